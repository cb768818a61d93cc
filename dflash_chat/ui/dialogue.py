"""What goes on between a person and the engine: loading, asking, answering, stopping, failing.

The only one that talks to the engine client. It fills the conversation and the turns on screen, and
knows which of them is being written; it knows nothing of keys, commands or layout.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dflash_chat.chat import COMPLETE, FAILED, STOPPED, Conversation, Turn
from dflash_chat.errors import EXIT_ENGINE_CRASHED, EXIT_OK, EXIT_USAGE
from dflash_chat.figures import numbers_words
from dflash_chat.keeper import Keeper
from dflash_chat.record import ELSEWHERE, Record
from dflash_chat.runtime.api import (
    Bench,
    Benched,
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Hello,
    Load,
    Message,
    ModelInfo,
    Prefill,
    Progress,
    Ready,
    SamplingParams,
    Spec,
    Tokens,
)
from dflash_chat.runtime.client import EngineClient, EngineDied
from dflash_chat.thinking import split
from dflash_chat.ui import pace
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.effects import law
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.origins import Trace
from dflash_chat.ui.past import Past
from dflash_chat.ui.transcript import Card, UserTurn

if TYPE_CHECKING:
    from dflash_chat.ui.transcript import Transcript

_STATES = {"stop": COMPLETE, "cancelled": STOPPED, "length": STOPPED, "context": COMPLETE}

AnswerEvent = Prefill | Tokens | Finished | Benched | Failed
Guest = Callable[[AnswerEvent | EngineDied], None]


class Dialogue:
    """One conversation with one engine. `transcript` is set before anything else is called."""

    transcript: Transcript

    def __init__(
        self, client: EngineClient, load: Load, params: SamplingParams, draft: bool, record: Record
    ) -> None:
        self.client, self.load = client, load
        self.params, self.draft, self.draft_tokens = params, draft, 0
        self.record = record
        self.meter = Meter()
        self.info: ModelInfo | None = None
        self.progress = Progress("starting the engine", 0, 0)
        self.down = False  # the engine is dead, or refused to load
        self.stopping = False  # the answer was asked to end
        self.answer: AnswerTurn | None = None  # the one being written
        self.waiting: deque[UserTurn] = deque()
        self.typed = ""  # what stands in the prompt, whole
        self.retry_after: UserTurn | None = None  # the question whose answer failed
        self.last_finished: Finished | None = None
        self.measured: dict[SamplingParams, Spec] = {}  # of the loaded pair, by what they hang on
        self.answer_began = 0.0
        self.ended: Callable[[float], None] = lambda seconds: None  # called after an answer
        self.unfolded = False  # thoughts are shown
        self.exit_code = EXIT_OK
        self._asked: UserTurn | None = None
        self._generation = 0
        self._reading = False  # nothing of the answer has come yet
        self._drawing: list[AnswerTurn] = []  # those with text left to draw
        self._guest: Guest | None = None  # takes the events of a request of its own
        self._one_restart = asyncio.Lock()

    @property
    def chat(self) -> Conversation:
        """The conversation on screen."""
        return self.record.chat

    @property
    def busy(self) -> bool:
        """Whether the engine has something to answer."""
        return self.answer is not None or self._guest is not None

    @property
    def drawing(self) -> bool:
        """Whether an answer is being written, or some of its text is still to be drawn."""
        return bool(self._drawing)

    @property
    def questions(self) -> list[UserTurn]:
        """What was asked, oldest first."""
        return [turn for turn in self.transcript.turns if isinstance(turn, UserTurn)]

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Ask the engine to load, and show what has been said."""
        self.client.send(self.load)
        self._enter()

    def frame(self) -> None:
        """Take what has arrived, and draw a bounded piece of it."""
        for event in self.client.drain():
            self._take(event)
        for answer in self._drawing:
            answer.draw()
        self._drawing = [each for each in self._drawing if each.behind or each is self.answer]

    def _take(self, event: Event | EngineDied) -> None:
        match event:
            case Hello():
                self.progress = Progress("loading", 0, 0)
            case Progress():
                self.progress = event
            case Ready():
                self.info = event.info
                self.meter.loaded(event.info)
                self.next()
            case EngineDied():
                self._crashed(event)
            case Failed(id=0):
                self._refused_to_load(event)
            case Prefill() | Tokens() | Finished() | Benched() | Failed() if (
                event.id == self._generation
            ):
                if self._guest:
                    self._guest(event)
                else:
                    self._take_answer(event)
            case _:
                pass  # of an answer that was given up

    def _take_answer(self, event: AnswerEvent) -> None:
        answer = self.answer
        assert answer is not None, event
        match event:
            case Prefill():
                self.meter.read(event)
                self.record.take(event)
                answer.say(f"reading the prompt · {event.done} of {event.total}")
            case Tokens():
                if self._reading:
                    self._reading = False
                    answer.say("")
                self.meter.take(event, time.monotonic())
                answer.take(event)
                self.record.take(event)
                self.transcript.count(event.tokens)
            case Finished():
                self.meter.finish(event)
                self.last_finished = event
                if event.spec.drafted:
                    at = law(self.chat.params)
                    self.measured[at] = self.measured.get(at, Spec()).merge(event.spec)
                self._close_answer(numbers_words(event), _STATES[event.reason], event)
                self.next()
            case Failed():
                self._close_answer("failed · " + event.message, FAILED)
                self.retry_after = self._asked
                details = tuple(event.trace.splitlines()[-6:])
                body = _sentences(event)
                if event.exit_code == EXIT_USAGE and self._leave_out(self._asked):
                    body += "\nThe chat goes on without it."
                self.show(Card("The engine could not answer", body, details, "error"))

    def _leave_out(self, asked: UserTurn | None) -> bool:
        """A question that was refused stays on screen and in the tree, but not on the path: the
        next one would be refused with it. False if an answer hangs on it."""
        if asked is None or asked.turn is None or self.chat.last is not asked.turn:
            return False
        self.chat.retract_question()
        self.record.changed()
        return True

    def _close_answer(self, words: str, state: str, finished: Finished | None = None) -> None:
        """The answer being written is complete, as far as it came."""
        answer, self.answer = self.answer, None
        if answer is None:
            return
        answer.finish(words)
        self.chat.end_answer(state)
        self.record.end(finished)
        self.ended(time.monotonic() - self.answer_began)

    def _refused_to_load(self, failed: Failed) -> None:
        self.down = True
        self.exit_code = failed.exit_code
        details = tuple(failed.trace.splitlines()[-6:])
        self.show(Card(f"{self.load.pair} was not loaded", _sentences(failed), details, "error"))

    def _crashed(self, died: EngineDied) -> None:
        had_loaded, self.info = self.info is not None, None
        if self._guest:
            self._guest(died)
            self._guest = None
        if self.answer:
            self.retry_after = self._asked
            self._close_answer("the engine stopped here", STOPPED)
        if had_loaded:
            body = f"Why: {died.reason}.\nThe chat is kept. The engine is being started again"
            body += "; Ctrl+R asks the last question again." if self.retry_after else "."
            self.restart()
        else:
            self.down = True
            self.exit_code = EXIT_ENGINE_CRASHED
            body = f"Why: {died.reason}, before the pair was loaded.\nCtrl+R tries again."
        self.show(Card("The engine stopped", body, died.log_lines, "error"))

    def restart(self) -> None:
        """Start the engine anew, whether it lives or not, and load again."""
        self.down = False
        self.info = None
        self.progress = Progress("starting the engine", 0, 0)
        self.meter.clear()
        self.transcript.run_worker(self._restart(), group="restart")

    async def _restart(self) -> None:
        async with self._one_restart:  # given up halfway, it might leave an engine behind
            await self.client.restart()
            self.client.send(self.load)

    def load_instead(self, load: Load) -> None:
        """End the engine with all that it holds, then load this; the chat is kept."""
        self.give_up()
        self.load, self.draft_tokens = load, 0
        self.measured.clear()
        self.restart()

    def show(self, widget: UserTurn | Card) -> None:
        """Add a message or a card, and go there."""
        self.transcript.append(widget)
        self.transcript.follow()

    # ── asking ──────────────────────────────────────────────────────────────────────────────────

    def ask(self, turn: UserTurn) -> None:
        """Ask as soon as the engine is free."""
        self.waiting.append(turn)
        self.show(turn)
        self.next()

    def next(self) -> None:
        """Ask the next waiting question, if the engine is free."""
        if self.info is None or self.busy or not self.waiting:
            self._save_waiting()
            return
        turn = self.waiting.popleft()
        turn.waiting(False)
        if turn.turn:
            self.chat.tip = turn.turn.id  # another answer will be a branch beside the first
        else:
            turn.turn = self.chat.ask(turn.text, turn.turn_id)
        messages = self.chat.messages()
        self._generate(turn, self.chat.begin_answer(), messages)
        self._save_waiting()  # not before: it is never in neither place

    def _waiting(self) -> dict[str, str]:
        return {turn.turn_id: turn.text for turn in self.waiting if turn.turn is None}

    def _save_waiting(self) -> None:
        self.record.wait(self._waiting(), self.typed)

    def withdraw(self) -> UserTurn:
        """The message that would be asked last is not to be asked. It is saved as waiting until
        `keep_typed` says where it went."""
        turn = self.waiting.pop()
        turn.remove()
        return turn

    def keep_typed(self, text: str) -> None:
        """This stands in the prompt now: save it with all that waits, and nothing else does."""
        self.typed = text
        self._save_waiting()

    def _generate(
        self, asked: UserTurn | None, turn: Turn, messages: tuple[Message, ...], begun: str = ""
    ) -> None:
        """Have `turn` written, from `begun` on."""
        self._generation += 1
        self.retry_after = None
        self._asked = asked
        self.stopping = False
        self._reading = True
        self.answer_began = time.monotonic()
        self.meter.begin()
        self.answer = AnswerTurn(turn, self.unfolded)
        self.answer.say("reading the prompt")
        self._drawing.append(self.answer)
        turn.content = turn.thinking = ""
        self.answer.go_on(begun)
        before = self.waiting[0] if self.waiting else None
        self.transcript.append(self.answer, before)
        self.record.begin(turn, self.load, self.info, self.params, self.draft)
        self.client.send(
            Generate(
                self._generation, messages, self.params, self.draft, self.draft_tokens, bool(begun)
            )
        )

    def stop(self) -> None:
        """Ask the answer to end."""
        if self.answer:
            self.stopping = True
            self.client.send(Cancel(self._generation))

    def can_continue(self, turn: object) -> bool:
        """Whether `turn` is an answer that was cut, with nothing behind it."""
        return (
            isinstance(turn, AnswerTurn)
            and turn.turn.state == STOPPED
            and self.chat.last is turn.turn
            and self.info is not None
            and not self.busy
            and not self.waiting
        )

    def continue_(self, answer: AnswerTurn) -> None:
        """Write on where an answer was cut. Its own tokens are in the engine's cache still."""
        if not self.record.alone:
            words = "Another dflash-chat has this chat open, and may write on this answer, too."
            self.show(Card("Not continued", f"{words}\nClose the chat there first."))
            return
        question = self.transcript.question_of(answer)
        begun = self._raw_of(answer.turn)
        turn = self.chat.continue_answer()
        turn.content = ""
        before = self.chat.messages()
        self.transcript.cut_from(answer)
        partial = (Message("assistant", begun),) if begun else ()
        self._generate(question, turn, (*before, *partial), begun)

    def _raw_of(self, turn: Turn) -> str:
        """An answer as the engine sent it, or without its thought if that is not known."""
        sent = "".join(event.text for event in self.record.events(turn))
        return sent if split(sent) == (turn.thinking, turn.content) else turn.content

    def ask_again(self, question: UserTurn, instead: UserTurn | None = None) -> None:
        """Answer a question again, or `instead` of it another, on a branch of its own."""
        self.forget_from(question, below=instead is None)
        turn = instead or question
        turn.waiting(True)
        if instead:
            self.transcript.append(turn, self.waiting[0] if self.waiting else None)
        self.waiting.appendleft(turn)
        self.transcript.follow()
        self.next()

    def forget_from(self, question: UserTurn, below: bool = False) -> None:
        """The conversation ends before `question`; on screen it stays if only what is `below` it
        goes."""
        assert question.turn is not None, "it was not asked yet"
        self.give_up()
        self.retry_after = None
        self.chat.tip = question.turn.parent
        self.transcript.cut_from(question, below)

    def delete(self, widget: UserTurn | AnswerTurn) -> None:
        """Delete a turn of the active path and all below it. Raises StoreError."""
        assert not self.waiting, "messages would hang on nothing"
        assert widget.turn is not None, "it was not asked yet"
        self.give_up()
        self.retry_after = None
        turn = widget.turn
        if turn.id not in self.chat.tree:  # a failed answer without a word
            self.transcript.point(None)
            widget.remove()
            return
        others = len(self.chat.branches(turn.id)) > 1
        self.record.delete(turn)
        if others:
            self._show_past()
        else:
            self.transcript.cut_from(widget)

    def give_up(self) -> None:
        """Nobody waits for the answer any more; what came of it stays in the conversation."""
        if self.answer:
            self.client.send(Cancel(self._generation))
            self._generation += 1  # what still comes of it is nobody's
            self._close_answer("given up", STOPPED)

    def new_chat(self) -> None:
        """Leave this chat and start another."""
        self.open(Conversation(self.chat.system))

    def open(self, chat: Conversation, keeper: Keeper | None = None) -> None:
        """Talk in `chat` from here on; the one on screen keeps what it has."""
        self.give_up()
        pace.let_go()
        self.retry_after = self._asked = None
        left, waits = self.record, self._waiting()
        self.waiting.clear()
        self.record = Record(chat, keeper or left.keeper)
        self._enter()
        self.record.wait(chat.waiting, self.typed)  # the prompt goes along,
        left.wait(waits)  # and all else stays with the chat that is left
        left.leave()
        self.meter.clear()

    def _enter(self) -> None:
        alone = self.record.enter()
        self._show_past()
        if not alone:
            self.show(Card("Open elsewhere", ELSEWHERE))

    def switch(self, turn: Turn) -> None:
        """Go to the branch of `turn`."""
        self.give_up()
        self.retry_after = None
        self.chat.switch(turn.id)
        self.record.changed()
        self._show_past()

    def _show_past(self) -> None:
        """Show the active path, the end of it first."""
        self._drawing.clear()
        self.transcript.clear()
        turns = self.chat.turns
        self.last_finished = next((t.figures for t in reversed(turns) if t.figures), None)
        if turns:
            self.transcript.append(Past(turns, self._past_answer, self._past_words))

    def _past_answer(self, turn: Turn) -> AnswerTurn:
        """An answer from the file, still to be drawn."""
        answer = AnswerTurn(turn, self.unfolded)
        answer.restore(self.record.events(turn) if turn.thinking else (), self._past_words(turn))
        return answer

    def _past_words(self, turn: Turn) -> str:
        """What stands below a turn from the file."""
        words = []
        branches = self.chat.branches(turn.id)
        if len(branches) > 1:
            words.append(f"branch {branches.index(turn) + 1} of {len(branches)}")
        if turn.role == "assistant":
            words.append(numbers_words(turn.figures) if turn.figures else turn.state)
        return " · ".join(words)

    def last_messages(self) -> tuple[Message, ...]:
        """The conversation up to the last question, none without one."""
        messages = self.chat.messages()
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        return messages if messages and messages[-1].role == "user" else ()

    def trace(self, answer: AnswerTurn) -> Trace:
        """An answer by block and origin, from all steps that were kept of it."""
        if answer.trace is None:
            answer.trace = Trace()
            for event in self.record.events(answer.turn):
                answer.trace.take(event)
        return answer.trace

    # ── thoughts, guests ────────────────────────────────────────────────────────────────────────

    def unfold(self, unfolded: bool) -> None:
        """Show or hide the thoughts of all answers."""
        self.unfolded = unfolded
        for turn in self.transcript.turns:
            if isinstance(turn, AnswerTurn):
                turn.unfold(unfolded)
                if turn.behind and turn not in self._drawing:
                    self._drawing.append(turn)

    def lend(self, request: Generate | Bench, guest: Guest) -> None:
        """Send a request that is no part of the conversation; `guest` takes its events. Call
        `give_back` after it."""
        assert self.answer is None, "an answer is being written"
        self._generation += 1
        self._guest = guest
        self.client.send(replace(request, id=self._generation))

    def stop_guest(self) -> None:
        """Ask the guest's request to end; what still comes of it is the guest's."""
        self.client.send(Cancel(self._generation))

    def give_back(self) -> None:
        """The guest has all it wants, or has left."""
        if self._guest:
            self.client.send(Cancel(self._generation))
            self._generation += 1
            self._guest = None
        self.next()


def _sentences(failed: Failed) -> str:
    return f"{failed.message}\n{failed.hint}".strip()
