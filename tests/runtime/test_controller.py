"""Never slower than plain decoding, and no worse than the best pinned width, in simulation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest

from dflash_chat.runtime import controller as words
from dflash_chat.runtime.controller import Controller, Decision, figures
from dflash_chat.runtime.costs import Costs, CostTable
from tests.runtime import simulated_decoding as sim
from tests.runtime.simulated_decoding import RIGS, Rig, Run, Trace, pooled

MOE = RIGS[:3]  # where rows cost
TEXTS = ("chat", "mixed", "code")
LATE = pytest.mark.parametrize("late", [True, False], ids=["late", "now"])
CASES = [
    *((text, "honest") for text in TEXTS),
    *(("switching", confidence) for confidence in ("honest", "random", "inverted")),
    ("dead", "honest"),
]


SEEDS = range(3)


@cache
def _trace(text: str, confidence: str, tokens: int, seed: int = 5) -> Trace:
    return sim.trace(TEXTS if text == "switching" else [text], tokens, seed, confidence)


@cache
def _best_fixed(rig: Rig, text: str, tokens: int) -> float:
    """Of the widths that are always taken, pooled over all traces."""
    traces = [_trace(text, "honest", tokens, seed) for seed in SEEDS]
    return max(pooled([sim.fixed(rig, drafts, n) for drafts in traces]) for n in sim.WIDTHS)


@cache
def _run(rig: Rig, text: str, confidence: str, late: bool, seed: int = 5) -> Run:
    drafts = _trace(text, confidence, _tokens(rig), seed)
    return sim.controlled(sim.controller(rig, late), rig, drafts)


def _tokens(rig: Rig) -> int:
    return 8000 if rig in MOE else 3000


def _of_best_fixed(rig: Rig, text: str, confidence: str, late: bool) -> float:
    ours = pooled([_run(rig, text, confidence, late, seed) for seed in SEEDS])
    return ours / _best_fixed(rig, text, _tokens(rig))


@pytest.mark.parametrize(
    ("rig", "rows", "verify_gb", "draft_gb"),
    [
        (Rig("Gemma-4-26B-A4B", "H200", "bf16"), (1, 4, 8, 16), (7.90, 15.43, 23.46, 34.45), 2.44),
        (Rig("Gemma-4-26B-A4B", "5090", "int4"), (1, 4, 8, 16), (3.35, 5.30, 7.39, 10.24), 2.44),
        (Rig("Qwen3.6-27B", "3090", "int4"), (1, 16), (15.63, 15.63), 6.15),
        (Rig("Qwen3-8B", "H200", "bf16"), (1, 16), (15.44, 15.44), 3.47),
    ],
    ids=str,
)
def test_the_simulated_passes_move_the_bytes_of_the_real_shapes(
    rig: Rig, rows: tuple[int, ...], verify_gb: tuple[float, ...], draft_gb: float
) -> None:
    tb_s = sim.TB_S[rig.card]
    moved = [rig.verify_ms(n, 2048) * tb_s for n in rows]
    assert moved == pytest.approx(verify_gb, abs=0.006)
    assert rig.draft_ms(2048) * tb_s == pytest.approx(draft_gb, abs=0.006)


@LATE
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rig", RIGS, ids=str)
def test_steady_text_runs_within_3_percent_of_the_best_pinned_width(
    rig: Rig, text: str, late: bool
) -> None:
    assert _of_best_fixed(rig, text, "honest", late) > 0.97


@LATE
@pytest.mark.parametrize("rig", MOE[:2], ids=str)
def test_text_that_switches_beats_every_pinned_width(rig: Rig, late: bool) -> None:
    """Little can be won one step late: knowing the text's character itself would win 3 to 4 %."""
    traces = [sim.trace(TEXTS, 8000, seed) for seed in range(3)]
    ours = pooled([sim.controlled(sim.controller(rig, late), rig, drafts) for drafts in traces])
    for width in sim.WIDTHS:
        pinned = pooled([sim.fixed(rig, drafts, width) for drafts in traces])
        assert ours > pinned * (1.005 if late else 1.08)


@LATE
@pytest.mark.parametrize("confidence", ["honest", "random", "inverted"])
@pytest.mark.parametrize("rig", RIGS, ids=str)
def test_text_that_switches_never_falls_behind_the_best_pinned_width(
    rig: Rig, confidence: str, late: bool
) -> None:
    """Where all widths cost the same, the widest cannot be beaten, only equalled."""
    assert _of_best_fixed(rig, "switching", confidence, late) > 0.97


