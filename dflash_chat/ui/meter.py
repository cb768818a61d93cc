"""Engine events → the numbers on screen, by the definitions of `runtime.api`. Pure Python.

Seconds are the engine's own (the steps' milliseconds), so a slow terminal does not change a rate;
`now` only says which steps are recent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dflash_chat.runtime.api import Finished, ModelInfo, Prefill, Spec, StepStats, Timing, Tokens
from dflash_chat.runtime.baseline import Baseline, Plain

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
        self.seconds += stats.total_ms / 1000

    @property
    def tok_s(self) -> float:
        return self.committed / self.seconds if self.seconds else 0.0


class Meter:
    """The present answer's sums, the present moment's rate, and the rates before it."""

    def __init__(self) -> None:
        self._recent: deque[_Rate] = deque()
        self._buckets: deque[_Rate] = deque(maxlen=BUCKETS)
        self.context_tokens = 0
        self._baseline = Baseline()
        self._plain_at: float | None = None
        self.begin()

    def loaded(self, info: ModelInfo) -> None:
        """A pair was loaded; plain decoding is measured anew."""
        at_load = Plain(info.plain_ms, info.plain_context) if info.plain_ms else None
        self._baseline, self._plain_at = Baseline(at_load), None

    def begin(self) -> None:
        """A new answer starts."""
        self._answer = _Rate(0.0)
        self._parts_ms = [0.0, 0.0, 0.0, 0.0]
        self._finished: Finished | None = None
        self.spec = Spec()
        self.prefill: Prefill | None = None
        self.last: StepStats | None = None
        self.figures = ""  # behind the width of a late step
        self._timing = Timing()

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
        self._timing = event.timing or self._timing
        stats = event.stats
        if stats is None:
            return
        self.last = stats
        self.figures = stats.figures or self.figures
        if self._baseline.take(stats):
            self._plain_at = now
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
        self.spec, self._timing = event.spec, event.timing
        if (tok_s := event.timing.ar_tok_s) and self.plain:
            self._baseline = Baseline(Plain(1000 / tok_s, self.plain.context_tokens))
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
    def plain(self) -> Plain | None:
        """What plain decoding costs, as measured last."""
        return self._baseline.plain

    def plain_age_s(self, now: float) -> float | None:
        """Seconds since that was measured; None if it was at load."""
        return None if self._plain_at is None else now - self._plain_at

    @property
    def speedup(self) -> float:
        """tok/s of the answer ÷ plain; 0 as long as one of them is not known."""
        plain = self.plain.tok_s if self.plain else 0.0
        return self._timing.speedup or (self.answer_tok_s / plain if plain else 0.0)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token; 0 before it."""
        return self._timing.ttft_s

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt that were not cached."""
        return self.prefill.total - self.prefill.cached if self.prefill else 0

    @property
    def prefill_tok_s(self) -> float:
        """Read ÷ seconds of the prompt; 0 before the first token."""
        prefill_s = self._timing.prefill_s
        return self.read_tokens / prefill_s if prefill_s else 0.0

    @property
    def rates(self) -> list[float]:
        """tok/s of each half second in which something was committed, oldest first."""
        return [bucket.tok_s for bucket in self._buckets]

    @property
    def block_ms(self) -> BlockMs:
        """Mean over the verify passes of this answer."""
        steps = max(self.spec.steps, 1)
        return BlockMs(*(part_ms / steps for part_ms in self._parts_ms))
