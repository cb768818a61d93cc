"""`list` and `show`: the catalogue for people, for programs and for shells.

Knows how a pair is told in words and columns. Looks at manifests only; needs neither torch, nor the
network, nor the hub's library.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dflash_chat import hub
from dflash_chat.pairs import Build, Drafter, Fact, HubSource, Pair
from dflash_chat.progress import size

_SIZE_FROM, _LICENCE_FROM = 62, 74  # columns of the terminal from which these are shown
_LEAST = 24  # columns that the last cell keeps


# ── list ────────────────────────────────────────────────────────────────────────────────────────


def names(catalogue: Iterable[Pair]) -> str:
    """One name a line."""
    return "\n".join(pair.name for pair in catalogue)


def rows(catalogue: Iterable[Pair]) -> list[dict[str, Any]]:
    """What `list --json` prints: one object for every pair.

    `build` is the one that is installed, or else the first that would be taken and can be loaded.
    `bytes` are its download's, or those installed; `drafter_bytes` are 0 where nothing is fetched.
    `missing` says why nothing can be loaded.
    """
    return [_row(pair) for pair in catalogue]


def _row(pair: Pair) -> dict[str, Any]:
    found = hub.installed(pair)
    build = found.build if found else best(pair)
    return {
        "name": pair.name,
        "aliases": list(pair.aliases),
        "title": pair.title,
        "licence": pair.licence,
        "build": build.name,
        "builds": [build.name for build in pair.builds],
        "source": build.source.kind,
        "bytes": found.bytes if found else build.source.bytes,
        "drafter_bytes": pair.drafter.source.bytes if pair.drafter.source else 0,
        "installed": found is not None,
        "path": str(found.target) if found else None,
        "loadable": bool(pair.loadable),
        "missing": why_not(pair),
    }


def best(pair: Pair) -> Build:
    """The build that would be taken: of the default ones, the first that can be loaded."""
    order = [*(pair.build(name) for name in pair.default), *pair.builds]
    return next((build for build in order if not build.missing), order[0])


def why_not(pair: Pair) -> str:
    """What the runtime lacks for the pair; "" if it can load a build of it."""
    if pair.loadable:
        return ""
    return pair.missing or pair.drafter.missing or best(pair).missing


def table(rows: Sequence[dict[str, Any]], width: int) -> str:
    """The rows for a terminal of `width` columns; 0: nothing is left out."""
    lines = [["PAIR", "BUILD", "SIZE", "LICENCE", "STATE"]]
    for row in rows:
        state = "installed" if row["installed"] else row["missing"] or "not installed"
        total = size(row["bytes"] + row["drafter_bytes"])
        lines.append([row["name"], row["build"], total, row["licence"], state])
    wide = width or 1 << 20
    kept = [0, *([1, 2] if wide >= _SIZE_FROM else []), *([3] if wide >= _LICENCE_FROM else []), 4]
    return columns([[line[i] for i in kept] for line in lines], width)


def columns(lines: Sequence[Sequence[str]], width: int = 0) -> str:
    """Cells side by side; the last one is cut where the terminal ends."""
    widths = _widths(lines)[:-1]
    room = max(_LEAST, width - sum(widths) - 2 * len(widths)) if width else 1 << 20
    cut = [last if len(last) <= room else last[: room - 1] + "…" for *_, last in lines]
    return "\n".join(aligned([[*line[:-1], last] for line, last in zip(lines, cut, strict=True)]))


def aligned(lines: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Cells side by side; the columns in `right` end below each other, the others begin so."""
    widths = _widths(lines)
    told = []
    for line in lines:
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        told.append("  ".join(cells).rstrip())
    return told


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]


def terminal_width() -> int:
    """Columns of the terminal; 0 where stdout is none, and nothing should be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


# ── show ────────────────────────────────────────────────────────────────────────────────────────


def as_json(pair: Pair) -> str:
    """What `show --json` prints: all that the catalogue knows."""
    known = asdict(pair) | {"loadable": [build.name for build in pair.loadable]}
    return json.dumps(known, indent=1, default=str, ensure_ascii=False)


def describe(pair: Pair) -> str:
    """What `show` prints for people."""
    builds = [pair.build(pair.quant)] if pair.quant else pair.builds
    facts = [("", pair.facts), ("drafter: ", pair.drafter.facts)]
    facts += [(f"{build.name}: ", build.facts) for build in builds]
    parts = [_head(pair), _builds(pair, builds), _drafter(pair.drafter), _facts(facts)]
    return "\n\n".join(part for part in parts if part)


def _head(pair: Pair) -> str:
    sampling = {k: v for k, v in asdict(pair.sampling).items() if v != _UNSET[k]}
    lines = [
        ["aliases", ", ".join(pair.aliases)],
        ["licence", pair.licence],
        ["loads", why_not(pair) or "yes"],
        ["thinking", "on" if pair.thinking else "off"],
        ["sampling", ", ".join(f"{key} {value}" for key, value in sampling.items())],
        ["notes", pair.notes],
    ]
    return f"{pair.name}: {pair.title}\n" + columns([line for line in lines if line[1]])


_UNSET = asdict(Pair.sampling)


def _builds(pair: Pair, builds: Sequence[Build]) -> str:
    lines = [["BUILD", "DOWNLOAD", "ON DEVICE", "LOADS", "FORMAT", "FROM"]]
    for build in builds:
        disk = _about(build, "bytes") + size(build.source.bytes)
        device = _about(build, "resident_bytes") + size(build.resident_bytes)
        name = f"{build.name}*" if build.name in pair.default else build.name
        form = f"{build.weights} {build.format}"
        loads = build.missing or "yes"
        lines.append([name, disk, device, loads, form, _origin(build.source)])
    return columns(lines) + "\n* is taken while none is named, ~ is an estimate"


def _about(build: Build, key: str) -> str:
    return "~" if key in build.approximate else ""


def _drafter(drafter: Drafter) -> str:
    origin = _origin(drafter.source) if drafter.source else str(drafter.path)
    lines = [
        ["drafter", origin],
        ["", f"DFlash{drafter.version if drafter.version > 1 else ''}, "
             f"block of {drafter.block_size}, {size(drafter.bytes)}"],
        ["", drafter.missing],
        ["", drafter.notes],
    ]  # fmt: skip
    if drafter.approximate:
        lines.append(["", f"estimates: {', '.join(drafter.approximate)}"])
    return columns([line for line in lines if line[1]])


def _origin(source: object) -> str:
    if isinstance(source, HubSource):
        commit = len(source.revision) == 40
        return f"{source.repo}@{source.revision[:8] if commit else source.revision}"
    return str(source)


def _facts(facts: Sequence[tuple[str, Sequence[Fact]]]) -> str:
    """A line for each; what they are of stands before them, the pair itself unsaid."""
    rows = [[f.date, f"{of}{f.what} ({f.source})"] for of, each in facts for f in each]
    if not rows:
        return ""
    return columns([["DATE", "FACT"], *rows])
