"""The engine on the steps that CUDA graphs replay.

On a GPU these are the kernels' steps as graphs; without one, plain torch in their place, run pass
by pass, and once the interpreted kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dflash_chat.runtime import engine as engine_module
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.engine import Engine, Prefilled
from dflash_chat.runtime.engine import Step as Committed
from dflash_chat.runtime.graphed import KEPT, GraphedSteps, Passes
from dflash_chat.runtime.quant import cpu
from dflash_chat.runtime.step import Graphs, Step, TargetParts
from dflash_chat.runtime.width import MAX_ROWS
from tests.runtime import tiny
from tests.runtime.any_width import AnyWidth
from tests.runtime.kernels import pairs
from tests.runtime.kernels.conftest import DEVICE
from tests.runtime.kernels.pairs import BLOCK, TAPS, VOCAB
from tests.runtime.kernels.plain_step import PlainStep
from tests.runtime.kernels.truth import relative_error

PROMPT = [5, 9, 2, 33, 17, 8]
GREEDY = SamplingParams(max_tokens=20)
KINDS = list(pairs.KINDS) if DEVICE.type == "cuda" else ["llama", "moe"]


class Directly:
    """Passes that simply run."""

    def __init__(self) -> None:
        self._runs: dict[str, Callable[[], None]] = {}

    def capture(self, name: str, run: Callable[[], None]) -> None:
        run()
        self._runs[name] = run

    def replay(self, name: str) -> None:
        self._runs[name]()


class Scripted:
    """Passes whose drafts are right as often as `right` says: the answer is known beforehand."""

    def __init__(self, graphed: GraphedSteps, prompt: int, answer: list[int]) -> None:
        self._passes, self._state = graphed.passes, graphed.step.state
        self._prompt, self._answer = prompt, torch.tensor(answer, device=DEVICE)
        self._draws = random.Random(1)
        self.right: list[int] = []

    def capture(self, name: str, run: Callable[[], None]) -> None:
        raise AssertionError("everything is captured")

    def replay(self, name: str) -> None:
        self._passes.replay(name)
        if name == "propose":
            right = min(self._draws.randint(0, 3) for _ in range(2))
            self.right.append(right)
            done = self._state.length.long() - self._prompt + 1  # [1]
            at = (done + torch.arange(BLOCK - 1, device=DEVICE)).clamp(max=len(self._answer) - 1)
            wrong = torch.arange(BLOCK - 1, device=DEVICE) >= right
            self._state.ids[1:BLOCK] = (self._answer[at] + wrong) % VOCAB


def on_graphs(kind: str, capacity: int = 96, k: int = 3, kernels: bool = False) -> Engine:
    """A tiny pair whose steps are captured."""
    pair = pairs.tiny(kind, capacity)
    made = Engine(pair.target, pair.cache, pair.drafter, TAPS, k, frozenset())
    step: Any = PlainStep(pair, TAPS)
    if kernels or DEVICE.type == "cuda":
        step = Step(TargetParts.of(pair.target), pair.cache, pair.drafter, TAPS)
    passes: Passes = Graphs() if DEVICE.type == "cuda" else Directly()
    made.graphed = GraphedSteps(step, pair.cache, pair.drafter, k, passes)
    with torch.inference_mode():
        made.graphed.capture()
    return made


def eager(kind: str, capacity: int = 96, k: int = 3) -> Engine:
    """The same pair on the engine's own steps."""
    pair = pairs.tiny(kind, capacity)
    return Engine(pair.target, pair.cache, pair.drafter, TAPS, k, frozenset())


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "prepacking_serves", lambda *_: False)  # kernels read plain tensors


@pytest.fixture(scope="module")
def llamas() -> Iterator[tuple[Engine, Engine]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "prepacking_serves", lambda *_: False)
        yield on_graphs("llama"), eager("llama")


def consistent(engine: Engine) -> None:
    assert engine.drafter is not None
    lengths = [len(engine.log), engine.cache.length, engine.drafter.length]
    assert all(a == b for a, b in pairwise(lengths)), lengths


