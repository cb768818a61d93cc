"""What may be typed next, in a few lines above the prompt. Draws choices, knows no meaning."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

from dflash_chat.ui.completion import Choice

ROWS = 6  # a third of the screen at most


class Menu(Static):
    """A list with one chosen row; hidden while there is nothing to choose."""

    def __init__(self) -> None:
        super().__init__()
        self.display = False
        self.moved = False  # the person went to the chosen row
        self._choices: tuple[Choice, ...] = ()
        self._at = 0

    def show(self, choices: Sequence[Choice]) -> None:
        """Offer these; none hides the menu."""
        self.display = bool(choices)
        if tuple(choices) == self._choices:
            return
        self._choices, self._at, self.moved = tuple(choices), 0, False
        self._draw()

    def step(self, direction: int) -> None:
        """Choose the next row, around the ends."""
        self._at = (self._at + direction) % len(self._choices)
        self.moved = True
        self._draw()

    @property
    def chosen(self) -> Choice:
        """The chosen row; there must be one."""
        return self._choices[self._at]

    def _draw(self) -> None:
        rows = min(ROWS, max(self.app.size.height // 3, 1))
        first = min(max(self._at - rows // 2, 0), max(len(self._choices) - rows, 0))
        shown = self._choices[first : first + rows]
        width = max((len(choice.text) for choice in shown), default=0)
        lines = []
        for at, choice in enumerate(shown, first):
            mark = "› " if at == self._at else "  "
            name = Content.styled(mark + choice.text.ljust(width), "bold" * (at == self._at))
            lines.append(name + Content.styled(f"  {choice.note}", "$text-muted"))
        self.update(Content("\n").join(lines))
