"""A few words on screen that are looked at often and change seldom."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

HARD = "\u00a0"  # a space where no line may break


def keys_line(*keys: str) -> str:
    """Keys and what they do, in lines that break between them only."""
    return "   ".join(key.replace(" ", HARD) for key in keys)


class Words(Static):
    """Text below an optional bold title. Redrawn when it changes, laid out when its shape does."""

    _shown = ("", "")

    def show(self, text: str, title: str = "") -> None:
        """Draw `text`, unless it is there already."""
        if (text, title) == self._shown:
            return
        same_shape = self._shape(text) == self._shape(self._shown[0])
        self._shown = (text, title)
        content = Content.styled(title, "bold") + "\n" + text if title else Content(text)
        self.update(content, layout=not same_shape)

    def _shape(self, text: str) -> list[int]:
        """Lengths of the lines that decide the size: those too long for their line, and the last
        if the width follows the text."""
        width = 0 if self.styles.is_auto_width else self.content_size.width
        return [len(line) if len(line) > width else 0 for line in text.split("\n")]
