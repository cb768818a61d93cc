"""Pairs whose gate others must open: the hub is asked about them now and then, after a restart too.

Approval by hand may take days, so the list is kept in a file of the cache folder; losing it costs
only that nobody is told. Knows no widgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from datetime import date
from pathlib import Path

from dflash_chat import hub, pairs
from dflash_chat.access import READABLE
from dflash_chat.errors import UserError
from dflash_chat.ui import gate

PERIOD_S = 60.0

log = logging.getLogger(__name__)


class Watch:
    """`opened` is called with the name of each pair that may be fetched now, once."""

    def __init__(self, opened: Callable[[str], None]) -> None:
        self._opened = opened
        self.since: dict[str, str] = {}  # by pair, as it was named: the day, ISO 8601
        self._asking: asyncio.Task[None] | None = None

    def toggle(self, pair: str) -> None:
        """Watch this pair (or PAIR@BUILD), or no longer."""
        if pair in self.since:
            del self.since[pair]
        else:
            self.since[pair] = date.today().isoformat()
            self._ask()
        self._write()

    def resume(self) -> None:
        """Watch what was watched before a restart."""
        try:
            known = json.loads(file().read_text(encoding="utf-8"))
            self.since = {str(pair): str(day) for pair, day in known.items()}
        except (OSError, ValueError, AttributeError):
            self.since = {}
        if self.since:
            self._ask()

    async def close(self) -> None:
        """Ask no more; what is watched stays in the file."""
        if self._asking is not None:
            self._asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._asking

    def _ask(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_on())

    async def _ask_on(self) -> None:
        """Ask until none is left."""
        while self.since:
            for pair in list(self.since):
                if await _is_open(pair) and pair in self.since:
                    self.toggle(pair)
                    self._opened(pair)
            if self.since:
                await asyncio.sleep(PERIOD_S)

    def _write(self) -> None:
        try:
            file().parent.mkdir(parents=True, exist_ok=True)
            file().write_text(json.dumps(self.since), encoding="utf-8")
        except OSError as error:
            log.info("what is watched is not kept: %s", error)


def file() -> Path:
    """In the folder of what may be deleted."""
    return hub.cache_dir() / "watched.json"


async def _is_open(name: str) -> bool:
    """Whether all that a pull of it reads may be read. A pair that is gone is not."""
    try:
        pair = pairs.find(name)
        answers = await gate.ask(gate.sources(pair, pair.wanted()[0]))
    except UserError:
        return False
    return all(answer.state in READABLE for answer in answers)
