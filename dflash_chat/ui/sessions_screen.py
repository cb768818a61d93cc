"""All saved chats: find one, open it, rename it, export it, delete it.

Talks to the store itself; what is chosen is handed back to the chat.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from dflash_chat.chat import Conversation
from dflash_chat.errors import UserError
from dflash_chat.sessions import exported
from dflash_chat.store import Listed, Store
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.words import Words, flowing

LIST_MOST = 500
FRAME = 4  # cells beside its lines
KEYS = (
    "Enter open", "/ search", "n rename", "e Markdown", "j JSON", "x delete", "Esc close",
)  # fmt: skip


class SessionsScreen(ClosesOnce, ModalScreen[Conversation | None]):
    """Ends with the conversation that should be opened. `current` is the one on screen; `remove`
    deletes one."""

    BINDINGS: ClassVar = [
        Binding("escape", "back", "Close", id="close_sessions"),
        Binding("slash", "search", "Search", id="search_sessions"),
        Binding("n", "rename", "Rename", id="rename_session"),
        Binding("e", "export('md')", "Export as Markdown", id="export_session"),
        Binding("j", "export('json')", "Export as JSON", id="export_session_json"),
        Binding("x", "delete", "Delete", id="delete_session"),
    ]

    def __init__(
        self, open_store: Callable[[], Store], current: Conversation, remove: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._open_store = open_store
        self._current = current
        self._remove = remove
        self._listed: list[Listed] = []
        self._doomed = ""  # asked about: the next x deletes it

    def compose(self) -> ComposeResult:
        """The line to search in, the list, a line for a new name, and the keys."""
        with Vertical(id="sessions") as box:
            box.border_title = "Chats"
            yield Input(placeholder="search all chats", id="session-search")
            yield OptionList(id="session-list")
            yield Input(placeholder="new title", id="session-title")
            yield Words(id="session-keys")

    def on_mount(self) -> None:
        """Show the latest."""
        self.query_one("#session-title").display = False
        self._fill("")
        self._list.focus()

    def on_resize(self) -> None:
        """No key is parted from what it does."""
        width = self.app.size.width * 9 // 10 - FRAME
        self.query_one("#session-keys", Words).show(flowing(KEYS, width))

    @property
    def _list(self) -> OptionList:
        return self.query_one("#session-list", OptionList)

    @property
    def _chosen(self) -> Listed | None:
        row = self._list.highlighted
        return self._listed[row] if row is not None and row < len(self._listed) else None

    def _fill(self, text: str, row: int = 0) -> None:
        """List what `text` finds, or everything."""
        with self._told() as told, self._open_store() as store:
            self._listed = store.search(text) if text.strip() else store.chats(LIST_MOST)
        if told.failed:
            self._listed = []
        self._list.clear_options()
        self._list.add_options(
            Option(_line(entry, entry.id == self._current.id)) for entry in self._listed
        )
        if self._listed:
            self._list.highlighted = min(row, len(self._listed) - 1)
        box = self.query_one("#sessions")
        found = f"{len(self._listed)} found" if text.strip() else "the latest first"
        box.border_subtitle = found if self._listed else "nothing found" if text else "none yet"

    def _told(self) -> _Told:
        return _Told(self)

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search as one types."""
        if event.input.id == "session-search":
            self._fill(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter in the search goes to the list; in the title it renames."""
        if event.input.id == "session-title" and self._chosen and event.value.strip():
            with self._told(), self._open_store() as store:
                store.rename(self._chosen.id, event.value.strip())
                if self._chosen.id == self._current.id:
                    self._current.title = event.value.strip()
            event.input.display = False
            self._refill()
        self._list.focus()

    def on_option_list_option_selected(self) -> None:
        """Open the chosen chat."""
        if self._chosen is None or not self.is_current:  # a second Enter comes too late
            return
        with self._told(), self._open_store() as store:
            self.dismiss(store.load(self._chosen.id))

    def on_option_list_option_highlighted(self) -> None:
        """A question that was not answered is off."""
        self._doomed = ""

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def action_back(self) -> None:
        """Leave the line one types in, or the screen."""
        if isinstance(self.focused, Input):
            self.query_one("#session-title").display = False
            self._list.focus()
        else:
            self.dismiss(None)

    def action_search(self) -> None:
        """Go to the search."""
        self.query_one("#session-search").focus()

    def action_rename(self) -> None:
        """Ask for a title."""
        if self._chosen is None:
            return
        line = self.query_one("#session-title", Input)
        line.display = True
        line.value = self._chosen.title
        line.focus()

    def action_export(self, form: str) -> None:
        """Write the chosen chat into the present folder, beside what is there."""
        if self._chosen is None:
            return
        with self._told(), self._open_store() as store:
            text = exported(store, self._chosen.id, form)
            path = _free_path(self._chosen.title, form)
            try:
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
            self.notify(f"Written: {path}")

    def action_delete(self) -> None:
        """Delete the chosen chat, the second time it is asked for."""
        chosen = self._chosen
        if chosen is None:
            return
        if self._doomed != chosen.id:
            self._doomed = chosen.id
            self.notify("x again deletes it with all its branches", severity="warning")
            return
        with self._told():
            self._remove(chosen.id)
        self._refill()

    def _refill(self) -> None:
        self._fill(self.query_one("#session-search", Input).value, self._list.highlighted or 0)


class _Told:
    """Turns a UserError of the block into a notice."""

    def __init__(self, screen: SessionsScreen) -> None:
        self._screen = screen
        self.failed = False

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.failed = isinstance(error, UserError)
        if isinstance(error, UserError):
            words = f"{error.message}\n{error.hint}".strip()
            self._screen.notify(words, severity="error", markup=False)
        return self.failed


def _line(entry: Listed, current: bool) -> Content:
    """A chat in the list: two lines when it was found by its words."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.updated))
    facts = f"  {when} · {entry.turns} turn{'s' * (entry.turns != 1)} · {entry.pair}"
    line = Content("● " if current else "  ") + Content.styled(entry.title, "bold") + facts
    return line + Content.styled(f"\n    {entry.found}", "italic") if entry.found else line


def _free_path(title: str, form: str) -> Path:
    """A file name made of the title that nothing has yet."""
    stem = re.sub(r"[^\w]+", "-", title.lower()).strip("-")[:40] or "chat"
    names = (f"{stem}{f'-{n}' if n else ''}.{form}" for n in range(10_000))
    return next(path for path in map(Path, names) if not path.exists())
