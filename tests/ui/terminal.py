"""A terminal for tests: runs a program in a pty, keeps what it draws as rows of text, types keys.

Understands what Textual writes: cursor addresses, line ends, clearing, and texts for the clipboard.
Of colours and styles it only keeps which there were; every character is one cell wide.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Callable
from types import TracebackType

from tests.ui.pty_bench import in_pty

WAIT_S = 60.0  # for what has to come
KEYS = {
    "enter": "\r",
    "escape": "\x1b",
    "up": "\x1b[A",
    "alt+up": "\x1b[1;3A",
    "f1": "\x1bOP",
    "f3": "\x1bOR",
}
_SEQUENCE = re.compile(
    r"\x1b\[([?>=]?)([\d;]*)\$?([@-~])"  # an order: private mark, numbers, letter
    r"|\x1b\]([^\x07\x1b]*)(?:\x07|\x1b\\\\)"  # a word to the terminal
    r"|\x1b[P_^][^\x1b]*\x1b\\\\|\x1b[()].|\x1b[^\[\]P_^()]"
)


class Terminal:
    """`with Terminal(command, columns, rows) as terminal:`; leaves nothing running."""

    def __init__(self, command: list[str], columns: int, rows: int) -> None:
        self._size = columns, rows
        self._cells = [[" "] * columns for _ in range(rows)]
        self._row = self._column = 0
        self._left = b""
        self.clipboard = ""
        self.styles: set[int] = set()  # all numbers in SGR orders
        self.process, self._master = in_pty(command, rows, columns)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.text)
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join("".join(row).rstrip() for row in self._cells)

    def press(self, *keys: str) -> None:
        """Keys by name, "ctrl+q", or text as it is typed; a lone surrogate is a byte that is no
        UTF-8."""
        for key in keys:
            typed = chr(ord(key[-1]) - 96) if key.startswith("ctrl+") else KEYS.get(key, key)
            os.write(self._master, typed.encode(errors="surrogateescape"))

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size, and forget what it showed."""
        self._size = columns, rows
        self._cells = [[" "] * columns for _ in range(rows)]
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def wait(self, what: Callable[[], bool], doing: str) -> None:
        """Let the program draw until `what` is so."""
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < deadline, f"waited in vain: {doing}"
            self.draw(0.05)

    def wait_for(self, words: str) -> None:
        """Let the program draw until it shows `words`."""
        self.wait(lambda: words in self.text, f"{words!r} to come")

    def end(self) -> int:
        """Wait until the program ends; its exit code."""
        self.wait(lambda: self.process.poll() is not None, "the end")
        return self.process.wait()

    def draw(self, seconds: float) -> None:
        """Take what is written within so long."""
        if not select.select([self._master], [], [], seconds)[0]:
            return
        try:
            data = self._left + os.read(self._master, 1 << 16)
        except OSError:  # it has ended
            time.sleep(seconds)
            return
        if b"\x1b[?2026$p" in data:  # it asks for synchronised updates: yes
            os.write(self._master, b"\x1b[?2026;2$y")
        whole = _whole(data)
        self._left = data[whole:]
        self._take(data[:whole].decode())

    def _take(self, text: str) -> None:
        at = 0
        for found in _SEQUENCE.finditer(text):
            self._put(text[at : found.start()])
            at = found.end()
            private, numbers, letter, word = found.groups()
            if word and word.startswith("52;"):
                self.clipboard = base64.b64decode(word.rpartition(";")[2]).decode()
            elif letter and not private:
                self._obey(letter, [int(number or 0) for number in numbers.split(";")])
        self._put(text[at:])

    def _obey(self, letter: str, numbers: list[int]) -> None:
        if letter in "Hf":
            row, column = (*numbers, 1)[:2]
            self._row, self._column = max(row, 1) - 1, max(column, 1) - 1
        elif letter == "J" and numbers == [2]:
            self._cells = [[" "] * len(row) for row in self._cells]
        elif letter == "m":
            self.styles.update(numbers)
        elif letter in "ABCD":
            by = max(numbers[0], 1)
            self._row += {"A": -by, "B": by}.get(letter, 0)
            self._column += {"D": -by, "C": by}.get(letter, 0)

    def _put(self, text: str) -> None:
        columns, rows = self._size
        for character in text:
            if character == "\r":
                self._column = 0
            elif character == "\n":
                self._row += 1
            elif character >= " " and self._row < rows and self._column < columns:
                self._cells[self._row][self._column] = character
                self._column += 1


def _whole(data: bytes) -> int:
    """How much of it ends neither within a sequence nor within a character."""
    escape = data.rfind(b"\x1b")
    if escape >= 0 and not _SEQUENCE.match(data[escape:].decode(errors="replace")):
        return escape
    text = data.decode(errors="ignore").encode()  # without half a character at the end
    return len(text) if data.startswith(text) else len(data)
