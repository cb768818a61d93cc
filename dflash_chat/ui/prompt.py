"""The prompt box: many lines, Enter sends, Ctrl+J breaks the line, paste never sends."""

from __future__ import annotations

from textual import events
from textual.message import Message
from textual.widgets import TextArea


class Prompt(TextArea):
    """A TextArea that grows with its text (to ten lines, see app.tcss)."""

    class Submitted(Message):
        """The person sent `text`."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(
            show_line_numbers=False,
            placeholder="Ask something · Enter sends · Ctrl+J newline · /help",
            highlight_cursor_line=False,
        )
        self.cursor_blink = False

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.submit()
        elif event.key in ("ctrl+j", "shift+enter"):
            event.stop()
            event.prevent_default()
            self.newline()
        else:
            await super()._on_key(event)

    def newline(self) -> None:
        """Break the line, in place of what is selected."""
        self.move_cursor(self.replace("\n", *self.selection).end_location)

    def submit(self) -> None:
        """Send what stands here, unless it is blank."""
        text = self.text.strip()
        if text:
            self.clear()
            self.post_message(self.Submitted(text))

    @property
    def at_line_end(self) -> bool:
        """Whether End would not move the cursor."""
        return self.cursor_at_end_of_line
