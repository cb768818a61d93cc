"""What a pass should take, from the bytes it must read, and how many drafted tokens pay.

    pass       Σ bytes of a format ÷ (what a copy reaches · that format's share) + launches · 2.2 µs
    verify(n)  weights once, keys and values once, recurrent states twice; of every layer's experts
               the distinct ones that n rows are routed to, E·(1 − (1 − k/E)^n) if rows choose
               independently. Neighbouring tokens share experts, so that real passes read less.
    draft      the drafter, its head and its cache once
    rate       expected committed tokens ÷ (draft + verify)

Estimates for a card nobody measured; `calibration.py` has the figures that replace them. Knows
counts, bytes and rates; knows neither files nor devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from dflash_chat.geometry import DrafterGeometry, Geometry, TargetGeometry
from dflash_chat.runtime import costs as measured
from dflash_chat.runtime.costs import CostTable
from dflash_chat.runtime.width import WIDTHS

# All four were measured on one H200 (driver 580, torch 2.11, the figures of tests/bench/NOTES.md).
COPY_SHARE = 0.89  # of the data sheet's bandwidth, by a large copy
FORMAT_SHARES = {16: 1.0, 8: 0.88, 4: 0.72}  # of a copy's bandwidth, by bits of the weights read
LAUNCH_MS = 0.0022  # a kernel inside a graph costs this besides its bytes
_LAUNCHES = {"dense": 7, "experts": 9, "draft": 10}  # a layer

KINDS = ("prose", "mixed", "code")
HERE = "here"  # the kind of text that was measured


class Curve(Protocol):
    """How many tokens passes are worth."""

    def committed(self, drafted: int) -> float:
        """Expected tokens of a pass that verifies so many drafted ones, its own token included."""


@dataclass(frozen=True)
class Acceptance:
    """How long accepted runs are: the i-th drafted token survives with chance first·ratio^(i−1)."""

    first: float
    ratio: float

    def committed(self, drafted: int) -> float:
        """Expected tokens of a pass that verifies so many drafted ones, its own token included."""
        return 1 + sum(self.first * self.ratio**i for i in range(drafted))


@dataclass(frozen=True)
class Survival:
    """Acceptance as it was measured: of the passes, the share that accepted at least i drafted
    tokens, i from 1, while `tokens` were decoded. Tokens behind those that were tried count for
    nothing. Raises ValueError where this is no such thing.
    """

    shares: tuple[float, ...]
    tokens: int

    def __post_init__(self) -> None:
        falls = all(a >= b for a, b in pairwise((1.0, *self.shares, 0.0)))
        if not self.shares or not falls or self.tokens <= 0:
            raise ValueError(f"no shares of survivors: {self.shares} of {self.tokens} tokens")

    def committed(self, drafted: int) -> float:
        """Expected tokens of a pass that verifies so many drafted ones, its own token included."""
        return 1 + sum(self.shares[:drafted])

    def to_dict(self) -> dict[str, Any]:
        """Builtins for JSON."""
        return {"survival": list(self.shares), "tokens": self.tokens}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Survival:
        """What `to_dict` gave. Raises ValueError for anything else."""
        try:
            return cls(tuple(float(share) for share in data["survival"]), int(data["tokens"]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a measured acceptance: {error!r}") from error


# Shapes of published runs at batch 1: 3.2 to 3.6 tokens a pass on prose, 7 to 10 on code.
CURVES = {
    "prose": Acceptance(0.75, 0.80),
    "mixed": Acceptance(0.82, 0.86),
    "code": Acceptance(0.92, 0.93),
}


@dataclass(frozen=True)
class Formats:
    """Bits per number on the device: a target's body, its head and routers, the drafter, and what
    drafts are read off; `draft_head_rows` 0 means every token's. Of a `screened` head it is the
    copy's bits that a greedy pass reads.
    """

    body: float
    head: float
    drafter: float = 16
    draft_head: float = 16
    draft_head_rows: int = 0
    screened: bool = False


@dataclass(frozen=True)
class Costs:
    """What passes take, in milliseconds: `verify_ms` by rows, anchor included, 1 being plain."""

    verify_ms: Mapping[int, float]
    draft_ms: float

    @classmethod
    def of(cls, table: CostTable, context: int) -> Costs:
        """A measurement, behind so much context."""
        at = measured.Costs(table).at(context)
        verify = {n: ms - at.draft_ms for n, ms in zip(table.widths, at.drafted_ms, strict=True)}
        return cls(verify, at.draft_ms)

    @property
    def plain(self) -> float:
        """Tokens per second without drafting."""
        return 1e3 / self.verify_ms[1]

    def drafted(self, curve: Curve, k: int) -> float:
        """Tokens per second when k drafted tokens are verified in every pass."""
        return 1e3 * curve.committed(k) / (self.draft_ms + self.verify_ms[k + 1])

    def best(self, curve: Curve) -> int:
        """The number of drafted tokens that commits most per second; fewer where two are equal."""
        drafts = sorted(rows - 1 for rows in self.verify_ms if rows > 1)
        return max(drafts, key=lambda k: (self.drafted(curve, k), -k))


def estimated(
    target: TargetGeometry, drafter: DrafterGeometry, formats: Formats, bandwidth_gb_s: float,
    context: int, most: int,
) -> Costs:  # fmt: skip
    """Costs of the captured widths up to `most` drafted tokens, and of that one, on a card of this
    bandwidth with so many tokens of context.
    """
    widths = sorted({n for n in WIDTHS if n <= most} | {most + 1})
    kind = "experts" if target.num_experts else "dense"
    launches = _LAUNCHES[kind] * target.num_hidden_layers + 4 + 2 * formats.screened
    return Costs(
        {
            n: _ms(verify_bytes(target, formats, context, n), launches, bandwidth_gb_s)
            for n in widths
        },
        _ms(
            draft_bytes(target, drafter, formats, context),
            _LAUNCHES["draft"] * len(drafter.attention) + 3,
            bandwidth_gb_s,
        ),
    )


def distinct_experts(experts: int, chosen: int, rows: int) -> float:
    """How many experts of a layer `rows` tokens touch, each choosing independently."""
    return experts * (1 - (1 - chosen / experts) ** rows) if experts else 0.0


def verify_bytes(
    target: TargetGeometry, formats: Formats, context: int, rows: int
) -> dict[float, float]:
    """Bytes that a pass of `rows` reads, by bits per number."""
    touched = distinct_experts(target.num_experts, target.top_k_experts, rows)
    experts = target.experts * touched / max(1, target.num_experts)
    body = target.body - target.experts - target.routers + experts
    caches = 2 * _cached(target.attention, context) + 2 * target.state_bytes
    return _added(
        (formats.body, body * formats.body / 8),
        (formats.head, (target.head or target.embedding) * formats.head / 8),
        (16, 2 * target.routers + caches),
    )


def draft_bytes(
    target: TargetGeometry, drafter: DrafterGeometry, formats: Formats, context: int
) -> dict[float, float]:
    """Bytes that a draft reads, by bits per number. The context's projection is read beside qkv."""
    rows = formats.draft_head_rows or target.vocab_size
    weights = drafter.parameters + drafter.context
    return _added(
        (formats.drafter, weights * formats.drafter / 8),
        (formats.draft_head, rows * target.hidden_size * formats.draft_head / 8),
        (16, 2.0 * _cached(drafter.attention, context)),
    )


def _cached(layers: Sequence[Geometry], context: int) -> int:
    """Keys and values that a row sees."""
    return sum(
        2 * a.kv_heads * a.head_dim * (min(context, a.window) if a.window else context)
        for a in layers
    )


def _added(*parts: tuple[float, float]) -> dict[float, float]:
    sums: dict[float, float] = {}
    for bits, count in parts:
        sums[bits] = sums.get(bits, 0.0) + count
    return sums


def _ms(sizes: Mapping[float, float], launches: int, bandwidth_gb_s: float) -> float:
    reached = bandwidth_gb_s * 1e9 * COPY_SHARE
    seconds = sum(size / (reached * _share(bits)) for bits, size in sizes.items())
    return 1e3 * seconds + launches * LAUNCH_MS


def _share(bits: float) -> float:
    """Of the nearest format that was measured: 4.5 and 5 bits unpack as 4 do, 8.25 as 8."""
    return FORMAT_SHARES[4 if bits < 7 else 8 if bits < 12 else 16]
