"""Estimates against what was measured, and the widths they advise."""

from __future__ import annotations

import math

import pytest

from dflash_chat import geometry, speed
from dflash_chat.speed import CURVES, Acceptance, Costs, Formats, Survival
from tests.published import DRAFTERS, TARGETS

H200 = 4800.0  # GB/s by data sheet
# ms a pass by rows, one H200, context 2048: the tables of tests/bench/NOTES.md
MEASURED = {
    ("gemma-4-26b-a4b", 16): {
        1: 2.28, 2: 3.12, 4: 4.21, 5: 4.70, 8: 5.93, 12: 7.39, 16: 8.57,
    },
    ("gemma-4-26b-a4b", 8): {1: 1.61, 2: 2.05, 4: 2.70, 5: 3.14, 8: 3.76, 12: 4.69, 16: 5.20},
    ("gemma-4-26b-a4b", 4.5): {1: 1.39, 2: 1.68, 4: 2.02, 5: 2.26, 8: 2.82, 12: 3.46, 16: 3.74},
    ("qwen3-8b", 16): {1: 4.06, 8: 4.19, 16: 4.28},
}  # fmt: skip
DRAFTS = {"gemma-4-26b-a4b": 0.55, "qwen3-8b": 0.82}


def costs(name: str, body: float = 16, bandwidth: float = H200, context: int = 2048) -> Costs:
    target, drafter = geometry.target(TARGETS[name]), geometry.drafter(DRAFTERS[name])
    formats = Formats(body, 8, draft_head=8, screened=True)
    return speed.estimated(target, drafter, formats, bandwidth, context, 15)


@pytest.mark.parametrize(("name", "body"), MEASURED)
def test_estimates_are_near_what_was_measured(name: str, body: float) -> None:
    estimated = costs(name, body)
    for rows, ms in MEASURED[name, body].items():
        assert estimated.verify_ms[rows] == pytest.approx(ms, rel=0.07)
    assert estimated.draft_ms == pytest.approx(DRAFTS[name], rel=0.05)


@pytest.mark.parametrize(("rows", "experts"), [(1, 8), (4, 29.1), (8, 51.6), (16, 82.4)])
def test_rows_touch_the_expected_number_of_distinct_experts(rows: int, experts: float) -> None:
    assert speed.distinct_experts(128, 8, rows) == pytest.approx(experts, abs=0.05)


@pytest.mark.parametrize(
    ("rows", "body", "gigabytes"),
    [(1, 16, 7.90), (16, 16, 34.45), (1, 8, 4.82), (8, 8, 12.61)],
)
def test_a_pass_reads_the_published_bytes(rows: int, body: float, gigabytes: float) -> None:
    gemma = geometry.target(TARGETS["gemma-4-26b-a4b"])
    read = speed.verify_bytes(gemma, Formats(body, 16), 2048, rows)
    assert sum(read.values()) / 1e9 == pytest.approx(gigabytes, rel=0.002)


def test_a_recurrent_state_is_read_and_written() -> None:
    qwen = geometry.target(TARGETS["qwen3.6-27b"])
    without = sum(speed.verify_bytes(qwen, Formats(16, 16), 0, 1).values())
    assert without == 2 * (qwen.body + qwen.head) + 2 * qwen.state_bytes


def test_coarser_drafters_and_heads_make_a_draft_quicker() -> None:
    gemma = geometry.target(TARGETS["gemma-4-26b-a4b"])
    drafter = geometry.drafter(DRAFTERS["gemma-4-26b-a4b"])
    sizes = [
        sum(speed.draft_bytes(gemma, drafter, formats, 2048).values()) / 1e9
        for formats in (
            Formats(16, 16),
            Formats(16, 16, draft_head=8),
            Formats(16, 16, drafter=8, draft_head=8, draft_head_rows=32_768),
        )
    ]
    assert sizes == [pytest.approx(gb, rel=0.03) for gb in (2.44, 1.70, 0.59)]


def test_expected_tokens_are_a_pass_of_its_own_and_the_survivors() -> None:
    curve = Acceptance(0.5, 0.5)
    assert curve.committed(0) == 1
    assert curve.committed(3) == 1 + 0.5 + 0.25 + 0.125
    measured = Survival((0.5, 0.4, 0.1), 99)
    assert [measured.committed(k) for k in (0, 2, 3, 7)] == [1, 1.9, 2.0, 2.0]


@pytest.mark.parametrize("bandwidth", [300.0, 936.0, 1792.0, H200])
def test_experts_make_narrow_passes_pay_on_prose_and_dense_targets_do_not(
    bandwidth: float,
) -> None:
    gemma, qwen = costs("gemma-4-26b-a4b", 8, bandwidth), costs("qwen3-8b", 8, bandwidth)
    assert gemma.best(CURVES["prose"]) < gemma.best(CURVES["code"])
    assert gemma.best(CURVES["prose"]) < qwen.best(CURVES["prose"])
    assert 4 <= gemma.best(CURVES["prose"]) <= 7
    assert qwen.best(CURVES["prose"]) == 15


def test_the_best_width_is_the_one_with_most_tokens_a_second() -> None:
    gemma = costs("gemma-4-26b-a4b")
    for curve in CURVES.values():
        rates = {rows - 1: gemma.drafted(curve, rows - 1) for rows in gemma.verify_ms if rows > 1}
        assert gemma.drafted(curve, gemma.best(curve)) == max(rates.values())
        k = gemma.best(curve)
        step_ms = gemma.draft_ms + gemma.verify_ms[k + 1]
        assert math.isclose(gemma.drafted(curve, k), curve.committed(k) / step_ms * 1e3)
