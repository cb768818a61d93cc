"""A conversation: who said what, in order. Knows nothing of tokens, models or widgets."""

from __future__ import annotations

from dataclasses import dataclass, field

from dflash_chat.runtime.api import Message


@dataclass
class Conversation:
    """The turns of one chat below an optional system prompt."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Append what the person said."""
        self.turns.append(Message("user", text))

    def answer(self, text: str) -> None:
        """Append what the assistant said, whole or stopped; an empty answer leaves no turn."""
        if text:
            self.turns.append(Message("assistant", text))

    def retract_answer(self) -> None:
        """Forget the last answer, so that its question can be answered again."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()

    def messages(self) -> tuple[Message, ...]:
        """What the engine is sent. Questions left without an answer join the next one, because chat
        templates want the roles to alternate."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            if messages and messages[-1].role == turn.role:
                turn = Message(turn.role, f"{messages.pop().content}\n\n{turn.content}")
            messages.append(turn)
        return tuple(messages)
