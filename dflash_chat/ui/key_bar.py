"""The keys that would do something now, in one line.

One widget, redrawn only when its words change; a widget per key would be rebuilt with every answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from textual.content import Content
from textual.widgets import Static

GAP = "   "


class KeyBar(Static):
    """Keys and what they do, as many as fit."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__()
        self._keys = list(keys)
        self._shown: list[tuple[str, str]] = []

    def on_resize(self) -> None:
        """Other keys may fit now."""
        self.show(self._keys)

    def show(self, keys: Iterable[tuple[str, str]]) -> None:
        """Draw keys, each with what it does; the first ones matter most."""
        self._keys = keys = list(keys)
        keys = keys[:]
        while keys and len(GAP.join(f"{key} {words}" for key, words in keys)) > self.size.width:
            keys.pop()
        if keys != self._shown:
            self._shown = keys
            parts = [Content.styled(key, "bold") + f" {words}" for key, words in keys]
            self.update(Content(GAP).join(parts))
