"""A page of text over whatever is shown."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from dflash_chat.ui.overlay import ClosesOnce


class TextScreen(ClosesOnce, ModalScreen[None]):
    """Closes with Esc, Enter or q."""

    BINDINGS: ClassVar = [Binding("escape,enter,q", "dismiss", "Close", id="close_text")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self.text = title, text

    def compose(self) -> ComposeResult:
        """The text as it is."""
        with VerticalScroll(id="text") as box:
            box.border_title = Content(self._title)
            yield Static(Content(self.text))
