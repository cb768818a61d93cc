"""A few words on screen that are looked at often and change seldom."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

GAP = "   "


def flow(pieces: Sequence[str], width: int) -> list[list[str]]:
    """Pieces in lines of `width` cells, with `GAP` between them; none is broken."""
    lines: list[list[str]] = [[]]
    for piece in pieces:
        if lines[-1] and len(GAP.join([*lines[-1], piece])) > width:
            lines.append([])
        lines[-1].append(piece)
    return lines


def flowing(pieces: Sequence[str], width: int) -> str:
    """The same as text."""
    return "\n".join(GAP.join(line) for line in flow(pieces, width))


def literal(text: str) -> str:
    """Markup that shows `text` as it stands."""
    return text.replace("[", "\\[")


class Words(Static):
    """Text below an optional bold title. Redrawn when it changes, laid out when its shape does."""

    _shown = ("", "")

    def show(self, text: str, title: str = "") -> None:
        """Draw `text`, unless it is there already."""
        if (text, title) == self._shown:
            return
        same_shape = self._shape(text) == self._shape(self._shown[0])
        self._shown = (text, title)
        content = self.painted(text)
        if title:
            content = Content.styled(title, "bold") + "\n" + content
        self.update(content, layout=not same_shape)

    def painted(self, text: str) -> Content:
        """The text with its colours: none."""
        return Content(text)

    def _shape(self, text: str) -> list[int]:
        """Lengths of the lines that decide the size: those too long for their line, and the last
        if the width follows the text."""
        width = 0 if self.styles.is_auto_width else self.content_size.width
        return [len(line) if len(line) > width else 0 for line in text.split("\n")]
