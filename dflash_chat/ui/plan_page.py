"""What the plan screen shows, as text: memory by part, choices, reasons, estimates, measurements.

Pure functions of a plan and of what is loaded; knows neither keys nor widgets. Every reason is the
planner's own, the same as `plan --json` prints.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dflash_chat import listing
from dflash_chat.budget import Budget
from dflash_chat.candidates import MEASURED_AT, Plan, Wishes
from dflash_chat.entries import Pair
from dflash_chat.reasons import gib
from dflash_chat.runtime.api import ModelInfo
from dflash_chat.runtime.baseline import Plain
from dflash_chat.speed import Costs
from dflash_chat.ui.bars import grouped

LABEL = 13  # cells before a reason
LEAST_CONTEXT = 1024  # tokens; the shorter half of what the arrow keys go through


@dataclass(frozen=True)
class Part:
    """A part of the memory: the letter that stands for it in the bar, its name and its bytes."""

    letter: str
    name: str
    bytes: int


_PARTS = (
    ("W", "weights", ("target", "screen")),
    ("D", "drafter", ("drafter", "draft_head")),
    ("C", "caches", ("target_cache", "drafter_cache", "state")),
    ("G", "graphs, workspace", ("tables", "buffers", "graphs", "workspace")),
    ("R", "CUDA", ("cuda_context", "modules")),
)


def parts(budget: Budget) -> list[Part]:
    """The parts that a device has, the same ones for every plan on it."""
    of = asdict(budget)
    made = [Part(letter, name, sum(of[key] for key in keys)) for letter, name, keys in _PARTS]
    return [part for part in made if part.bytes]


def cells(made: Sequence[Part], free: int, width: int) -> list[tuple[str, int]]:
    """Letters and how many cells each takes of `width`, one at least, which stands for what is
    free, or for all of the parts where they are more; "·" is spare.
    """
    whole = max(free, sum(part.bytes for part in made)) or 1
    taken, reached, drawn = [], 0, 0
    for part in made:
        reached += part.bytes
        end = min(max(round(width * reached / whole), drawn + 1), width)
        taken.append((part.letter, end - drawn))
        drawn = end
    return [*taken, ("·", width - drawn)]


def spare_words(made: Plan) -> str:
    """What is left, or how much too much it is."""
    if not made.free:
        return "free memory unknown"
    if made.fits:
        return f"{gib(made.spare)} spare"
    return f"✗ does not fit: {gib(-made.spare)} too much"


# ── choices ─────────────────────────────────────────────────────────────────────────────────────


def builds(pair: Pair) -> list[str]:
    """What the arrow keys go through: the planner's choice, then every build."""
    return ["", *(build.name for build in pair.builds)]


def widths(pair: Pair) -> list[int]:
    """The same for drafted tokens; 0 is the planner's choice."""
    return list(range(pair.drafter.block_size))


def contexts(pair: Pair, now: int) -> list[int]:
    """The same for tokens of context, with the present one among them."""
    limit = int(pair.config.get("max_position_embeddings", 0)) or now
    doubled = [LEAST_CONTEXT << n for n in range(24) if LEAST_CONTEXT << n < limit]
    return sorted({0, *doubled, limit, now})


def choice_lines(made: Plan | None, wishes: Wishes, current: int, typed: str) -> list[str]:
    """The three choices, one of them current; what is left to the planner says what it takes."""
    options = wishes.options
    rows = [
        ("quant", wishes.build, made.build.name if made else ""),
        ("K", str(options.draft_tokens or ""), str(made.num_speculative_tokens) if made else ""),
        (
            "context",
            grouped(options.context_tokens) if options.context_tokens else "",
            grouped(made.context_tokens) if made else "",
        ),
    ]
    lines = []
    for row, (name, chosen, taken) in enumerate(rows):
        value = chosen or f"auto: {taken}"
        if row == current and typed:
            value = f"{typed}▏"
        mark = "›" if row == current else " "
        lines.append(f"{mark} {name:8} ◂ {value} ▸")
    return lines


# ── reasons ─────────────────────────────────────────────────────────────────────────────────────


