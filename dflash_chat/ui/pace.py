"""How often the screen may be drawn.

On two cores every millisecond of drawing is one that the engine's threads wait for each other, and
a new line, which moves everything above it, costs the most. There text comes less often and the
view moves four lines at a time.
"""

from __future__ import annotations

import os


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_FEW_CORES = _cores() <= 2
FRAME_S = 1 / 8 if _FEW_CORES else 1 / 18
SCROLL_ROWS = 4 if _FEW_CORES else 1