def as_read_at_once(engine: Engine, kind: str, capacity: int) -> None:
    """Both caches hold what one reading of the committed tokens would leave in them."""
    consistent(engine)
    assert engine.drafter is not None
    with torch.inference_mode():
        engine.drafter.flush()
    fresh = pairs.tiny(kind, capacity)
    with torch.inference_mode():
        ids = torch.tensor(engine.log, device=DEVICE)
        _, features = fresh.target.forward(ids, fresh.cache, TAPS)
        fresh.cache.commit(len(ids))
        fresh.drafter.observe(features)
        fresh.drafter.flush()
    held = len(engine.log)
    tolerance = 1e-2 if DEVICE.type == "cuda" else 1e-5  # tf32 or fp32
    for ours, theirs in (
        (engine.cache, fresh.cache),
        (engine.drafter.cache, fresh.drafter.cache),
    ):
        for a, b in zip([*ours.keys, *ours.values], [*theirs.keys, *theirs.values], strict=True):
            assert relative_error(a[:, :held], b[:, :held]) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_eager(kind: str) -> None:
    graphed = on_graphs(kind)
    ours, theirs = (tiny.run(engine, PROMPT, GREEDY) for engine in (graphed, eager(kind)))
    assert tiny.tokens(ours) == tiny.tokens(theirs)
    widths = [[s.stats.committed for s in steps if s.stats] for steps in (ours, theirs)]
    assert widths[0] == widths[1], "the drafter sees another context"
    consistent(graphed)


@pytest.mark.slow
def test_the_kernels_own_step_equals_eager() -> None:
    params = SamplingParams(max_tokens=4)
    graphed = on_graphs("llama", k=2, kernels=True)
    assert graphed.graphed is not None
    assert isinstance(graphed.graphed.step, Step)
    ours, theirs = (tiny.tokens(tiny.run(e, PROMPT, params)) for e in (graphed, eager("llama")))
    assert ours == theirs
    consistent(graphed)


