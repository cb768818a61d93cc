"""What plain decoding costs, by the passes of the anchor alone that run now and then.

`controller.py` decides when they run. Knows figures of passes; neither models nor clocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from dflash_chat.runtime.api import StepStats

_RECENT = 3  # passes whose median counts: one alone may have met a disturbance


@dataclass(frozen=True)
class Plain:
    """Milliseconds of a plain pass, and the tokens before it."""

    ms: float
    context_tokens: int

    @property
    def tok_s(self) -> float:
        """Such a pass commits one token."""
        return 1000 / self.ms if self.ms else 0.0


class Baseline:
    """Plain decoding as measured last; `at_load` stands until a pass of an answer was plain."""

    def __init__(self, at_load: Plain | None = None) -> None:
        self._at_load = at_load
        self._recent: deque[Plain] = deque(maxlen=_RECENT)

    def take(self, stats: StepStats) -> bool:
        """Learn from a pass; says whether it was plain. The draft's time is not plain decoding's,
        even where a draft was made and not verified.
        """
        if stats.drafted:
            return False
        self._recent.append(Plain(stats.total_ms - stats.draft_ms, stats.context_tokens))
        return True

    @property
    def plain(self) -> Plain | None:
        """The median of the last passes, at the context of the very last; None before any."""
        if not self._recent:
            return self._at_load
        return Plain(median(p.ms for p in self._recent), self._recent[-1].context_tokens)
