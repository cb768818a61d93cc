"""What a plan chooses from and what it is: builds with their bytes, rules about cards, the result.

Pure functions of facts, shared by who chooses (planner.py) and who explains (reasons.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from dflash_chat import budget, cards, geometry
from dflash_chat.budget import Budget, Demand
from dflash_chat.entries import Build, Pair
from dflash_chat.geometry import DrafterGeometry, TargetGeometry
from dflash_chat.gpu import Gpu
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.speed import CURVES, HERE, Costs, Formats, Survival

COMFORTABLE = 32_768  # tokens: a long conversation with a few files in it
MEASURED_AT = 2048  # tokens of context that estimates of speed assume
MARGIN = 40  # a fortieth stays free where the plan chooses: predictions are within 3 % of peaks
KERNELS_FROM = (8, 0)  # compute capability; below it nothing of speed.py holds
FP8_FROM = (8, 9)  # Triton refuses e4m3 on older cards; only plain matrices go round it


@dataclass(frozen=True)
class Wishes:
    """What somebody asked for: a build, and of the options what is not "auto" or 0."""

    build: str = ""
    options: EngineOptions = EngineOptions()


@dataclass(frozen=True)
class Why:
    """One choice: what is decided, how, because of what, and what would change it."""

    what: str
    choice: str
    because: str
    instead: str = ""


@dataclass(frozen=True)
class Candidate:
    """A build and what it would take and read on this device."""

    build: Build
    target: TargetGeometry
    drafter: DrafterGeometry
    demand: Demand
    dense: bool  # block formats are widened for a GPU

    @classmethod
    def of(cls, pair: Pair, build: Build, draft_tokens: int, on_gpu: bool) -> Candidate:
        """Raises ConfigError if the pair's configs cannot be counted."""
        target = geometry.target(pair.config)
        drafter = geometry.drafter(_drafter_config(pair), target.hidden_size)
        dense = on_gpu and build.format == "gguf"
        demand = budget.demand(
            target, drafter, budget.BF16 * target.parameters if dense else build.resident_bytes,
            head_bits=16 if dense else build.head_bits, quantised=not dense and build.bits < 16,
            draft_tokens=draft_tokens,
        )  # fmt: skip
        return cls(build, target, drafter, demand, dense)

    @property
    def quality(self) -> float:
        """More is better: bits of a weight of the body."""
        return self.build.bits

    def formats(self, options: EngineOptions) -> Formats:
        """Bits that passes read."""
        screened = options.head == "screened"
        head = 8 if options.head == "fp8" else 16 if self.dense else self.build.head_bits
        return Formats(
            body=16 if self.dense else self.build.bits,
            head=8 if screened else head,
            drafter=8 if options.drafter == "fp8" else 16,
            draft_head=8 if options.draft_head in ("fp8", "screened") else head,
            draft_head_rows=options.draft_rows,
            screened=screened,
        )

    def total(self, options: EngineOptions, context: int) -> int:
        """Bytes at most."""
        return self.demand.plan(options, context).total


@dataclass(frozen=True)
class Plan:
    """What to load, and why. `options` are complete: nothing that a plan decides is "auto".

    `free` counts the device's bytes before we come; `fits` says that `budget.total` is no more.
    `drafts` are the numbers of drafted tokens by kind of text, those that pay best unless one was
    asked for, empty where nothing is known of speeds; `costs` are `measured`, or estimates. With
    `survival`, acceptance as it was measured, there is one kind: the text it was measured on.
    `missing` says what the runtime lacks to load this, or "".
    """

    pair: Pair
    build: Build
    gpu: Gpu | None
    options: EngineOptions
    budget: Budget
    free: int
    fits: bool
    kv_dtype: str = "bf16"
    drafts: dict[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    survival: Survival | None = None
    measured: bool = False
    missing: str = ""
    why: tuple[Why, ...] = ()

    @property
    def context_tokens(self) -> int:
        """Tokens there is room for."""
        return self.options.context_tokens

    @property
    def num_speculative_tokens(self) -> int:
        """Drafted tokens in a pass, the anchor not counted."""
        return self.options.draft_tokens

    @property
    def spare(self) -> int:
        """Bytes that stay free; negative where it does not fit."""
        return self.free - self.budget.total

    @property
    def recommendable(self) -> bool:
        """Whether it fits and can be loaded."""
        return self.fits and not self.missing

    def tok_s(self, kind: str = "") -> float:
        """Tokens per second of this kind of text, drafted; 0 if unknown. Without a kind of what was
        measured, or of mixed text.
        """
        if self.costs is None:
            return 0.0
        kind = kind or (HERE if self.survival else "mixed")
        curve = self.survival or CURVES[kind]
        return self.costs.drafted(curve, self.drafts[kind])


# ── rules ───────────────────────────────────────────────────────────────────────────────────────


def ladder(candidates: Iterable[Candidate], context: int) -> list[Candidate]:
    """Builds from the smallest to the best, without those that take more than a better one."""
    kept: list[Candidate] = []
    plain = EngineOptions()
    for candidate in sorted(candidates, key=lambda c: (-c.quality, c.total(plain, context))):
        if not kept or candidate.total(plain, context) < kept[-1].total(plain, context):
            kept.append(candidate)
    return kept[::-1]


def lean(options: EngineOptions) -> EngineOptions:
    """What takes least without changing an answer."""
    return replace(options, drafter="fp8") if options.drafter == "auto" else options


def roomy(free: int) -> int:
    """Of so many free bytes, those that a plan takes unasked."""
    return free - free // MARGIN


def bandwidth(gpu: Gpu) -> tuple[float, str]:
    """GB/s, and who says so: the driver's clock and bus, or a data sheet, or nobody."""
    if gpu.bandwidth_gb_s:
        return gpu.bandwidth_gb_s, "by its clock and bus"
    if card := cards.reported(gpu.name):
        return card.bandwidth_gb_s, "by data sheet"
    return cards.guessed_bandwidth(gpu.total), "a guess by its size"


def rounds_unasked(gpu: Gpu) -> bool:
    """Whether 8 bits are taken for speed alone: only where they have been measured."""
    return (gpu.capability or FP8_FROM) >= FP8_FROM


def without_kernels(gpu: Gpu, candidate: Candidate) -> str:
    """Why a build goes without our kernels there, or "". A card that does not tell its compute
    capability is taken for a new one.
    """
    has = gpu.capability or FP8_FROM
    if has < KERNELS_FROM:
        return "our kernels need compute capability {}.{}".format(*KERNELS_FROM)
    if has < FP8_FROM and candidate.target.num_experts and candidate.build.weights == "fp8":
        return "experts in 8 bits need compute capability {}.{}".format(*FP8_FROM)
    return ""


def _drafter_config(pair: Pair) -> dict[str, Any]:
    """As published, with what the catalogue says beside it."""
    config = {"block_size": pair.drafter.block_size, **pair.drafter.config}
    if pair.drafter.version == 2:
        config.setdefault("architectures", ["DFlash2DraftModel"])
    return config
