"""`dflash-chat plan`: what a card can take, and why, without loading anything.

Knows the arguments and the printing; planner.py decides. Imports neither torch nor the hub.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dflash_chat import calibration, cards, gpu, listing, pairs, planner, reasons
from dflash_chat.cards import GIB
from dflash_chat.errors import EXIT_DOES_NOT_FIT, EXIT_OK, UsageError
from dflash_chat.geometry import ConfigError
from dflash_chat.gpu import Gpu
from dflash_chat.pairs import Pair
from dflash_chat.planner import Plan, Wishes
from dflash_chat.runtime.api import EngineOptions

COLUMNS = 80
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([GM])?(?:I?B)?", re.IGNORECASE)
_SHADES = "█▓▒░▞▚▙▟▛▜▌▐"  # as many as there are parts


@dataclass(frozen=True)
class Args:
    """`pair` None ranks all pairs. `vram` and `card` describe a GPU that need not be here."""

    wishes: Wishes
    pair: Pair | None = None
    vram: str = ""
    card: str = ""
    json: bool = False


def run(args: Args) -> int:
    """Print the plan of a pair, or all pairs ranked. Returns 5 if nothing fits.

    Raises UsageError for sizes, cards and contexts that make no sense, UnknownModelError for an
    unknown build, and ConfigError for a pair that cannot be counted.
    """
    device, problem = _device(args.vram, args.card)
    ram = 0 if device else free_ram()
    if args.pair:
        made = planner.plan(args.pair, args.wishes, device, ram, calibration.read)
        out = (
            json.dumps(as_json(made), indent=1) if args.json else _page(made, args.wishes, problem)
        )
        sys.stdout.write(out + "\n")
        if not made.fits:
            sys.stderr.write(f"dflash-chat: {reasons.shortage(made)}\n  {reasons.remedy(made)}\n")
        return EXIT_OK if made.fits else EXIT_DOES_NOT_FIT
    plans, uncounted = _all(args.wishes, device, ram)
    if args.json:
        found = [as_json(made) for made in plans]
        best = plans[0].pair.name if plans and plans[0].recommendable else None
        sys.stdout.write(json.dumps({"recommended": best, "plans": found}, indent=1) + "\n")
    else:
        sys.stdout.write(_ranking(plans, uncounted, device, problem) + "\n")
    if plans and plans[0].recommendable:
        return EXIT_OK
    where = _where(device, problem)
    sys.stderr.write(f"dflash-chat: no pair that can be loaded fits {where}\n")
    return EXIT_DOES_NOT_FIT


def as_json(made: Plan) -> dict[str, Any]:
    """The object of `--json`; its names are an interface. Bytes are whole, rates in tokens per
    second, contexts in tokens.
    """
    return {
        "pair": made.pair.name,
        "build": made.build.name,
        "gpu": made.gpu.name if made.gpu else None,
        "fits": made.fits,
        "missing": made.missing,
        "approximate": _approximate(made),
        "context_tokens": made.context_tokens,
        "kv_dtype": made.kv_dtype,
        "drafter": made.options.drafter,
        "draft_head": made.options.draft_head,
        "draft_rows": made.options.draft_rows,
        "head": made.options.head,
        "num_speculative_tokens": made.num_speculative_tokens,
        "bytes": asdict(made.budget),
        "total_bytes": made.budget.total,
        "free_bytes": made.free,
        "drafts": made.drafts,
        "tok_s": {
            "plain": round(made.costs.plain, 1),
            **{kind: round(made.tok_s(kind), 1) for kind in made.drafts},
            "measured": made.measured,
        }
        if made.costs
        else None,
        "acceptance": made.survival.to_dict() if made.survival else None,
        "why": [asdict(line) for line in made.why],
    }


# ── the device ──────────────────────────────────────────────────────────────────────────────────


def _device(vram: str, card: str) -> tuple[Gpu | None, str]:
    """The GPU to plan for: the one described, or this computer's first one; None is the CPU, with
    the reason.
    """
    if card:
        found = cards.find(card)
        total = parse_size(vram) if vram else round(found.gib * GIB)
        free = cards.usable(total)
        return Gpu(0, "", found.name, total, free, capability=found.capability), ""
    if vram:
        total = parse_size(vram)
        return Gpu(0, "", f"a card of {total / GIB:g} GB", total, cards.usable(total)), ""
    survey = gpu.survey()
    return (survey.gpus[0], "") if survey.gpus else (None, survey.problem)


def parse_size(text: str) -> int:
    """Bytes of `24G`, `24GB`, `24 GiB`, `24` or `24576M`; cards are sold in binary units.

    Raises UsageError for anything else, and beyond 1 to 2048 GB.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = GIB >> 10 if match and (match[2] or "").upper() == "M" else GIB
    size = float(match[1]) * unit if match else 0
    if not GIB <= size <= 2048 * GIB:
        raise UsageError(f"--vram {text!r} is no size of a card", "e.g. --vram 24G")
    return round(size)


def free_ram() -> int:
    """Bytes that this computer can give to a program, or 0 if it does not tell."""
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^MemAvailable: +(\d+) kB", told, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _all(wishes: Wishes, device: Gpu | None, ram: int) -> tuple[list[Plan], list[str]]:
    """Every pair that can be counted, ranked, and the names of the others."""
    plans: list[Plan] = []
    uncounted: list[str] = []
    for pair in pairs.load_catalogue(pairs.user_file()):
        try:
            plans.append(_clipped(pair, wishes, device, ram))
        except ConfigError:
            uncounted.append(pair.name)
    return planner.rank(plans), uncounted


