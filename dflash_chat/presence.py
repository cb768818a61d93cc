"""Which chats this program has open, for other programs to see.

Each is a shared lock on one byte of a file beside the chats, at a place that its id says. The
kernel lets go of it when the process ends, however that is. Nothing breaks without: where a file
system has no locks, every program believes itself alone, and what they write becomes branches.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from pathlib import Path

from dflash_chat.store import data_folder

FILE = "open.lock"
_SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB
_OURS = fcntl.LOCK_EX | fcntl.LOCK_NB


class Presence:
    """This program's. A process has one of a folder at most: POSIX would give up its locks with the
    first that is closed. `folder` None takes the usual place."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: int | None = None

    def enter(self, chat: str) -> bool:
        """This chat is open here from now on; whether it is nowhere else."""
        with contextlib.suppress(OSError):
            if self._file is None:
                path = (self._folder or data_folder()) / FILE
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        alone = self.alone(chat)
        self._lock(chat, _SHARED)
        return alone

    def alone(self, chat: str) -> bool:
        """Whether no other program has the chat open."""
        alone = self._lock(chat, _OURS)
        if alone:
            self._lock(chat, _SHARED)
        return alone

    def leave(self, chat: str) -> None:
        """This chat is not open here any more."""
        self._lock(chat, fcntl.LOCK_UN)

    def close(self) -> None:
        """No chat is."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, chat: str, kind: int) -> bool:
        """Whether it was granted, or cannot be asked for."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, kind, 1, zlib.crc32(chat.encode()))
        except (BlockingIOError, PermissionError):  # POSIX leaves it open which of them
            return False
        except OSError:
            return True
        return True
