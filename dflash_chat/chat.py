"""A conversation: a tree of turns and the path through it that is talked along.

An edited question and a regenerated answer are branches beside the old ones. Knows nothing of
tokens, models or widgets.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from dflash_chat.runtime.api import Message

COMPLETE, STOPPED, STREAMING, FAILED = "complete", "stopped", "streaming", "failed"


@dataclass
class Turn:
    """What one side said. `parent` is the id of the turn before it, None at the beginning."""

    role: str
    content: str
    parent: str | None
    id: str = field(default_factory=lambda: secrets.token_hex(5))
    thinking: str = ""
    state: str = COMPLETE


@dataclass
class Conversation:
    """The turns of one chat below an optional system prompt; `tip` ends the active path."""

    system: str = ""
    tip: str | None = None
    tree: dict[str, Turn] = field(default_factory=dict)

    @property
    def turns(self) -> list[Turn]:
        """The active path, first question first."""
        path, at = [], self.tip
        while at is not None:
            path.append(self.tree[at])
            at = self.tree[at].parent
        return path[::-1]

    @property
    def last(self) -> Turn | None:
        """The end of the active path."""
        return self.tree[self.tip] if self.tip else None

    def ask(self, text: str) -> Turn:
        """Append what the person said."""
        return self._grow(Turn("user", text, self.tip))

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
        if not (turn.content or turn.thinking):
            del self.tree[turn.id]
            self.tip = turn.parent

    def answer(self, text: str, state: str = COMPLETE) -> None:
        """Append what the assistant said, whole or stopped; an empty answer leaves no turn."""
        self.begin_answer().content = text
        self.end_answer(state)

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

    def _grow(self, turn: Turn) -> Turn:
        self.tree[turn.id] = turn
        self.tip = turn.id
        return turn


def as_markdown(chat: Conversation) -> str:
    """The active path as a document; thoughts are left out."""
    parts = [f"> {line}" for line in chat.system.splitlines()]
    for turn in chat.turns:
        parts += [f"## {'You' if turn.role == 'user' else 'Answer'}", turn.content.strip()]
    return "\n\n".join(parts) + "\n"
