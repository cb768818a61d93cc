"""What plain decoding costs, measured while drafting: a pass of the anchor alone now and then.

Such a pass commits the token that plain decoding would have, so it changes no answer; one in two
hundred costs (speed-up - 1) / (200 tau) of the time, under 0.5 %. Passes that were too narrow to
draft for another reason count as well. Knows figures of passes; neither models nor clocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from dflash_chat.runtime.api import StepStats

EVERY = 200  # passes between two plain ones
_FIRST = 25  # after loading the gap grows from here, doubling
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
        self._passes, self._gap = 0, _FIRST

    def asks(self) -> bool:
        """Whether the pass to be launched now should be plain. To be called once per pass."""
        self._passes += 1
        if self._passes < self._gap:
            return False
        self._passes, self._gap = 0, min(2 * self._gap, EVERY)
        return True

    def take(self, stats: StepStats) -> bool:
        """Learn from a pass; says whether it was plain. The draft's time is not plain decoding's,
        even where a draft was made and not verified.
        """
        if stats.drafted:
            return False
        self._recent.append(Plain(stats.total_ms - stats.draft_ms, stats.context_tokens))
        self._passes = 0
        return True

    @property
    def plain(self) -> Plain | None:
        """The median of the last passes, at the context of the very last; None before any."""
        if not self._recent:
            return self._at_load
        return Plain(median(p.ms for p in self._recent), self._recent[-1].context_tokens)