SETTINGS = {
    "sampled": SamplingParams(temperature=0.9, seed=5),
    "filtered": SamplingParams(temperature=1.1, top_k=20, top_p=0.9, min_p=0.02, seed=6),
    "penalised": SamplingParams(temperature=0.8, seed=7, repetition_penalty=1.3),
    "penalised greedily": SamplingParams(repetition_penalty=1.5, presence_penalty=0.5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_seeded_answers_equal_eager_ones(name: str, llamas: tuple[Engine, Engine]) -> None:
    params = replace(SETTINGS[name], max_tokens=9)
    ours, theirs = (tiny.tokens(tiny.run(engine, PROMPT, params)) for engine in llamas)
    assert ours == theirs
    assert len(set(ours)) > 4, "a degenerate answer would prove nothing"


@pytest.mark.parametrize("name", ["sampled", "penalised"])
def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(
    name: str, llamas: tuple[Engine, Engine]
) -> None:
    graphed, other = llamas
    whole = tiny.tokens(tiny.run(other, PROMPT, replace(SETTINGS[name], max_tokens=9)))
    begun = tiny.tokens(tiny.run(graphed, PROMPT, replace(SETTINGS[name], max_tokens=4)))
    params = replace(SETTINGS[name], max_tokens=5)
    prefilled, *steps = graphed.generate([*PROMPT, *begun], params, answered=len(begun))
    rest = tiny.tokens([step for step in steps if isinstance(step, Committed)])
    assert isinstance(prefilled, Prefilled)
    assert prefilled.cached == len(PROMPT) + len(begun) - 1
    assert begun + rest == whole
    consistent(graphed)


@pytest.mark.parametrize("pinned", [1, 3, 9])
def test_a_request_may_pin_how_many_are_drafted(pinned: int, llamas: tuple[Engine, Engine]) -> None:
    graphed, other = llamas
    steps = [s for s in graphed.generate(PROMPT, GREEDY, True, pinned) if isinstance(s, Committed)]
    assert tiny.tokens(steps) == tiny.tokens(tiny.run(other, PROMPT, GREEDY))
    assert {step.stats.drafted for step in steps if step.stats} == {min(pinned, 3)}


@pytest.mark.parametrize("name", ["greedily", "sampled"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "now"])
def test_widths_that_change_at_random_do_not_change_the_answer(
    late: bool, name: str, llamas: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do drafts that wait for the host, are not verified, or pause for many plain steps."""
    graphed, other = llamas
    greedily = name == "greedily"  # the interpreted sampling kernel is slow
    params = replace(GREEDY, max_tokens=80) if greedily else replace(SETTINGS[name], max_tokens=12)
    want = tiny.tokens(tiny.run(other, PROMPT, params))
    kinds: list[tuple[bool, int]] = []
    for seed in range(4 if greedily else 1):
        controller = AnyWidth((1, 2, 3, 4), late, seed)
        monkeypatch.setattr(graphed, "controller", controller)
        assert tiny.tokens(tiny.run(graphed, PROMPT, params)) == want
        consistent(graphed)
        kinds += controller.kinds
        steps = graphed.generate(PROMPT, params)  # cut off anywhere
        for _ in range(3 + 5 * seed):
            next(steps)
        steps.close()
        consistent(graphed)
    if not greedily:
        return
    assert set(kinds) >= {(False, 1), (True, 2), (True, 3), (True, 4)}
    assert ((True, 1) in kinds) == (not late)
    longest = max(len(run) for run in "".join("dp"[not d] for d, _ in kinds).split("d"))
    assert longest > KEPT, "no plain run filled what is kept"


def test_turns_of_every_kind_leave_no_hole_in_the_drafters_context(
    llamas: tuple[Engine, Engine],
) -> None:
    """Drafted, plain, cut off in the middle: the next answer is the one of a fresh engine."""
    graphed, _ = llamas
    said = list(PROMPT)
    for stop_after, draft in ((3, True), (5, False), (2, True), (1, False), (4, True)):
        steps = graphed.generate(said, GREEDY, draft)
        tokens: list[int] = []
        for step in steps:
            if not isinstance(step, Prefilled):
                tokens += step.tokens
                stop_after -= 1
            if not stop_after:
                break
        steps.close()
        consistent(graphed)
        said += [*tokens, 7, 3]
    ours = tiny.run(graphed, said, GREEDY)
    for fresh in (on_graphs("llama"), eager("llama")):
        theirs = tiny.run(fresh, said, GREEDY)
        assert tiny.tokens(ours) == tiny.tokens(theirs)
        accepted = [[s.stats.accepted for s in steps if s.stats] for steps in (ours, theirs)]
        assert accepted[0] == accepted[1]


@pytest.mark.parametrize("params", [GREEDY, SETTINGS["sampled"]], ids=["greedy", "sampled"])
def test_the_end_of_the_context_ends_the_answer_without_a_wrong_token(
    params: SamplingParams,
) -> None:
    graphed, other = on_graphs("llama", capacity=24), eager("llama", capacity=24)
    params = replace(params, max_tokens=60)
    ours, theirs = (tiny.run(engine, PROMPT, params) for engine in (graphed, other))
    assert ours[-1].reason == "context"
    assert len(PROMPT) + len(tiny.tokens(ours)) == 24 + 1
    assert tiny.tokens(ours) == tiny.tokens(theirs)
    consistent(graphed)


def test_measuring_leaves_the_answer_as_it_was() -> None:
    graphed = on_graphs("llama")
    with torch.inference_mode():
        graphed.measure()
    table = graphed.controller.costs.table
    assert table.widths == (1, 2, 3, 4)
    assert table.contexts == (96 - 2 * MAX_ROWS,)
    assert graphed.plain is not None
    assert graphed.plain.ms > 0
    ours, theirs = (tiny.tokens(tiny.run(e, PROMPT, GREEDY)) for e in (graphed, eager("llama")))
    assert ours == theirs


def test_a_stop_id_is_found_though_the_next_step_is_under_way(
    llamas: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed, other = llamas
    plain = tiny.tokens(tiny.run(other, PROMPT, GREEDY))
    stop = plain[13]
    monkeypatch.setattr(graphed, "stop_ids", frozenset({stop}))
    steps = tiny.run(graphed, PROMPT, GREEDY)
    assert tiny.tokens(steps) == plain[: plain.index(stop) + 1]
    assert steps[-1].reason == "stop"
    consistent(graphed)


@pytest.mark.parametrize("name", ["greedily", "sampled", "penalised"])
def test_drafts_found_in_the_text_do_not_change_the_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, llamas: tuple[Engine, Engine]
) -> None:
    """Instead of a draft or in place of one that has run, between plain and drafted steps."""
    graphed, other = llamas
    greedily = name == "greedily"
    params = replace(GREEDY if greedily else SETTINGS[name], max_tokens=60 if greedily else 12)
    want = tiny.tokens(tiny.run(other, PROMPT, params))
    lookup = tiny.ScriptedLookup(want + [0] * BLOCK, [0, 3, 1, 3, 2])
    monkeypatch.setattr(engine_module, "Lookup", lookup)
    found: list[tuple[bool, int]] = []
    for seed in range(2 if greedily else 1):
        controller = AnyWidth((1, 2, 3, 4), late=False, seed=seed)
        monkeypatch.setattr(graphed, "controller", controller)
        steps = tiny.run(graphed, PROMPT, params)
        assert tiny.tokens(steps) == want
        assert lookup.text[: len(PROMPT) + len(want)] == PROMPT + want
        as_read_at_once(graphed, "llama", 96)
        figures = [step.stats for step in steps if step.stats and step.stats.found]
        widths = [s.drafted + 1 for s in figures]
        assert widths == controller.found_widths[: len(widths)]
        found += [(ran, s.accepted) for s, ran in zip(figures, controller.copied, strict=False)]
        begun = graphed.generate(PROMPT, params)  # cut off anywhere
        for _ in range(3 + 5 * seed):
            next(begun)
        begun.close()
        as_read_at_once(graphed, "llama", 96)
    if greedily:
        assert set(found) == {(ran, n) for ran in (True, False) for n in range(4)}


def test_short_steps_look_nothing_up(
    monkeypatch: pytest.MonkeyPatch, llamas: tuple[Engine, Engine]
) -> None:
    graphed, other = llamas
    want = tiny.tokens(tiny.run(other, PROMPT, GREEDY))
    lookup = tiny.ScriptedLookup(want, [3])
    monkeypatch.setattr(engine_module, "Lookup", lookup)
    monkeypatch.setattr(graphed, "controller", AnyWidth((1, 2, 3, 4), late=True))
    assert tiny.tokens(tiny.run(graphed, PROMPT, GREEDY)) == want
    assert not lookup.asked


@pytest.mark.parametrize("kind", ["llama", "gemma4"] if DEVICE.type == "cuda" else ["llama"])
def test_random_accept_lengths_in_a_row_leave_what_one_reading_leaves(kind: str) -> None:
    """The commit law: caches after many drafts of any luck equal those of one reading."""
    tokens = 500
    graphed = on_graphs(kind, capacity=tokens + 40)
    params = SamplingParams(max_tokens=tokens)
    answer = tiny.tokens(tiny.run(graphed, PROMPT, params, draft=False))
    assert graphed.graphed is not None
    script = Scripted(graphed.graphed, len(PROMPT), answer)
    graphed.graphed.passes = script
    steps = tiny.run(graphed, PROMPT, params)
    assert tiny.tokens(steps) == answer
    accepted = [step.stats.accepted for step in steps if step.stats]
    assert accepted[:-1] == script.right[: len(accepted) - 1]
    assert len(accepted) >= 200
    as_read_at_once(graphed, kind, tokens + 40)
