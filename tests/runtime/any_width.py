"""A controller that decides at random: whatever it does, the answer must stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dflash_chat.runtime.controller import BASELINE, FOUND, Controller, Decision
from dflash_chat.runtime.costs import Costs, CostTable

WHY = "at random"


class AnyWidth(Controller):
    """Runs of plain steps, drafted ones of every width, drafts of which nothing is verified or
    only the first were looked at, and every second time that something was found in the text, a
    part of that, with or without a draft.
    """

    def __init__(self, widths: Sequence[int], late: bool, seed: int = 3) -> None:
        super().__init__(Costs(CostTable.even(widths)), max(widths) - 1, late)
        self._draws = random.Random(seed)
        self._plain_left = 0
        self._parts = 0  # drafts that came in two parts
        self.found_widths: list[int] = []
        self.copied: list[bool] = []  # of the steps observed that were found: behind a draft?
        self.kinds: list[tuple[bool, int]] = []  # of the steps observed: drafted, rows

    def decide(self, context: int, most: int, found: Sequence[float] = ()) -> Decision:
        fitting = [n for n in self.widths if n <= most]
        if width := self._copied(most, found):
            return Decision(width, False, FOUND, self.costs.at(context), 1.0)
        if not self._plain_left and self._draws.random() < 0.2:
            self._plain_left = self._draws.randint(1, 20)
        if self._plain_left or len(fitting) == 1:
            self._plain_left -= self._plain_left > 0
            return Decision(1, False, BASELINE, self.costs.at(context), 1.0)
        return Decision(self._draws.choice(fitting[1:]), True, WHY, self.costs.at(context), 1.0)

    def goes_on(self, decision: Decision, confidence: Sequence[float]) -> bool:
        assert 0 < len(confidence) < decision.width - 1
        self._parts += 1
        if self._parts % 4 > 0:
            return True
        decision.width = len(confidence) + 1
        return False

    def cut(self, decision: Decision, confidence: Sequence[float]) -> int:
        assert len(confidence) >= decision.width - 1
        assert all(0 <= sure <= 1.001 for sure in confidence)
        fitting = [n for n in self.widths if n <= decision.width]
        decision.width = self._draws.choice(fitting)
        return decision.width

    def weigh(self, decision: Decision, most: int, found: Sequence[float]) -> Decision:
        if width := self._copied(most, found):
            return Decision(width, True, FOUND, decision.costs, 1.0)
        return decision

    def tempted(self, decision: Decision, most: int, found: Sequence[float]) -> bool:
        return bool(found) and self._draws.random() < 0.5

    def _copied(self, most: int, found: Sequence[float]) -> int:
        """How many rows verify what was found; 0 for none of it."""
        fitting = [n for n in self.widths[1:] if n <= min(most, len(found) + 1)]
        if not fitting or self._draws.random() < 0.5:
            return 0
        self.found_widths.append(self._draws.choice(fitting))
        return self.found_widths[-1]

    def observe(
        self, decision: Decision, accepted: int, context: int, draft_ms: float, verify_ms: float,
        confidence: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        assert accepted < decision.width
        self.kinds.append((decision.draft, decision.width))
        if decision.why == FOUND:
            self.copied.append(decision.draft)

    def new_answer(self, pinned: int | None = None) -> None:
        """Nothing is pinned."""
