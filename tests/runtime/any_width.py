"""A controller that decides at random: whatever it does, the answer must stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dflash_chat.runtime.controller import BASELINE, FOUND, Controller, Decision
from dflash_chat.runtime.costs import Costs, CostTable

WHY = "at random"


class AnyWidth(Controller):
    """Runs of plain steps, drafted ones of every width, drafts of which nothing is verified, and
    every second time that something was found in the text, a part of that.
    """

    def __init__(self, widths: Sequence[int], late: bool, seed: int = 3) -> None:
        super().__init__(Costs(CostTable.even(widths)), max(widths) - 1, late)
        self._draws = random.Random(seed)
        self._plain_left = 0
        self.found_widths: list[int] = []
        self.kinds: list[tuple[bool, int]] = []  # of the steps observed: drafted, rows

    def decide(self, context: int, most: int, found: Sequence[float] = ()) -> Decision:
        fitting = [n for n in self.widths if n <= most]
        copied = [n for n in fitting[1:] if n <= len(found) + 1]
        if copied and self._draws.random() < 0.5:
            self.found_widths.append(self._draws.choice(copied))
            return Decision(self.found_widths[-1], False, FOUND, self.costs.at(context), 1.0)
        if not self._plain_left and self._draws.random() < 0.2:
            self._plain_left = self._draws.randint(1, 20)
        if self._plain_left or len(fitting) == 1:
            self._plain_left -= self._plain_left > 0
            return Decision(1, False, BASELINE, self.costs.at(context), 1.0)
        return Decision(self._draws.choice(fitting[1:]), True, WHY, self.costs.at(context), 1.0)

    def cut(self, decision: Decision, confidence: Sequence[float]) -> int:
        assert len(confidence) >= decision.width - 1
        assert all(0 <= sure <= 1.001 for sure in confidence)
        fitting = [n for n in self.widths if n <= decision.width]
        decision.width = self._draws.choice(fitting)
        return decision.width

    def observe(
        self, decision: Decision, accepted: int, context: int, draft_ms: float, verify_ms: float,
        confidence: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        assert accepted < decision.width
        self.kinds.append((decision.draft, decision.width))

    def new_answer(self, pinned: int | None = None) -> None:
        """Nothing is pinned."""
