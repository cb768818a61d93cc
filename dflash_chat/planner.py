"""Which build, context, precision and width of a pair suit a card, and which pair does.

    build      the best that leaves room for a comfortable context; else the smallest
    context    comfortable, or what fits of it; more only where somebody asks
    precision  of what changes no answer: the drafter and its head, rounded where that is quicker,
               or where nothing else fits
    width      the number of drafted tokens that commits most per second by `speed.py`'s bytes, or
               by what was measured on this card

Builds and contexts go up one ladder whose rungs take ever more memory, so that a bigger card never
gets a worse build or a shorter context. What the runtime cannot load is never recommended. Pure
functions of facts: asks no driver, opens no file. `reasons.py` has the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from dflash_chat import budget, cards, geometry, speed
from dflash_chat.budget import Budget, Demand
from dflash_chat.calibration import Key
from dflash_chat.entries import Build, Pair
from dflash_chat.errors import UsageError
from dflash_chat.geometry import DrafterGeometry, TargetGeometry
from dflash_chat.gpu import Gpu
from dflash_chat.runtime.api import DEFAULT_CONTEXT, EngineOptions
from dflash_chat.speed import CURVES, Costs, Formats

COMFORTABLE = 32_768  # tokens: a long conversation with a few files in it
MEASURED_AT = 2048  # tokens of context that estimates of speed assume
MARGIN = 40  # a fortieth stays free where the plan chooses: predictions are within 3 % of peaks
QUICKER = 1.03  # so much must a rounded drafter gain before it is taken unasked
KERNELS_FROM = (8, 0)  # compute capability; below it nothing of speed.py holds
FP8_FROM = (8, 9)  # Triton refuses e4m3 on older cards; only plain matrices go round it

Measured = Callable[[Key], Costs | None]


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
        head = 16 if self.dense else self.build.head_bits
        head = 8 if options.head == "fp8" else head
        return Formats(
            body=16 if self.dense else self.build.bits,
            head=head,
            drafter=8 if options.drafter == "fp8" else 16,
            draft_head=8 if options.draft_head == "fp8" else head,
            draft_head_rows=options.draft_rows,
        )

    def total(self, options: EngineOptions, context: int) -> int:
        """Bytes at most."""
        return self.demand.plan(options, context).total


@dataclass(frozen=True)
class Plan:
    """What to load, and why. `options` are complete: nothing that a plan decides is "auto".

    `free` counts the device's bytes before we come; `fits` says that `budget.total` is no more.
    `drafts` are the numbers of drafted tokens that pay best by kind of text, empty where nothing
    is known of speeds; `costs` are `measured`, or estimates. `missing` says what the runtime lacks
    to load this, or "".
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

    def tok_s(self, kind: str = "mixed") -> float:
        """Tokens per second of this kind of text, drafted; 0 if unknown."""
        if self.costs is None:
            return 0.0
        k = self.drafts.get(kind) or self.num_speculative_tokens
        return self.costs.drafted(CURVES[kind], k)


def plan(
    pair: Pair, wishes: Wishes = Wishes(), gpu: Gpu | None = None, ram: int = 0,
    measured: Measured = lambda _: None,
) -> Plan:  # fmt: skip
    """The plan of a pair on `gpu`, or on a CPU with `ram` free bytes (0: unknown).

    Raises ConfigError if the pair's configs cannot be counted, UnknownModelError for an unknown
    build and UsageError for a context or a width beyond the pair's.
    """
    from dflash_chat import reasons  # it knows this module

    candidates = _candidates(pair, wishes, gpu is not None)
    wanted = _wanted_context(candidates[-1].target, wishes, gpu is not None)
    free = gpu.free if gpu else ram
    if gpu:
        quick = [c for c in candidates if not without_kernels(gpu, c)] or candidates
        chosen, context = _on_ladder(ladder(quick, wanted), wishes.options, wanted, free)
    else:
        chosen, context = candidates[0], wanted
    options = replace(wishes.options, context_tokens=context)
    options, costs, known = _precision(pair, chosen, options, gpu, free, measured)
    drafts = {kind: costs.best(curve) for kind, curve in CURVES.items()} if costs else {}
    most = chosen.demand.draft_tokens
    options = replace(options, draft_tokens=options.draft_tokens or drafts.get("mixed", most))
    spent = chosen.demand.plan(options, context)
    spent = spent if gpu else _on_cpu(spent)
    decided = Plan(
        pair, chosen.build, gpu, options, spent, free,
        fits=spent.total <= free or (gpu is None and not ram), drafts=drafts, costs=costs,
        measured=known, missing=pair.missing or pair.drafter.missing or chosen.build.missing,
    )  # fmt: skip
    return replace(decided, why=reasons.why(decided, chosen, candidates, wishes))


