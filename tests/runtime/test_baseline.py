"""What plain passes tell."""

from __future__ import annotations

import pytest

from dflash_chat.runtime.api import StepStats
from dflash_chat.runtime.baseline import Baseline, Plain


def step(ms: float, context: int = 100, drafted: int = 0) -> StepStats:
    """Half a millisecond of drafting, whatever became of the draft."""
    return StepStats(drafted, 0, 1, 0.5, ms - 0.3, 0.2, 0.1, context)


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
