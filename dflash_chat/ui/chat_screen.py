"""One conversation: prompt → engine → events → widgets; stopping, errors, crashes and retries.

The only file that talks to the engine client. It owns what is going on (loading, answering, down);
widgets only draw. Text is drawn a few times a second and numbers at 5 Hz at most, from what has
arrived meanwhile.
"""

from __future__ import annotations

import time
from collections import deque

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen

from dflash_chat.chat import STOPPED, Conversation, Turn
from dflash_chat.errors import EXIT_ENGINE_CRASHED, EXIT_OK, UsageError, UserError
from dflash_chat.runtime.api import (
    Cancel,
    EngineOptions,
    Event,
    Failed,
    Finished,
    Generate,
    Hello,
    Load,
    ModelInfo,
    Prefill,
    Progress,
    Ready,
    SamplingParams,
    Tokens,
)
from dflash_chat.runtime.client import EngineClient, EngineDied
from dflash_chat.settings import parse_options
from dflash_chat.store import StoreError
from dflash_chat.ui import commands, pace
from dflash_chat.ui.help_screen import HelpScreen
from dflash_chat.ui.keeper import Keeper
from dflash_chat.ui.key_bar import KeyBar
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.past import Past
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.record import Record
from dflash_chat.ui.sessions_screen import SessionsScreen
from dflash_chat.ui.side_panel import SidePanel, StatusLine, bar
from dflash_chat.ui.transcript import AnswerTurn, Card, Transcript, UserTurn
from dflash_chat.ui.words import Words

NUMBERS_S = 1 / 5
WIDTHS = [(0, "-tiny"), (60, "-narrow"), (96, "-wide")]

_ENDINGS = {
    "cancelled": "stopped · ",
    "length": "cut at max_tokens · ",
    "context": "context is full · ",
}

KEYS: list[BindingType] = [
    Binding("enter", "send", "Send", id="send"),
    Binding("escape", "stop", "Stop", id="stop", priority=True),
    Binding("ctrl+r", "retry", "Retry", id="retry", priority=True),
    Binding("f1", "help", "Help", id="help"),
    Binding("ctrl+q", "app.quit", "Quit", id="quit", priority=True),
    Binding("ctrl+n", "new_chat", "New chat", id="new", priority=True),
    Binding("ctrl+o", "sessions", "Chats", id="sessions", priority=True),
    Binding("f2", "toggle_panel", "Panel", id="panel"),
    Binding("ctrl+j", "newline", "Newline", id="newline"),
    Binding("ctrl+c", "copy_or_stop", "Copy", id="copy", show=False, priority=True),
    Binding("pageup", "page(-1)", "Page up", id="page_up", show=False, priority=True),
    Binding("pagedown", "page(1)", "Page down", id="page_down", show=False, priority=True),
    Binding("ctrl+up", "line(-1)", "Line up", id="line_up", show=False, priority=True),
    Binding("ctrl+down", "line(1)", "Line down", id="line_down", show=False, priority=True),
    Binding("end", "follow", "To the end", id="follow", show=False, priority=True),
]


