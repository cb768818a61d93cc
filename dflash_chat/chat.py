"""A conversation: a tree of turns, and the path through it that is being talked along.

An edited question and a regenerated answer are new branches beside the old ones; nothing said is
lost. Knows nothing of tokens, models, files or widgets.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dflash_chat.runtime.api import Finished, Message, ModelInfo, Prefill, SamplingParams, Tokens

COMPLETE, STOPPED, STREAMING, FAILED = STATES = ("complete", "stopped", "streaming", "failed")
ROLES = ("user", "assistant")
TITLE_CHARS = 60
_JOINER = "\u200d"  # between the parts of one emoji


def new_id() -> str:
    """Ten hexadecimal digits: unique without asking anybody, short enough to type a part of."""
    return secrets.token_hex(5)


def titled(text: str) -> str:
    """How the first paragraph of a text begins, in one line and without what a terminal would
    obey. Files that go along with a message stand below it."""
    head = text.lstrip().partition("\n\n")[0][: 10 * TITLE_CHARS]
    kept = (c if c.isprintable() or c == _JOINER else " " for c in head)
    words = " ".join("".join(kept).split())
    return words if len(words) <= TITLE_CHARS else words[: TITLE_CHARS - 1].rstrip() + "…"


@dataclass
class Turn:
    """What one side said at one point of the tree.

    `parent` None is a first question. `figures` are the engine's own, once it has finished. `trace`
    holds the events of this answer that were seen since the chat was opened.
    """

    role: str
    content: str
    parent: str | None
    id: str = field(default_factory=new_id)
    thinking: str = ""
    state: str = COMPLETE
    created: float = field(default_factory=time.time)
    figures: Finished | None = None
    trace: list[Prefill | Tokens] = field(default_factory=list)

    @property
    def said(self) -> bool:
        """Whether there is a word of it."""
        return self.role == "user" or bool(self.content or self.thinking)


@dataclass
class Conversation:
    """One chat. Until a person names it, its title is how its first question begins. `pair` and
    `build` name what answered last, `info` is what that said of itself. `waiting` holds what
    was typed and is no turn yet, by the ids the turns will have: questions that wait to be asked,
    and last what stands in the prompt. `settled` are ids that have waited and do no more."""

    system: str = ""
    id: str = field(default_factory=new_id)
    title: str = ""
    pair: str = ""
    build: str = ""
    params: SamplingParams = SamplingParams()
    draft: bool = True
    info: ModelInfo | None = None
    created: float = field(default_factory=time.time)
    tip: str | None = None  # the last turn of the active path
    tree: dict[str, Turn] = field(default_factory=dict)  # by id, oldest first
    waiting: dict[str, str] = field(default_factory=dict)
    settled: frozenset[str] = frozenset()

    # ── the active path ─────────────────────────────────────────────────────────────────────────

    @property
    def turns(self) -> list[Turn]:
        """The active path, first question first."""
        path = []
        at = self.tip
        while at is not None:
            path.append(self.tree[at])
            at = self.tree[at].parent
        return path[::-1]

    @property
    def last(self) -> Turn | None:
        """The end of the active path."""
        return self.tree[self.tip] if self.tip else None

    def messages(self) -> tuple[Message, ...]:
        """What the engine is sent, without thoughts. Questions left without an answer join the next
        one, because chat templates want the roles to alternate."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            if not turn.content:
                continue
            message = Message(turn.role, turn.content)
            if messages and messages[-1].role == turn.role:
                message = Message(turn.role, f"{messages.pop().content}\n\n{turn.content}")
            messages.append(message)
        return tuple(messages)

    def ask(self, text: str, id_: str = "") -> Turn:
        """Append what the person said, as the turn `id_` if it has waited."""
        if not self.tree or not self.title:  # what waited has named it so far
            self.title = titled(text)
        return self._grow(Turn("user", text, self.tip, id_ or new_id()))

    def wait(self, questions: Mapping[str, str]) -> None:
        """These questions wait now, and no others."""
        self.settled = (self.settled | self.waiting.keys()) - questions.keys()
        self.waiting = dict(questions)
        if not self.tree:
            self.title = titled(next(iter(questions.values()), ""))

    def begin_answer(self) -> Turn:
        """Append an answer that is still to be written: set its `content`, then `end_answer`."""
        return self._grow(Turn("assistant", "", self.tip, state=STREAMING))

    def continue_answer(self) -> Turn:
        """The answer at the end of the path is written on."""
        turn = self.last
        assert turn is not None, "an empty chat has no answer"
        assert turn.role == "assistant", turn
        turn.state = STREAMING
        return turn

    def end_answer(self, state: str = COMPLETE) -> None:
        """The answer at the end of the path is as long as it gets; an empty one leaves no turn."""
        turn = self.last
        assert turn is not None, "an empty chat has no answer"
        assert turn.state == STREAMING, turn
        turn.state = state
        if not turn.said:
            del self.tree[turn.id]
            self.tip = turn.parent

    def answer(self, text: str, state: str = COMPLETE) -> None:
        """Append what the assistant said, whole or stopped; an empty answer leaves no turn."""
        self.begin_answer().content = text
        self.end_answer(state)

    # ── branches ────────────────────────────────────────────────────────────────────────────────

    def edit(self, turn: str, text: str) -> Turn:
        """Say `text` in place of the question `turn`, on a branch of its own."""
        assert self.tree[turn].role == "user", self.tree[turn]
        return self._grow(Turn("user", text, self.tree[turn].parent))

    def regenerate(self, turn: str) -> None:
        """Go back to the question of the answer `turn`; the next answer is a branch beside it."""
        assert self.tree[turn].role == "assistant", self.tree[turn]
        self.tip = self.tree[turn].parent

    def retract_answer(self) -> None:
        """Leave the last answer, if there is one, so that its question can be answered again."""
        if self.last and self.last.role == "assistant":
            self.regenerate(self.last.id)

    def retract_question(self) -> None:
        """Leave the last question; the path ends before it."""
        if self.last and self.last.role == "user":
            self.tip = self.last.parent

    def branches(self, turn: str) -> list[Turn]:
        """All turns that stand where `turn` stands, oldest first, itself included."""
        parent, role = self.tree[turn].parent, self.tree[turn].role
        return [t for t in self.tree.values() if t.parent == parent and t.role == role]

    def switch(self, turn: str) -> None:
        """Follow the path through `turn`, and from there on the newest turn each time."""
        newest = {t.parent: t.id for t in self.tree.values()}
        while turn in newest:
            turn = newest[turn]
        self.tip = turn

    def below(self, turn: str) -> list[Turn]:
        """A turn and all that hangs below it, on whatever branch, parents before children."""
        found = {turn: self.tree[turn]}
        for each in self.tree.values():
            if each.parent in found:
                found[each.id] = each
        return list(found.values())

    def delete(self, turn: str) -> None:
        """Take a turn and all below it out of the tree. A path that went through it ends before
        it, or goes through the newest turn beside it."""
        parent = self.tree[turn].parent
        beside = [each.id for each in self.branches(turn) if each.id != turn]
        for each in self.below(turn):
            del self.tree[each.id]
        if self.tip in self.tree:
            return
        self.tip = parent
        if beside:
            self.switch(beside[-1])
        if not self.tree:
            self.title = ""

    def _grow(self, turn: Turn) -> Turn:
        self.tree[turn.id] = turn
        self.tip = turn.id
        return turn

    # ── from elsewhere ──────────────────────────────────────────────────────────────────────────

    def plant(self, turns: Iterable[Turn], tip: str | None) -> None:
        """Take turns from a file, parents before children. What nobody writes on is stopped, and
        answers without a word, or without their question, are left out; so the tree is whole."""
        for turn in turns:
            if not turn.said or (turn.parent is not None and turn.parent not in self.tree):
                continue
            turn.state = STOPPED if turn.state == STREAMING else turn.state
            self.tree[turn.id] = turn
        self.tip = tip if tip in self.tree else None
        if self.tip is None and self.tree:
            self.switch(next(reversed(self.tree)))
