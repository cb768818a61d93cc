"""One answer on screen: its thought, its text as it streams in, and the line of numbers under it.

Text is drawn in two zones: closed chunks, a few to a widget, which never change again, and a tail
that is redrawn with every frame and whose size is bounded. A frame takes a bounded piece of what
has arrived, so a burst shows a little later instead of freezing the screen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.geometry import Size
from textual.reactive import Reactive
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Static

from dflash_chat.chat import STREAMING, Turn
from dflash_chat.runtime.api import Spec, Tokens
from dflash_chat.terminals import CONTROLS
from dflash_chat.thinking import ThoughtSplitter
from dflash_chat.ui import pace
from dflash_chat.ui.markdown import Flow, plain, render
from dflash_chat.ui.origins import Trace
from dflash_chat.ui.splitter import Chunk, Splitter
from dflash_chat.ui.words import Words

PIECE_CHARS = 1000
FRAME_S = 0.02  # after which a frame takes no further piece
BLOCK_CHARS = 1500


class Block(Widget):
    """Closed chunks of an answer, until they are `BLOCK_CHARS` together."""

    # The default asks for a second layout after each that changed a size; nothing here needs it.
    virtual_size = Reactive(Size(0, 0))
    auto_links = Reactive(False)  # no text of ours is a link to press

    def __init__(self, chunk: Chunk | None = None) -> None:
        super().__init__()
        self._flow = Flow(())
        self._chars = 0
        if chunk:
            self._flow = render(chunk)
            self._chars = len(chunk.text)
            self.set_class(chunk.continued, "-continued")

    def takes(self, chunk: Chunk) -> bool:
        """Add a chunk, if there is room for it."""
        if self._chars + len(chunk.text) > BLOCK_CHARS:
            return False
        self._flow.extend(render(chunk), gap=not chunk.continued)
        self._chars += len(chunk.text)
        self.refresh(layout=True)
        return True

    def get_content_width(self, container: Size, viewport: Size) -> int:
        """Whatever there is."""
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many rows as the text has."""
        return self._flow.height(width)

    def render_line(self, y: int) -> Strip:
        """One row. Only those in view are drawn: keeping the others would cost the garbage
        collector more than drawing them again."""
        row, width = self._flow.drawn(y, self.size.width), self.size.width
        if (selection := self.text_selection) and (span := selection.get_span(y)):
            start, end = span
            style = Style.from_styles(self.screen.get_component_styles("screen--selection"))
            row = row.stylize(style, start, len(row.plain) if end == -1 else end)
        strip, *_ = Visual.to_strips(self, row, width, 1, self.visual_style, apply_selection=False)
        return strip.apply_offsets(0, y)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Selected text as it was written, not as it was wrapped."""
        return self._flow.extract(selection), "\n"


class Tail(Block):
    """The open chunk of an answer that is still being written."""

    def show(self, chunk: Chunk | None) -> None:
        """Draw `chunk`; tables stay as written until their columns are known."""
        self.display = chunk is not None
        if chunk is None:
            return
        self._flow = plain(chunk.text) if chunk.kind == "table" else render(chunk, False)
        self.set_class(chunk.continued, "-continued")
        self._flow.step = pace.SCROLL_ROWS
        width, height = self.content_size
        self.refresh(layout=not width or self._flow.height(width) != height)


class Zones(Vertical):
    """Text that streams in. Draws nothing while it is hidden; nothing is lost by that."""

    virtual_size = Reactive(Size(0, 0))  # see Block

    def __init__(self, classes: str = "") -> None:
        super().__init__(classes=classes)
        self._splitter = Splitter()
        self._pending = ""
        self._ended = False
        self._tail = Tail()
        self._tail.display = False
        self._last: Block | None = None

    def compose(self) -> ComposeResult:
        """The tail; blocks come before it."""
        yield self._tail

    def write(self, text: str) -> None:
        """Take text; `draw` shows it."""
        self._pending += text.translate(CONTROLS)

    def end(self) -> None:
        """No text follows."""
        self._ended = True

    @property
    def undrawn(self) -> int:
        """Characters that `draw` has not drawn yet."""
        return len(self._pending)

    @property
    def behind(self) -> bool:
        """Whether `draw` has something left to do."""
        return self.display and (bool(self._pending) or self._ended)

    def draw(self) -> None:
        """Draw one frame."""
        if not self.behind or not self.is_mounted:
            return
        until = time.perf_counter() + FRAME_S
        with self.app.batch_update():
            while self.behind:
                self._draw_piece()
                if time.perf_counter() > until:
                    break
            self._tail.show(self._splitter.tail)

    def _draw_piece(self) -> None:
        text, self._pending = self._pending[:PIECE_CHARS], self._pending[PIECE_CHARS:]
        closed = self._splitter.feed(text)
        if self._ended and not self._pending:
            closed += self._splitter.finish()
            self._ended = False
        for chunk in closed:
            if not (self._last and self._last.takes(chunk)):
                self._last = Block(chunk)
                self.mount(self._last, before=self._tail)


class AnswerTurn(Vertical):
    """The answer `turn`: its thought, folded away unless asked for, its text and its numbers."""

    virtual_size = Reactive(Size(0, 0))  # see Block
    waits = False  # an answer is written at once
    COMPONENT_CLASSES: ClassVar = {
        "strong", "em", "strike", "code", "fence", "link", "target", "rule", "bullet", "quote-bar",
        "h1", "h2", "h3", "h4", "h5", "h6",
    }  # fmt: skip

    def __init__(self, turn: Turn, unfolded: bool = False) -> None:
        super().__init__()
        self.turn = turn
        self.trace: Trace | None = None  # what X-ray shows of it, once it was asked for
        self._unfolded = unfolded
        self._thoughts = ThoughtSplitter()
        self._note: str | None = None
        self._thought_words = Words(classes="thought-words")
        self._thought = Zones("thought")
        self._thought_words.display = self._thought.display = False
        self._thought_tokens, self._thought_spec = 0, Spec()
        self._zones = Zones()
        self._line = Static(Content(""), classes="numbers")

    def compose(self) -> ComposeResult:
        """The thought's line, the thought, the text, and the line of numbers."""
        yield self._thought_words
        yield self._thought
        yield self._zones
        yield self._line

    def say(self, words: str) -> None:
        """Put words where the numbers will be."""
        self._line.update(Content(words))

    def take(self, event: Tokens) -> None:
        """Take what the engine says: it becomes text of `turn`, which `draw` shows."""
        self._split(self._counted(event))
        if self.trace:
            self.trace.take(event)

    def go_on(self, text: str) -> None:
        """Take text as it was sent, marks of thoughts included."""
        self._split(self._thoughts.feed(text))

    def _split(self, pieces: list[tuple[bool, str]]) -> None:
        for is_thought, text in pieces:
            if is_thought:
                self.turn.thinking += text
                self._think(text)
            else:
                self.turn.content += text
                self._zones.write(text)

    def restore(self, events: Iterable[Tokens], words: str) -> None:
        """Show what `turn` holds; its thought is counted as the engine told it."""
        for event in events:
            self._counted(event)
        if self.turn.thinking:
            self._think(self.turn.thinking)
        self._zones.write(self.turn.content)
        self._end(words)

    def _think(self, text: str) -> None:
        self._thought_words.display = True
        self._thought.display = self._unfolded
        self._thought.write(text)

    def _counted(self, event: Tokens) -> list[tuple[bool, str]]:
        """The pieces of its text; tokens of the thought are counted."""
        thinking = self._thoughts.thinking
        pieces = self._thoughts.feed(event.text)
        if thinking or self._thoughts.thinking:
            self._thought_tokens += event.tokens
            if event.stats:
                self._thought_spec = self._thought_spec.add(event.stats)
        return pieces

    def unfold(self, unfolded: bool) -> None:
        """Show or hide the thought."""
        self._unfolded = unfolded
        self._thought.display = unfolded and self._thought_words.display

    def finish(self, words: str) -> None:
        """No text follows; `words` go below once all of it is drawn."""
        self._split(self._thoughts.finish())
        self._end(words)

    def _end(self, words: str) -> None:
        self._note = words
        self._thought.end()
        self._zones.end()

    @property
    def undrawn(self) -> int:
        """Characters of the text, thought apart, that `draw` has not drawn yet."""
        return self._zones.undrawn

    @property
    def behind(self) -> bool:
        """Whether `draw` has something left to do."""
        return self._thought.behind or self._zones.behind or self._note is not None

    def draw(self) -> None:
        """Draw one frame."""
        if not self.is_mounted:
            return
        self._thought.draw()
        self._zones.draw()
        if self._thought_words.display:
            self._thought_words.show(self._thought_line())
        if self._note is not None and not self._zones.behind:
            self.say(self._note)
            self._note = None

    def _thought_line(self) -> str:
        """The thought in one line: how long, how well drafted, whether it is open."""
        goes_on = self.turn.state == STREAMING and not self.turn.content
        words = [f"{'▾' if self._unfolded else '▸'} {'thinking …' if goes_on else 'thought'}"]
        if self._thought_tokens:
            words.append(f"{self._thought_tokens} tokens")
        if self._thought_spec.steps:
            words.append(f"tau {self._thought_spec.tau:.1f}")
        return " · ".join(words)
