"""How many drafted tokens are worth verifying: expected tokens against measured milliseconds.

Every further row of a verify pass costs something, and a step more where the matmuls tile their
rows; it wins a token only if all rows before it are accepted too. Knows chances and costs; knows
neither models nor tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # for which a CUDA graph is worth its memory
MAX_ROWS = 17  # of a block: sixteen drafted tokens behind their anchor

# Why a pass has the width it has, in words.
PAYS = "commits most per second"
PINNED = "every draft is verified"
PROBE = "plain, to compare"
NO_ROOM = "the context ends here"
NO_DRAFTING = "no drafting"

_PRIOR = 0.75  # chance of a drafted token before anything is known
_RATE = 0.06  # how much one observation counts: some twenty steps are remembered
_DRIFT = 0.01  # how fast a position that is not looked at returns to the prior


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


class Survival:
    """Running chance of each drafted position to be right if all before it are.

    For a host that launches a step before it has read the last one, so that the drafter's own
    confidence comes too late.
    """

    def __init__(self, positions: int) -> None:
        self.chances = [_PRIOR] * positions

    def observe(self, drafted: int, accepted: int) -> None:
        """A pass verified `drafted` tokens and accepted the first `accepted` of them."""
        reached = min(accepted + 1, drafted)
        for i, chance in enumerate(self.chances):
            if i < reached:
                self.chances[i] += _RATE * ((i < accepted) - chance)
            else:
                self.chances[i] += _DRIFT * (_PRIOR - chance)