@LATE
@pytest.mark.parametrize(("text", "confidence"), CASES)
@pytest.mark.parametrize("rig", RIGS, ids=str)
def test_no_500_tokens_are_slower_than_plain_decoding(
    rig: Rig, text: str, confidence: str, late: bool
) -> None:
    assert _run(rig, text, confidence, late).worst(500) > 0.98


def _dies(rig: Rig, late: bool, seed: int) -> float:
    """The slowest 500 tokens around a drafter's end after 2000 tokens of code."""
    code, dead = sim.trace(["code"], 2000, seed), sim.trace(["dead"], 1500, seed)
    drafts = Trace(code.accepted + dead.accepted, code.confidence + dead.confidence)
    return sim.controlled(sim.controller(rig, late), rig, drafts).worst(500)


@pytest.mark.parametrize(
    ("rig", "late"),
    [
        *((rig, False) for rig in RIGS),
        *((rig, True) for rig in RIGS[3:]),  # a pass whose rows cost is long enough not to be late
    ],
    ids=str,
)
def test_a_drafter_that_dies_amid_code_makes_no_500_tokens_slower(rig: Rig, late: bool) -> None:
    assert min(_dies(rig, late, seed) for seed in range(3)) > 0.98


@pytest.mark.parametrize("rig", MOE, ids=str)
def test_a_late_width_that_costs_much_loses_what_the_purse_holds_when_a_drafter_dies(
    rig: Rig,
) -> None:
    most = words.PURSE_LIMIT + 500 * words.REFILL
    assert min(_dies(rig, True, seed) for seed in range(3)) > 500 / (500 + most)


@LATE
@pytest.mark.parametrize("rig", MOE[:2], ids=str)
def test_a_first_answer_with_a_weak_drafter_is_cheaper_if_a_sweep_has_shown_it(
    rig: Rig, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sim.TEXTS, "weak", (0.35, 0.4))
    shares = [0.35 * 0.4**i for i in range(sim.SLOTS)]

    def first_answers(survival: Sequence[float]) -> float:
        runs = []
        for seed in range(20):
            auto = Controller(Costs(rig.table()), sim.SLOTS, late, survival=survival)
            runs.append(sim.controlled(auto, rig, sim.trace(["weak"], 200, seed)))
        return pooled(runs)

    unknown, known = first_answers(()), first_answers(shares)
    assert unknown > 0.965
    assert known > unknown + 0.005
    assert known > 0.98


def test_a_curve_that_promises_much_drafts_at_once_and_one_that_does_not_waits() -> None:
    for shares, why in (((0.9, 0.8, 0.7), words.PAYS), ((0.2, 0.05, 0.0), words.PLAIN)):
        for late in (True, False):
            auto = Controller(Costs(MOE[0].table()), sim.SLOTS, late, survival=shares)
            auto.observe(auto.decide(2048, 16), 0, 2048, 0.0, 1.84)
            assert auto.decide(2048, 16).why == why


@LATE
def test_drafting_comes_back_when_it_pays_again(late: bool) -> None:
    rig = MOE[0]
    dead, code = _trace("dead", "honest", 3000), _trace("code", "honest", 2000)
    drafts = Trace(dead.accepted + code.accepted, dead.confidence + code.confidence)
    run = sim.controlled(sim.controller(rig, late), rig, drafts)
    behind = run.tokens.cumsum() > 4000
    assert run.plain_ms[behind].sum() / run.ms[behind].sum() > 1.7


@LATE
def test_a_table_that_was_wrong_is_found_out_while_decoding(late: bool) -> None:
    rig = MOE[0]
    true = rig.table()
    cheap = tuple(
        tuple(ms * (0.5 if width > 1 else 1.0) for ms in row)
        for width, row in zip(true.widths, true.verify_ms, strict=True)
    )
    wrong = CostTable(true.widths, true.contexts, true.draft_ms, cheap)
    misled = Controller(Costs(wrong), sim.SLOTS, late)
    drafts = _trace("chat", "honest", 8000)
    assert sim.controlled(misled, rig, drafts).speedup > 0.93 * _best_fixed(rig, "chat", 8000)


def _controller(pinned: int | None = None, late: bool = True) -> Controller:
    return Controller(Costs(MOE[0].table()), sim.SLOTS, late, pinned)


