"""Keys and commands, over the chat."""

from __future__ import annotations

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

WIDTH = 66  # cells of a line where there is room
FRAME = 6  # cells beside it

ALSO = """\
Tab                  take the menu's word; Up and Down choose
Up, Down             at the prompt's edges: what was sent before
Up in an empty one   edit the last message
@file                a file's text goes along with the message
Shift+drag           select with the terminal's own mouse"""


class HelpScreen(ModalScreen[None]):
    """Closes with Esc, F1 or Enter."""

    BINDINGS: ClassVar = [Binding("escape,f1,enter,q", "dismiss", "Close", id="close_help")]

    def __init__(self, keymap: Keymap) -> None:
        super().__init__()
        self._keymap = keymap

    def compose(self) -> ComposeResult:
        """Four lists."""
        with VerticalScroll(id="help") as box:
            box.border_title = "Help"
            for title, body in (
                ("Keys", f"{self._keys(turn=False)}\n{ALSO}"),
                ("On a turn (Alt+Up)", self._keys(turn=True)),
                ("Commands", "\n".join(f"{a.usage:20} {a.does}" for a in COMMANDS.values())),
                ("Numbers", self._numbers()),
            ):
                yield Static(Content.styled(title, "bold") + f"\n{body}\n")

    def _keys(self, turn: bool) -> str:
        return "\n".join(
            f"{key_words(keys_of(action, self._keymap)):20} {action.does}"
            for action in ACTIONS
            if action.keys and (action.scope == TURN) is turn
        )

    def _numbers(self) -> str:
        width = min(WIDTH, self.app.size.width * 9 // 10 - FRAME)
        lines = (f"{word:20} {meaning}" for word, meaning in GLOSSARY.items())
        return "\n".join(fill(line, width, subsequent_indent=" " * 21) for line in lines)
