"""Which build, context, precision and width of a pair suit a card, and which pair does.

    build      the best that leaves room for a comfortable context; else the smallest
    context    comfortable, or what fits of it; more only where somebody asks
    precision  of what changes no answer: the drafter and its head, rounded where that is quicker,
               or where nothing else fits; the target's head, screened where that is quicker
    width      the number of drafted tokens that commits most per second by `speed.py`'s bytes and
               usual acceptance, or by what was measured here of either

Builds and contexts go up one ladder whose rungs take ever more memory, so that a bigger card never
gets a worse build or a shorter context. What the runtime cannot load is never recommended. Pure
functions of facts: asks no driver, opens no file. `reasons.py` has the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import product

from dflash_chat import budget, geometry, reasons, speed
from dflash_chat.budget import Budget
from dflash_chat.calibration import Key, Known
from dflash_chat.candidates import (
    COMFORTABLE,
    MEASURED_AT,
    Candidate,
    Plan,
    Wishes,
    bandwidth,
    ladder,
    lean,
    roomy,
    rounds_unasked,
    without_kernels,
)
from dflash_chat.entries import Build, Pair
from dflash_chat.errors import UsageError
from dflash_chat.geometry import TargetGeometry
from dflash_chat.gpu import Gpu
from dflash_chat.runtime.api import DEFAULT_CONTEXT, EngineOptions
from dflash_chat.speed import CURVES, HERE, Costs, Curve

__all__ = ["Measured", "Plan", "Wishes", "parameters", "plan", "plan_for", "rank"]

QUICKER = 1.03  # so much must a rounded drafter gain before it is taken unasked

Measured = Callable[[Key], Known]


def plan(
    pair: Pair, wishes: Wishes = Wishes(), gpu: Gpu | None = None, ram: int = 0,
    measured: Measured = lambda _: Known(),
) -> Plan:  # fmt: skip
    """The plan of a pair on `gpu`, or on this CPU with `ram` free bytes (0: unknown).

    Raises ConfigError if the pair's configs cannot be counted, UnknownModelError for an unknown
    build and UsageError for a context or a width beyond the pair's.
    """
    candidates = _candidates(pair, wishes, gpu is not None)
    wanted = _wanted_context(candidates[-1].target, wishes, gpu is not None)
    free = gpu.free if gpu else ram
    if gpu:
        quick = [c for c in candidates if not without_kernels(gpu, c)] or candidates
        chosen, context = _on_ladder(ladder(quick, wanted), wishes.options, wanted, free)
    else:
        chosen, context = candidates[0], wanted
    options = replace(wishes.options, context_tokens=context)
    device = (gpu.name, gpu.driver) if gpu else ("", "")
    found = measured(Key(*device, pair.name, chosen.build.name))
    curves: Mapping[str, Curve] = {HERE: found.survival} if found.survival else CURVES
    usual = HERE if found.survival else "mixed"
    options, costs, known = _precision(chosen, options, gpu, free, curves[usual], found.costs)
    most, asked = chosen.demand.draft_tokens, options.draft_tokens
    drafts = {kind: asked or costs.best(curve) for kind, curve in curves.items()} if costs else {}
    options = replace(options, draft_tokens=asked or drafts.get(usual, most))
    spent = chosen.demand.plan(options, context)
    spent = spent if gpu else _on_cpu(spent)
    decided = Plan(
        pair, chosen.build, gpu, options, spent, free,
        fits=spent.total <= free or (gpu is None and not ram), drafts=drafts, costs=costs,
        survival=found.survival, measured=known,
        missing=pair.missing or pair.drafter.missing or chosen.build.missing,
    )  # fmt: skip
    return replace(decided, why=reasons.why(decided, chosen, candidates, wishes))


def plan_for(
    pair: Pair,
    build: Build,
    options: EngineOptions,
    gpu: Gpu,
    measured: Measured = lambda _: Known(),
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
    chosen: Candidate, options: EngineOptions, gpu: Gpu | None, free: int, curve: Curve,
    found: Costs | None,
) -> tuple[EngineOptions, Costs | None, bool]:  # fmt: skip
    """The options with drafter and heads decided, the costs of passes, and whether these were
    measured, at the width that was asked for if one was.
    """
    most = chosen.demand.draft_tokens
    verify_ms = {n: ms for n, ms in found.verify_ms.items() if n <= most + 1} if found else {}
    known = None
    if found and len(verify_ms) > 1 and (not options.draft_tokens or most + 1 in verify_ms):
        known = Costs(verify_ms, found.draft_ms)
    if gpu is None:
        return _decided(options), known, known is not None
    drafters = ("bf16", "fp8") if options.drafter == "auto" else (options.drafter,)
    variants = [
        variant
        for drafter, heads in product(drafters, _heads(options, chosen))
        if chosen.total(variant := replace(heads, drafter=drafter), options.context_tokens)
        <= roomy(free)
    ]
    first = variants[0] if variants else lean(options)
    if without_kernels(gpu, chosen):
        return _decided(first), None, False

    def costs(variant: EngineOptions) -> Costs:
        return speed.estimated(
            chosen.target, chosen.drafter, chosen.formats(variant), bandwidth(gpu)[0],
            min(options.context_tokens, MEASURED_AT), most,
        )  # fmt: skip

    def rate(variant: EngineOptions) -> float:
        made = costs(variant)
        return made.drafted(curve, made.best(curve))

    best = max(variants, key=rate, default=first)
    if not rounds_unasked(gpu) or rate(best) < QUICKER * rate(first):
        best = first
    return _decided(best), known or costs(best), known is not None


def _heads(options: EngineOptions, chosen: Candidate) -> list[EngineOptions]:
    """Ways to read the head and to draft, from the plainest to what reads least."""
    of_copy = options.draft_head == "auto" and not options.draft_rows
    screened = replace(
        options, head="screened", draft_head="screened" if of_copy else options.draft_head
    )
    if options.head == "screened":
        return [screened]
    names = ("own", "fp8") if _may_copy(options, chosen) else (options.draft_head,)
    ways = [replace(options, draft_head=name) for name in names]
    dense = options.head == "auto" and chosen.formats(options).head == 16
    return [*ways, screened] if dense else ways


def _decided(options: EngineOptions) -> EngineOptions:
    """No "auto" left in what a plan decides."""
    return replace(
        options,
        drafter="bf16" if options.drafter == "auto" else options.drafter,
        draft_head="own" if options.draft_head == "auto" else options.draft_head,
        head="own" if options.head == "auto" else options.head,
    )


def _may_copy(options: EngineOptions, chosen: Candidate) -> bool:
    """Whether a copy of the head in 8 bits is ours to choose, and smaller than the head."""
    free = options.draft_head == "auto" and not options.draft_rows
    return free and chosen.formats(options).head > 8


def _on_cpu(spent: Budget) -> Budget:
    """Of a GPU's budget what a CPU needs, too; activations are small beside it."""
    kept = ("target", "screen", "draft_head", "drafter", "drafter_cache", "target_cache", "state")
    return Budget(**{name: n if name in kept else 0 for name, n in asdict(spent).items()})
