"""Keys and commands, over the chat."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from dflash_chat.runtime.api import GLOSSARY
from dflash_chat.ui.actions import ACTIONS, COMMANDS, TURN, Keymap, key_words, keys_of
from dflash_chat.ui.overlay import ClosesOnce

WIDTH, LEAST_WIDTH = 66, 44  # cells of a line where there is room, and of one in two columns
FRAME = 6  # cells beside it
LABEL = 20  # cells of the first column

ALSO = (
    ("Tab", "take the menu's word; Up and Down choose"),
    ("Up, Down", "at the prompt's edges: what was sent before"),
    ("Up in an empty one", "edit the last message"),
    ("@file", "a file's text goes along with the message"),
    ("Shift+drag", "select with the terminal's own mouse"),
)


class HelpScreen(ClosesOnce, ModalScreen[None]):
    """Closes with Esc, F1 or Enter."""

    BINDINGS: ClassVar = [Binding("escape,f1,enter,q", "dismiss", "Close", id="close_help")]

    def __init__(self, keymap: Keymap) -> None:
        super().__init__()
        self._keymap = keymap

    def compose(self) -> ComposeResult:
        """Four lists."""
        with VerticalScroll(id="help") as box:
            box.border_title = "Help"
            box.border_subtitle = "PageDown more · Esc close"
            yield Static()

    def on_resize(self) -> None:
        """Lines are broken by us."""
        width = min(WIDTH, self.app.size.width * 9 // 10 - FRAME)
        lists = (
            ("Keys", (*self._keys(turn=False), *ALSO)),
            ("On a turn (Alt+Up)", self._keys(turn=True)),
            ("Commands", [(action.usage, action.does) for action in COMMANDS.values()]),
            ("Numbers", GLOSSARY.items()),
        )
        texts = (
            Content.styled(title, "bold") + "\n" + listed(rows, width) for title, rows in lists
        )
        self.query_one(Static).update(Content("\n\n").join(texts))

    def _keys(self, turn: bool) -> list[tuple[str, str]]:
        return [
            (key_words(keys_of(action, self._keymap)), action.does)
            for action in ACTIONS
            if action.keys and (action.scope == TURN) is turn
        ]


def listed(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Words and their meanings in two columns of `width` cells, or below each other in fewer."""
    two = width >= LEAST_WIDTH
    indent = " " * (LABEL + 1 if two else 2)
    lines = []
    for word, meaning in rows:
        first = f"{word:{LABEL}} " if two else indent
        body = fill(meaning, max(width, 8), initial_indent=first, subsequent_indent=indent)
        lines.append(body if two else f"{word}\n{body}")
    return "\n".join(lines)
