"""What can be done with turns: the cursor, copying, continuing, editing, answering again, deleting.

A part of the chat screen. What becomes of the conversation is the dialogue's business.
"""

from __future__ import annotations

from textual.screen import Screen

from dflash_chat import attach
from dflash_chat.errors import UsageError
from dflash_chat.fenced import code_blocks
from dflash_chat.store import StoreError
from dflash_chat.ui import clipboard
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.dialogue import Dialogue
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.transcript import Transcript, UserTurn


class TurnActions(Screen[None]):
    """Actions on the turn under the cursor, or on the last one."""

    dialogue: Dialogue
    editing: UserTurn | None = None  # the question that the prompt's text will replace
    to_delete: UserTurn | AnswerTurn | None = None  # the turn that another press will delete
    _set_aside = _as_it_was = ""  # what stood in the prompt before, and what was put there
    _kept = ""  # what stood in the prompt when that was last saved, folded
    _copied_block: tuple[AnswerTurn | None, int] = (None, -1)

    @property
    def last_answer(self) -> AnswerTurn | None:
        """The last answer in the transcript."""
        turns = self.query_one(Transcript).turns
        return next((each for each in reversed(turns) if isinstance(each, AnswerTurn)), None)

    # ── the cursor ──────────────────────────────────────────────────────────────────────────────

    def action_turn(self, direction: int) -> None:
        """Move the cursor; below the last turn it goes back to the prompt."""
        self.to_delete = None
        if not self.query_one(Transcript).step(direction):
            self.leave_cursor()

    def leave_cursor(self) -> None:
        """Give the keys back to the prompt."""
        self.to_delete = None
        self.query_one(Transcript).point(None)
        self.query_one(Prompt).focus()

    def on_transcript_typed(self, message: Transcript.Typed) -> None:
        """What is typed belongs into the prompt, wherever the cursor was."""
        self.leave_cursor()
        self.query_one(Prompt).put_in(message.text)

    def action_answer_start(self) -> None:
        """Go to the first line of the last answer."""
        if self.last_answer:
            self.query_one(Transcript).to_top_of(self.last_answer)

    # ── copying ─────────────────────────────────────────────────────────────────────────────────

    def copy_text(self, text: str, what: str) -> None:
        """Copy, and say how."""
        self.run_worker(clipboard.hand_over(self.app, text, what), group="copy")

    def action_copy_turn(self) -> None:
        """Copy the turn under the cursor as it was written."""
        turn = self.query_one(Transcript).cursor
        if turn is not None and turn.turn is not None:
            what = "the message" if isinstance(turn, UserTurn) else "the answer"
            self.copy_text(turn.turn.content, what)

    def action_copy_answer(self, argument: str = "") -> None:
        """Copy the last answer, or its last code block. Raises UsageError for another part."""
        answer = self.last_answer
        if answer is None:
            self.notify("There is no answer yet")
        elif argument == "code":
            self._copy_block(answer, -1)
        elif argument:
            raise UsageError(f"/copy knows no {argument!r}.", "Type /copy or /copy code")
        else:
            self.copy_text(answer.turn.content, "the answer")

    def action_code(self) -> None:
        """Continue the answer under the cursor if it was cut, else copy its next code block."""
        turn = self.query_one(Transcript).cursor
        if not isinstance(turn, AnswerTurn):
            return
        if self.dialogue.can_continue(turn):
            self.leave_cursor()
            self.dialogue.continue_(turn)
            return
        before, at = self._copied_block
        self._copied_block = (turn, at + 1 if before is turn else 0)
        self._copy_block(turn, self._copied_block[1])

    def _copy_block(self, answer: AnswerTurn, at: int) -> None:
        blocks = code_blocks(answer.turn.content)
        if not blocks:
            self.notify("There is no code in this answer")
            return
        at %= len(blocks)
        self.copy_text(blocks[at], f"code block {at + 1} of {len(blocks)}")

    # ── answering again ─────────────────────────────────────────────────────────────────────────

    def action_again(self) -> None:
        """Start a dead engine, or answer the last question again."""
        if self.dialogue.down:
            self.dialogue.restart()
        elif question := self.dialogue.retry_after or self._last_question:
            self.dialogue.ask_again(question)

    @property
    def _last_question(self) -> UserTurn | None:
        return next(reversed(self.dialogue.questions), None)

    def action_regenerate(self) -> None:
        """Answer the turn under the cursor again."""
        if question := self._question_at_cursor():
            self.leave_cursor()
            self.dialogue.ask_again(question)

    def action_continue_answer(self) -> None:
        """Go on with the last answer, if it was cut."""
        if self.last_answer:
            self.leave_cursor()
            self.dialogue.continue_(self.last_answer)

    def action_undo_turn(self) -> None:
        """Take the last question back into the prompt; its answer stays as a branch."""
        if question := self._last_question:
            self.leave_cursor()
            self.dialogue.forget_from(question)
            self.take_back(question.shown)
            self.dialogue.next()

    def take_back(self, *texts: str) -> None:
        """Put texts before what stands in the prompt."""
        prompt = self.query_one(Prompt)
        typed = (prompt.short(attach.typed(text)) for text in texts)
        prompt.put("\n".join(filter(None, (*typed, prompt.text))))
        self.keep_typed()

    @property
    def unsent(self) -> str:
        """What was typed and sent nowhere, folded; a question that is edited only once it is
        another one."""
        typed = self.query_one(Prompt).unsent
        if self.editing is None:
            return typed
        return "\n".join(filter(None, [self._set_aside, typed * (typed != self._as_it_was)]))

    def keep_typed(self) -> None:
        """Have what stands in the prompt saved as it is now."""
        self._kept = self.unsent
        self.dialogue.keep_typed(self.query_one(Prompt).unfolded(self._kept))

    # ── deleting ────────────────────────────────────────────────────────────────────────────────

    def action_delete_turn(self) -> None:
        """Delete the turn under the cursor and all below it, if that was asked for twice."""
        cursor = self.query_one(Transcript).cursor
        if cursor is None:
            return
        if self.dialogue.waiting:
            self.notify("Messages wait for the engine. Esc takes them back")
        elif self.to_delete is not cursor:
            self.to_delete = cursor
        else:
            self.leave_cursor()
            self.end_editing()
            try:
                self.dialogue.delete(cursor)
            except StoreError as error:
                self.notify(f"Not deleted: {error.reason}", severity="error", markup=False)

    def delete_words(self, key: str) -> str:
        """What another press of `key` would do."""
        chat = self.dialogue.chat
        turn = self.to_delete.turn if self.to_delete else None
        below = len(chat.below(turn.id)) - 1 if turn and turn.id in chat.tree else 0
        more = f" and {below} below it" if below else ""
        return f"{key} again deletes this turn{more} for good"

    # ── editing ─────────────────────────────────────────────────────────────────────────────────

    def _question_at_cursor(self) -> UserTurn | None:
        transcript = self.query_one(Transcript)
        return transcript.question_of(transcript.cursor) if transcript.cursor else None

    def action_edit(self) -> None:
        """Edit the question at the cursor."""
        if question := self._question_at_cursor():
            self.leave_cursor()
            self.edit_question(question)

    def on_prompt_edit_last(self) -> None:
        """Up in an empty prompt edits the last message."""
        if question := self._last_question:
            self.edit_question(question)
        else:
            self.query_one(Prompt).recall(-1)

    def edit_question(self, question: UserTurn) -> None:
        """Put a question into the prompt; sending it replaces the old one by a branch."""
        prompt = self.query_one(Prompt)
        if self.editing is None:
            self._set_aside = prompt.text
        self.editing = question
        prompt.put(prompt.short(attach.typed(question.shown)))
        self._as_it_was = prompt.text
        prompt.border_title = "editing · Esc leaves it as it was"

    def end_editing(self, restore: bool = True) -> UserTurn | None:
        """The question that was edited; what stood in the prompt before comes back."""
        question, self.editing = self.editing, None
        prompt = self.query_one(Prompt)
        prompt.border_title = ""
        if question is not None and restore:
            prompt.put(self._set_aside)
        self._set_aside = ""
        return question

    def on_prompt_recalled(self) -> None:
        """Another message stands in the prompt: it will be sent as a new one."""
        self.end_editing(restore=False)