def _clipped(pair: Pair, wishes: Wishes, device: Gpu | None, ram: int) -> Plan:
    """A plan whose context is at most the target's: not every pair has the one that was named."""
    try:
        return planner.plan(pair, wishes, device, ram, calibration.read)
    except UsageError:
        options = replace(wishes.options, context_tokens=0, draft_tokens=0)
        return planner.plan(pair, replace(wishes, options=options), device, ram, calibration.read)


# ── printing ────────────────────────────────────────────────────────────────────────────────────


def _page(made: Plan, wishes: Wishes, problem: str) -> str:
    title = f"{made.pair.name}@{made.build.name} on {_where(made.gpu, problem)}"
    lines = [*_wrapped(title, "", ""), "", *_memory(made), ""]
    for line in made.why:
        words = "; ".join(part for part in (line.because, line.instead) if part)
        lines += _wrapped(f"{line.choice}: {words}", f"{line.what:<13}", " " * 13)
    if guessed := _approximate(made):
        lines += ["", *_wrapped(f"Estimates: {guessed}.", "", "")]
    if made.missing:
        lines += ["", *_wrapped(f"It cannot be loaded yet: {made.missing}.", "", "")]
    elif made.fits:
        lines += ["", f"dflash-chat -m {made.pair.name}@{made.build.name}{_flags(wishes.options)}"]
    return "\n".join(lines)


def _approximate(made: Plan) -> str:
    """Which facts of the catalogue, those that plans are made of, are estimates."""
    parts = {"build": made.build.approximate, "drafter": made.pair.drafter.approximate}
    return "; ".join(
        f"{part}: {', '.join(keys)}"
        for part, facts in parts.items()
        if (keys := [key for key in facts if key != "bytes"])
    )


def _where(device: Gpu | None, problem: str) -> str:
    if device is None:
        return f"the CPU ({problem})" if problem else "the CPU"
    notes = f"; {device.notes}" if device.notes else ""
    return f"{device.name} ({reasons.gib(device.free)} free{notes})"


def _memory(made: Plan) -> Iterator[str]:
    """Parts of the memory, and a bar of those that have a column of it."""
    width = COLUMNS - 13
    words: list[str] = []
    bar, shades = "", iter(_SHADES)
    for name, size in asdict(made.budget).items():
        columns = round(width * size / made.free) if made.fits and made.free else 0
        shade = next(shades) if columns else ""
        bar += shade * columns
        if size:
            words.append(f"{shade} {name.replace('_', ' ')} {size / GIB:.2f}".strip())
    spare = f"{reasons.gib(made.spare)} spare" if made.fits and made.free else "does not fit"
    spare = spare if made.free else "free memory unknown"
    total = f"{reasons.gib(made.budget.total)} = {' · '.join(words)}; {spare}"
    yield from _wrapped(total, f"{'memory':<13}", " " * 13)
    if bar:
        yield f"{'':13}{bar[:width]:·<{width}}"


def _flags(options: EngineOptions) -> str:
    """What must be typed to wish for this; the rest is planned again when the pair is loaded."""
    rows = f"{options.draft_rows}" if options.draft_rows else ""
    head = "" if options.draft_head == "auto" else options.draft_head
    given = {
        "ctx": f"{options.context_tokens or ''}",
        "k": f"{options.draft_tokens or ''}",
        "drafter": "" if options.drafter == "auto" else options.drafter,
        "draft_head": ":".join(word for word in (head, rows) if word),
        "head": "" if options.head == "auto" else options.head,
    }
    return "".join(f" -o {key}={value}" for key, value in given.items() if value)


def _ranking(
    plans: Sequence[Plan], uncounted: Sequence[str], device: Gpu | None, problem: str
) -> str:
    rows = [["", "PAIR", "BUILD", "NEEDS", "CONTEXT", "TOK/S", "STATE"]]
    for made in plans:
        state = "does not fit" if not made.fits else "not read yet" if made.missing else "fits"
        rate = f"{made.tok_s():.0f}" if made.fits and made.costs else "–"
        best = "›" if made is plans[0] and made.recommendable else ""
        needs = reasons.gib(made.budget.total)
        context = f"{made.context_tokens}" if made.fits else "–"
        rows.append([best, made.pair.name, made.build.name, needs, context, rate, state])
    lines = [f"On {_where(device, problem)}:", "", *listing.aligned(rows, right=(3, 4, 5))]
    if uncounted:
        lines += ["", *_wrapped(f"Not counted, for want of facts: {', '.join(uncounted)}.", "", "")]
    return "\n".join([*lines, "", *_advice(plans)])


def _advice(plans: Sequence[Plan]) -> Iterator[str]:
    if not plans or not plans[0].recommendable:
        yield from _wrapped("Nothing that can be loaded fits.", "", "")
        return
    best = plans[0]
    how = "the biggest model that is quick here" if best.gpu else "small enough for a CPU"
    yield from _wrapped(f"Recommended: {best.pair.name}@{best.build.name}, {how}.", "", "")
    for line in best.why[:2]:
        reason = f"{line.what} {line.choice}: {line.because}"
        yield from _wrapped(f"{reason}; {line.instead}." if line.instead else reason + ".", "", "")
    unread = [made for made in plans if made.fits and made.missing]
    if unread:
        most = max(unread, key=planner.parameters)
        yield from _wrapped(
            f"{most.pair.name}@{most.build.name} would fit, but {most.missing}.", "", ""
        )
    yield ""
    yield f"dflash-chat plan {best.pair.name}   says more"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=first, subsequent_indent=rest, break_long_words=False
    )