def reason_lines(made: Plan, width: int) -> list[str]:
    """The planner's reasons, wrapped; on narrow screens below their names."""
    indent = LABEL if width >= 60 else 2
    lines: list[str] = []
    for why in made.why:
        words = "; ".join(filter(None, (f"{why.choice}: {why.because}", why.instead)))
        first = f"{why.what:<{indent}}" if len(why.what) < indent else f"{why.what} "
        lines += textwrap.wrap(
            words, max(width, 20), initial_indent=first, subsequent_indent=" " * indent,
            break_long_words=False,
        )  # fmt: skip
    return lines


# ── estimated and measured ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Loaded:
    """What runs now: its own plan with costs as estimated, the engine's figures, costs as measured
    on this card at some load, and plain decoding as it was last.
    """

    plan: Plan
    estimated: Costs | None
    info: ModelInfo
    measured: Costs | None
    plain: Plain | None
    plain_age_s: float | None


def measured_lines(made: Plan, loaded: Loaded | None) -> list[str]:
    """A table: this plan; what is loaded, as estimated and as measured."""
    rows = [["", "estimated"], *([p.name, gib(p.bytes)] for p in parts(made.budget))]
    rows.append(["in all", gib(made.budget.total)])
    if loaded is None:
        return _aligned(rows)
    info, before = loaded.info, {p.name: p.bytes for p in parts(loaded.plan.budget)}
    found = {
        "weights": info.target_bytes, "drafter": info.drafter_bytes, "caches": info.cache_bytes,
    }  # fmt: skip
    if info.other_bytes:
        found["graphs, workspace, CUDA"] = info.other_bytes
    rest = [name for name in ("graphs, workspace", "CUDA") if name in before]
    changed = made.budget != loaded.plan.budget
    new = {p.name: p.bytes for p in parts(made.budget)}
    for figures in (new, before):
        if rest:
            figures["graphs, workspace, CUDA"] = sum(figures.pop(name, 0) for name in rest)
        figures["in all"] = sum(figures.values())
    found["in all"] = sum(found.values())
    rows = [["", *(["this plan", "as loaded"] if changed else ["estimated"]), "measured"]]
    for name in new:
        told = [gib(new[name])] if changed else []
        rows.append([name, *told, *_two(before.get(name, 0), found.get(name, 0))])
    return [*_aligned(rows), *_pass_lines(loaded)]


def _two(estimate: int, measured: int) -> list[str]:
    return [gib(estimate) if estimate else "–", gib(measured) if measured else "–"]


def _pass_lines(loaded: Loaded) -> list[str]:
    """Milliseconds of passes: by the bytes they read, as timed on this card, and as they are."""
    info = loaded.info
    caches = next((p.bytes for p in parts(loaded.plan.budget) if p.name == "caches"), 0)
    estimate, measured = (n / info.context_tokens / 1000 for n in (caches, info.cache_bytes))
    lines = [f"caches, a token   {estimate:.1f} kB estimated, {measured:.1f} kB measured"]
    if loaded.estimated:
        context = min(loaded.plan.context_tokens, MEASURED_AT)
        lines.append(f"passes estimated  {_costs_words(loaded.estimated, context)}")
    if loaded.measured:
        lines.append(f"passes measured   {_costs_words(loaded.measured, MEASURED_AT)}")
    if loaded.plain:
        age = loaded.plain_age_s
        when = "at load" if age is None else f"{age:.0f} s ago"
        plain = loaded.plain
        lines.append(
            f"plain pass now    {plain.ms:.1f} ms, measured {when} at "
            f"{grouped(plain.context_tokens)} tokens"
        )
    return lines


def _costs_words(costs: Costs, context: int) -> str:
    shown: Mapping[int, float] = costs.verify_ms
    rows = [n for n in (1, 2, 4, 8, 16) if n in shown]
    if max(shown) not in rows:
        rows.append(max(shown))
    words = " · ".join(f"{n} row{'s' * (n > 1)} {shown[n]:.1f}" for n in rows)
    return f"{words} · draft {costs.draft_ms:.1f} ms at {grouped(context)} tokens"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Words in the first column, numbers behind."""
    return listing.aligned(rows, right=range(1, len(rows[0])))
