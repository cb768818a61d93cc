"""How many drafted tokens are worth verifying: expected tokens against measured milliseconds.

Every further row of a verify pass costs something, and a step more where the matmuls tile their
rows; it wins a token only if all rows before it are accepted too. Knows chances and costs; knows
neither models nor tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class WidthChooser:
    """Picks the verify width (anchor included) that commits most tokens per millisecond.

    `verify_ms[n - 1]` is what a pass of n rows costs, `draft_ms` what the draft before it cost.
    """

    def __init__(self, verify_ms: Sequence[float], draft_ms: float) -> None:
        self.verify_ms, self.draft_ms = tuple(verify_ms), draft_ms

    def choose(self, chances: Sequence[float]) -> int:
        """The width for a draft whose i-th token is right with chance `chances[i]` if all before
        it are.
        """
        width, best = 1, 1 / (self.draft_ms + self.verify_ms[0])
        survives = expected = 1.0
        for n, chance in enumerate(chances, 2):
            survives *= chance
            expected += survives
            rate = expected / (self.draft_ms + self.verify_ms[n - 1])
            if rate > best:
                width, best = n, rate
        return width
