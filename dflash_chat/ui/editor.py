"""A text in the person's own editor: $VISUAL, else $EDITOR, else what is there.

Knows files and processes; the screen must have been given away by the caller.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from dflash_chat.errors import UserError

_USUAL = ("nano", "vim", "vi")


def command() -> list[str]:
    """The editor as words. Raises UserError if there is none."""
    for name in ("VISUAL", "EDITOR"):
        if value := os.environ.get(name, "").strip():
            try:
                return shlex.split(value)
            except ValueError as error:
                raise UserError(f"${name} cannot be read: {error}.") from error
    found = next(filter(None, map(shutil.which, _USUAL)), None)
    if found is None:
        raise UserError("There is no editor.", "Set VISUAL or EDITOR.")
    return [found]


def edit(text: str) -> str:
    """What `text` became. Raises UserError if the editor did not end well or left no text, OSError
    if there is no room for it."""
    words = command()
    with tempfile.TemporaryDirectory(prefix="dflash-chat-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*words, str(path)], check=False).returncode
        except OSError as error:
            raise UserError(f"{words[0]} could not be started: {error.strerror}.") from error
        if code:
            raise UserError(f"{words[0]} ended with exit code {code}.", "The message is unchanged.")
        try:
            return path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{words[0]} left no UTF-8 text.", "The message is unchanged."
            ) from error
