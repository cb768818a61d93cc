"""`dflash-chat --plain`: the chat line by line, for screen readers and terminals without a cursor.

No colour, no drawing, nothing but the conversation on stdout; everything else goes to stderr. What
comes through a pipe is a message a line, and nothing asks for it. The pair is loaded in this
process, as for `--once`. Ctrl+C stops an answer; at the prompt it leaves the second time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dflash_chat import attach, hub, pairs
from dflash_chat.chat import COMPLETE, STOPPED, Conversation
from dflash_chat.errors import EXIT_OK, UsageError, UserError
from dflash_chat.figures import numbers_words
from dflash_chat.keeper import Keeper
from dflash_chat.once import InterruptAsCancel, in_words
from dflash_chat.record import ELSEWHERE, Record
from dflash_chat.runtime.api import (
    Event,
    Finished,
    Generate,
    Load,
    Message,
    ModelInfo,
    Prefill,
    Progress,
    SamplingParams,
    Tokens,
)
from dflash_chat.settings import (
    Settings,
    draft_choice,
    draft_choice_words,
    sampling_option,
    suggest,
)
from dflash_chat.terminals import CONTROLS
from dflash_chat.thinking import ThoughtSplitter
from dflash_chat.ui.commands import is_command

PROMPT, MORE = "> ", "... "
QUOTES = '"""'  # before and behind a message of several lines
COMMANDS = {
    "/help": "these commands",
    "/system": "TEXT: set the system prompt; alone: none",
    "/set": "key=value: temperature, top_p, top_k, seed, max_tokens …",
    "/draft": "on, off, auto or a number of tokens",
    "/continue": "go on with an answer that was stopped or cut",
    "/regen": "answer the last question again",
    "/undo": "forget the last question and its answer",
    "/clear": "start a new chat",
    "/stats": "all figures after an answer, or one line of them",
    "/quit": "leave; so does Ctrl+D",
}


class Answerer(Protocol):
    """What is needed of a loaded pair (`runtime.session.Session`)."""

    info: ModelInfo

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Prefill, Tokens, Finished; looks at `cancelled` once per block."""


def run(
    pair: str,
    settings: Settings,
    system: str,
    draft: bool,
    stats: bool,
    reopened: Conversation | None = None,
) -> int:
    """Load, then chat until the person leaves, in a new chat or in `reopened`; the exit code."""
    stages = Stages()
    installed = hub.ensure(pairs.find(pair), settings.quant, stages)
    from dflash_chat.runtime.session import Session  # torch comes in here, not before

    def loading(progress: Progress) -> None:
        stages(progress.stage, progress.done, progress.total)

    session = Session.load(installed, settings.engine, loading)
    say(f"{session.info.pair} on {session.info.device}. /help lists commands, Ctrl+D leaves.")
    if not draft:
        say("draft OFF: switched off")
    pinned = settings.engine.draft_tokens
    keeper = Keeper()
    record = Record(reopened or Conversation(system), keeper)
    if not record.enter():
        say(ELSEWHERE)
    if reopened:
        say(f"{reopened.title}: {len(reopened.turns)} turns so far")
        for text in reopened.waiting.values():
            say(f"not sent yet: {text}")
        reopened.waiting = {}  # it stays in the file, for the prompt of the other chat
    build = settings.quant
    chat = LineChat(session, settings.sampling, record, draft, stats, pinned=pinned, build=build)
    _with_line_editing(keeper.questions())
    try:
        while (line := _ask()) is not None:
            if chat.obey(line):
                break
    finally:
        keeper.close()
    return EXIT_OK


class Stages:
    """Says each stage of fetching and loading once."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            say(f"{stage}, {total / 1e6:.0f} MB" if total else stage)


def _with_line_editing(asked: Iterable[str]) -> None:
    """Cursor keys and history at the prompt, where Python was built with them; what was `asked`
    before is in it, if it is one line."""
    try:
        import readline
    except ImportError:
        say("no line editing here")
        return
    for text in asked:
        if "\n" not in text:
            readline.add_history(text)


def _ask() -> str | None:
    """A message from the person; None at the end of input. Raises KeyboardInterrupt the second
    time it comes."""
    warned = False
    while True:
        try:
            return _message()
        except EOFError:
            if sys.stdin.isatty():
                say("")
            return None
        except KeyboardInterrupt:
            if warned:
                raise
            say("\nCtrl+C again leaves, and so does Ctrl+D")
            warned = True


def _message() -> str:
    """A line, or all lines between `QUOTES`. Raises EOFError."""
    line = _line(PROMPT)
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].endswith(QUOTES):
        lines.append(_line(MORE))
    return "\n".join(lines).removesuffix(QUOTES).strip("\n")


