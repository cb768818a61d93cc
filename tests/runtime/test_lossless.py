"""The rule of the house: drafting changes the speed of an answer, never the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from dflash_chat.runtime import engine as engine_module
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.controller import PINNED
from dflash_chat.runtime.costs import Costs, CostTable
from dflash_chat.runtime.engine import FIRST_DRAFTS, BlockDrafter, Engine, Step
from dflash_chat.runtime.sampling import Sampler
from tests.runtime import tiny
from tests.runtime.any_width import AnyWidth

PROMPT = [5, 9, 2, 33, 17, 8]
BLOCK = 7


def _engine(
    drafter: BlockDrafter | None = None,
    k: int = BLOCK,
    stop: frozenset[int] = frozenset(),
    lookup: bool = True,
) -> Engine:
    target = tiny.target()
    return Engine(target, target.new_cache(256), drafter, tiny.TAPS, k, stop, lookup)


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
    plain = _plain(220, params)

    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [0, 7, 3, 1, 6, 2, 5, 4])
    engine = _engine(drafter)
    engine.controller = controller = AnyWidth(range(1, BLOCK + 2), late=False, seed=1)
    steps = tiny.run(engine, PROMPT, replace(params, max_tokens=220))
    assert tiny.tokens(steps) == plain
    drafted = {width for drafts, width in controller.kinds if drafts}
    assert drafted == set(range(1, BLOCK + 2))
    assert (False, 1) in controller.kinds


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_in_two_parts_are_those_of_the_whole_block(temperature: float) -> None:
    """Guesses that foresee the target are all right only with the noise of their own places."""
    params = SamplingParams(temperature=temperature, seed=5)
    plain = _plain(150 + BLOCK, params)
    assert len(set(plain)) > 10, "a degenerate answer would prove nothing"
    for controller in (None, AnyWidth(range(1, BLOCK + 2), late=False)):
        drafter = tiny.Foreseeing(tiny.target(), plain, PROMPT)
        engine = _engine(drafter, lookup=False)
        if controller is not None:
            engine.controller = controller
        steps = tiny.run(engine, PROMPT, replace(params, max_tokens=150))
        assert tiny.tokens(steps) == plain[:150]
        stats = [s.stats for s in steps[:-1] if s.stats is not None]
        assert all(s.accepted == s.drafted for s in stats)
        assert BLOCK in {s.drafted for s in stats}
        assert set(drafter.multiplied) == ({BLOCK} if controller is None else {1, 2, 3, 4})


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("certainty", "parts"), [(1.0, {3, 4}), (0.0, {3})])
def test_the_last_drafts_are_looked_at_where_the_first_are_sure(
    monkeypatch: pytest.MonkeyPatch, temperature: float, certainty: float, parts: set[int]
) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=120)
    plain = _plain(120, params)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [BLOCK], certainty)
    engine = _engine(drafter, lookup=False)
    table = CostTable(tuple(range(1, 9)), (1,), (0.5,), ((9.0,),) * 4 + ((13.0,),) * 4)
    engine.measure(known=table)
    monkeypatch.setattr(Costs, "observe", lambda *step: None)  # steps cost what the table says
    steps = tiny.run(engine, PROMPT, params)
    assert tiny.tokens(steps) == plain
    most = max(s.stats.drafted for s in steps if s.stats is not None)
    assert most == sum(parts)
    assert set(drafter.multiplied) == parts


@pytest.mark.parametrize(("temperature", "penalty"), [(0.0, 1.0), (0.9, 1.0), (0.9, 1.3)])
def test_drafts_found_in_the_text_do_not_change_the_answer(
    monkeypatch: pytest.MonkeyPatch, temperature: float, penalty: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=5, repetition_penalty=penalty)
    plain = _plain(200, params)
    lookup = tiny.ScriptedLookup(plain + [0] * BLOCK, [0, 7, 3, 1, 6, 2, 5, 4])
    monkeypatch.setattr(engine_module, "Lookup", lookup)
    drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [2, 0, 5])
    engine = _engine(drafter)
    engine.controller = controller = AnyWidth(range(1, BLOCK + 2), late=False)

    steps = tiny.run(engine, PROMPT, replace(params, max_tokens=200))
    assert tiny.tokens(steps) == plain
    assert lookup.text[: len(PROMPT) + 200] == PROMPT + plain
    assert drafter.length == len(engine.log), "what was copied is context of the drafter, too"
    stats = [s.stats for s in steps if s.stats is not None and s.stats.found]
    assert [s.drafted + 1 for s in stats] == controller.found_widths
    assert {s.accepted for s in stats} >= set(range(5))


def test_nothing_is_looked_up_where_that_is_off_or_a_width_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = _plain(60)
    lookup = tiny.ScriptedLookup(plain + [0] * BLOCK, [7])
    monkeypatch.setattr(engine_module, "Lookup", lookup)
    target = tiny.target()
    for on, pinned in ((False, False), (True, True)):
        drafter = tiny.ScriptedDrafter(plain + [0] * BLOCK, len(PROMPT), [2])
        cache = target.new_cache(256)
        engine = Engine(target, cache, drafter, tiny.TAPS, BLOCK, frozenset(), lookup=on)
        if not pinned:
            engine.controller = AnyWidth(range(1, BLOCK + 2), late=False)
        assert tiny.tokens(tiny.run(engine, PROMPT, SamplingParams(max_tokens=60))) == plain
    assert not lookup.asked


def test_measuring_leaves_the_engine_as_it_was() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    engine.warm_up()
    engine.measure()
    table = engine.controller.costs.table
    assert table.widths == (1, 2, 3, 4, 5)
    assert [list(row) for row in zip(*table.verify_ms, strict=True)] == [
        sorted(row) for row in zip(*table.verify_ms, strict=True)
    ]
    assert engine.plain is not None
    assert engine.plain.context_tokens == table.contexts[0] == 64
    assert engine.plain.ms > 0
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=60))
    assert tiny.tokens(steps) == _plain(60)


def test_what_passes_cost_includes_the_choice_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    chosen, guessed = [], []
    choose, guess = Sampler.choose, Sampler.guess

    def slow_choose(self: Sampler, logits: Tensor, drafted: Tensor) -> Tensor:
        chosen.append((len(logits), len(drafted)))
        time.sleep(0.004 * len(logits))
        return choose(self, logits, drafted)

    def slow_guess(self: Sampler, logits: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        guessed.append(len(logits))
        time.sleep(0.01)
        return guess(self, logits, ids)

    monkeypatch.setattr(Sampler, "choose", slow_choose)
    monkeypatch.setattr(Sampler, "guess", slow_guess)
    engine.measure()
    table = engine.controller.costs.table
    assert set(chosen) == {(n, n - 1) for n in table.widths}
    assert set(guessed) == {FIRST_DRAFTS}
    assert min(table.draft_ms) >= 10
    for width, row in zip(table.widths, table.verify_ms, strict=True):
        assert min(row) >= 4 * width


@pytest.mark.parametrize(
    ("plain_ms", "wide_ms", "draft_ms", "holds"),
    [
        (12.0, 16.8, 6.0, True),  # all of it slower
        (5.0, 7.5, 2.6, True),  # or faster
        (12.0, 14.0, 6.0, False),  # but for some rows
        (10.0, 14.0, 6.0, False),  # the draft alone
    ],
)
def test_a_known_table_holds_while_its_passes_compare_as_they_did(
    plain_ms: float, wide_ms: float, draft_ms: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    contexts = (64, 251)
    rows = [(ms, 2 * ms) for ms in (10.0, 12.0, 13.0, 14.0, 15.0)]
    known = CostTable((1, 2, 3, 4, 5), contexts, (5.0, 6.0), tuple(rows))

    def timed(passes: Sequence[Callable[[], object]], *_: object) -> list[float]:
        for run in passes:
            run()
        assert engine.cache.length == 0
        return [plain_ms, wide_ms, draft_ms]

    monkeypatch.setattr(engine_module, "quickest_ms", timed)
    assert engine.at_present(known) == (known.scaled(plain_ms / 10.0) if holds else None)
    for other in (
        CostTable((1, 2, 3), contexts, (5.0, 6.0), tuple(rows[:3])),
        CostTable((1, 2, 3, 4, 5), (64, 2048), (5.0, 6.0), tuple(rows)),
    ):
        assert engine.at_present(other) is None


def test_a_pinned_width_is_measured_against_plain_decoding_and_stays() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 3, frozenset())
    engine.warm_up()
    engine.measure(pinned=True)
    steps = tiny.run(engine, PROMPT, SamplingParams(max_tokens=100))
    stats = [step.stats for step in steps if step.stats is not None]
    assert {(s.drafted, s.why) for s in stats} == {(3, PINNED)}
    assert engine.plain is not None
    assert engine.plain.ms > 0
    assert tiny.tokens(steps) == _plain(100)


def test_a_request_may_pin_its_own_width_or_none() -> None:
    target = tiny.target()
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    params = SamplingParams(max_tokens=40)
    for draft_tokens, drafted in ((2, {2}), (4, {4}), (0, {4})):
        yielded = engine.generate(PROMPT, params, draft_tokens=draft_tokens)
        steps = [step for step in yielded if isinstance(step, Step)]
        stats = [step.stats for step in steps[:-1] if step.stats is not None]
        assert {s.drafted for s in stats} == drafted
        assert tiny.tokens(steps) == _plain(40)
