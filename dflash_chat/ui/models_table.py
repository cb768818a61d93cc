"""What the models screen shows of a pair, as text: its row, and what is to be known of it now.

Pure functions of the catalogue, of what is installed, of a plan and of the hub's answers; knows
neither keys nor widgets.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dflash_chat import hub, listing, pairs
from dflash_chat.access import READABLE, Access, State
from dflash_chat.candidates import Plan
from dflash_chat.entries import Build, HubSource, Pair
from dflash_chat.errors import UserError
from dflash_chat.here import Machine
from dflash_chat.progress import size
from dflash_chat.reasons import gib, remedy, shortage
from dflash_chat.ui import gate
from dflash_chat.ui.bars import thousands

SIZE_FROM, GATE_FROM = 66, 78  # columns of the screen from which these are shown
_PAIR, _SIZE, _FITS, _GATE = 20, 8, 20, 11


@dataclass
class Entry:
    """A pair on this machine. `answers` are the hub's, None until it is asked."""

    pair: Pair
    row: dict[str, Any]
    plan: Plan | None
    answers: list[Access] | None = None
    build: Build = field(init=False)  # the one that is installed, or that would be fetched

    def __post_init__(self) -> None:
        planned = self.plan is not None and self.loads
        self.build = (
            self.plan.build if planned and self.plan else self.pair.build(self.row["build"])
        )

    @property
    def name(self) -> str:
        """The pair's."""
        return self.pair.name

    @property
    def installed(self) -> bool:
        """Whether a build of it is complete here."""
        return bool(self.row["installed"])

    @property
    def loads(self) -> bool:
        """Whether the runtime can load it at all."""
        return bool(self.row["loadable"])

    @property
    def bytes(self) -> int:
        """Of the build and the drafter: those installed, or the download's."""
        if self.installed:
            return int(self.row["bytes"])
        return self.build.source.bytes + int(self.row["drafter_bytes"])

    @property
    def to_fetch(self) -> str:
        """The build to name when fetching; none where another may stand in if it is not there."""
        known = self.pair.kind == "catalogue" and isinstance(self.build.source, HubSource)
        return self.build.name if known else ""

    @property
    def sources(self) -> list[HubSource]:
        """The repositories that a pull would read."""
        return [] if self.installed else gate.sources(self.pair, self.build)


def entries(machine: Machine, also: str = "") -> list[Entry]:
    """Every pair of the catalogue, and the one named `also`, planned for an idle machine."""
    known = list(pairs.load_catalogue(pairs.user_file()))
    if also and also not in [pair.name for pair in known]:
        with suppress(UserError):  # a folder of one's own that is gone
            known.insert(0, pairs.find(also))
    rows = listing.rows(known)
    return [
        Entry(pair, row, machine.plan(pair, _settled(row)))
        for pair, row in zip(known, rows, strict=True)
    ]


def _settled(row: dict[str, Any]) -> str:
    """The build that the planner need not choose: it is here, or the package index has it."""
    return str(row["build"]) if row["installed"] or row["source"] == "pypi" else ""


def found(entry: Entry, words: str) -> bool:
    """Whether all of the words stand in its name, aliases, title or licence."""
    pair = entry.pair
    text = " ".join((pair.name, *pair.aliases, pair.title, pair.licence)).lower()
    return all(word in text for word in words.lower().split())


# ── the row ─────────────────────────────────────────────────────────────────────────────────────


def head(width: int) -> str:
    """The names of the columns."""
    return _cells(("PAIR", "SIZE", "FITS", "GATE", "STATE"), width, "  ")


def row(entry: Entry, width: int, loaded: bool, fetching: str) -> str:
    """One pair; `fetching` says how far its pull is, or ""."""
    state = fetching or state_words(entry, loaded)
    cells = (entry.name, size(entry.bytes), fit_words(entry.plan), gate_word(entry), state)
    return _cells(cells, width, "● " if loaded else "  ")


