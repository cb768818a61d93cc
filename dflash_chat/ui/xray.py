"""X-ray: an answer as raw text by block and origin, while it is written and afterwards.

Draws the rows in view and no others; lays out what `Trace` says is new, a few times a second.
"""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.geometry import Size
from textual.message import Message
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dflash_chat.ui.key_bar import KeyBar
from dflash_chat.ui.origins import Trace
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.words import Words
from dflash_chat.ui.xray_layout import SHADES, Layout, figures, next_missed, worst

REFRESH_S = 1 / 5

LEGEND = "~correction~ · bonus▸ · ▏ a block · ≡ looked up · accepted, shaded by place"
KEYS = (
    ("←/→", "block"), ("F3", "close"), ("w", "worst"), ("Tab", "next without a hit"),
    ("Home/End", "first/last"),
)  # fmt: skip


class XrayView(ScrollView, can_focus=True):
    """The blocks; one of them is current."""

    class Selected(Message):
        """Another block is current."""

    COMPONENT_CLASSES: ClassVar = {
        *(f"accepted-{n}" for n in range(1, SHADES + 1)),
        "lookup", "correction", "bonus", "plain", "border",
    }  # fmt: skip
    BINDINGS: ClassVar = [
        Binding("left", "step(-1)", "Block before", id="xray_left"),
        Binding("right", "step(1)", "Next block", id="xray_right"),
        Binding("home", "first", "First block", id="xray_home"),
        Binding("end", "last", "Last block", id="xray_end"),
        Binding("tab", "next_missed", "Next without a hit", id="xray_missed"),
        Binding("w", "worst", "Worst block", id="xray_worst"),
    ]

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self._layout = Layout(0)
        self.current = max(len(trace.blocks) - 1, 0)

    def on_resize(self) -> None:
        """Lay out everything, if the width is another."""
        width = self.scrollable_content_region.width
        if width != self._layout.width:
            self._layout = Layout(width)
            self._lay_out(0)

    def take_news(self) -> None:
        """Lay out what has come; the current block stays the last one if it was."""
        blocks, changed = self._trace.blocks, self._trace.news()
        if changed is None:
            return
        following = self.current >= self._layout.blocks - 1
        self._lay_out(changed)
        if following and blocks:
            self.select(len(blocks) - 1)

    def _lay_out(self, changed: int) -> None:
        self._layout.update(self._trace.blocks, changed)
        self.virtual_size = Size(self._layout.width, len(self._layout.rows))
        self.refresh()

    def select(self, block: int | None) -> None:
        """Make `block` the current one and bring it into view."""
        if block is None or not self._layout.blocks:
            return
        self.current = min(max(block, 0), self._layout.blocks - 1)
        top, bottom = self._layout.row_of(self.current), self._layout.last_row_of(self.current)
        height = self.scrollable_content_region.height
        if top < self.scroll_offset.y or bottom >= self.scroll_offset.y + height:
            self.scroll_to(y=max(top - height // 2, 0), animate=False, force=True)
        self.refresh()
        self.post_message(self.Selected())

    def render_line(self, y: int) -> Strip:
        """One row."""
        row, base = self.scroll_offset.y + y, self.rich_style
        width = self.scrollable_content_region.width
        if row >= len(self._layout.rows):
            return Strip.blank(width, base)
        segments = [
            Segment(run.text, self._style(run.style, run.block == self.current))
            for run in self._layout.rows[row]
        ]
        return Strip(segments).extend_cell_length(width, base)

    def _style(self, name: str, current: bool) -> Style:
        style = self.get_component_rich_style(name or "border")
        return style + Style(bold=True, reverse=not name) if current else style

    def on_click(self, event: events.Click) -> None:
        """Make the block under the mouse current."""
        at = event.get_content_offset(self)
        if at is not None:
            self.select(self._layout.block_at(at.y + self.scroll_offset.y, at.x))

    def action_step(self, by: int) -> None:
        """Go a block on, or back."""
        self.select(self.current + by)

    def action_first(self) -> None:
        """Go to the first block."""
        self.select(0)

    def action_last(self) -> None:
        """Go to the last block and stay with it."""
        self.select(len(self._trace.blocks) - 1)

    def action_next_missed(self) -> None:
        """Go to the next block of which no draft was accepted."""
        found = next_missed(self._trace.blocks, self.current)
        if found is None:
            self.notify("Every block that drafted had a hit")
        self.select(found)

    def action_worst(self) -> None:
        """Go to the block that committed least per second."""
        found = worst(self._trace.blocks)
        if found is None:
            self.notify("No block drafted")
        self.select(found)


class XrayScreen(ClosesOnce, Screen[None]):
    """Closes with F3 or Esc."""

    BINDINGS: ClassVar = [Binding("escape,f3,q", "dismiss", "Close", id="close_xray")]

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def compose(self) -> ComposeResult:
        """The blocks, the current one's figures, and what marks and keys mean."""
        yield Words(id="xray-title")
        yield XrayView(self.trace)
        yield Words(id="xray-figures")
        yield Words(id="xray-legend")
        yield KeyBar(KEYS)

    def on_mount(self) -> None:
        """Show what there is and look for more."""
        self.trace.news()
        self.query_one("#xray-legend", Words).show(LEGEND)
        self.query_one(XrayView).focus()
        self.call_after_refresh(self.query_one(XrayView).action_last)
        self.set_interval(REFRESH_S, self.show_news)

    def on_xray_view_selected(self) -> None:
        """Show its figures."""
        self._show_figures()

    def show_news(self) -> None:
        """Bring everything up to date."""
        view = self.query_one(XrayView)
        view.take_news()
        blocks = self.trace.blocks
        spec = self.trace.spec
        title = f"X-ray · {len(blocks)} blocks"
        if spec.steps:
            title += f" · tau {spec.tau:.2f} · full blocks {spec.full_blocks:.0%}"
        self.query_one("#xray-title", Words).show(title)
        self._show_figures()

    def _show_figures(self) -> None:
        current = self.query_one(XrayView).current
        lines = figures(self.trace.blocks, current)
        self.query_one("#xray-figures", Words).show("\n".join(lines))
