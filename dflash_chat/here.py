"""What this machine takes of a pair, before it is fetched: which build, and whether it fits.

The planner decides; here it is asked about an idle machine, since what runs at the moment of a
download says nothing of the time after it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from dflash_chat import calibration, cards, gpu, hub, planner, reasons
from dflash_chat.geometry import ConfigError
from dflash_chat.gpu import Gpu
from dflash_chat.pairs import Build, Pair, PyPISource
from dflash_chat.planner import Plan, Wishes


@dataclass(frozen=True)
class Machine:
    """The first card, or None and the bytes of memory there are (0: unknown)."""

    card: Gpu | None
    ram: int = 0

    def choose(self, pair: Pair) -> tuple[Pair, str]:
        """The pair with the build the planner takes, and why; as it was where that is settled: by
        a name, by what is installed, or by an index that carries the weights.
        """
        first = pair.build(pair.default[0]) if pair.default else pair.builds[0]
        if pair.quant or isinstance(first.source, PyPISource) or hub.installed(pair):
            return pair, ""
        made = self._plan(pair, "")
        if made is None or not made.recommendable:
            return pair, ""
        why = next((line.because for line in made.why if line.what == "build"), "")
        return pair.narrowed(made.build.name), why

    def fits(self, pair: Pair, build: Build) -> str:
        """A `Fits`: why this build cannot run here, or "". What cannot be counted may be tried."""
        made = self._plan(pair, build.name)
        return reasons.shortage(made) if made and not made.fits else ""

    def _plan(self, pair: Pair, build: str) -> Plan | None:
        try:
            return planner.plan(pair, Wishes(build), self.card, self.ram, calibration.read)
        except ConfigError:
            return None


def machine() -> Machine:
    """This one, as if nothing else ran on it."""
    found = gpu.survey().gpus
    if not found:
        return Machine(None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    idle = max(found[0].free, cards.usable(found[0].total))
    return Machine(replace(found[0], free=idle))
