"""The turns of one chat on screen: questions, answers and cards, and the cursor that points at one.

Knows nothing of the engine. What an answer looks like is in answer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.reactive import Reactive
from textual.widget import Widget
from textual.widgets import Static

from dflash_chat.chat import Turn, new_id
from dflash_chat.terminals import CONTROLS
from dflash_chat.ui.actions import TURN, in_scope
from dflash_chat.ui.answer import AnswerTurn

SHOWN_CHARS = 8000
WELCOME = """\
Type a message and press Enter; while the engine loads, it waits.
Esc stops an answer and keeps what came. F1 lists keys and commands."""


class UserTurn(Static):
    """What the person said; `waiting` while it has not been sent.

    `shown` is what was typed, `text` what is sent: pastes unfolded and files added, which `notes`
    says in words. `turn` is its place in the conversation once it was sent, `turn_id` the id that a
    new one gets. It is shown up to a length that can be drawn at once.
    """

    def __init__(self, shown: str, text: str = "", notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.shown, self.text = shown, text or shown
        self.turn: Turn | None = None
        self.turn_id = new_id()
        self._notes = tuple(notes)
        self.waiting(True)

    def waiting(self, waiting: bool) -> None:
        """Mark the turn as sent or not yet sent."""
        self.waits = waiting
        notes = [*self._notes, *(["waits for the engine"] if waiting else [])]
        below = Content.styled("\n" + "\n".join(notes), "$text-muted") if notes else Content("")
        more = len(self.shown) - SHOWN_CHARS
        if more > 0:
            below = Content.styled(f"\n… {more} characters more", "$text-muted") + below
        self.update(Content(self.shown[:SHOWN_CHARS].translate(CONTROLS)) + below)
        self.set_class(waiting, "-waiting")


class Card(Static):
    """A framed message in the transcript: help, a refusal, a crash."""

    def __init__(
        self, title: str, body: str, details: tuple[str, ...] = (), kind: str = ""
    ) -> None:
        content = Content(body)
        if details:
            content += Content.styled("\n" + "\n".join(details), "$text-muted")
        super().__init__(content, classes=f"-{kind}" if kind else "")
        self.border_title = Content(title)


class Turns(Vertical):
    """What the transcript scrolls."""

    virtual_size = Reactive(Size(0, 0))  # see Block


class Transcript(VerticalScroll, can_focus=False):
    """All turns; follows the newest text unless the person has scrolled up.

    It takes the focus only while its cursor points at a turn; what is typed then still goes to the
    prompt.
    """

    BINDINGS: ClassVar = [
        Binding(action.keys, f"screen.{action.method}", action.name, id=action.id, priority=True)
        for action in in_scope(TURN)
    ]
    virtual_size = Reactive(Size(0, 0))  # see Block

    class Typed(Message):
        """The person went on typing while the cursor was on a turn."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__()
        self.cursor: UserTurn | AnswerTurn | None = None
        self.unseen_tokens = 0  # that came since the end was last in view

    def compose(self) -> ComposeResult:
        """The turns fill the view at least: an anchored view would push fewer to its bottom."""
        with Turns():
            yield self._welcome()

    def on_mount(self) -> None:
        """Start at the bottom and stay there."""
        self.anchor()

    def append(self, turn: Widget, before: Widget | None = None) -> None:
        """Add a turn at the end, or above `before`."""
        self.query("#welcome").remove()
        self.query_one(Turns).mount(turn, before=before)

    def _welcome(self) -> Static:
        return Static(Content(WELCOME), id="welcome")

    # ── the view ────────────────────────────────────────────────────────────────────────────────

    @property
    def following(self) -> bool:
        """Whether the end is in view."""
        return self.is_vertical_scroll_end

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.anchor()

    def count(self, tokens: int) -> None:
        """So many tokens were added at the end."""
        self.unseen_tokens = 0 if self.following else self.unseen_tokens + tokens

    def to_top_of(self, turn: Widget) -> None:
        """Scroll to the first line of a turn."""
        self.scroll_to_widget(turn, top=True, animate=False, immediate=True)

    # ── turns and the cursor ────────────────────────────────────────────────────────────────────

    @property
    def turns(self) -> list[UserTurn | AnswerTurn]:
        """Questions that were sent and their answers, first one first."""
        return [
            child
            for child in self.query_one(Turns).children
            if isinstance(child, UserTurn | AnswerTurn) and child.display and not child.waits
        ]

    def question_of(self, turn: UserTurn | AnswerTurn) -> UserTurn | None:
        """The question itself, or what the answer answers."""
        turns = self.turns
        before = turns[: turns.index(turn) + 1] if turn in turns else []
        return next((each for each in reversed(before) if isinstance(each, UserTurn)), None)

    def point(self, turn: UserTurn | AnswerTurn | None) -> None:
        """Put the cursor on a turn, or take it away."""
        if self.cursor is not None:
            self.cursor.remove_class("-cursor")
        self.cursor = turn
        self.can_focus = turn is not None
        if turn is not None:
            turn.add_class("-cursor")
            self.focus(scroll_visible=False)
            self.to_top_of(turn)

    def step(self, direction: int) -> bool:
        """Move the cursor by a turn; False below the last one."""
        turns = self.turns
        at = turns.index(self.cursor) if self.cursor in turns else len(turns)
        at = max(at + direction, 0)
        if at >= len(turns):
            return False
        self.point(turns[at])
        return True

    def cut_from(self, turn: Widget, below: bool = False) -> None:
        """Remove a turn and all that stands below it but messages that wait; with `below`, keep the
        turn."""
        children = [child for child in self.query_one(Turns).children if child.display]
        if turn not in children:
            return
        after = children[children.index(turn) + below :]
        gone = [w for w in after if not (isinstance(w, UserTurn) and w.waits)]
        if self.cursor in gone:
            self.point(None)
        self.query_one(Turns).remove_children(gone)

    def clear(self) -> None:
        """Remove all turns."""
        self.point(None)
        turns = self.query_one(Turns)
        turns.remove_children([child for child in turns.children if child.id != "welcome"])
        if not turns.query("#welcome"):
            turns.mount(self._welcome())
        self.unseen_tokens = 0
        self.anchor()

    # ── what is typed while the cursor is here ──────────────────────────────────────────────────

    def on_key(self, event: events.Key) -> None:
        """A character that is no key of ours is the beginning of a message."""
        if event.is_printable and event.character:
            event.stop()
            self.post_message(self.Typed(event.character))

    def on_paste(self, event: events.Paste) -> None:
        """So is a paste."""
        event.stop()
        self.post_message(self.Typed(event.text))
