"""Opening a page in the desktop's browser, without a word on the screen that is drawn.

Python's own `webbrowser` may start a browser for terminals inside ours, and lets the others write
to it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Mapping

PATIENCE_S = 3.0


def ways(environ: Mapping[str, str]) -> list[str]:
    """Commands that open an address here; none over SSH, where it would be the wrong desktop."""
    if any(environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY")):
        return []
    found = ["open"] if sys.platform == "darwin" else []
    if environ.get("WSL_DISTRO_NAME"):
        found.append("wslview")
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        found.append("xdg-open")
    return [command for command in found if shutil.which(command)]


async def open_page(url: str) -> bool:
    """Whether some browser took it."""
    for command in ways(os.environ):
        process = await asyncio.create_subprocess_exec(
            command, url, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
        try:
            if await asyncio.wait_for(process.wait(), PATIENCE_S) == 0:
                return True
        except TimeoutError:  # some stay until their window is closed
            return True
    return False
