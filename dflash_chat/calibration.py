"""What passes really took and accepted, kept between runs: it replaces `speed.py`'s estimates.

One JSON file in the cache folder; an entry per card, driver, pair and build. Losing it costs
nothing but estimates, so a file that cannot be read or written is no error. Knows the file; knows
neither who measures nor what the figures are for.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dflash_chat.hub import cache_dir
from dflash_chat.runtime.costs import CostTable
from dflash_chat.speed import Costs, Survival

log = logging.getLogger(__name__)

_CONTEXT = 2048  # tokens behind which a plan compares costs


@dataclass(frozen=True)
class Key:
    """What a measurement holds for. `gpu` is the card's name, `driver` its version; without a name
    it holds for this computer's processor.
    """

    gpu: str
    driver: str
    pair: str
    build: str

    def __str__(self) -> str:
        return " | ".join((self.gpu or processor(), self.driver, self.pair, self.build))


@dataclass(frozen=True)
class Known:
    """What was measured last: what passes take, and how far drafts survive; None was not."""

    costs: Costs | None = None
    survival: Survival | None = None


@cache
def processor() -> str:
    """This computer's, by name."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if "model name" in line]
    return f"CPU {next(iter(names), platform.machine())}"


def file() -> Path:
    """In the folder of what may be deleted."""
    return cache_dir() / "calibration.json"


def read(key: Key) -> Known:
    """What was measured last, whatever else it was measured with. Costs without a drafted pass are
    none.
    """
    entry = _entry(key, _entries())
    table = _table(entry)
    costs = Costs.of(table, _CONTEXT) if table is not None and len(table.widths) > 1 else None
    return Known(costs, _survival(entry))


def table(key: Key, rig: str) -> CostTable | None:
    """The table measured last, if it was with this `rig`: all else that times depend on, in
    words.
    """
    entry = _entry(key, _entries())
    return _table(entry) if entry.get("rig") == rig else None


def write(key: Key, rig: str, table: CostTable) -> None:
    """Keep this table; the rest of the file stays. A folder that cannot be written is left."""
    _write(key, {"rig": rig, "costs": table.to_dict()})


def write_survival(key: Key, survival: Survival) -> None:
    """Keep what was accepted, beside the table."""
    _write(key, {"acceptance": survival.to_dict()})


def _write(key: Key, news: Mapping[str, Any]) -> None:
    entries = _entries()
    entries[str(key)] = {**_entry(key, entries), **news}
    target = file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=".calibration-", delete=False
        ) as staged:
            json.dump(entries, staged, indent=1)
        Path(staged.name).replace(target)
    except OSError as error:
        log.info("no calibration is kept: %s", error)


def _entry(key: Key, entries: Mapping[str, Any]) -> dict[str, Any]:
    entry = entries.get(str(key))
    return dict(entry) if isinstance(entry, Mapping) else {}


def _table(entry: Mapping[str, Any]) -> CostTable | None:
    try:
        return CostTable.from_dict(entry["costs"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _survival(entry: Mapping[str, Any]) -> Survival | None:
    try:
        return Survival.from_dict(entry["acceptance"])
    except (KeyError, TypeError, ValueError):
        return None


def _entries() -> dict[str, Any]:
    try:
        entries = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(entries) if isinstance(entries, Mapping) else {}
