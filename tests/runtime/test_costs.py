"""What steps cost: between measured lengths, after surprises, from one start to the next."""

from __future__ import annotations

import json

import pytest

from dflash_chat.runtime.costs import Costs, CostTable

TABLE = CostTable((1, 2, 4), (1024, 8192), (1.0, 2.0), ((4.0, 6.0), (5.0, 7.0), (8.0, 10.0)))


def test_times_are_linear_between_the_measured_contexts_and_beyond_the_last() -> None:
    for context, plain_ms, draft_ms in ((0, 4.0, 1.0), (4608, 5.0, 1.5), (15360, 8.0, 3.0)):
        at = Costs(TABLE).at(context)
        assert at.plain_ms == pytest.approx(plain_ms, abs=0.03)
        assert at.draft_ms == pytest.approx(draft_ms, abs=0.03)
        assert at.drafted_ms[0] == pytest.approx(at.plain_ms + at.draft_ms)
        assert list(at.drafted_ms) == sorted(at.drafted_ms)


def test_a_disturbed_measurement_takes_the_larger_pass_s_time() -> None:
    table = CostTable.measured((1, 2), (1, 9), (3.0, 2.0), ((4.0, 9.0), (6.0, 5.0)))
    assert table.draft_ms == (2.0, 2.0)
    assert table.verify_ms == ((4.0, 5.0), (5.0, 5.0))


@pytest.mark.parametrize(
    ("widths", "contexts", "draft_ms", "verify_ms"),
    [
        ((2, 4), (1,), (1.0,), ((1.0,), (1.0,))),
        ((1, 1), (1,), (1.0,), ((1.0,), (1.0,))),
        ((1, 2), (9, 1), (1.0, 1.0), ((1.0, 1.0), (1.0, 1.0))),
        ((1, 2), (1,), (1.0,), ((1.0,),)),
        ((1,), (1, 2), (1.0, 1.0), ((1.0,),)),
        ((1,), (1,), (0.0,), ((1.0,),)),
        ((1,), (1,), (1.0,), ((float("nan"),),)),
    ],
)
def test_a_table_without_sense_is_refused(
    widths: tuple[int, ...],
    contexts: tuple[int, ...],
    draft_ms: tuple[float, ...],
    verify_ms: tuple[tuple[float, ...], ...],
) -> None:
    with pytest.raises(ValueError, match=r"width|context|row|time"):
        CostTable(widths, contexts, draft_ms, verify_ms)


def test_steps_correct_the_pass_they_ran_at_every_context() -> None:
    live = Costs(TABLE)
    for _ in range(100):
        live.observe(4, 1024, draft_ms=1.5, verify_ms=10.0)
    near, far = live.at(1024), live.at(8192)
    assert near.drafted_ms[2] == pytest.approx(11.5, rel=0.03)
    assert far.drafted_ms[2] == pytest.approx(2.0 * 1.5 + 10.0 * 10 / 8, rel=0.03)
    assert near.plain_ms == Costs(TABLE).at(1024).plain_ms


def test_neither_a_first_call_nor_an_outlier_moves_much() -> None:
    live = Costs(TABLE)
    live.observe(1, 1024, 0.0, 4000.0)  # compiles
    assert live.at(1024).plain_ms == Costs(TABLE).at(1024).plain_ms
    live.observe(1, 1024, 0.0, 400.0)
    assert live.at(1024).plain_ms == pytest.approx(4.0, rel=0.03)


def test_a_pass_that_ran_long_ago_is_corrected_sooner() -> None:
    rare, steady = Costs(TABLE), Costs(TABLE)
    for live, others in ((rare, 200), (steady, 1)):
        live.observe(1, 1024, 0.0, 4.0)
        for _ in range(others):
            live.observe(4, 1024, 1.0, 8.0)
        live.observe(1, 1024, 0.0, 4.8)
    assert rare.at(1024).plain_ms > steady.at(1024).plain_ms > 4.0


def test_a_table_survives_json() -> None:
    assert CostTable.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


def test_a_scaled_table_is_that_of_a_slower_machine() -> None:
    slower, at = Costs(TABLE.scaled(1.5)).at(5000), Costs(TABLE).at(5000)
    assert slower.plain_ms == pytest.approx(1.5 * at.plain_ms)
    assert slower.drafted_ms == pytest.approx([1.5 * ms for ms in at.drafted_ms])


@pytest.mark.parametrize("data", [{}, {"version": 2}, {"version": 1, "widths": 3}])
def test_what_is_no_table_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cost table"):
        CostTable.from_dict(data)


def test_where_nothing_was_measured_all_passes_cost_the_same() -> None:
    at = Costs(CostTable.even((1, 2, 3))).at(500)
    assert (at.plain_ms, at.draft_ms, at.drafted_ms) == (1, 1, (2, 2, 2))
