"""The screen under NO_COLOR: what a style says beside its colours, and no colour at all.

Textual's own filter turns colours to shades of grey. Which cues get a style in place of their
colour stands in app.tcss, under `:nocolor`.
"""

from __future__ import annotations

from functools import lru_cache

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter


class Colourless(LineFilter):
    """Leaves bold, dim, italic, underline, strike and reverse, and what the mouse finds there."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The same text without foreground and background colours."""
        return [
            Segment(text, style and _colourless(style), control)
            for text, style, control in segments
        ]


@lru_cache(1024)
def _colourless(style: Style) -> Style:
    plain = style.without_color  # has lost the meta data, too
    return plain + Style.from_meta(style.meta) if style.meta else plain
