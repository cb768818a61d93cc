"""What can be done with saved chats and with branches, and what comes back of them at the start.

A part of the chat screen.
"""

from __future__ import annotations

import asyncio

from textual import work

from dflash_chat import attach
from dflash_chat.chat import Conversation, Turn
from dflash_chat.errors import UserError
from dflash_chat.store import StoreError
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.sessions_screen import SessionsScreen
from dflash_chat.ui.transcript import Card, Transcript
from dflash_chat.ui.turn_actions import TurnActions


class SavedActions(TurnActions):
    """Opening, deleting, and going from branch to branch."""

    def action_sessions(self, argument: str = "") -> None:
        """Open the chat of this id, or choose one."""
        keeper = self.dialogue.record.keeper
        assert keeper is not None, "nothing is saved here"
        if not argument:
            self._choose_chat()
            return
        with keeper.store() as store:
            self._reopen(store.load(store.find(argument)))

    def open_saved(self, conversation: str) -> None:
        """Open the chat of this id, if it is there still."""
        try:
            self.action_sessions(conversation)
        except UserError as error:
            self.notify(error.message, severity="error", markup=False)

    @work(exclusive=True, group="sessions")
    async def _choose_chat(self) -> None:
        keeper, chat = self.dialogue.record.keeper, self.dialogue.chat
        assert keeper is not None, "nothing is saved here"
        screen = SessionsScreen(keeper.store, chat, self._remove_chat)
        if chosen := await self.app.push_screen_wait(screen):
            self._reopen(chosen)

    def _reopen(self, chat: Conversation) -> None:
        """Go on with a saved chat, as it was set, on the pair that is loaded."""
        dialogue = self.dialogue
        if chat.id == dialogue.chat.id:
            return
        self.end_editing()
        self.keep_typed()
        dialogue.params, dialogue.draft = chat.params, chat.draft
        dialogue.open(chat)
        self.put_back()
        if chat.pair != dialogue.load.pair:
            words = f"{chat.pair or 'another'} answered so far, {dialogue.load.pair} does now"
            dialogue.show(Card("Another pair", words))

    def put_back(self) -> None:
        """What was not asked when the chat was left goes into the prompt."""
        before = self.query_one(Prompt).unfolded(self.unsent)
        texts = [attach.typed(text) for text in self.dialogue.chat.waiting.values()]
        if missing := [text for text in texts if text not in before]:
            self.take_back(*missing)
            self.notify("What was not sent yet stands in the prompt")
        self.keep_typed()

    @work
    async def recall_past(self) -> None:
        """The prompt's history goes on with what was asked before this session."""
        if keeper := self.dialogue.record.keeper:
            texts = await asyncio.to_thread(lambda: [*map(attach.typed, keeper.questions())])
            self.query_one(Prompt).remember(texts)

    def _remove_chat(self, conversation: str) -> None:
        """Delete a saved chat; if it is the one on screen, start another. Raises StoreError."""
        record = self.dialogue.record
        keeper = record.keeper
        assert keeper is not None, "nothing is saved here"
        if conversation != record.chat.id:
            keeper.remove(conversation)
            return
        record.keeper = None  # what still comes is saved no more
        try:
            keeper.remove(conversation)
        except StoreError:
            record.keeper = keeper
            raise
        self.keep_typed()
        self.dialogue.open(Conversation(record.chat.system), keeper)

    def action_branch(self, direction: int = 1) -> None:
        """Go to the next or last branch of the turn at the cursor, or of the last with several."""
        turn = self.fork
        if turn is None:
            return
        branches = self.dialogue.chat.branches(turn.id)
        at = (branches.index(turn) + direction) % len(branches)
        self.leave_cursor()
        self.dialogue.switch(branches[at])
        self.notify(f"Branch {at + 1} of {len(branches)}")

    @property
    def fork(self) -> Turn | None:
        """The turn at the cursor if it has branches, else the last on the path that has some."""
        chat, cursor = self.dialogue.chat, self.query_one(Transcript).cursor
        turns = [cursor.turn] if cursor and cursor.turn else []
        for turn in [*turns, *reversed(chat.turns)]:
            if turn.id in chat.tree and len(chat.branches(turn.id)) > 1:
                return turn
        return None
