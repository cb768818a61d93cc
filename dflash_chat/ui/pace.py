"""How often the screen may be drawn, and when the program may pause to collect garbage.

On two cores every millisecond of drawing is one that the engine's threads wait for each other, and
a new line, which moves everything above it, costs the most. There text comes less often and the
view moves six lines at a time.

A full collection looks at every object there is and takes as long as several frames, so it waits
until nothing is being written.
"""

from __future__ import annotations

import gc
import os


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_FEW_CORES = _cores() <= 2
FRAME_S = 1 / 5 if _FEW_CORES else 1 / 18
SCROLL_ROWS = 6 if _FEW_CORES else 1
_NICENESS = 10
_YOUNG_ROUNDS = 1000  # between two full collections, if nobody tidies: minutes of text


def give_way() -> None:
    """Let the engine, which was started before, go first where both share few cores.

    Measured on two: 94 % of the speed without a screen instead of 84 %.
    """
    if _FEW_CORES and hasattr(os, "nice"):
        os.nice(_NICENESS)


def tidy() -> None:
    """Collect garbage now. What lives is not looked at again, neither here nor while text comes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _YOUNG_ROUNDS)
    gc.enable()


def let_go() -> None:
    """Much of what lived until now may be garbage: `tidy` is to look at all of it."""
    gc.unfreeze()
