"""What is said to the terminal beside the picture: its title, and a call when an answer is done.

Sequences only; when to say them is the screen's business.
"""

from __future__ import annotations

from dflash_chat.terminals import CONTROLS

CALL_AFTER_S = 10.0  # shorter answers are waited for

SAVE_TITLE, RESTORE_TITLE = "\x1b[22;2t", "\x1b[23;2t"  # of xterm and those that follow it


def title(words: str) -> str:
    """Set the window's title."""
    return f"\x1b]2;{_safe(words)}\x07"


def call(words: str) -> str:
    """Ring, and show a note where the terminal can (OSC 9)."""
    return f"\x07\x1b]9;{_safe(words)}\x07"


def _safe(words: str) -> str:
    return " ".join(words.translate(CONTROLS).split())