def plan_for(
    pair: Pair, build: Build, options: EngineOptions, gpu: Gpu, measured: Measured = lambda _: None
) -> EngineOptions:
    """The options with "auto" and 0 filled in for this card, as the runtime takes them.

    The width stays open: the engine chooses it anew in every step. What does not fit, or cannot be
    counted, stays as it was; the runtime says so with exact bytes.
    """
    try:
        made = plan(pair, Wishes(build.name, options), gpu, measured=measured)
    except geometry.ConfigError:
        return options
    return replace(made.options, draft_tokens=options.draft_tokens) if made.fits else options


def rank(plans: Iterable[Plan], floor: float = 30.0) -> list[Plan]:
    """Plans of several pairs, the one to recommend first, those that cannot be loaded or do not fit
    last.

    The biggest model that writes at `floor` tokens per second or more and has room for the default
    context; of models within a third of its size, the quickest. On a CPU the smallest.
    """
    rest = list(plans)
    ranked: list[Plan] = []
    while usable := [p for p in rest if p.recommendable]:
        if usable[0].gpu is None:
            best = min(usable, key=lambda p: p.budget.target)
        else:
            long = [p for p in usable if p.context_tokens >= DEFAULT_CONTEXT] or usable
            quick = [p for p in long if p.tok_s() >= floor] or long
            size = max(map(parameters, quick))
            best = max((p for p in quick if parameters(p) * 3 >= size * 2), key=Plan.tok_s)
        ranked.append(best)
        rest.remove(best)
    return ranked + sorted(rest, key=lambda p: (not p.fits, -parameters(p)))


def parameters(made: Plan) -> int:
    """The target's."""
    return geometry.target(made.pair.config).parameters


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


def bandwidth(gpu: Gpu) -> float:
    """GB/s: what the driver says, or the data sheet, or the middle of the cards of its size."""
    card = cards.reported(gpu.name)
    sheet = card.bandwidth_gb_s if card else cards.guessed_bandwidth(gpu.total)
    return gpu.bandwidth_gb_s or sheet


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


# ── choosing ────────────────────────────────────────────────────────────────────────────────────


def _candidates(pair: Pair, wishes: Wishes, on_gpu: bool) -> list[Candidate]:
    """The named build; or those that can be loaded, and if none can, all of them. On a CPU the
    first one is meant.
    """
    most = pair.drafter.block_size - 1
    if wishes.options.draft_tokens > most:
        raise UsageError(
            f"k {wishes.options.draft_tokens} is more than this drafter proposes", f"at most {most}"
        )
    width = wishes.options.draft_tokens or min(pair.drafter.draft_tokens, most)
    if not on_gpu and not wishes.options.draft_tokens:
        width = pair.drafter.cpu_draft_tokens or width
    name = wishes.build or pair.quant
    if name:
        builds: tuple[Build, ...] = (pair.build(name),)
    else:
        builds = pair.loadable or pair.builds
        builds = tuple(sorted(builds, key=lambda b: b.name not in pair.default[:1]))
    return [Candidate.of(pair, build, width, on_gpu) for build in builds]


