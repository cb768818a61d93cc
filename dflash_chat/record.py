"""What happens on the chat screen, told to the conversation and its keeper.

The screen calls one method for each thing that happens; this file alone decides what is saved when.
Knows no widgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from dflash_chat.chat import Conversation, Turn, new_id
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import Finished, Load, ModelInfo, Prefill, SamplingParams, Tokens
from dflash_chat.store import StoreError

ELSEWHERE = (
    "Another dflash-chat has this chat open. Both may go on: what they say becomes branches, which"
    " each sees once it opens the chat again. What stands unsent there stays there."
)


@dataclass
class Record:
    """One conversation on screen; without a keeper nothing is saved."""

    chat: Conversation
    keeper: Keeper | None = None
    writing: Turn | None = None  # the answer that is being written
    _typed_id: str = field(default_factory=new_id)  # what stands in the prompt is saved under it
    _sent: frozenset[str] = frozenset()  # the ids of questions that wait, and were saved as sent

    def enter(self) -> bool:
        """The chat is open here from now on; whether it is nowhere else. What waits in another
        program's prompt or queue is left to that one."""
        alone = True
        if self.keeper:
            alone = self.keeper.presence.enter(self.chat.id)
            if alone and (self.chat.tree or self.chat.waiting):
                with suppress(StoreError), self.keeper.store() as store:
                    store.load_waiting(self.chat)  # whoever had it open may have left just now
        if not alone:
            self.chat.waiting = {}
        self._sent = frozenset(self.chat.waiting)
        return alone

    def leave(self) -> None:
        """The chat is not open here any more."""
        if self.keeper:
            self.keeper.presence.leave(self.chat.id)

    @property
    def alone(self) -> bool:
        """Whether no other program has the chat open."""
        return self.keeper is None or self.keeper.presence.alone(self.chat.id)

    def begin(
        self, answer: Turn, load: Load, info: ModelInfo | None, params: SamplingParams, draft: bool
    ) -> None:
        """A question is about to be sent, to be answered in `answer`: it is saved first."""
        chat, self.writing = self.chat, answer
        chat.pair, chat.build, chat.info = load.pair, load.quant, info
        chat.params, chat.draft = params, draft
        if self.keeper:
            self.keeper.keep_now(chat, *chat.turns[-2:])

    def take(self, event: Prefill | Tokens) -> None:
        """The answer grows by this."""
        assert self.writing is not None, event
        self.writing.trace.append(event)
        if self.keeper and isinstance(event, Tokens):
            self.keeper.writing(self.chat, self.writing)

    def end(self, finished: Finished | None) -> None:
        """The answer is over; `finished` None: without the engine's figures."""
        turn, self.writing = self.writing, None
        if turn is not None:
            turn.figures = finished
            if self.keeper:
                self.keeper.keep(self.chat, turn)

    def changed(self) -> None:
        """The system prompt or the active path is another one now."""
        if self.keeper and self.chat.tree:
            self.keeper.keep(self.chat)

    def next_id(self) -> str:
        """For a question that is sent now: the id under which it was saved while it was typed, so
        that it is never both asked and still in the prompt."""
        id_, self._typed_id = self._typed_id, new_id()
        return id_

    def wait(self, questions: Mapping[str, str], typed: str = "") -> None:
        """These questions wait for the engine now, by their ids, and `typed` stands in the prompt.
        A new question is saved at once, what is typed soon."""
        new, self._sent = not questions.keys() <= self._sent, frozenset(questions)
        waiting = {**questions, **({self._typed_id: typed} if typed.strip() else {})}
        if waiting == self.chat.waiting and not new:
            return
        self.chat.wait(waiting)
        if self.keeper:
            (self.keeper.keep_now if new else self.keeper.writing)(self.chat)

    def delete(self, turn: Turn) -> None:
        """A turn and all below it are to be gone. Raises StoreError, and then they are not."""
        assert self.writing is None, self.writing
        if self.keeper:
            self.keeper.remove_turn(self.chat, turn)
        self.chat.delete(turn.id)
        if self.keeper:
            self.keeper.keep(self.chat)

    def trace(self, turn: Turn) -> list[Prefill | Tokens]:
        """All steps of an answer. Raises StoreError."""
        return self.keeper.trace(turn) if self.keeper else turn.trace

    def events(self, turn: Turn) -> list[Tokens]:
        """What the engine sent for an answer, none if that cannot be read."""
        try:
            return [event for event in self.trace(turn) if isinstance(event, Tokens)]
        except StoreError:
            return []

    @property
    def problem(self) -> str:
        """Why the chat is not saved, "" if it is."""
        return self.keeper.problem if self.keeper else ""
