"""The turns of one chat on screen: questions, streamed answers, notes and cards.

An answer is drawn in two zones: closed chunks, a few to a widget, which never change again, and a
tail that is redrawn with every frame and whose size is bounded. A frame takes a bounded piece of
what has arrived, so a burst shows a little later instead of freezing the screen.
"""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.geometry import Size
from textual.reactive import Reactive
from textual.selection import Selection
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Static

from dflash_chat.chat import Turn
from dflash_chat.ui import pace
from dflash_chat.ui.markdown import Flow, plain, render
from dflash_chat.ui.splitter import Chunk, Splitter

FRAME_CHARS = 2000
BLOCK_CHARS = 1500

# What a model writes must not reach the terminal as a control sequence.
_CONTROLS: dict[int, str] = dict.fromkeys(
    (*range(0x20), 0x7F, *range(0x80, 0xA0)), "\N{REPLACEMENT CHARACTER}"
)
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


class Block(Widget):
    """Closed chunks of an answer, until they are `BLOCK_CHARS` together."""

    # The default asks for a second layout after each that changed a size; nothing here needs it.
    virtual_size = Reactive(Size(0, 0))

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

    def render(self) -> Visual:
        """The laid-out chunk."""
        return self._flow

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


class AnswerTurn(Vertical):
    """One answer and the line of numbers under it."""

    virtual_size = Reactive(Size(0, 0))  # see Block
    COMPONENT_CLASSES: ClassVar = {
        "strong", "em", "strike", "code", "fence", "link", "target", "rule", "bullet", "quote-bar",
        "h1", "h2", "h3", "h4", "h5", "h6",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._splitter = Splitter()
        self._pending = ""
        self._note: str | None = None
        self._tail = Tail()
        self._last: Block | None = None
        self._tail.display = False
        self._line = Static(Content(""), classes="numbers")

    def compose(self) -> ComposeResult:
        """The tail, and the line of numbers."""
        yield self._tail
        yield self._line

    def say(self, words: str) -> None:
        """Put words where the numbers will be."""
        self._line.update(Content(words))

    def write(self, text: str) -> None:
        """Take text; `draw` shows it."""
        self._pending += text.translate(_CONTROLS)

    def finish(self, words: str) -> None:
        """No text follows; `words` go below once all of it is drawn."""
        self._note = words

    @property
    def behind(self) -> bool:
        """Whether `draw` has something left to do."""
        return bool(self._pending) or self._note is not None

    def draw(self) -> None:
        """Draw one frame."""
        if not self.behind or not self.is_mounted:
            return
        text, self._pending = self._pending[:FRAME_CHARS], self._pending[FRAME_CHARS:]
        closed = self._splitter.feed(text)
        if self._note is not None and not self._pending:
            closed += self._splitter.finish()
            self.say(self._note)
            self._note = None
        with self.app.batch_update():
            for chunk in closed:
                if not (self._last and self._last.takes(chunk)):
                    self._last = Block(chunk)
                    self.mount(self._last, before=self._tail)
            self._tail.show(self._splitter.tail)


class UserTurn(Static):
    """What the person said; `waiting` while it has not been sent."""

    def __init__(self, text: str, turn: Turn | None = None) -> None:
        super().__init__()
        self.text = text
        self.turn = turn  # once it has been asked
        self.waiting(turn is None)

    def waiting(self, waiting: bool) -> None:
        """Mark the turn as sent or not yet sent."""
        note = Content.styled("\nwaits for the engine", "dim") if waiting else Content("")
        self.update(Content(self.text.translate(_CONTROLS)) + note)
        self.set_class(waiting, "-waiting")


class Card(Static):
    """A framed message in the transcript: help, a refusal, a crash."""

    def __init__(
        self, title: str, body: str, details: tuple[str, ...] = (), kind: str = ""
    ) -> None:
        content = Content(body)
        if details:
            content += Content.styled("\n" + "\n".join(details), "dim")
        super().__init__(content, classes=f"-{kind}" if kind else "")
        self.border_title = Content(title)


WELCOME = """\
Type a message and press Enter; it goes out as soon as the engine is ready.
Esc stops an answer and keeps what came. F1 lists keys and commands."""


class Turns(Vertical):
    """What the transcript scrolls."""

    virtual_size = Reactive(Size(0, 0))  # see Block


class Transcript(VerticalScroll, can_focus=False):
    """All turns; follows the newest text unless the person has scrolled up."""

    virtual_size = Reactive(Size(0, 0))  # see Block

    def compose(self) -> ComposeResult:
        """The turns fill the view at least: an anchored view would push fewer to its bottom."""
        with Turns():
            yield self._welcome()

    def on_mount(self) -> None:
        """Start at the bottom and stay there."""
        self.anchor()

    @property
    def turns(self) -> Turns:
        """What is scrolled."""
        return self.query_one(Turns)

    def append(self, turn: Widget, before: Widget | None = None) -> None:
        """Add a turn at the end, or above `before`."""
        self.query("#welcome").remove()
        self.turns.mount(turn, before=before)

    def _welcome(self) -> Static:
        return Static(Content(WELCOME), id="welcome")

    @property
    def following(self) -> bool:
        """Whether the end is in view."""
        return self.is_vertical_scroll_end

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.anchor()

    async def clear(self) -> None:
        """Remove all turns."""
        await self.turns.remove_children()
        await self.turns.mount(self._welcome())
        self.anchor()