class ChatScreen(Screen[None]):
    """The chat and its panel."""

    HORIZONTAL_BREAKPOINTS = WIDTHS
    BINDINGS = KEYS

    def __init__(
        self,
        client: EngineClient,
        load: Load,
        params: SamplingParams,
        system: str = "",
        draft: bool = True,
        keeper: Keeper | None = None,
        chat: Conversation | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._load = load
        self._params = params
        self._draft = draft
        self._record = Record(chat or Conversation(system), keeper)
        self._meter = Meter()
        self._info: ModelInfo | None = None
        self._progress = Progress("starting the engine", 0, 0)
        self._down = False  # the engine is dead, or refused to load
        self._generation = 0
        self._answer: AnswerTurn | None = None  # the one being written
        self._drawing: list[AnswerTurn] = []  # those with text left to draw
        self._stopping = False  # it was asked to end
        self._numbers_due = 0.0
        self._waiting: deque[UserTurn] = deque()
        self._retry_after: UserTurn | None = None  # the question whose answer failed
        self._asked: UserTurn | None = None
        self.exit_code = EXIT_OK

    def compose(self) -> ComposeResult:
        """Title, chat and panel, footer."""
        with Horizontal(id="title-bar"):
            yield Words(id="title")
            yield Words(id="state")
        with Horizontal(id="body"):
            with Vertical(id="chat"):
                yield Transcript()
                yield Words(id="hint")
                yield Prompt()
                yield StatusLine()
            yield SidePanel()
        yield KeyBar()

    def on_mount(self) -> None:
        """Start the clocks and load the pair."""
        self._client.send(self._load)
        self.query_one(Prompt).focus()
        self._show_chat()
        self.set_interval(pace.FRAME_S, self._frame)
        self.show_numbers()

    @property
    def _chat(self) -> Conversation:
        return self._record.chat

    # ── clocks ──────────────────────────────────────────────────────────────────────────────────

    async def _frame(self) -> None:
        for event in self._client.drain():
            await self._take(event)
        for answer in self._drawing:
            answer.draw()
        if time.monotonic() >= self._numbers_due:
            self.show_numbers()
        self._drawing = [
            answer for answer in self._drawing if answer.behind or self._is_open(answer)
        ]

    def _is_open(self, answer: AnswerTurn) -> bool:
        return answer is self._answer

    def show_numbers(self) -> None:
        """Bring everything but the transcript up to date."""
        now = time.monotonic()
        self._numbers_due = now + NUMBERS_S
        for panel in (self.query_one(SidePanel), self.query_one(StatusLine)):
            if panel.display:
                panel.show_numbers(self._meter, self._info, self._draft, now)
        self.query_one("#title", Words).show(self._title_words())
        self.query_one("#state", Words).show(self._state_words())
        self.query_one("#hint", Words).show(self._hint_words())
        self.query_one(KeyBar).show(self._useful_keys())

    def _useful_keys(self) -> list[Binding]:
        """The bindings worth a place in the footer now."""
        shown = [key for key in KEYS if isinstance(key, Binding) and key.show]
        return [key for key in shown if self.check_action(key.action, ())]

    def _title_words(self) -> str:
        words = ["dflash-chat", self._load.pair]
        if self._info is not None:
            words += [self._info.dtype, self._info.device]
        return " · ".join(words)

    def _state_words(self) -> str:
        if self._down:
            return "○ engine down"
        if self._info is None:
            return "○ loading"
        if self._answer is None:
            return "● ready"
        return "● stopping" if self._stopping else "● answering"

    def _hint_words(self) -> str:
        if self._down:
            return "Ctrl+R starts the engine again"
        if self._info is None:
            return progress_words(self._progress)
        if not self.query_one(Transcript).following:
            return "↓ more below · End"
        if self._record.problem:
            return f"not saved: {self._record.problem}"
        if self._retry_after and not self._answer:
            return "Ctrl+R asks again"
        return ""

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    async def _take(self, event: Event | EngineDied) -> None:
        match event:
            case Hello():
                self._progress = Progress("loading", 0, 0)
            case Progress():
                self._progress = event
            case Ready():
                self._info = event.info
                self._next()
            case EngineDied():
                await self._crashed(event)
            case Failed(id=0):
                self._refused_to_load(event)
            case Prefill() | Tokens() | Finished() | Failed() if event.id == self._generation:
                self._take_answer(event)
            case _:
                pass  # of an answer that was given up

    def _take_answer(self, event: Prefill | Tokens | Finished | Failed) -> None:
        answer = self._answer
        assert answer is not None, event
        if isinstance(event, Prefill | Tokens):
            self._record.take(event)
        match event:
            case Prefill():
                self._meter.read(event)
                answer.say(f"reading the prompt · {event.done} of {event.total}")
            case Tokens():
                answer.say("")
                self._meter.take(event, time.monotonic())
                answer.write(event.text)
            case Finished():
                self._meter.finish(event)
                self._close_answer(numbers_words(event), event)
                self._next()
            case Failed():
                self._close_answer("failed · " + event.message)
                self._retry_after = self._asked
                details = tuple(event.trace.splitlines()[-6:])
                self._show(Card("The engine could not answer", _sentences(event), details, "error"))

    def _close_answer(self, words: str, finished: Finished | None = None) -> None:
        """The answer being written is complete, as far as it came."""
        if self._answer is None:
            return
        self._answer.finish(words)
        self._answer = None
        self._record.end(finished)

    def _refused_to_load(self, failed: Failed) -> None:
        self._down = True
        self.exit_code = failed.exit_code
        details = tuple(failed.trace.splitlines()[-6:])
        self._show(Card(f"{self._load.pair} was not loaded", _sentences(failed), details, "error"))

    async def _crashed(self, died: EngineDied) -> None:
        had_loaded, self._info = self._info is not None, None
        if self._answer:
            self._retry_after = self._asked
            self._close_answer("the engine stopped here")
        if had_loaded:
            body = f"Why: {died.reason}.\nThe chat is kept. The engine is being started again"
            body += "; Ctrl+R asks the last question again." if self._retry_after else "."
            self._restart()
        else:
            self._down = True
            self.exit_code = EXIT_ENGINE_CRASHED
            body = f"Why: {died.reason}, before the pair was loaded.\nCtrl+R tries again."
        self._show(Card("The engine stopped", body, died.log_lines, "error"))

    @work(exclusive=True)
    async def _restart(self) -> None:
        self._down = False
        self._info = None
        self._progress = Progress("starting the engine", 0, 0)
        self._meter.clear()
        await self._client.restart()
        self._client.send(self._load)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────

    def on_prompt_submitted(self, message: Prompt.Submitted) -> None:
        """A message or a command; messages wait until the engine is free."""
        try:
            command = commands.parse(message.text)
            if command:
                self._obey(command)
                return
        except UserError as error:
            self._show(Card("Not understood", f"{error.message}\n{error.hint}".strip()))
            return
        turn = UserTurn(message.text)
        self._waiting.append(turn)
        self._show(turn)
        self._next()

    def _next(self) -> None:
        """Ask the next waiting question, if the engine is free."""
        if self._info is None or self._answer or not self._waiting:
            return
        turn = self._waiting.popleft()
        turn.waiting(False)
        turn.turn = turn.turn or self._chat.ask(turn.text)
        self._generate(turn)

    def _generate(self, turn: UserTurn) -> None:
        self._generation += 1
        self._retry_after = None
        self._asked = turn
        self._stopping = False
        self._meter.begin()
        self._answer = AnswerTurn()
        self._answer.say("reading the prompt")
        self._drawing.append(self._answer)
        before = self._waiting[0] if self._waiting else None
        self.query_one(Transcript).append(self._answer, before)
        messages = self._chat.messages()
        self._record.begin(self._load, self._info, self._params, self._draft)
        self._client.send(Generate(self._generation, messages, self._params, self._draft))

    def _show(self, widget: UserTurn | Card) -> None:
        transcript = self.query_one(Transcript)
        transcript.append(widget)
        transcript.follow()

    def _obey(self, command: commands.Command) -> None:
        argument = command.argument
        match command.name:
            case "/help":
                self.action_help()
            case "/clear":
                self.action_new_chat()
            case "/quit":
                self.app.exit()
            case "/system":
                self._chat.system = argument
                self._record.changed()
                self._show(Card("System prompt", argument or "none"))
            case "/draft":
                self._draft = argument == "on"
                self._show(Card("Drafting", f"{argument}, from the next answer on"))
            case "/set":
                self._set(argument)

    def _set(self, option: str) -> None:
        settings = parse_options([option], self._params)
        if (settings.engine, settings.source) != (EngineOptions(), ""):
            raise UsageError(
                f"{option.partition('=')[0]} is fixed while a pair is loaded.",
                "Give it at the start: dflash-chat -o " + option,
            )
        self._params = settings.sampling
        self._show(Card("Setting", f"{option}, from the next answer on"))

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that would do nothing now are left to the prompt, and out of the footer."""
        if action == "stop":
            return self._answer is not None or bool(self._waiting)
        if action == "retry":
            return self._down or (self._retry_after is not None and self._answer is None)
        if action == "follow":
            return self.query_one(Prompt).at_line_end
        return True

    def action_send(self) -> None:
        """Send the prompt."""
        self.query_one(Prompt).submit()

    def action_newline(self) -> None:
        """Break the line in the prompt."""
        self.query_one(Prompt).newline()

    def action_stop(self) -> None:
        """Stop the answer; without one, take the last waiting message back into the prompt."""
        if self._answer:
            self._stopping = True
            self._client.send(Cancel(self._generation))
        elif self._waiting:
            turn = self._waiting.pop()
            turn.remove()
            self.query_one(Prompt).text = turn.text

    def action_copy_or_stop(self) -> None:
        """Copy what is selected; else stop; else say how to quit."""
        selected = self.query_one(Prompt).selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.clear_selection()
            self.notify("Copied")
        elif self._answer:
            self.action_stop()
        else:
            self.notify("Ctrl+Q quits")

    def action_retry(self) -> None:
        """Start a dead engine, or ask the failed question again."""
        if self._down:
            self._restart()
        elif self._retry_after:
            self._chat.retract_answer()
            self._waiting.appendleft(self._retry_after)
            self._next()

    @work(exclusive=True, group="new")
    async def action_new_chat(self) -> None:
        """Leave this chat and start another."""
        await self._change_chat(Conversation(self._chat.system))

    async def _change_chat(self, chat: Conversation, keeper: Keeper | None = None) -> None:
        """Talk in `chat` from here on; the one on screen keeps what it has."""
        if self._answer:
            self._client.send(Cancel(self._generation))
        self._generation += 1  # what still comes of the old answer is nobody's
        self._answer = self._retry_after = self._asked = None
        self._drawing.clear()
        self._waiting.clear()
        self._record.end(None, STOPPED)
        self._record = Record(chat, keeper or self._record.keeper)
        self._meter.clear()
        await self.query_one(Transcript).clear()
        self._show_chat()

    @work(exclusive=True, group="new")
    async def action_sessions(self) -> None:
        """Choose a saved chat to go on with."""
        keeper = self._record.keeper
        if keeper is None:
            self.notify("Nothing is saved here")
            return
        screen = SessionsScreen(keeper.store, self._chat.id, self._remove)
        if chat := await self.app.push_screen_wait(screen):
            await self._reopen(chat)

    async def _reopen(self, chat: Conversation) -> None:
        """Go on with a saved chat, as it was set, on the pair that is loaded."""
        if chat.id == self._chat.id:
            return
        self._params, self._draft = chat.params, chat.draft
        await self._change_chat(chat)
        if chat.pair != self._load.pair:
            words = f"{chat.pair or 'another pair'} answered so far, {self._load.pair} does now"
            self._show(Card("Another pair", words))

    def _remove(self, conversation: str) -> None:
        """Delete a saved chat; if it is the one on screen, start another."""
        keeper = self._record.keeper
        assert keeper is not None, "nothing is saved here"
        if conversation != self._chat.id:
            keeper.remove(conversation)
            return
        self._record.keeper = None  # what still comes is saved no more
        try:
            keeper.remove(conversation)
        except StoreError:
            self._record.keeper = keeper
            raise
        self.run_worker(self._change_chat(Conversation(self._chat.system), keeper))

    def _show_chat(self) -> None:
        if turns := self._chat.turns:
            self.query_one(Transcript).append(Past(turns, turn_words))

    def action_toggle_panel(self) -> None:
        """Show or hide the numbers."""
        self.toggle_class("-bare")

    def action_help(self) -> None:
        """Show keys and commands."""
        self.app.push_screen(HelpScreen())

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
        self.query_one(Transcript).follow()


def progress_words(progress: Progress) -> str:
    """A stage and how far it is."""
    if not progress.total:
        return f"{progress.stage} …"
    share = progress.done / progress.total
    megabytes = f"{progress.done / 1e6:.0f} of {progress.total / 1e6:.0f} MB"
    return f"{progress.stage} {bar(share, 20)} {share:4.0%} · {megabytes}"


def numbers_words(finished: Finished) -> str:
    """The line under an answer."""
    usage, timing, spec = finished.usage, finished.timing, finished.spec
    words = [
        f"cached {usage.cached}",
        f"read {usage.prompt - usage.cached}",
        f"ttft {timing.ttft_s * 1000:.0f} ms",
        f"{timing.tok_s:.0f} tok/s",
    ]
    if spec.steps:
        words.append(f"tau {spec.tau:.1f}")
    return _ENDINGS.get(finished.reason, "") + " · ".join(words)


def turn_words(turn: Turn) -> str:
    """The line under an answer from the file."""
    if turn.figures is None:
        return turn.state
    return numbers_words(turn.figures)


def _sentences(failed: Failed) -> str:
    return f"{failed.message}\n{failed.hint}".strip()
