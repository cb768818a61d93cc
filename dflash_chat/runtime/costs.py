"""What a step costs on this machine: milliseconds of a draft and of every verify width.

Measured at load at a few context lengths and kept (`calibration.py`), interpolated between them,
and corrected by every step that runs. Knows widths, contexts and milliseconds; knows neither how a
pass is timed nor what a wider one wins (`controller.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_VERSION = 1  # of what is kept
_BUCKET = 128  # tokens of context that share one interpolation
_REFRESH = 16  # steps after which their corrections are put to use; a lone plain step's at once
_RATE = 0.1  # how much one step corrects a pass that runs all the time …
_RARE_RATE = 0.4  # … and one that has not run for `_RARE` steps
_RARE = 64
_CLIP = 0.25  # no single step may claim to be further off than this
_FASTER = 0.1  # what runs this much faster than thought was timed in a bad moment


@dataclass(frozen=True)
class CostTable:
    """Milliseconds by context length; a lone width 1 is plain decoding, whatever it does besides.

    `verify_ms[i][j]` is a pass of `widths[i]` rows, the choice of tokens and the host's share
    included, behind `contexts[j]` tokens; `draft_ms[j]` the draft before it. Raises ValueError
    where the shapes do not fit, widths do not start at 1 or a time is not positive.
    """

    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    draft_ms: tuple[float, ...]
    verify_ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, axis in (("widths", self.widths), ("contexts", self.contexts)):
            if not axis or list(axis) != sorted(set(axis)):
                raise ValueError(f"{name} must rise: {axis}")
        if self.widths[0] != 1:
            raise ValueError(f"the first width must be 1: {self.widths}")
        rows = (self.draft_ms, *self.verify_ms)
        if len(rows) != len(self.widths) + 1 or {len(row) for row in rows} != {len(self.contexts)}:
            raise ValueError("one row for the draft and each width, one column for each context")
        if not all(0 < ms < float("inf") for row in rows for ms in row):
            raise ValueError("every time must be positive and finite")

    @classmethod
    def even(cls, widths: Sequence[int]) -> CostTable:
        """Where nothing was measured: every pass takes a millisecond."""
        return cls(tuple(widths), (1,), (1.0,), ((1.0,),) * len(widths))

    @classmethod
    def measured(
        cls,
        widths: Sequence[int],
        contexts: Sequence[int],
        draft_ms: Sequence[float],
        verify_ms: Sequence[Sequence[float]],
    ) -> CostTable:
        """The table of a measurement. More rows, or more context, cannot take less time: where they
        seem to, the smaller pass was disturbed and takes the larger one's time.
        """
        rows = [_rising(row) for row in verify_ms]
        columns = [_rising(column) for column in zip(*rows, strict=True)]
        return cls(
            tuple(widths), tuple(contexts), _rising(draft_ms), tuple(zip(*columns, strict=True))
        )

    def scaled(self, factor: float) -> CostTable:
        """All passes slower by this factor."""
        draft, *verify = (
            tuple([ms * factor for ms in row]) for row in (self.draft_ms, *self.verify_ms)
        )
        return CostTable(self.widths, self.contexts, draft, tuple(verify))

    def to_dict(self) -> dict[str, Any]:
        """Builtins for JSON."""
        return {
            "version": _VERSION,
            "widths": list(self.widths),
            "contexts": list(self.contexts),
            "draft_ms": list(self.draft_ms),
            "verify_ms": [list(row) for row in self.verify_ms],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostTable:
        """What `to_dict` gave. Raises ValueError for anything else."""
        try:
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']} of the cost table")
            return cls(
                tuple(int(n) for n in data["widths"]),
                tuple(int(n) for n in data["contexts"]),
                tuple(float(ms) for ms in data["draft_ms"]),
                tuple(tuple(float(ms) for ms in row) for row in data["verify_ms"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a cost table: {error!r}") from error


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Milliseconds of every kind of step at one context length, widths in the table's order."""

    plain_ms: float
    draft_ms: float
    drafted_ms: tuple[float, ...]  # draft and verify together
    stakes: tuple[float, ...]  # plain steps that each loses if nothing is accepted


class Costs:
    """A table that follows the machine: every step corrects the pass it ran.

    A correction is one factor per pass, the same at every context. It moves by a clipped share of
    the surprise, so a disturbed step moves it by a few percent at most, and a pass's first live
    step (compiling, allocating) not at all. Nothing makes a step faster than it is, so one that is
    clearly faster is believed sooner.
    """

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._rows = (table.draft_ms, *table.verify_ms)  # the draft is row 0, width i row i + 1
        self._index = {width: i for i, width in enumerate(table.widths, 1)}
        self._factors = [1.0] * len(self._rows)
        self._seen: list[int | None] = [None] * len(self._rows)
        self._steps = 0
        self._plain = False  # whether the last step was
        self._bucket = -1
        self._raw: tuple[float, ...] = ()
        self._at: StepCosts | None = None

    def at(self, context: int) -> StepCosts:
        """What steps behind `context` tokens cost, to within a bucket of tokens."""
        bucket = context // _BUCKET
        if bucket != self._bucket:
            self._bucket = bucket
            self._raw = self._interpolated(bucket * _BUCKET + _BUCKET // 2)
            self._at = None
        if self._at is None:
            draft, *verify = (ms * f for ms, f in zip(self._raw, self._factors, strict=True))
            plain, drafted = verify[0], tuple([draft + ms for ms in verify])
            stakes = tuple([ms / plain - 1.0 for ms in drafted])
            self._at = StepCosts(plain, draft, drafted, stakes)
        return self._at

    def observe(self, width: int, context: int, draft_ms: float, verify_ms: float) -> None:
        """A step of `width` rows behind `context` tokens took this long; `draft_ms` 0: no draft."""
        self.at(context)
        self._steps += 1
        self._correct(self._index[width], verify_ms)
        if draft_ms > 0:
            self._correct(0, draft_ms)
        if self._steps % _REFRESH == 0 or (width == 1 and not self._plain):
            self._at = None
        self._plain = width == 1

    def _correct(self, row: int, ms: float) -> None:
        seen, self._seen[row] = self._seen[row], self._steps
        if seen is None:
            return
        factor = self._factors[row]
        surprise = ms / (self._raw[row] * factor) - 1
        if not -_CLIP < surprise < _CLIP:
            surprise = _CLIP if surprise > 0 else -_CLIP
        sooner = self._steps - seen >= _RARE or surprise < -_FASTER
        rate = _RARE_RATE if sooner else _RATE
        self._factors[row] = factor * (1 + rate * surprise)

    def _interpolated(self, context: int) -> tuple[float, ...]:
        """Every row at `context`: linear between the measured lengths and beyond the last, where
        attention's share goes on growing; constant before the first.
        """
        xs = self.table.contexts
        if len(xs) == 1 or context <= xs[0]:
            return tuple(row[0] for row in self._rows)
        j = min(bisect_right(xs, context), len(xs) - 1)
        share = (context - xs[j - 1]) / (xs[j] - xs[j - 1])
        return tuple(row[j - 1] + share * (row[j] - row[j - 1]) for row in self._rows)


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """The values, none above a later one."""
    out = list(values)
    for i in range(len(out) - 2, -1, -1):
        out[i] = min(out[i], out[i + 1])
    return tuple(out)
