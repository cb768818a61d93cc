"""What lies over the chat and can be closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.await_complete import AwaitComplete
from textual.screen import Screen

if TYPE_CHECKING:
    _Base = Screen[Any]
else:
    _Base = object  # a class of Textual's would hide the other base's styles


class ClosesOnce(_Base):
    """Stands before `Screen` among a screen's bases: a key that comes while it closes would
    otherwise close what lies below, too."""

    def dismiss(self, result: Any = None) -> AwaitComplete:  # noqa: ANN401 -- of any screen
        """Close with this result, unless that has been done."""
        return super().dismiss(result) if self.is_active else AwaitComplete()
