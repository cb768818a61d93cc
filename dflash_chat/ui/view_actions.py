"""What the keys for looking do: scrolling, thoughts, panel, X-ray, comparison, help.

A part of the chat screen; changes nothing of the conversation.
"""

from __future__ import annotations

from dflash_chat.ui.actions import Keymap
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.compare_screen import CompareScreen
from dflash_chat.ui.help_screen import HelpScreen
from dflash_chat.ui.transcript import Transcript
from dflash_chat.ui.turn_actions import TurnActions
from dflash_chat.ui.xray import XrayScreen


class ViewActions(TurnActions):
    """Actions that show something."""

    keymap: Keymap

    def action_thoughts(self) -> None:
        """Show or hide what the model thinks."""
        self.dialogue.unfold(not self.dialogue.unfolded)
        self.notify("Thoughts are shown" if self.dialogue.unfolded else "Thoughts are folded")

    @property
    def seen_answer(self) -> AnswerTurn | None:
        """The answer under the cursor, or that to the question there; without a cursor the last."""
        transcript = self.query_one(Transcript)
        cursor, turns = transcript.cursor, transcript.turns
        if cursor not in turns:  # none, or its turn is being removed
            return self.last_answer
        from_here = turns[turns.index(cursor) :][:2]
        return next((turn for turn in from_here if isinstance(turn, AnswerTurn)), None)

    def action_xray(self) -> None:
        """Show an answer by block and origin."""
        if answer := self.seen_answer:
            self.app.push_screen(XrayScreen(self.dialogue.trace(answer)))

    def action_compare(self) -> None:
        """Answer the last question with and without drafting."""
        if self.dialogue.info is not None and not self.dialogue.info.drafter:
            self.notify("This pair has no drafter")
            return
        comparison = CompareScreen(self.dialogue, self.dialogue.last_messages())
        comparison.start()
        self.app.push_screen(comparison)

    def action_toggle_panel(self) -> None:
        """Show or hide the numbers."""
        self.toggle_class("-bare")

    def action_help(self) -> None:
        """Show keys and commands."""
        self.app.push_screen(HelpScreen(self.keymap))

    def action_page(self, direction: int) -> None:
        """Scroll the chat by a page."""
        transcript = self.query_one(Transcript)
        (transcript.scroll_page_up if direction < 0 else transcript.scroll_page_down)(animate=False)

    def action_line(self, direction: int) -> None:
        """Scroll the chat by a line."""
        transcript = self.query_one(Transcript)
        (transcript.scroll_up if direction < 0 else transcript.scroll_down)(animate=False)

    def action_follow(self) -> None:
        """Go to the end and follow the answer again."""
        if self.query_one(Transcript).cursor is not None:
            self.leave_cursor()
        self.query_one(Transcript).follow()