def _drafter_config(pair: Pair) -> dict[str, Any]:
    """As published, with what the catalogue says beside it."""
    config = {"block_size": pair.drafter.block_size, **pair.drafter.config}
    if pair.drafter.version == 2:
        config.setdefault("architectures", ["DFlash2DraftModel"])
    return config


def _wanted_context(target: TargetGeometry, wishes: Wishes, on_gpu: bool) -> int:
    limit, asked = target.context_limit, wishes.options.context_tokens
    if asked > limit:
        raise UsageError(
            f"ctx {asked} is more than the target's {limit} positions", f"at most ctx={limit}"
        )
    return asked or min(limit, COMFORTABLE if on_gpu else DEFAULT_CONTEXT)


def _on_ladder(
    rungs: list[Candidate], options: EngineOptions, wanted: int, free: int
) -> tuple[Candidate, int]:
    """The highest rung that fits; if none does, the lowest as it was wanted."""
    room = roomy(free)
    for candidate in reversed(rungs):
        if candidate.total(lean(options), wanted) <= room:
            return candidate, wanted
    lowest, context = rungs[0], 0
    if not options.context_tokens:
        beside = room - budget.CUDA_CONTEXT
        context = lowest.demand.largest_context(lean(options), wanted, beside)
        wanted = min(wanted, budget.LEAST)
    return lowest, context or wanted


def _precision(
    pair: Pair, chosen: Candidate, options: EngineOptions, gpu: Gpu | None, free: int,
    measured: Measured,
) -> tuple[EngineOptions, Costs | None, bool]:  # fmt: skip
    """The options with drafter and draft head decided, the costs of passes, and whether these were
    measured.
    """
    plain = _decided(options)
    if gpu is None:
        return plain, None, False
    found = measured(Key(gpu.name, gpu.driver, pair.name, chosen.build.name))
    variants = [
        variant
        for drafter, head in product(
            ("bf16", "fp8") if options.drafter == "auto" else (options.drafter,),
            ("own", "fp8") if _may_copy(options, chosen) else (options.draft_head,),
        )
        if chosen.total(variant := replace(options, drafter=drafter, draft_head=head),
                        options.context_tokens) <= roomy(free)
    ]  # fmt: skip
    first = variants[0] if variants else lean(options)
    if without_kernels(gpu, chosen):
        return _decided(first), None, False

    def costs(variant: EngineOptions) -> Costs:
        formats, context = chosen.formats(variant), min(options.context_tokens, MEASURED_AT)
        made = speed.estimated(chosen.target, chosen.drafter, formats, bandwidth(gpu), context)
        return _up_to(made, chosen.demand.draft_tokens)

    def rate(variant: EngineOptions) -> float:
        made = costs(variant)
        return made.drafted(CURVES["mixed"], made.best(CURVES["mixed"]))

    best = max(variants, key=rate, default=first)
    if not rounds_unasked(gpu) or rate(best) < QUICKER * rate(first):
        best = first
    if found:
        return _decided(best), _up_to(found, chosen.demand.draft_tokens), True
    return _decided(best), costs(best), False


def _decided(options: EngineOptions) -> EngineOptions:
    """No "auto" left in what a plan decides."""
    return replace(
        options,
        drafter="bf16" if options.drafter == "auto" else options.drafter,
        draft_head="own" if options.draft_head == "auto" else options.draft_head,
    )


def _may_copy(options: EngineOptions, chosen: Candidate) -> bool:
    """Whether a copy of the head in 8 bits is ours to choose, and smaller than the head."""
    free = options.draft_head == "auto" and not options.draft_rows
    return free and chosen.formats(options).head > 8


def _up_to(costs: Costs, most: int) -> Costs:
    return replace(costs, verify_ms={n: ms for n, ms in costs.verify_ms.items() if n <= most + 1})


def _on_cpu(spent: Budget) -> Budget:
    """Of a GPU's budget what a CPU needs, too; activations are small beside it."""
    kept = ("target", "draft_head", "drafter", "drafter_cache", "target_cache", "state")
    return Budget(**{name: n if name in kept else 0 for name, n in asdict(spent).items()})
