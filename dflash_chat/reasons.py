"""Why a plan is as it is, in sentences: every choice, its figures, and what would change it.

Knows plans and the candidates they were chosen from; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dflash_chat import budget, cards, speed
from dflash_chat.candidates import (
    COMFORTABLE,
    FP8_FROM,
    MEASURED_AT,
    Candidate,
    Plan,
    Why,
    Wishes,
    bandwidth,
    ladder,
    roomy,
    rounds_unasked,
    without_kernels,
)
from dflash_chat.cards import GIB
from dflash_chat.entries import Build
from dflash_chat.runtime.api import EngineOptions

SIZES = (8, 12, 16, 24, 32, 48, 80, 96, 141, 180)  # GB that cards are sold with


def why(
    made: Plan, chosen: Candidate, candidates: Sequence[Candidate], wishes: Wishes
) -> tuple[Why, ...]:
    """One for every choice of the plan, in the order of their weight."""
    lines = [_build(made, chosen, candidates, wishes), _context(made, chosen, wishes)]
    if made.gpu:
        lines += [_kv(made), _drafter(made, chosen, wishes), _draft_head(made, chosen, wishes)]
        lines += [_head(made, chosen, wishes)]
    if made.gpu and made.fits:
        lines.append(_others(made))
    if made.gpu or made.costs:
        lines += [_width(made, chosen, wishes), _rates(made, chosen)]
    return tuple(lines)


def gib(count: int, digits: int = 1) -> str:
    """`24.0 GiB`, or `48 MiB`."""
    return f"{count / GIB:.{digits}f} GiB" if count >= GIB // 10 else f"{count / 2**20:.0f} MiB"


def of_free(needed: int, free: int, of: str = "") -> str:
    """`needs 24.0 GiB, 23.4 GiB are free`, to as many digits as show the difference."""
    digits = next((n for n in (1, 2, 3) if f"{needed / GIB:.{n}f}" != f"{free / GIB:.{n}f}"), 4)
    return f"needs {gib(needed, digits)}, {gib(free, digits)}{of} are free"


def card_for(total: int) -> str:
    """`a 24 GB card`: the smallest that is sold with so many bytes free."""
    for size in SIZES:
        if cards.usable(size * GIB) >= total:
            return f"{'an' if size in (8, 80) else 'a'} {size} GB card"
    return "no single card"


def shortage(made: Plan) -> str:
    """One sentence about a plan that does not fit."""
    where = made.gpu.name if made.gpu else "this computer"
    return (
        f"{made.pair.name}@{made.build.name} with a context of {made.context_tokens} "
        f"{of_free(made.budget.total, made.free, f' of {where}')}"
    )


def remedy(made: Plan) -> str:
    """What would fit instead of a plan that does not, as a hint."""
    first = next((line.instead for line in made.why if line.instead), "")
    return first or f"{card_for(made.budget.total)} would take it"


def _build(made: Plan, chosen: Candidate, candidates: Sequence[Candidate], wishes: Wishes) -> Why:
    name, context = chosen.build.name, made.context_tokens
    if named := bool(wishes.build or made.pair.quant):
        because = "you named it"
    elif made.gpu is None:
        because = "the pair's own first choice"
    else:
        better = [c for c in ladder(candidates, context) if c.quality > chosen.quality]
        which = "there is" if made.missing else "that can be loaded"
        because = f"the {'best' if made.fits else 'smallest'} {which}"
        if better and made.fits:
            total, word = better[0].total(made.options, context), better[0].build.name
            because = f"{word} {of_free(total, made.free)}"
            line = Why("build", name, because, f"{card_for(total)} would take {word}")
            return _also(made, chosen, line)
    if not made.fits:
        because = f"{because}; it {of_free(made.budget.total, made.free)}"
        smaller = min(candidates, key=lambda c: c.total(made.options, context))
        if smaller.total(made.options, context) <= made.free:
            return Why("build", name, because, f"{smaller.build.name} would fit")
        return _also(made, chosen, Why("build", name, because, _what_fits(made, chosen)))
    line = Why("build", name, because)
    return line if named else _also(made, chosen, line)


def _what_fits(made: Plan, chosen: Candidate) -> str:
    """A shorter context, or a bigger card."""
    options = replace(made.options, drafter="fp8")
    context = _largest(made, chosen, options, made.context_tokens)
    taken = f"{card_for(made.budget.total)} would take it"
    return f"-o drafter=fp8 -o ctx={context} would fit; {taken}" if context else taken


def _also(made: Plan, chosen: Candidate, line: Why) -> Why:
    """With the build that would be better, or fit, were it read."""
    for build in _unread(made, chosen):
        total = made.budget.total - made.budget.target + build.resident_bytes
        if total <= made.free:
            word = f"{build.name} ({gib(build.resident_bytes)}) would fit, but {build.missing}"
            return replace(line, because=f"{line.because}; {word}")
    return line


def _unread(made: Plan, chosen: Candidate) -> Iterator[Build]:
    """Builds that the runtime lacks something for: better ones, or if nothing fits all, best
    first.
    """
    if made.pair.missing or made.pair.drafter.missing:
        return
    unread = [b for b in made.pair.builds if b.missing and b.name != chosen.build.name]
    for build in sorted(unread, key=lambda b: -b.bits):
        if not made.fits or build.bits > chosen.quality:
            yield build


def _context(made: Plan, chosen: Candidate, wishes: Wishes) -> Why:
    limit = chosen.target.context_limit
    asked, context = wishes.options.context_tokens, made.context_tokens
    per_token = 2 * chosen.target.kv_values + 2 * sum(
        2 * a.kv_heads * a.head_dim for a in chosen.drafter.attention if not a.window
    )
    because = f"{per_token} bytes a token; "
    if asked:
        because += "you named it"
    elif context == limit:
        because += "all that the target was made for"
    elif context < COMFORTABLE and made.gpu:
        because += "what fits" if made.fits else "the least there is"
    else:
        because += "a long conversation" if made.gpu else "a CPU reads long prompts slowly"
    largest = _largest(made, chosen, made.options, limit) if made.gpu else context
    instead = f"-o ctx={largest} would fit, too" if largest > context else ""
    if largest < context and made.gpu:
        freed = made.budget.total - chosen.total(made.options, largest) if largest else 0
        instead = f"-o ctx={largest} would free {gib(freed)}" if largest else ""
    elif made.gpu and largest == context < limit and context < COMFORTABLE:
        total = chosen.total(made.options, min(limit, COMFORTABLE))
        instead = f"{card_for(total)} would take {min(limit, COMFORTABLE)}"
    return Why("context", f"{context} of {limit}", because, instead)


def _others(made: Plan) -> Why:
    because = "if they take more before it is loaded, it is refused; what is loaded is held"
    return Why("others", f"{gib(made.spare)} left", because)


def _largest(made: Plan, chosen: Candidate, options: EngineOptions, most: int) -> int:
    return chosen.demand.largest_context(options, most, roomy(made.free) - budget.CUDA_CONTEXT)


def _kv(made: Plan) -> Why:
    saved = (made.budget.target_cache + made.budget.drafter_cache) // 2
    return Why(
        "keys, values", made.kv_dtype, "the only format that the runtime keeps",
        f"8 bits would save {gib(saved)}, but are not kept yet",
    )  # fmt: skip


def _drafter(made: Plan, chosen: Candidate, wishes: Wishes) -> Why:
    demand, choice = chosen.demand, made.options.drafter
    saved = demand.drafter_bytes - demand.drafter_fp8_bytes
    if wishes.options.drafter != "auto":
        return Why("drafter", choice, "you named it")
    if choice == "fp8":
        plain = replace(made.options, drafter="bf16")
        fits = chosen.total(plain, made.context_tokens) <= made.free
        quicker = "quicker to read, same answers" if fits else "takes least; same answers"
        return Why("drafter", choice, f"{quicker}; saves {gib(saved)}", "-o drafter=bf16")
    because = "rounding it would gain next to nothing" if _rounds(made) else _UNMEASURED
    return Why("drafter", choice, because, f"-o drafter=fp8 would free {gib(saved)}")


def _draft_head(made: Plan, chosen: Candidate, wishes: Wishes) -> Why:
    choice = made.options.draft_head
    if made.options.draft_rows:
        choice = f"{choice}, {made.options.draft_rows} rows"
    if wishes.options.copies_head or wishes.options.draft_head != "auto":
        return Why("draft head", choice, "you named it")
    if choice == "screened":
        return Why("draft head", choice, "the copy that screens the target's; same answers")
    if choice == "fp8":
        took = gib(made.budget.draft_head)
        because = f"a copy of {took} that drafts are read off in half the time; same answers"
        return Why("draft head", choice, because, "-o draft_head=own")
    read = gib(round(_head_bytes(chosen) * chosen.formats(made.options).head / 8))
    own = f"the target's own, {read} a draft"
    if not _rounds(made):
        return Why("draft head", choice, own, "-o draft_head=fp8 reads half")
    return Why("draft head", choice, f"{own}; a copy would not pay, or not fit")


_UNMEASURED = "rounding is not measured below compute capability {}.{}".format(*FP8_FROM)


def _rounds(made: Plan) -> bool:
    return made.gpu is not None and rounds_unasked(made.gpu)


def _head_bytes(chosen: Candidate) -> int:
    """Numbers in the head."""
    return chosen.target.head or chosen.target.embedding


def _head(made: Plan, chosen: Candidate, wishes: Wishes) -> Why:
    if made.options.head == "fp8":
        return Why("head", "fp8", "you named it; answers may differ from the file's")
    if made.options.head == "screened":
        took = gib(made.budget.screen)
        because = f"a copy of {took} says which rows can win, half the bytes; same answers"
        if wishes.options.head == "screened":
            return Why("head", "screened", f"you named it; {because}")
        return Why("head", "screened", because, "-o head=own")
    bits = chosen.formats(made.options).head
    saved = gib(round(_head_bytes(chosen) * (bits - 8) / 8))
    instead = f"-o head=fp8 reads {saved} less a pass; answers may differ" if bits > 8 else ""
    return Why("head", f"{bits:g} bits", "as in its file", instead)


def _width(made: Plan, chosen: Candidate, wishes: Wishes) -> Why:
    choice, target = f"{made.num_speculative_tokens} drafted", chosen.target
    if wishes.options.draft_tokens:
        return Why("width", choice, "you named it")
    if not made.drafts:
        return Why("width", choice, "the pair's own; nothing is known of this card's speed")
    because = "any number of rows reads the same weights"
    if made.gpu is None:
        because = "what rows take was measured on this processor"
    elif target.num_experts:
        rows = chosen.demand.draft_tokens + 1
        touched = speed.distinct_experts(target.num_experts, target.top_k_experts, rows)
        because = (
            f"{rows} rows read {touched:.0f} of {target.num_experts} experts a layer if they "
            f"choose alone, one row {target.top_k_experts}; neighbours share some"
        )
    best = "best for " + ", ".join(f"{kind} {k}" for kind, k in made.drafts.items())
    if made.survival:
        best = f"best for the acceptance measured on {made.survival.tokens} tokens here"
    return Why("width", choice, because, f"{best}; the engine chooses in every step")


def _rates(made: Plan, chosen: Candidate) -> Why:
    gpu, costs = made.gpu, made.costs
    if costs is None:
        assert gpu is not None, "a CPU has no line of speeds unless they were measured"
        because = without_kernels(gpu, chosen)
        return Why("speed", "unknown", f"{because}; plain torch is slower")
    drafted = ", ".join(f"{kind} {made.tok_s(kind):.0f}" for kind in made.drafts)
    choice = f"{costs.plain:.0f} tok/s plain; drafted {drafted}"
    accepted = "usual acceptance"
    if made.survival:
        accepted = f"acceptance measured on {made.survival.tokens} tokens here"
    if gpu is None or made.measured:
        device = "card" if gpu else "processor"
        return Why("speed", choice, f"passes measured on this {device}, {accepted}")
    speed_of, source = bandwidth(gpu)
    context = min(made.context_tokens, MEASURED_AT)
    because = f"estimated at {speed_of:.0f} GB/s ({source}) and {context} tokens of context"
    because += f", {accepted}" if made.survival else ""
    return Why("speed", choice, because, "what a load measures replaces it")