def _line(prompt: str) -> str:
    """A line, asked for only where somebody types."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
    return input()


def say(words: str) -> None:
    """A remark that is no part of the conversation."""
    sys.stderr.write(words + "\n")
    sys.stderr.flush()


@dataclass
class LineChat:
    """A conversation in lines. `draft_tokens` 0 drafts as the engine was loaded to."""

    session: Answerer
    params: SamplingParams
    record: Record = field(default_factory=lambda: Record(Conversation()))
    draft: bool = True
    stats: bool = False
    draft_tokens: int = 0
    pinned: int = 0  # how many the engine was loaded to draft
    build: str = ""  # of the pair that is loaded
    _raw: str = ""  # the last answer as the engine sent it
    _generation: int = 0

    @property
    def chat(self) -> Conversation:
        """The conversation so far."""
        return self.record.chat

    def obey(self, line: str) -> bool:
        """Answer a line or carry out its command; True to leave."""
        try:
            if is_command(line):
                return self._command(*([*line.split(None, 1), ""])[:2])
            if line.strip():
                self._ask(attach.below(line, attach.files(line)))
        except UserError as error:
            say(f"{error.message}\n  {error.hint}".rstrip())
        return False

    def _ask(self, text: str) -> None:
        """Answer a question. One that is refused is left out: the next would be refused with it."""
        self.chat.ask(text)
        try:
            self._answer()
        except UsageError:
            self.chat.retract_question()
            self.record.changed()
            raise

    def _answer(self, begun: str = "") -> None:
        """Write the answer as it comes; the first Ctrl+C stops it."""
        messages = self.chat.messages()
        turn = self.chat.begin_answer()
        if begun:
            messages = (*messages, Message("assistant", begun))
        self._generation += 1
        request = Generate(
            self._generation, messages, self.params, self.draft, self.draft_tokens, bool(begun)
        )
        splitter, state, self._raw = ThoughtSplitter(), STOPPED, begun
        pieces = splitter.feed(begun)
        turn.thinking, turn.content = _joined(pieces, True), _joined(pieces, False)
        finished: Finished | None = None
        info = self.session.info
        self.record.begin(turn, Load(info.pair, self.build), info, self.params, self.draft)
        try:
            with InterruptAsCancel() as cancelled:
                for event in self.session.generate(request, cancelled):
                    if isinstance(event, Tokens):
                        self._raw += event.text
                        pieces = splitter.feed(event.text)
                    elif isinstance(event, Finished):
                        finished = event
                        pieces = splitter.finish()
                    else:
                        pieces = []
                    if not turn.thinking and any(thought for thought, _ in pieces):
                        say("thinking …")
                    turn.thinking += _joined(pieces, True)
                    turn.content += _joined(pieces, False)
                    if isinstance(event, Prefill | Tokens):
                        self.record.take(event)
                    sys.stdout.write(_harmless(_joined(pieces, False)))
                    sys.stdout.flush()
            if finished and finished.reason in ("stop", "context"):
                state = COMPLETE
        finally:
            self.chat.end_answer(state)
            self.record.end(finished)
            sys.stdout.write("\n")
            sys.stdout.flush()
        if self.record.problem:
            say(f"not saved: {self.record.problem}")
        if finished and finished.reason in ("cancelled", "length"):
            say("/continue goes on with it")
        if finished:
            load_s = self.session.info.load_s
            say(in_words(finished, load_s) if self.stats else numbers_words(finished))

    def _command(self, name: str, argument: str) -> bool:
        argument, last = argument.strip(), self.chat.last
        match name.lower():
            case "/quit":
                return True
            case "/help":
                say("\n".join(f"{name:10} {does}" for name, does in COMMANDS.items()))
            case "/system":
                self.chat.system = argument
                self.record.changed()
            case "/clear":
                self.record.leave()
                self.record = Record(Conversation(self.chat.system), self.record.keeper)
                self.record.enter()
            case "/stats":
                self.stats = not self.stats
            case "/set":
                self.params = sampling_option(argument, self.params)
                say("from the next answer on")
            case "/draft":
                most = self.session.info.block_size - 1
                choice = draft_choice(argument, most, self.pinned)
                self.draft, self.draft_tokens = choice
                say(f"drafting: {draft_choice_words(*choice)}")
            case "/undo":
                self.chat.retract_answer()
                self.chat.retract_question()
            case "/regen" if last:
                self.chat.retract_answer()
                self._answer()
            case "/continue" if last and last.role == "assistant" and last.state == STOPPED:
                self.chat.retract_answer()
                self._answer(self._raw)
            case "/regen" | "/continue":
                raise UsageError(f"{name} has nothing to do now.")
            case _:
                raise UsageError(f"There is no command {name}.", suggest(name, COMMANDS))
        return False


def _harmless(text: str) -> str:
    """What a model wrote, as a terminal may have it; elsewhere as it is."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def _joined(pieces: list[tuple[bool, str]], thought: bool) -> str:
    return "".join(text for is_thought, text in pieces if is_thought is thought)
