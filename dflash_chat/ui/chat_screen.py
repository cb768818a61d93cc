"""The chat on screen: layout, clocks, words, sending and stopping.

What goes on with the engine is the dialogue's business; which keys and commands there are stands in
actions.py, what they do with turns, saved chats, settings and views in the files that end in
_actions.py. Text is drawn a few times a second and numbers at 5 Hz at most.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical

from dflash_chat import attach
from dflash_chat.chat import Conversation
from dflash_chat.errors import UserError
from dflash_chat.keeper import Keeper
from dflash_chat.record import Record
from dflash_chat.runtime.api import Load, Progress, SamplingParams
from dflash_chat.runtime.client import EngineClient
from dflash_chat.ui import commands, editor, pace, terminal
from dflash_chat.ui.actions import (
    ACTIONS,
    APP,
    BY_ID,
    CHAT,
    COMMANDS,
    TURN,
    Action,
    Keymap,
    in_scope,
    key_words,
    keys_of,
)  # fmt: skip
from dflash_chat.ui.bars import bar
from dflash_chat.ui.chat_search import SavedChats
from dflash_chat.ui.dialogue import Dialogue
from dflash_chat.ui.fetching import Pull
from dflash_chat.ui.key_bar import KeyBar
from dflash_chat.ui.menu import Menu
from dflash_chat.ui.model_actions import ModelActions
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.saved_actions import SavedActions
from dflash_chat.ui.setting_actions import SettingActions
from dflash_chat.ui.side_panel import SidePanel, StatusLine
from dflash_chat.ui.transcript import Card, Transcript, UserTurn
from dflash_chat.ui.view_actions import ViewActions
from dflash_chat.ui.watching import Watch
from dflash_chat.ui.words import Words

NUMBERS_S = 1 / 5
WIDTHS = [(0, "-tiny"), (60, "-narrow"), (96, "-wide")]


class ChatScreen(SavedActions, SettingActions, ViewActions, ModelActions):
    """The chat and its panel."""

    HORIZONTAL_BREAKPOINTS = WIDTHS
    COMMANDS: ClassVar = {SavedChats}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(action.keys, action.call or action.id, action.name, id=action.id, priority=True)
        for action in in_scope(CHAT)
    ]

    def __init__(
        self,
        client: EngineClient,
        load: Load,
        params: SamplingParams,
        system: str = "",
        draft: bool = True,
        keymap: Keymap | None = None,
        keeper: Keeper | None = None,
        chat: Conversation | None = None,
    ) -> None:
        super().__init__()
        record = Record(chat or Conversation(system), keeper)
        self.dialogue = Dialogue(client, load, params, draft, record)
        self.dialogue.ended = self._answered
        self.pull = Pull(self.pulled)
        self.gates = Watch(self.gate_opened)
        self.keymap: Keymap = keymap or {}
        self._numbers_due = 0.0
        self._untidy = False  # an answer has ended since garbage was collected
        self._told = ""

    @property
    def exit_code(self) -> int:
        """What the program should return."""
        return self.dialogue.exit_code

    def compose(self) -> ComposeResult:
        """Title, chat and panel, footer."""
        with Horizontal(id="title-bar"):
            yield Words(id="title")
            yield Words(id="state")
        with Horizontal(id="body"):
            with Vertical(id="chat"):
                yield Transcript()
                yield Words(id="hint")
                menu = Menu()
                yield menu
                yield Prompt(menu, self.keymap)
                yield StatusLine()
            yield SidePanel()
        yield KeyBar()

    def on_mount(self) -> None:
        """Start the clocks and load the pair."""
        self.dialogue.transcript = self.query_one(Transcript)
        self.dialogue.start()
        self.query_one(Prompt).focus()
        self.gates.resume()
        self.set_interval(pace.FRAME_S, self._frame)
        self.put_back()
        self.show_numbers()
        self.call_after_refresh(self.recall_past)

    # ── clocks ──────────────────────────────────────────────────────────────────────────────────

    def _frame(self) -> None:
        self.dialogue.frame()
        if time.monotonic() >= self._numbers_due:
            self.show_numbers()
        elif self._untidy and not self.dialogue.drawing:
            self._untidy = False
            pace.tidy()

    def show_numbers(self) -> None:
        """Bring everything but the transcript up to date."""
        now = time.monotonic()
        self._numbers_due = now + NUMBERS_S
        if self.unsent != self._kept:
            self.keep_typed()
        dialogue = self.dialogue
        info, pinned = dialogue.info, dialogue.draft_tokens
        if info is not None and pinned:
            info = replace(info, draft_tokens=pinned)
        for panel in (self.query_one(SidePanel), self.query_one(StatusLine)):
            if panel.display:
                panel.show_numbers(dialogue.meter, info, dialogue.draft, now)
        self.query_one(Transcript).count(0)
        state = self._state_words()
        self.query_one("#title", Words).show(self._title_words())
        self.query_one("#state", Words).show(state)
        self.query_one("#hint", Words).show(self._hint_words())
        self.query_one(KeyBar).show(self._useful_keys())
        self._tell_title(f"{state} · {dialogue.load.pair} · dflash-chat")

    def _useful_keys(self) -> list[tuple[str, str]]:
        """Keys worth a place in the footer now, and what they do."""
        at_turn = self.query_one(Transcript).cursor is not None
        shown = [action for action in ACTIONS if action.footer]
        if at_turn:
            shown = [*in_scope(TURN), *(a for a in shown if a.scope in (CHAT, APP))]
        return [
            (key_words(keys_of(action, self.keymap), short=True), self._words_now(action))
            for action in shown
            if (action.scope == TURN) <= at_turn and self.check_action(action.method, ())
        ]

    def _words_now(self, action: Action) -> str:
        """What the action would do now."""
        if action.id == "code":
            cursor = self.query_one(Transcript).cursor
            return "continue" if self.dialogue.can_continue(cursor) else "copy code"
        if action.id == "stop" and (what := self._stoppable()) != "answer":
            return "Take back" if what == "waiting" else "Close"
        if action.id == "again" and (self.dialogue.retry_after or self.dialogue.down):
            return "Retry"
        return action.name

    def _title_words(self) -> str:
        words = ["dflash-chat", self.dialogue.load.pair]
        if info := self.dialogue.info:
            words += [info.dtype, info.device]
        return " · ".join(words)

    def _state_words(self) -> str:
        if self.dialogue.down:
            return "○ engine down"
        if self.dialogue.info is None:
            return "○ loading"
        if self.dialogue.answer is None:
            return "● ready"
        return "● stopping" if self.dialogue.stopping else "● answering"

    def _hint_words(self) -> str:
        transcript = self.query_one(Transcript)
        words = [self._hint()]
        if not transcript.following:
            new = transcript.unseen_tokens
            words.insert(
                0, f"↓ {f'{new} new' if new else 'more below'} · {self.key_words('follow')}"
            )
        return " · ".join(filter(None, words))

    def _hint(self) -> str:
        """What helps most now."""
        typed, again = self.query_one(Prompt).text, self.key_words("again")
        if typed.startswith("/") and (command := COMMANDS.get(typed.split(None, 1)[0].lower())):
            return f"{command.usage} · {command.does}"
        if "@" in typed and (included := attach.sizes(typed)):
            return "includes " + ", ".join(included)
        if self.to_delete is not None:
            return self.delete_words(self.key_words("delete"))
        if self.query_one(Transcript).cursor is not None and not self.query_one(KeyBar).display:
            return " · ".join(" ".join(pair) for pair in self._useful_keys())
        if self.dialogue.down:
            return f"{again} starts the engine again"
        if self.dialogue.info is None:
            return progress_words(self.dialogue.progress)
        if problem := self.dialogue.record.problem:
            return f"not saved: {problem}"
        if self.dialogue.retry_after and not self.dialogue.busy:
            return f"{again} asks again"
        if self.pull.pair:
            return f"fetching {self.pull.pair} · {self.pull.words()}"
        return ""

    def key_words(self, id_: str) -> str:
        """The keys of an action, as they are now."""
        return key_words(keys_of(BY_ID[id_], self.keymap))

    def _tell_title(self, words: str) -> None:
        if words != self._told:
            self._told = words
            self.tell(terminal.title(words))

    def _answered(self, seconds: float) -> None:
        """An answer is done after so long: call a person who looks elsewhere."""
        self._untidy = True
        if seconds >= terminal.CALL_AFTER_S and not self.app.app_focus:
            self.tell(terminal.call("The answer is done"))

    def tell(self, sequence: str) -> None:
        """Say something to the terminal that is no part of the picture."""
        if driver := self.app._driver:
            driver.write(sequence)

    # ── what is sent ────────────────────────────────────────────────────────────────────────────

    async def on_prompt_submitted(self, message: Prompt.Submitted) -> None:
        """A message or a command; messages wait until the engine is free."""
        prompt = self.query_one(Prompt)
        del prompt.leaving[:1]
        try:
            command = commands.parse(message.shown)
            if command:
                self.keep_typed()
                await self.perform(command.action, command.argument)
                return
            files = attach.files(message.shown)
        except UserError as error:
            self.take_back(message.shown)
            self.dialogue.show(Card("Not understood", f"{error.message}\n{error.hint}".strip()))
            return
        turn = UserTurn(message.shown, attach.below(message.text, files), [str(f) for f in files])
        turn.turn_id = self.dialogue.record.next_id()
        replaced = self.end_editing()
        self.dialogue.typed = prompt.unfolded(self.unsent)
        if replaced:
            self.dialogue.ask_again(replaced, instead=turn)
        else:
            self.dialogue.ask(turn)

    async def perform(self, action: Action, argument: str = "") -> None:
        """Do it, if it can be done now. Raises UserError."""
        if action.scope == APP:
            await self.app.run_action(f"app.{action.method}")
        elif not self.check_action(action.method, ()):
            self.dialogue.show(Card(action.name, f"{action.usage} has nothing to do now."))
        else:
            method = getattr(self, f"action_{action.method}")
            method(argument) if action.argument else method()

    async def choose(self, action: Action) -> None:
        """What the palette does: perform it, or ask for the argument in the prompt."""
        if action.needs_argument:
            self.query_one(Prompt).put_in(action.command + " ")
            return
        try:
            await self.perform(action)
        except UserError as error:
            self.notify(error.message, markup=False)

    @work(exclusive=True, group="editor")
    async def action_editor(self) -> None:
        """Write the message in an editor of one's own."""
        prompt = self.query_one(Prompt)
        if self.dialogue.busy:
            self.notify("The editor opens once the answer is done")
            return
        try:
            with self.app.suspend():
                text = editor.edit(prompt.unfolded(prompt.text))
        except SuspendNotSupported:
            self.notify("This terminal cannot be lent to an editor")
        except UserError as error:
            self.notify(f"{error.message} {error.hint}".strip(), markup=False)
        except OSError as error:
            self.notify(f"No editor was opened: {error.strerror}", markup=False)
        else:
            if text != prompt.unfolded(prompt.text):
                prompt.put(text)

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that would do nothing now are left to the prompt, and out of the footer."""
        dialogue = self.dialogue
        if action == "stop":
            return bool(self._stoppable())
        if action == "again":
            return dialogue.down or (not dialogue.busy and bool(dialogue.questions))
        if action == "continue_answer":
            return dialogue.can_continue(self.last_answer)
        if action == "compare":
            return dialogue.info is not None and not dialogue.busy and bool(dialogue.questions)
        if action == "xray":
            return self.seen_answer is not None
        if action == "sessions":
            return dialogue.record.keeper is not None
        if action == "branch":
            return not (dialogue.busy or dialogue.waiting) and self.fork is not None
        if action == "undo_turn":
            return bool(dialogue.questions)
        if action == "follow":
            at_turn = self.query_one(Transcript).cursor is not None
            return at_turn or self.query_one(Prompt).at_line_end
        return True

    def _stoppable(self) -> str:
        """What Esc ends now: the answer first, then what lies over the prompt, then the queue."""
        if self.dialogue.answer and not self.dialogue.stopping:
            return "answer"
        if self.query_one(Prompt).offering:
            return "menu"
        if self.query_one(Transcript).cursor is not None:
            return "cursor"
        if self.editing is not None:
            return "editing"
        return "waiting" if self.dialogue.waiting else ""

    def action_stop(self) -> None:
        """Stop the answer; else close what is open; else take a waiting message back."""
        match self._stoppable():
            case "answer":
                self.dialogue.stop()
            case "menu":
                self.query_one(Prompt).dismiss_menu()
            case "cursor":
                self.leave_cursor()
            case "editing":
                self.end_editing()
            case "waiting":
                self.take_back(self.dialogue.withdraw().shown)

    def action_copy_or_stop(self) -> None:
        """Copy what is selected; else stop; else say how to quit."""
        selected = self.query_one(Prompt).selected_text or self.get_selected_text()
        if selected:
            self.clear_selection()
            self.copy_text(selected, "the selection")
        elif self.dialogue.answer:
            self.dialogue.stop()
        else:
            self.notify(f"{self.key_words('quit')} quits")

    def action_new_chat(self) -> None:
        """Leave this chat and start another."""
        self.end_editing()
        self.leave_cursor()
        self.keep_typed()
        self.dialogue.new_chat()


def progress_words(progress: Progress) -> str:
    """A stage and how far it is."""
    if not progress.total:
        return f"{progress.stage} …"
    share = progress.done / progress.total
    megabytes = f"{progress.done / 1e6:.0f} of {progress.total / 1e6:.0f} MB"
    return f"{progress.stage} {share:4.0%} · {megabytes} {bar(share, 20)}"
