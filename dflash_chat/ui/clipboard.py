"""Copying so that it arrives: through tmux, through the desktop's own tool, or by the terminal.

An OSC 52 sequence goes out in any case; tmux in its default setting ignores it, and so do some
terminals, so the better ways are tried first and the person is told which one it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping

PATIENCE_S = 2.0
_REMOTE = ("SSH_CONNECTION", "SSH_TTY")


def ways(environ: Mapping[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """Commands that take text on stdin, the best first, and what to call them."""
    found: list[tuple[str, tuple[str, ...]]] = []
    if environ.get("TMUX"):
        found.append(("tmux", ("tmux", "load-buffer", "-w", "-")))
    if not any(environ.get(name) for name in _REMOTE):  # else it would be the wrong desktop's
        if environ.get("WAYLAND_DISPLAY"):
            found.append(("wl-copy", ("wl-copy",)))
        if environ.get("DISPLAY"):
            found.append(("xclip", ("xclip", "-selection", "clipboard")))
    return [(name, command) for name, command in found if shutil.which(command[0])]


async def copy(text: str) -> str:
    """Hand `text` to the first way that takes it; its name, or "" if only OSC 52 is left."""
    for name, command in ways(os.environ):
        if await _fed(command, text.encode()):
            return name
    return ""


async def _fed(command: tuple[str, ...], data: bytes) -> bool:
    """Whether the command took the data and ended well."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL
        )
    except OSError:
        return False
    try:
        await asyncio.wait_for(process.communicate(data), PATIENCE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return False
    return process.returncode == 0
