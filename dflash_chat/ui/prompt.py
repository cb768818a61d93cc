"""The prompt box: many lines, Enter sends, paste never sends, Up and Down recall what was sent, in
this session or, if it is told, before it.

A long paste folds to a word in brackets, which is edited as one character would be and unfolds when
the message is sent. Knows nothing of commands and files but how a menu offers them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea
from textual.widgets.text_area import Edit, EditResult, Location

from dflash_chat.terminals import CONTROLS
from dflash_chat.ui.actions import PROMPT, Keymap, in_scope, keys_of
from dflash_chat.ui.completion import Completion, complete
from dflash_chat.ui.menu import Menu

FOLD_CHARS = 2000


class Prompt(TextArea):
    """A TextArea that grows with its text (to ten lines, see app.tcss)."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("tab", "accept", "Complete", show=False)]

    class Submitted(Message):
        """The person sent `text`, which was typed as `shown`."""

        def __init__(self, shown: str, text: str = "") -> None:
            super().__init__()
            self.shown, self.text = shown, text or shown

    class EditLast(Message):
        """Up was pressed in an empty prompt."""

    class Recalled(Message):
        """Another text was put here from those sent before."""

    def __init__(self, menu: Menu, keymap: Keymap) -> None:
        super().__init__(
            show_line_numbers=False,
            placeholder="Ask something · Enter sends · Ctrl+J newline · /help",
            highlight_cursor_line=False,
        )
        self.cursor_blink = False
        self._keys = {
            key: action.method
            for action in in_scope(PROMPT)
            for key in keys_of(action, keymap).split(",")
        }
        self.sent: list[str] = []  # as typed, oldest first
        self._at = 0  # which of them stands here; behind them all is the draft
        self._draft = ""
        self.leaving: list[str] = []  # was sent, and nobody has taken it yet
        self._pastes: dict[str, str] = {}  # what a folded paste stands for, for good: undo needs it
        self._menu = menu
        self._completion = Completion(0)
        self._dismissed = ""  # the text whose menu was closed

    async def _on_key(self, event: events.Key) -> None:
        """Keys of ours. Not as bindings: those overtake what was typed quickly before them."""
        if method := self._keys.get(event.key):
            event.stop()
            event.prevent_default()
            getattr(self, f"action_{method}")()
        else:
            await super()._on_key(event)

    # ── sending ─────────────────────────────────────────────────────────────────────────────────

    def action_send(self) -> None:
        """Send what stands here, unless it is blank or the menu has the rest of it."""
        if self.offering and (self._menu.moved or not self._completion.whole):
            self.action_accept()
            return
        shown = self.text.strip()
        if shown:
            self.sent.append(shown)
            self._at = len(self.sent)
            self._draft = ""
            self.leaving.append(shown)
            self.clear()
            self.post_message(self.Submitted(shown, self.unfolded(shown)))

    @property
    def unsent(self) -> str:
        """What was typed and sent nowhere, folded: behind what is recalled, the draft."""
        recalled = self._at < len(self.sent) and self.text == self.sent[self._at]
        here = self._draft if recalled else self.text
        return "\n".join(filter(None, [*self.leaving, here]))

    def action_newline(self) -> None:
        """Break the line, in place of what is selected."""
        self.put_in("\n")

    def put_in(self, text: str) -> None:
        """Insert text at the cursor, in place of what is selected."""
        self.move_cursor(self.replace(text, *self.selection).end_location)

    def put(self, text: str) -> None:
        """Let `text` stand here, as an edit that can be undone."""
        self.history.checkpoint()
        self.replace(_plain(text), (0, 0), self.document.end)
        self.move_cursor(self.document.end)

    def undo(self) -> None:
        """Take back the last edits. The cursor goes home first: TextArea looks for it in the
        shorter text before it has put it back, and fails if it stood too far below."""
        if self.history.undo_stack:
            self.move_cursor((0, 0))
        super().undo()

    def redo(self) -> None:
        """Make them again; see `undo`."""
        if self.history.redo_stack:
            self.move_cursor((0, 0))
        super().redo()

    @property
    def at_line_end(self) -> bool:
        """Whether End would not move the cursor."""
        return self.cursor_at_end_of_line

    # ── recalling ───────────────────────────────────────────────────────────────────────────────

    def action_cursor_up(self, select: bool = False) -> None:
        """Up in the menu, in the text, or from its first line to what was sent before."""
        if self.offering and not select:
            self._menu.step(-1)
        elif select or self._row() > 0:
            super().action_cursor_up(select)
        elif not self.text and self._at == len(self.sent):
            self.post_message(self.EditLast())
        else:
            self.recall(-1)

    def action_cursor_down(self, select: bool = False) -> None:
        """Down in the menu, in the text, or from its last line to what was sent after."""
        if self.offering and not select:
            self._menu.step(1)
        elif select or self._row() < self.wrapped_document.height - 1:
            super().action_cursor_down(select)
        else:
            self.recall(1)

    def recall(self, direction: int) -> None:
        """Show what was sent before or after what stands here, unless it is the same; behind the
        last is the draft."""
        at = self._at + direction
        while 0 <= at < len(self.sent) and self.sent[at] == self.text:
            at += direction
        if not 0 <= at <= len(self.sent):
            return
        if self._at == len(self.sent) or self.text != self.sent[self._at]:
            self._draft = self.text
        self._at = at
        if at < len(self.sent):
            self.sent[at] = self.short(self.sent[at])
        self.put(self.sent[at] if at < len(self.sent) else self._draft)
        self.post_message(self.Recalled())

    def remember(self, texts: Sequence[str]) -> None:
        """These were sent before all that was sent here, oldest first."""
        self.sent[:0] = texts
        self._at += len(texts)

    def _row(self) -> int:
        return self.wrapped_document.location_to_offset(self.cursor_location).y

    # ── pasting ─────────────────────────────────────────────────────────────────────────────────

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        text = _plain(event.text)
        self.put_in(self._folded(text) if len(text) > FOLD_CHARS else text)
        self.focus()

    def _folded(self, text: str) -> str:
        """The word that stands for a long text."""
        lines = text.rstrip("\n").count("\n") + 1
        size = f"{lines} lines" if lines > 1 else f"{len(text)} characters"
        label, number = f"[pasted {size}]", 1
        while self._pastes.get(label, text) != text:
            number += 1
            label = f"[pasted {size} #{number}]"
        self._pastes[label] = text
        return label

    def short(self, text: str) -> str:
        """`text` with what is long of it folded, but for a first line that is not."""
        if len(text) <= FOLD_CHARS:
            return text
        text = self.unfolded(text)
        head, newline, rest = text.partition("\n")
        whole = len(head) > FOLD_CHARS or len(rest) <= FOLD_CHARS
        return self._folded(text) if whole else head + newline + self._folded(rest)

    def unfolded(self, text: str) -> str:
        """`text` with the pastes it stands for."""
        if not self._pastes:
            return text
        return self._labels().sub(lambda label: self._pastes[label[0]], text)

    def _labels(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._pastes)))

    def edit(self, edit: Edit) -> EditResult:
        """Change the text; a folded paste is changed as a whole or not at all."""
        if self._pastes:
            top, bottom = sorted((edit.from_location, edit.to_location))
            begin, end = self._around(top), self._around(bottom)
            top, bottom = (end[1], end[1]) if top == bottom else (begin[0], end[1])
            edit = replace(edit, from_location=top, to_location=bottom)
        return super().edit(edit)

    def _around(self, at: Location) -> tuple[Location, Location]:
        """The folded paste that `at` is inside of, or `at` twice."""
        row, column = at
        if row >= self.document.line_count:  # an edit up to the end may say one line more
            return at, at
        for label in self._labels().finditer(self.document.get_line(row)):
            if label.start() < column < label.end():
                return (row, label.start()), (row, label.end())
        return at, at

    def get_line(self, line_index: int) -> Text:
        """A line as drawn: folded pastes stand out."""
        line = super().get_line(line_index)
        if self._pastes:
            line.highlight_regex(self._labels(), "bold reverse")
        return line

    # ── completing ──────────────────────────────────────────────────────────────────────────────

    @property
    def offering(self) -> bool:
        """Whether the menu is open."""
        return self._menu.display

    def dismiss_menu(self) -> None:
        """Close the menu until something else is typed."""
        self._dismissed = self.text
        self._offer()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Tab leaves the prompt while there is nothing to complete."""
        return self.offering if action == "accept" else True

    def action_accept(self) -> None:
        """Put in the menu's choice."""
        row, column = self.cursor_location
        start = (row, self._completion.start)
        self.move_cursor(self.replace(self._menu.chosen.text, start, (row, column)).end_location)

    def _on_text_area_changed(self) -> None:
        self._offer()

    def _on_text_area_selection_changed(self) -> None:
        self._offer()

    def _offer(self) -> None:
        """Open, fill or close the menu."""
        row, column = self.cursor_location
        line = self.document.get_line(row)
        completion = complete(line[:column], self.document.line_count == 1)
        typed = line[completion.start : column]
        nothing_new = [choice.text.strip() for choice in completion.choices] == [typed.strip()]
        if nothing_new or not self.selection.is_empty or self.text == self._dismissed:
            completion = Completion(0)
        else:
            self._dismissed = ""
        self._completion = completion
        self._menu.show(completion.choices)


def _plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS)
