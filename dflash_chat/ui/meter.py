"""Engine events → the numbers on screen, by the definitions of `runtime.api`. Pure Python.

Seconds are the engine's own (the steps' milliseconds), so a slow terminal does not change a rate;
`now` only says which steps are recent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dflash_chat.runtime.api import Finished, Prefill, Spec, StepStats, Tokens

WINDOW_S = 1.5
BUCKET_S = 0.5
BUCKETS = 48


@dataclass(frozen=True)
class BlockMs:
    """Mean milliseconds of one verify pass, by part."""

    draft: float = 0.0
    verify: float = 0.0
    sample: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """The whole pass."""
        return self.draft + self.verify + self.sample + self.host


@dataclass
class _Rate:
    """Committed tokens and the seconds they took, from time `at` on."""

    at: float
    committed: int = 0
    seconds: float = 0.0

    def add(self, stats: StepStats) -> None:
        self.committed += stats.committed
        self.seconds += step_ms(stats) / 1000

    @property
    def tok_s(self) -> float:
        return self.committed / self.seconds if self.seconds else 0.0


def step_ms(stats: StepStats) -> float:
    """One verify pass from draft to commit."""
    return stats.draft_ms + stats.verify_ms + stats.sample_ms + stats.host_ms


class Meter:
    """The present answer's sums, the present moment's rate, and the rates before it."""

    def __init__(self) -> None:
        self._recent: deque[_Rate] = deque()
        self._buckets: deque[_Rate] = deque(maxlen=BUCKETS)
        self.context_tokens = 0
        self.begin()

    def begin(self) -> None:
        """A new answer starts."""
        self._answer = _Rate(0.0)
        self._parts_ms = [0.0, 0.0, 0.0, 0.0]
        self._finished: Finished | None = None
        self.spec = Spec()
        self.prefill: Prefill | None = None

    def clear(self) -> None:
        """A new chat starts: the engine's cache no longer stands for what is on screen."""
        self._recent.clear()
        self._buckets.clear()
        self.context_tokens = 0
        self.begin()

    def read(self, event: Prefill) -> None:
        """Take a prefill event."""
        self.prefill = event
        self.context_tokens = event.done

    def take(self, event: Tokens, now: float) -> None:
        """Take the tokens of one verify pass that arrived at `now` (seconds of any clock)."""
        stats = event.stats
        if stats is None:
            return
        self.context_tokens = stats.context_tokens
        self.spec = self.spec.add(stats)
        parts_ms = (stats.draft_ms, stats.verify_ms, stats.sample_ms, stats.host_ms)
        self._parts_ms = [a + b for a, b in zip(self._parts_ms, parts_ms, strict=True)]
        self._answer.add(stats)
        step = _Rate(now)
        step.add(stats)
        self._recent.append(step)
        if not self._buckets or now >= self._buckets[-1].at + BUCKET_S:
            self._buckets.append(_Rate(now))
        self._buckets[-1].add(stats)

    def finish(self, event: Finished) -> None:
        """Take the engine's own sums; they replace ours."""
        self._finished = event
        self.spec = event.spec
        self._recent.clear()

    def now_tok_s(self, now: float) -> float:
        """Committed ÷ seconds of the steps of the last 1.5 s; 0 when there were none."""
        while self._recent and self._recent[0].at < now - WINDOW_S:
            self._recent.popleft()
        seconds = sum(step.seconds for step in self._recent)
        return sum(step.committed for step in self._recent) / seconds if seconds else 0.0

    @property
    def answer_tok_s(self) -> float:
        """Committed ÷ seconds since the answer's first token."""
        return self._finished.timing.tok_s if self._finished else self._answer.tok_s

    @property
    def rates(self) -> list[float]:
        """tok/s of each half second in which something was committed, oldest first."""
        return [bucket.tok_s for bucket in self._buckets]

    @property
    def block_ms(self) -> BlockMs:
        """Mean over the verify passes of this answer."""
        steps = max(self.spec.steps, 1)
        return BlockMs(*(part_ms / steps for part_ms in self._parts_ms))