@pytest.mark.parametrize(("pinned", "width"), [(3, 4), (15, 16), (8, 8)])
def test_a_pinned_width_is_kept_whatever_happens(pinned: int, width: int) -> None:
    pin = _controller(pinned)
    for _ in range(50):
        decision = pin.decide(2048, 16)
        assert (decision.width, decision.draft, decision.why) == (width, True, words.PINNED)
        pin.observe(decision, 0, 2048, 0.5, 5.0)
    assert pin.histogram[width] == 50


def test_off_and_no_room_are_plain_steps() -> None:
    off = _controller(0).decide(2048, 16)
    assert (off.width, off.draft, off.why) == (1, False, words.OFF)
    full = _controller().decide(2048, 1)
    assert (full.width, full.draft, full.why) == (1, False, words.NO_ROOM)
    without = Controller(Costs(CostTable((1,), (64,), (1.0,), ((1.0,),))), 0, late=True)
    assert without.decide(64, 16).why == words.OFF


def test_no_pass_is_wider_than_there_is_room() -> None:
    auto = _controller()
    for most in (2, 3, 7, 16) * 10:
        decision = auto.decide(2048, most)
        assert decision.width <= most
        auto.observe(decision, decision.width - 1, 2048, 0.5 * decision.draft, 5.0)


def test_a_step_that_is_never_read_gives_its_stake_back() -> None:
    auto = _controller()
    auto.observe(auto.decide(2048, 16), 0, 2048, 0.0, 1.84)
    first = auto.decide(2048, 16)
    auto.drop(first)
    assert auto.decide(2048, 16) == first
    assert first.stake > 0


def test_the_plain_baseline_is_measured_now_and_then_and_costs_a_quarter_percent() -> None:
    rig = Rig("Qwen3-8B", "H200", "bf16")
    auto = sim.controller(rig, late=True)
    assert auto.baseline is None
    run = sim.controlled(auto, rig, _trace("code", "honest", 16000))
    measured = auto.histogram[1]
    assert measured >= 5
    assert measured * rig.verify_ms(1, 10000) < 0.004 * run.ms.sum()
    assert auto.baseline is not None
    assert auto.baseline.ms == pytest.approx(rig.verify_ms(1, 18000), rel=0.03)
    assert auto.baseline.tok_s == pytest.approx(1000 / auto.baseline.ms)
    assert 0 <= auto.baseline.age_ms < 420 * auto.baseline.ms
    assert 2048 <= auto.baseline.measured_context_tokens < 18048
    assert auto.speedup == pytest.approx(run.speedup, rel=0.3)
    assert sum(auto.histogram.values()) == len(run.ms)


def test_the_reason_names_the_numbers_behind_the_last_decision() -> None:
    auto = _controller()
    assert auto.reason == ""
    auto.observe(auto.decide(2048, 16), 0, 2048, 0.0, 1.84)
    assert auto.reason == f"{words.BASELINE}: 1.84 ms a token"
    decision = auto.decide(2048, 16)
    assert auto.reason.startswith(f"{words.PAYS}: {decision.width} rows, ")
    assert auto.reason.endswith("plain 1 in 1.84")


def test_figures_are_told_in_the_first_and_every_fiftieth_step_of_an_answer() -> None:
    auto = _controller()
    for _ in range(2):
        auto.new_answer()
        told = []
        for step in range(1, 111):
            decision = auto.decide(2048, 16)
            auto.observe(decision, decision.width - 1, 2048, 0.5 * decision.draft, 5.0)
            if words_of_step := auto.told(decision):
                told.append(step)
                assert words_of_step == figures(decision)
                assert auto.reason == f"{decision.why}: {words_of_step}"
        assert told == [1, 51, 101]


def _plain_until_a_look(auto: Controller) -> int:
    """Plain steps until one is drafted, whose confidence is low and whose drafts are wrong."""
    for plain in range(1000):
        decision = auto.decide(2048, 16)
        if decision.draft:
            auto.cut(decision, [0.02] * sim.SLOTS)
        auto.observe(decision, 0, 2048, 0.57 * decision.draft, 1.84)
        if decision.draft:
            return plain
    raise AssertionError("drafting was given up")


