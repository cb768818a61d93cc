"""The rule of the house: drafting changes the speed of an answer, never the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.baseline import Baseline
from dflash_chat.runtime.engine import BlockDrafter, Engine, Prefilled
from dflash_chat.runtime.width import PINNED, PROBE, WidthChooser
from tests.runtime import tiny

PROMPT = [5, 9, 2, 33, 17, 8]
BLOCK = 7


def _engine(
    drafter: BlockDrafter | None = None, k: int = BLOCK, stop: frozenset[int] = frozenset()
) -> Engine:
    target = tiny.target()
    return Engine(target, target.new_cache(256), drafter, tiny.TAPS, k, stop)


def _plain(n: int, params: SamplingParams = SamplingParams()) -> list[int]:
    return tiny.tokens(tiny.run(_engine(), PROMPT, replace(params, max_tokens=n)))


@pytest.mark.parametrize("accept", range(BLOCK + 1))
def test_greedy_with_every_acceptance_length_equals_plain(accept: int) -> None:
    plain = _plain(120)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [accept])
    steps = tiny.run(_engine(drafter), PROMPT, SamplingParams(max_tokens=120))
    assert tiny.tokens(steps) == plain
    lengths = [s.stats.committed for s in steps if s.stats is not None]
    assert all(length == accept + 1 for length in lengths[:-1])


def test_greedy_with_changing_acceptance_lengths_equals_plain() -> None:
    plain = _plain(150)
    script = [0, 7, 3, 1, 6, 2, 5, 4]
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), script)
    steps = tiny.run(_engine(drafter), PROMPT, SamplingParams(max_tokens=150))
    assert tiny.tokens(steps) == plain


@pytest.mark.parametrize("accept", [0, 3, 7])
def test_seeded_sampling_with_penalties_equals_plain(accept: int) -> None:
    settings = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7, repetition_penalty=1.2,
        presence_penalty=0.4, frequency_penalty=0.3,
    )  # fmt: skip
    plain = _plain(100, settings)
    assert len(set(plain)) > 10, "a degenerate answer would prove nothing"
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [accept])
    steps = tiny.run(_engine(drafter), PROMPT, replace(settings, max_tokens=100))
    assert tiny.tokens(steps) == plain


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_widths_that_change_at_random_do_not_change_the_answer(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5)
    plain = _plain(150, params)

    class AnyWidth(WidthChooser):
        draws = random.Random(3)

        def choose(self, chances: Sequence[float]) -> int:
            return self.draws.randint(1, len(chances) + 1)

    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [0, 7, 3, 1, 6, 2, 5, 4])
    engine = _engine(drafter)
    engine.chooser = AnyWidth([1.0] * (BLOCK + 1), 1.0)
    steps = tiny.run(engine, PROMPT, replace(params, max_tokens=150))
    assert tiny.tokens(steps) == plain
    assert len({step.stats.drafted for step in steps if step.stats is not None}) == BLOCK + 1


class NowAndThen(Baseline):
    """Asks for a plain pass at random."""

    def __init__(self) -> None:
        super().__init__()
        self._draws = random.Random(4)

    def asks(self) -> bool:
        return self._draws.random() < 0.3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_plain_passes_in_between_change_neither_the_answer_nor_the_next_draft(
    temperature: float,
) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=150)
    plain = _plain(150, params)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [3])
    engine = _engine(drafter)
    engine.baseline = NowAndThen()
    steps = tiny.run(engine, PROMPT, params)
    assert tiny.tokens(steps) == plain
    stats = [step.stats for step in steps[:-1] if step.stats is not None]
    assert {(s.drafted, s.accepted, s.why) for s in stats if s.probe} == {(0, 0, PROBE)}
    assert {(s.drafted, s.accepted, s.why) for s in stats if not s.probe} == {(BLOCK, 3, PINNED)}
    assert engine.baseline.plain is not None
    assert engine.baseline.plain.ms > 0
    assert engine.baseline.plain.context_tokens == [s for s in stats if s.probe][-1].context_tokens


def test_measuring_leaves_the_engine_as_it_was() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    engine.warm_up()
    engine.measure()
    assert engine.chooser is not None
    assert len(engine.chooser.verify_ms) == 5
    assert min(*engine.chooser.verify_ms, engine.chooser.draft_ms) > 0
    assert list(engine.chooser.verify_ms) == sorted(engine.chooser.verify_ms)
    assert engine.baseline is not None
    assert engine.baseline.plain is not None
    assert engine.baseline.plain.ms == engine.chooser.verify_ms[0]
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=60))
    assert tiny.tokens(steps) == _plain(60)


def test_a_pinned_width_is_measured_against_plain_decoding_and_stays() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 3, frozenset())
    engine.warm_up()
    engine.measure(pinned=True)
    assert engine.chooser is None
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=100))
    stats = [step.stats for step in steps if step.stats is not None]
    assert {s.drafted for s in stats if not s.probe} == {3}
    assert [i for i, s in enumerate(stats) if s.probe][:2] == [24, 74]
    assert tiny.tokens(steps) == _plain(100)


def test_a_real_drafter_equals_plain_greedy() -> None:
    plain = _plain(100)
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=100))
    assert tiny.tokens(steps) == plain


def test_every_emitted_token_is_the_choice_of_its_verify_row() -> None:
    """Replays the answer through fresh target forwards, one row at a time."""
    target = tiny.target()
    plain = _plain(60)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [2, 5])
    answer = tiny.tokens(tiny.run(_engine(drafter), PROMPT, SamplingParams(max_tokens=60)))
    cache = target.new_cache(256)
    with torch.inference_mode():
        hidden, _ = target.forward(torch.tensor(PROMPT + answer[:-1]), cache)
        choices = target.logits(hidden).argmax(-1).tolist()
    assert choices[len(PROMPT) - 1 :] == answer


def test_a_stop_id_inside_a_block_ends_the_answer_there() -> None:
    plain = _plain(80)
    stop = plain[17]
    end = plain.index(stop)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [BLOCK])
    steps = tiny.run(
        _engine(drafter, stop=frozenset({stop})), PROMPT, SamplingParams(max_tokens=80)
    )
    assert tiny.tokens(steps) == plain[: end + 1]
    assert steps[-1].reason == "stop"


@pytest.mark.parametrize("budget", range(1, 12))
def test_the_token_budget_is_exact(budget: int) -> None:
    plain = _plain(40)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [4])
    steps = tiny.run(_engine(drafter), PROMPT, SamplingParams(max_tokens=budget))
    assert tiny.tokens(steps) == plain[:budget]
    assert steps[-1].reason == "length"


def test_the_end_of_the_context_ends_the_answer_without_a_wrong_token() -> None:
    target = tiny.target()
    plain = _plain(60)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [5])
    engine = Engine(target, target.new_cache(32), drafter, tiny.TAPS, BLOCK, frozenset())
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=60))
    answer = tiny.tokens(steps)
    assert steps[-1].reason == "context"
    assert len(PROMPT) + len(answer) == 32 + 1  # the last token is chosen but needs no row
    assert answer == plain[: len(answer)]


def test_a_second_turn_reuses_both_caches_and_answers_the_same() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    first = tiny.tokens(tiny.run(engine, PROMPT, SamplingParams(max_tokens=20)))
    second = [*PROMPT, *first[:15], 7, 7, 3]
    reused = next(iter(engine.generate(second, SamplingParams(max_tokens=30))))
    assert isinstance(reused, Prefilled)
    assert reused.cached == len(PROMPT) + 15
    again = tiny.tokens(tiny.run(engine, second, SamplingParams(max_tokens=30)))
    fresh = tiny.run(_engine(), second, SamplingParams(max_tokens=30))
    assert again == tiny.tokens(fresh)


def test_plain_turns_leave_no_hole_in_the_drafters_context() -> None:
    target = tiny.target()
    drafter = tiny.drafter(target)
    engine = Engine(target, target.new_cache(256), drafter, tiny.TAPS, 4, frozenset())
    answer = tiny.tokens(tiny.run(engine, PROMPT, SamplingParams(max_tokens=25), draft=False))
    assert drafter.length == engine.cache.length == len(engine.log)
    drafter.flush()
    fresh_target = tiny.target()
    fresh = tiny.drafter(fresh_target)
    with torch.inference_mode():
        ids = torch.tensor([*PROMPT, *answer][: engine.cache.length])
        _, features = fresh_target.forward(ids, fresh_target.new_cache(256), tiny.TAPS)
        fresh.observe(features)
        fresh.flush()
    held = drafter.length
    for ours, theirs in zip(drafter.cache.keys, fresh.cache.keys, strict=True):
        torch.testing.assert_close(ours[:, :held], theirs[:, :held], rtol=1e-4, atol=1e-4)


def test_closing_the_generator_after_any_step_keeps_the_caches_usable() -> None:
    target = tiny.target()
    plain = _plain(40)
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    for stop_after in range(1, 8):
        steps = engine.generate(PROMPT, SamplingParams(max_tokens=40))
        for _ in range(stop_after):
            next(steps)
        steps.close()
        assert engine.drafter is not None
        lengths = [len(engine.log), engine.cache.length, engine.drafter.length]
        assert all(a == b for a, b in pairwise(lengths))
    assert tiny.tokens(tiny.run(engine, PROMPT, SamplingParams(max_tokens=40))) == plain


def test_a_drafter_still_drafts_where_its_block_ends_behind_the_context() -> None:
    target = tiny.target()
    drafter = tiny.drafter(target, capacity=32)
    engine = Engine(target, target.new_cache(32), drafter, tiny.TAPS, 4, frozenset())
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=60))
    assert steps[-1].reason == "context"
    assert tiny.tokens(steps) == _plain(27)


# ── rings: a target of sliding and full layers, windows far shorter than the answer ─────────────

CHUNK = BLOCK + 1  # rows of the largest forward: rings of 8 + 8 rows


def _hybrid(drafter: BlockDrafter | None = None, rings: bool = True) -> Engine:
    target = tiny.hybrid(window=8)
    if drafter is None:
        drafter = tiny.drafter(target, window=8, largest_block=CHUNK)
    cache = target.new_cache(256, CHUNK) if rings else target.new_cache(256)
    assert (cache.slots(8) == 16) == rings
    k = BLOCK if isinstance(drafter, tiny.ScriptedDrafter) else 4
    return Engine(target, cache, drafter, tiny.TAPS, k, frozenset())


def _hybrid_answer(prompt: list[int], n: int) -> list[int]:
    engine = _hybrid(rings=False)
    return tiny.tokens(tiny.run(engine, prompt, SamplingParams(max_tokens=n), draft=False))


@pytest.mark.parametrize("script", [[0], [3], [7], [0, 7, 3, 1, 6, 2, 5, 4]], ids=str)
def test_rings_do_not_change_an_answer(script: list[int]) -> None:
    plain = _hybrid_answer(PROMPT, 100)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), script)
    steps = tiny.run(_hybrid(drafter), PROMPT, SamplingParams(max_tokens=100))
    assert tiny.tokens(steps) == plain
    drafted = [step.stats.accepted for step in steps if step.stats is not None]
    assert drafted[: len(script)] == script


@pytest.mark.parametrize(("kept", "reused"), [(30, True), (26, True), (25, False), (10, False)])
def test_a_second_turn_reuses_what_the_rings_still_hold(kept: int, reused: bool) -> None:
    """The first turn reaches row 36, so the rings hold rows 20 to 35 and a cut may be at 27."""
    engine = _hybrid()
    first = tiny.tokens(tiny.run(engine, PROMPT, SamplingParams(max_tokens=31), draft=False))
    assert engine.cache.length == len(PROMPT) + 30
    second = [*([*PROMPT, *first][: kept + 1]), 7, 7, 3]
    head = next(iter(engine.generate(second, SamplingParams(max_tokens=20))))
    assert isinstance(head, Prefilled)
    assert head.cached == (kept + 1 if reused else 0)
    again = tiny.tokens(tiny.run(engine, second, SamplingParams(max_tokens=20)))
    assert again == _hybrid_answer(second, 20)
