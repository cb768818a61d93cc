"""The verify width that pays."""

from __future__ import annotations

import pytest

from dflash_chat.runtime.width import WidthChooser


def test_free_rows_are_always_taken_and_dear_ones_never() -> None:
    assert WidthChooser([10.0] * 5, 3.0).choose([0.3] * 4) == 5
    assert WidthChooser([1.0, 100, 200, 300, 400], 0.1).choose([0.9] * 4) == 1


def test_a_sure_draft_is_worth_a_step_in_the_cost_that_a_doubtful_one_is_not() -> None:
    chooser = WidthChooser([8, 8.2, 8.5, 9, 14, 14.2, 14.5, 15], 4)
    assert chooser.choose([0.99] * 7) == 8
    assert chooser.choose([0.6] * 7) == 4
    assert chooser.choose([0.9, 0.9, 0.9, 0.01, 0.9, 0.9, 0.9]) == 4


@pytest.mark.parametrize("chances", [[0.5, 0.9, 0.2], [0.1] * 6, [1.0] * 7, []])
def test_no_other_width_commits_more_per_millisecond(chances: list[float]) -> None:
    verify_ms, draft_ms = [7, 9, 9.5, 12, 12.5, 17, 18, 20], 3.0
    chosen = WidthChooser(verify_ms, draft_ms).choose(chances)
    rates = []
    for n in range(1, len(chances) + 2):
        expected = survives = 1.0
        for chance in chances[: n - 1]:
            survives *= chance
            expected += survives
        rates.append(expected / (draft_ms + verify_ms[n - 1]))
    assert rates[chosen - 1] == max(rates)