def test_looks_that_fail_are_ever_rarer_until_another_answer_begins() -> None:
    auto = _controller(late=False)
    waits = [_plain_until_a_look(auto) for _ in range(20)]
    assert waits[-1] > 100
    assert waits[-1] > 3 * next(n for n in waits if n > 1)
    again = deepcopy(auto)
    again.new_answer()
    assert _plain_until_a_look(again) < _plain_until_a_look(auto) / 2


@pytest.mark.parametrize(
    ("first", "more"), [([0.98] * 3, True), ([0.98, 0.98, 0.3], False), ([0.3] * 3, False)]
)
def test_the_last_drafts_are_asked_for_where_the_first_promise_that_they_pay(
    first: list[float], more: bool
) -> None:
    auto = sim.controller(MOE[0], late=False)
    sim.controlled(auto, MOE[0], _trace("mixed", "honest", 3000))
    step = auto.decide(2048, 16)
    unasked, same = deepcopy((auto, step))
    assert auto.goes_on(step, first) == more
    assert step == same, "to ask changes nothing"
    assert auto.cut(step, first) <= len(first) + 1
    both = [*first, *[first[-1]] * 12]
    assert (unasked.cut(same, both) > len(first) + 1) == more
    assert auto.decide(2048, 16).draft


def test_what_a_pinned_width_loses_is_not_charged_to_the_controllers_own_choice() -> None:
    auto = _controller()
    auto.new_answer(pinned=15)
    for _ in range(200):
        auto.observe(auto.decide(2048, 16), 0, 2048, 0.5, 9.0)
    auto.new_answer()
    assert auto.decide(2048, 16).why != words.SPENT
    decided = [auto.decide(2048, 16).why for _ in range(3)]
    assert words.SPENT not in decided


SURE, UNSURE = [0.98] * 15, [0.3] * 15


def _used_to(accepted: int, late: bool = True, steps: int = 60) -> Controller:
    """A controller whose drafts were right so far, `accepted` in a row."""
    auto = _controller(late=late)
    for _ in range(steps):
        _step(auto, accepted)
    return auto


def _step(auto: Controller, accepted: int, found: Sequence[float] = ()) -> Decision:
    """One step at the table's own times, of which at most `accepted` drafts are right."""
    decision = auto.decide(2048, 16, found)
    if decision.draft and not auto.late:
        auto.cut(decision, [0.9] * 15)
    draft_ms = decision.costs.draft_ms * decision.draft
    right = min(accepted, decision.width - 1)
    auto.observe(decision, right, 2048, draft_ms, decision.ms - draft_ms)
    return decision


@LATE
@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_drafts_that_were_found_are_taken_where_they_win_more(accepted: int, late: bool) -> None:
    auto = _used_to(accepted, late)
    steps = [_step(auto, 12, SURE) for _ in range(30)]
    assert sum(step.why == words.FOUND for step in steps) >= 28  # plain steps are still measured
    step = next(step for step in reversed(steps) if step.why == words.FOUND)
    assert not step.draft
    assert step.width >= 8
    costs, i = step.costs, auto.widths.index(step.width)
    assert step.ms == costs.drafted_ms[i] - costs.draft_ms
    assert step.tokens > step.width * 0.8
    assert figures(step).startswith(f"{step.width} rows, ")
    assert not any(_step(auto, 0, UNSURE).why == words.FOUND for _ in range(10))


def test_what_is_found_competes_with_a_drafter_that_is_good() -> None:
    auto = _used_to(15)
    assert not any(_step(auto, 15, [0.6] * 15).why == words.FOUND for _ in range(10))
    assert any(_step(auto, 15, [0.999] * 15).why == words.FOUND for _ in range(3))


@LATE
def test_what_is_found_and_always_wrong_costs_no_more_than_the_purse(late: bool) -> None:
    auto = _used_to(0, late, 0)
    steps = [_step(auto, 0, SURE) for _ in range(800)]
    assert any(step.why == words.FOUND for step in steps)
    plain_ms = steps[-1].costs.plain_ms
    lost = sum(step.ms for step in steps) / plain_ms - len(steps)
    assert lost < words.PURSE + (words.REFILL + 0.0025) * len(steps) + 1


