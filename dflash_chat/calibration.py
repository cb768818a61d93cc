"""What passes really took, kept between runs: measured costs replace `speed.py`'s estimates.

One JSON file in the cache folder; an entry per card, driver, pair and build. Losing it costs
nothing but estimates, so a file that cannot be read or written is no error. Knows the file; knows
neither who measures nor what the figures are for.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_chat.hub import cache_dir
from dflash_chat.speed import Costs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What a measurement holds for. `gpu` is the card's name, `driver` its version."""

    gpu: str
    driver: str
    pair: str
    build: str

    def __str__(self) -> str:
        return " | ".join((self.gpu, self.driver, self.pair, self.build))


def file() -> Path:
    """In the folder of what may be deleted."""
    return cache_dir() / "calibration.json"


def read(key: Key) -> Costs | None:
    """The costs measured last, or None. An entry without a plain pass and a drafted one is none."""
    entry = _entries().get(str(key))
    if not isinstance(entry, dict) or not isinstance(entry.get("verify_ms"), dict):
        return None
    try:
        verify = {int(rows): float(ms) for rows, ms in entry["verify_ms"].items()}
        costs = Costs(dict(sorted(verify.items())), float(entry["draft_ms"]))
    except (KeyError, TypeError, ValueError):
        return None
    times = (*verify.values(), costs.draft_ms)
    usable = 1 in verify and len(verify) > 1 and all(0 < ms < float("inf") for ms in times)
    return costs if usable else None


def write(key: Key, costs: Costs) -> None:
    """Keep these costs; the rest of the file stays. A folder that cannot be written is left."""
    entries = _entries()
    verify = {str(rows): round(ms, 4) for rows, ms in costs.verify_ms.items()}
    entries[str(key)] = {"verify_ms": verify, "draft_ms": round(costs.draft_ms, 4)}
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


def _entries() -> dict[str, Any]:
    try:
        entries = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(entries) if isinstance(entries, Mapping) else {}
