"""A recorded chat played at true speed, with no model: `dflash-chat --replay FILE`.

Knows the files that can be played and when each event is due. The chat screen talks to a
`ReplayClient` as it would to the engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dflash_chat import __version__, export
from dflash_chat.chat import Conversation
from dflash_chat.errors import EXIT_OTHER, UserError
from dflash_chat.runtime.api import (
    PROTOCOL_VERSION,
    Bench,
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Hello,
    Load,
    ModelInfo,
    Prefill,
    Ready,
    Request,
    Spec,
    Timing,
    Tokens,
    Usage,
    decode,
)
from dflash_chat.runtime.client import EngineClient, EngineDied

PAUSE_S = 1.0  # before each question


@dataclass(frozen=True)
class Answer:
    """A question, and what the engine did about it."""

    question: str
    events: tuple[Prefill | Tokens, ...]
    finished: Finished


@dataclass(frozen=True)
class Recording:
    """A chat as it went. `draft`: whether it was drafted."""

    info: ModelInfo
    system: str
    draft: bool
    answers: tuple[Answer, ...]


def read(path: Path) -> Recording:
    """The recording in an exported JSON file, or in a trace of protocol lines. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{path} cannot be read: {reason}") from error
    try:
        return _of_lines(text) if text.startswith('{"type":') else _of_chat(export.from_json(text))
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.hint) from error


def _of_chat(chat: Conversation) -> Recording:
    answers, question = [], ""
    for turn in chat.turns:
        if turn.role == "user":
            question = turn.content
        else:
            finished = turn.figures or _figures_of(turn.trace)
            answers.append(Answer(question, tuple(turn.trace), finished))
    return _recording(chat.info, chat.system, chat.draft, answers)


def _of_lines(text: str) -> Recording:
    info: ModelInfo | None = None
    system, draft = "", True
    answers: list[Answer] = []
    question, events = "", list[Prefill | Tokens]()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            event = decode(line.encode())
        except ValueError as error:
            raise UserError(f"line {number} of the trace is no event of the engine") from error
        if not export.fits(event, type(event)):
            raise UserError(f"line {number} of the trace has a wrong value")
        match event:
            case Ready():
                info = event.info
            case Generate(messages=messages) if messages:
                question, draft, events = messages[-1].content, event.draft, []
                system = messages[0].content if messages[0].role == "system" else ""
            case Prefill() | Tokens():
                events.append(event)
            case Finished():
                answers.append(Answer(question, tuple(events), event))
            case _:
                pass  # of the rest of a protocol nothing is shown
    return _recording(info, system, draft, answers)


def _recording(
    info: ModelInfo | None, system: str, draft: bool, answers: list[Answer]
) -> Recording:
    if info is None or not any(answer.events for answer in answers):
        raise UserError(
            "the file has no recorded steps to play",
            "dflash-chat sessions export ID --format json writes them",
        )
    return Recording(info, system, draft, tuple(answers))


def _figures_of(events: Sequence[Prefill | Tokens]) -> Finished:
    """The sums of an answer that was cut off before the engine gave its own."""
    spec, prompt, cached, completion = Spec(), 0, 0, 0
    for event in events:
        if isinstance(event, Prefill):
            prompt, cached = event.total, event.cached
            continue
        completion += event.tokens
        if event.stats:
            spec = spec.add(event.stats)
    decode_s = sum(_pass_s(event) for event in events)
    tok_s = completion / decode_s if decode_s else 0.0
    timing = Timing(decode_s=decode_s, tok_s=tok_s)
    return Finished(0, "cancelled", Usage(prompt, cached, completion), spec, timing)


def schedule(answer: Answer) -> list[tuple[float, Prefill | Tokens | Finished]]:
    """Each event with the seconds after the question at which it is due.

    The engine's own times decide, not those at which a screen saw the events: the first token comes
    after `ttft_s`, and every pass takes its milliseconds, which are stretched to `decode_s` where
    that is of the same passes (an answer that was gone on with has figures of its last part).
    """
    timing = answer.finished.timing
    chunks = sum(isinstance(event, Prefill) for event in answer.events)
    passes_s = [_pass_s(event) for event in answer.events if isinstance(event, Tokens)]
    whole = answer.finished.spec.steps == sum(seconds > 0 for seconds in passes_s)
    stretch = timing.decode_s / sum(passes_s) if whole and timing.decode_s and any(passes_s) else 1
    due: list[tuple[float, Prefill | Tokens | Finished]] = []
    at, chunk = 0.0, 0
    for event in answer.events:
        if isinstance(event, Prefill):
            chunk += 1
            at = max(at, timing.ttft_s * chunk / (chunks + 1))
        else:
            at = max(at, timing.ttft_s) + _pass_s(event) * stretch
        due.append((at, event))
    return [*due, (at, answer.finished)]


class ReplayClient(EngineClient):
    """What the chat screen knows of an engine, played from a recording.

    `clock` counts seconds. Nothing runs beside the screen: what is due by then comes out of
    `drain`.
    """

    def __init__(self, recording: Recording, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(())
        self._recording = recording
        self._clock = clock
        self._answers = deque(recording.answers)
        self._due: deque[tuple[float, Prefill | Tokens | Finished]] = deque()
        self._playing = Answer("", (), _figures_of(()))
        self._ask_at: float | None = None

    async def start(self) -> None:
        """Say hello, as an engine would."""
        self._events.append(Hello(__version__, PROTOCOL_VERSION, 0))

    async def restart(self) -> None:
        """Start over."""
        self._answers = deque(self._recording.answers)
        self._due.clear()
        await self.start()

    async def close(self) -> None:
        """Nothing runs."""

    def send(self, request: Request) -> None:
        """Take a request; a question that is not the next recorded one is refused."""
        now = self._clock()
        match request:
            case Load():
                self._events.append(Ready(self._recording.info))
                self._ask_at = now + PAUSE_S
            case Generate(id=number, messages=messages):
                asked = messages[-1].content if messages else ""
                if not self._answers or not asked.endswith(self._answers[0].question):
                    self._events.append(
                        Failed(
                            number,
                            "This is a recording; it answers only what was asked then.",
                            "Start dflash-chat without --replay to ask.",
                            EXIT_OTHER,
                        )
                    )
                    return
                self._playing = self._answers.popleft()
                due = schedule(self._playing)
                self._due.extend((now + at, replace(event, id=number)) for at, event in due)
            case Bench(id=number):
                words = "This is a recording; there is no engine to measure."
                self._events.append(Failed(number, words, "", EXIT_OTHER))
            case Cancel(id=number) if self._due:
                events = self._playing.events
                played = events[: len(events) + 1 - len(self._due)]  # the figures were due, too
                self._due.clear()
                self._events.append(replace(_figures_of(played), id=number))
                self._ask_at = now + PAUSE_S

    def drain(self) -> list[Event | EngineDied]:
        """All events that are due by now."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            self._events.append(self._due.popleft()[1])
            if not self._due:
                self._ask_at = now + PAUSE_S
        return super().drain()

    def next_question(self) -> str | None:
        """The question that should be asked now, once."""
        if self._ask_at is None or self._clock() < self._ask_at or not self._answers:
            return None
        self._ask_at = None
        return self._answers[0].question


def _pass_s(event: Prefill | Tokens) -> float:
    """Seconds of the verify pass that committed these tokens; 0 for those of the prefill."""
    stats = event.stats if isinstance(event, Tokens) else None
    return stats.total_ms / 1000 if stats else 0.0