def _cells(cells: tuple[str, str, str, str, str], width: int, mark: str) -> str:
    name, bytes_, fits, gates, state = cells
    kept = [_cut(name, _PAIR)]
    if width >= SIZE_FROM:
        kept += [bytes_.rjust(_SIZE), _cut(fits, _FITS)]
    else:
        kept.append(_cut(" ".join(fits.replace("needs ", "").split()[:2]), 8))
    if width >= GATE_FROM:
        kept.append(_cut(gates, _GATE))
    line = mark + "  ".join([*kept, state])
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def _cut(text: str, width: int) -> str:
    return (text if len(text) <= width else text[: width - 1] + "…").ljust(width)


def fit_words(plan: Plan | None) -> str:
    """Whether it fits here, and as what."""
    if plan is None:
        return "? not counted"
    if not plan.fits:
        return f"✗ needs {gib(plan.budget.total)}"
    context = thousands(plan.context_tokens)
    return f"✓ {plan.build.name} K{plan.num_speculative_tokens} {context}"


def gate_word(entry: Entry) -> str:
    """Whether the hub gives it to this machine."""
    if entry.installed or not entry.sources:
        return "–"
    return "?" if entry.answers is None else gate.word(entry.answers)


def state_words(entry: Entry, loaded: bool) -> str:
    """What there is of it here."""
    if loaded:
        return "loaded"
    if entry.installed:
        return "installed"
    return "–" if entry.loads else "not read yet"


# ── below the list ──────────────────────────────────────────────────────────────────────────────


def about(entry: Entry, loaded: bool, asking: bool, since: str) -> list[str]:
    """The pair, what Enter does with it, and what stands in the way; `since` when its gate is
    watched, or "".
    """
    pair, plan = entry.pair, entry.plan
    lines = [f"{pair.title} · {pair.licence} · {entry.build.name}, {size(entry.bytes)}"]
    if not entry.loads:
        return [*lines, f"it cannot be loaded yet: {listing.why_not(pair)}"]
    if plan is not None and not plan.fits:
        lines.append(f"✗ {shortage(plan)}; {remedy(plan)}")
    elif plan is not None and plan.why and not entry.installed and entry.to_fetch:
        lines.append(f"{plan.build.name}: {plan.why[0].because}")
    if loaded:
        lines.append("it is loaded")
    elif entry.installed:
        lines.append("Enter loads it; what is loaded now ends first, the chat is kept")
    elif plan is None or plan.fits:
        lines += [*_gate_lines(entry, since), *(["asking the hub …"] if asking else [])]
    return lines


def _gate_lines(entry: Entry, since: str) -> list[str]:
    """The hub's answers, and the next step."""
    answers = entry.answers or []
    shut = [answer for answer in answers if answer.state not in READABLE]
    lines = [f"! {message}" for message in dict.fromkeys(answer.message for answer in shut)]
    lines += [f"  {hint}" for hint in dict.fromkeys(answer.hint for answer in shut) if hint]
    if gate.waits(answers):
        lines.append("  asked again every 5 s · o opens the page, c copies its address, l logs in")
        if os.environ.get("HF_TOKEN") and any(a.state is State.INVALID_TOKEN for a in shut):
            lines.append("  HF_TOKEN goes before a login until dflash-chat is started without it")
    elif since:
        lines.append(f"  watched since {since}: you are told in the chat · n gives it up")
    elif gate.waits_for_others(answers):
        lines.append("  n watches it and tells you in the chat · o opens the page, c copies it")
    elif answers and not shut:
        lines.append("Enter fetches it")
    return lines


def address(entry: Entry) -> str:
    """The page to open for the next step, or the first repository's."""
    answers = entry.answers or []
    shut = [a.url for a in answers if a.state not in READABLE and a.url]
    pages = shut or [a.url for a in answers if a.url]
    if pages:
        return pages[0]
    here = gate.sources(entry.pair, entry.build)
    return f"https://huggingface.co/{here[-1].repo}" if here else ""


def disk_words() -> str:
    """What is free where weights go."""
    from dflash_chat import preflight

    return f"{size(preflight.free_bytes(hub.cache_dir()))} of disk free"
