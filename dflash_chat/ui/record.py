"""What happens on the chat screen, told to the conversation and its keeper.

The screen calls one method for each thing that happens; this file alone decides what is saved when.
Knows no widgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from dflash_chat.chat import COMPLETE, FAILED, STOPPED, Conversation, Turn
from dflash_chat.runtime.api import Finished, Load, ModelInfo, Prefill, SamplingParams, Tokens
from dflash_chat.ui.keeper import Keeper


@dataclass
class Record:
    """One conversation on screen; without a keeper nothing is saved."""

    chat: Conversation
    keeper: Keeper | None = None
    writing: Turn | None = None  # the answer that is being written

    def begin(
        self, load: Load, info: ModelInfo | None, params: SamplingParams, draft: bool
    ) -> Turn:
        """The question at the tip is about to be sent: it is saved first."""
        chat, question = self.chat, self.chat.last
        assert question is not None, "nothing was asked"
        chat.pair, chat.build, chat.info = load.pair, load.source, info
        chat.params, chat.draft = params, draft
        if self.keeper:
            self.keeper.keep_now(chat, question)
        self.writing = chat.begin_answer()
        return self.writing

    def take(self, event: Prefill | Tokens) -> None:
        """The answer has grown."""
        turn = self.writing
        assert turn is not None, event
        turn.trace.append(event)
        if isinstance(event, Tokens):
            turn.content += event.text
            if self.keeper and turn.content:
                self.keeper.writing(self.chat, turn)

    def end(self, finished: Finished | None, state: str = FAILED) -> None:
        """The answer is over; without the engine's figures `state` says how."""
        turn, self.writing = self.writing, None
        if turn is None:
            return
        turn.figures = finished
        if finished is not None:
            state = COMPLETE if finished.reason == "stop" else STOPPED
        self.chat.end_answer(state)
        if self.keeper and turn.content:
            self.keeper.keep(self.chat, turn)

    def changed(self) -> None:
        """The title, the system prompt or the active path is another one now."""
        if self.keeper and self.chat.tree:
            self.keeper.keep(self.chat)

    @property
    def problem(self) -> str:
        """Why the chat is not saved, "" if it is."""
        return self.keeper.problem if self.keeper else ""
