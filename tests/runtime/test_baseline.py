"""When a pass is plain in order to be compared with, and what such passes tell."""

from __future__ import annotations

import pytest

from dflash_chat.runtime.api import StepStats
from dflash_chat.runtime.baseline import EVERY, Baseline, Plain


def step(ms: float, context: int = 100, drafted: int = 0) -> StepStats:
    """Half a millisecond of drafting, whatever became of the draft."""
    return StepStats(drafted, 0, 1, 0.5, ms - 0.3, 0.2, 0.1, context)


def asked(baseline: Baseline, passes: int) -> list[int]:
    """Which of the next passes should be plain."""
    return [n for n in range(1, passes + 1) if baseline.asks()]


def test_the_gap_grows_to_one_in_two_hundred() -> None:
    assert asked(Baseline(), 975) == [25, 75, 175, 375, 575, 775, 975]
    assert EVERY == 200


@pytest.mark.parametrize("speedup", [1.0, 1.5, 3.0, 4.5])
def test_asking_costs_less_than_half_a_percent(speedup: float) -> None:
    """tau tokens in tau / speedup plain passes' time; a plain pass brings one in one."""
    tau, passes = 6.0, 2000
    plain = len(asked(Baseline(), passes))
    tokens = (passes - plain) * tau + plain
    seconds = (passes - plain) * tau / speedup + plain
    assert tokens / seconds > speedup * 0.995


def test_a_pass_that_happened_to_be_plain_puts_the_question_off() -> None:
    baseline = Baseline()
    assert asked(baseline, 20) == []
    assert baseline.take(step(8.0))
    assert asked(baseline, 30) == [25]


def test_the_median_of_three_stands_at_the_last_ones_context() -> None:
    baseline = Baseline(Plain(5.0, 0))
    assert baseline.plain == Plain(5.0, 0)
    for ms, context in ((99.0, 10), (8.0, 200), (9.0, 400), (10.0, 600)):
        baseline.take(step(ms, context))
    assert baseline.plain is not None
    assert baseline.plain.ms == pytest.approx(9.0)
    assert baseline.plain.context_tokens == 600
    assert baseline.plain.tok_s == pytest.approx(1000 / 9)


def test_drafted_passes_tell_nothing_about_plain_ones() -> None:
    baseline = Baseline()
    assert not baseline.take(step(8.0, drafted=3))
    assert baseline.plain is None
