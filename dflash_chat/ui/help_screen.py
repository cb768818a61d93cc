"""Keys and commands, over the chat."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from dflash_chat.ui.commands import USAGE

KEYS = """\
Enter             send
Ctrl+J            newline (Shift+Enter where the terminal reports it)
Esc               stop the answer; what came stays
Ctrl+C            copy the selection, else stop
Ctrl+R            ask again after a failure
Ctrl+N            new chat
Ctrl+O            saved chats: open, search, rename, export, delete
PageUp PageDown   scroll, also Ctrl+Up and Ctrl+Down
End               to the end, and follow the answer again
F2                show or hide the numbers
Ctrl+P            all commands
Ctrl+Q            quit"""

NUMBERS = """\
tau               tokens committed per verify pass; one of them is the target's own
cached, read      prompt tokens found in the cache, and read this turn
ttft              from sending to the first token"""


class HelpScreen(ModalScreen[None]):
    """Closes with Esc, F1 or Enter."""

    BINDINGS: ClassVar = [Binding("escape,f1,enter,q", "dismiss", "Close", id="close_help")]

    def compose(self) -> ComposeResult:
        """Three lists."""
        with VerticalScroll(id="help") as box:
            box.border_title = "Help"
            for title, body in (
                ("Keys", KEYS),
                ("Commands", "\n".join(USAGE.values())),
                ("Numbers", NUMBERS),
            ):
                yield Static(Content.styled(title, "bold") + f"\n{body}\n")