@pytest.mark.parametrize(("found", "taken"), [(SURE, True), (UNSURE, False)])
def test_what_is_found_behind_a_draft_takes_its_place_where_it_is_likelier(
    found: list[float], taken: bool
) -> None:
    auto = _used_to(2, late=False)
    drafted = auto.decide(2048, 16)
    auto.cut(drafted, [0.5] * 15)
    tokens, why = drafted.tokens, drafted.why
    step = auto.weigh(drafted, 16, found)
    assert why == words.PAYS
    assert (step.why == words.FOUND) == taken
    assert step.draft, "it has run and is paid for"
    if taken:
        assert step.ms == step.costs.drafted_ms[auto.widths.index(step.width)]
        assert step.tokens > tokens
        assert auto.last is step
    else:
        assert step is drafted
    auto.observe(step, 0, 2048, step.costs.draft_ms, step.ms - step.costs.draft_ms)
    assert auto.weigh(auto.decide(2048, 1), 1, SURE).width == 1


def test_what_is_found_behind_drafts_and_wrong_costs_no_more_than_the_purse() -> None:
    auto, found = _controller(late=False), 0
    total_ms = 0.0
    for _ in range(800):
        step = auto.decide(2048, 16)
        if step.draft:
            auto.cut(step, [0.5] * 15)
            step = auto.weigh(step, 16, SURE)
        found += step.why == words.FOUND
        draft_ms = step.costs.draft_ms * step.draft
        auto.observe(step, 0, 2048, draft_ms, step.ms - draft_ms)
        total_ms += step.ms
    lost = total_ms / step.costs.plain_ms - 800
    assert found > 0
    assert lost < words.PURSE + (words.REFILL + 0.0025) * 800 + 1


def test_a_plain_step_tells_what_it_missed() -> None:
    auto = _used_to(0, late=False, steps=300)
    step = auto.decide(2048, 16)
    assert step.why == words.PLAIN
    assert auto.tempted(step, 16, SURE)
    assert not auto.tempted(step, 16, [0.1] * 15)
    assert not auto.tempted(step, 16, ())
    assert not auto.tempted(step, 1, SURE), "there is no room"
    assert auto.last is step


def test_what_is_found_teaches_nothing_about_the_drafter() -> None:
    auto = _used_to(3)
    before = auto.acceptance.expected()[-1]
    for _ in range(3):
        assert _step(auto, 0, [0.9999] * 15).why == words.FOUND
    assert auto.acceptance.expected()[-1] == pytest.approx(before, rel=0.1)
    for _ in range(3):  # whereas this does
        _step(auto, 0)
    assert auto.acceptance.expected()[-1] < 0.7 * before


@pytest.mark.parametrize("pinned", [0, 3])
def test_nothing_found_has_a_say_where_the_width_is_pinned(pinned: int) -> None:
    auto = _controller()
    auto.new_answer(pinned=pinned)
    assert auto.decide(2048, 16, SURE).width == pinned + 1
    assert auto.decide(2048, 1, SURE).width == 1


@LATE
def test_equal_inputs_give_equal_decisions(late: bool) -> None:
    rig, drafts = MOE[1], _trace("switching", "honest", 8000)
    again = sim.controlled(sim.controller(rig, late), rig, drafts)
    assert (again.ms == _run(rig, "switching", "honest", late).ms).all()


@LATE
def test_deciding_and_learning_take_microseconds(late: bool) -> None:
    """Best of many batches against a plain loop of the same run, so that a busy machine fits."""
    auto, sure = sim.controller(MOE[0], late), _trace("code", "honest", 2000).confidence
    steps, loops = [], []
    for batch in range(40):
        begun = time.perf_counter()
        for i in range(25):
            decision = auto.decide(2048, 16)
            if decision.draft and not late:
                auto.cut(decision, sure[25 * batch + i])
            told = sure[25 * batch + i] if decision.draft else None
            auto.observe(decision, decision.width // 2, 2048, 0.5 * decision.draft, 5.0, told)
        between = time.perf_counter()
        sum([i * 2 for i in range(25000)])
        loops.append(time.perf_counter() - between)
        steps.append(between - begun)
    assert min(steps) < 0.9 * min(loops)


def test_a_plain_pass_that_was_timed_in_a_bad_moment_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sim.TEXTS, "weak", (0.4, 0.5))
    rig = MOE[1]
    true = rig.table()
    slow = tuple(1.6 * ms for ms in true.verify_ms[0])
    wrong = replace(true, verify_ms=(slow, *true.verify_ms[1:]))
    misled = Controller(Costs(wrong), sim.SLOTS, late=False)
    assert sim.controlled(misled, rig, _trace("weak", "honest", 1500)).speedup > 0.95
