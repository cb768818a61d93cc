"""The same prompt answered twice by one engine, with and without drafting, side by side.

One run after the other, greedy or with the same seed, so that the texts can be compared and the
rates are of an engine that does nothing else. Leaves the conversation as it was.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen

from dflash_chat.chat import Turn
from dflash_chat.runtime.api import Failed, Finished, Generate, Message, Prefill, Tokens
from dflash_chat.runtime.client import EngineDied
from dflash_chat.ui import pace
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.dialogue import AnswerEvent, Dialogue
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.transcript import Turns
from dflash_chat.ui.words import Words

NARROW = [(0, "-tiny"), (60, "-wide")]


class Run(Vertical):
    """One of the two: its answer as it comes, and its figures."""

    def __init__(self, name: str, draft: bool) -> None:
        super().__init__()
        self.title, self.draft = name, draft
        self.text = ""
        self.finished: Finished | None = None
        self.answer = AnswerTurn(Turn("assistant", "", None))
        self._words = "waits"

    def compose(self) -> ComposeResult:
        """Figures above the text."""
        yield Words(classes="run-words")
        with VerticalScroll(can_focus=False) as scroll, Turns():
            scroll.anchor()
            yield self.answer

    def take(self, event: AnswerEvent) -> None:
        """One event of this run."""
        match event:
            case Prefill():
                self._words = "reading the prompt"
            case Tokens():
                self._words = "answering"
                self.text += event.text
                self.answer.take(event)
            case Finished():
                self.finished = event
                self._words = figures(event)
                self.answer.finish("")
            case Failed():
                self._words = f"failed · {event.message}"

    def draw(self) -> None:
        """Draw one frame."""
        self.answer.draw()
        self.query_one(Words).show(self._words, self.title)


class CompareScreen(ClosesOnce, Screen[None]):
    """Call `start`, then show it. Esc ends it."""

    HORIZONTAL_BREAKPOINTS = NARROW
    BINDINGS: ClassVar = [Binding("escape,q,f9", "leave", "Close", id="close_compare")]

    def __init__(self, dialogue: Dialogue, messages: tuple[Message, ...]) -> None:
        super().__init__()
        self._dialogue, self._messages = dialogue, messages
        self._params = dialogue.params
        if self._params.temperature > 0 and self._params.seed is None:
            self._params = replace(self._params, seed=secrets.randbits(32))
        self._runs = (Run("with drafting", True), Run("without", False))
        self._at = 0
        self._over = False

    def compose(self) -> ComposeResult:
        """The verdict above the two runs."""
        yield Words(id="verdict")
        with Horizontal(id="runs"):
            yield from self._runs
        yield Words(id="compare-keys")

    def on_mount(self) -> None:
        """Start the clock."""
        self.query_one("#compare-keys", Words).show("Esc back to the chat")
        self.set_interval(pace.FRAME_S, self._draw)

    def start(self) -> None:
        """Send the next run's request; the first one before anybody else asks the engine."""
        run = self._runs[self._at]
        tokens = self._dialogue.draft_tokens if run.draft else 0
        self._dialogue.lend(Generate(0, self._messages, self._params, run.draft, tokens), self.take)

    def take(self, event: AnswerEvent | EngineDied) -> None:
        """An event of the present run."""
        if isinstance(event, EngineDied):
            event = Failed(0, "the engine stopped", "", 1)
        self._runs[self._at].take(event)
        if isinstance(event, Failed):
            self._end()
        elif isinstance(event, Finished) and self._at + 1 < len(self._runs):
            self._at += 1
            self.start()
        elif isinstance(event, Finished):
            self._end()

    def _end(self) -> None:
        self._over = True
        self._dialogue.give_back()

    def _draw(self) -> None:
        for run in self._runs:
            run.draw()
        self.query_one("#verdict", Words).show(self.verdict())

    def verdict(self) -> str:
        """What the comparison says so far."""
        drafted, plain = self._runs
        sampling = self._params.temperature
        how = f"temperature {sampling:g}, seed {self._params.seed}" if sampling else "greedy"
        if not (drafted.finished and plain.finished):
            return f"{how} · " + ("it ended early" if self._over else "one run after the other")
        words = [how, same_words(drafted.text, plain.text)]
        if plain.finished.timing.tok_s:
            ratio = drafted.finished.timing.tok_s / plain.finished.timing.tok_s
            words.append(f"{ratio:.2f}× plain decoding")
        return " · ".join(words)

    def action_leave(self) -> None:
        """End what still runs and go back."""
        if not self._over:
            self._end()
        self.dismiss()


def figures(finished: Finished) -> str:
    """Rate, acceptance length and length of one run."""
    tau = finished.spec.tau
    return f"{finished.timing.tok_s:.0f} tok/s · tau {tau:.1f} · {finished.usage.completion} tokens"


def same_words(one: str, other: str) -> str:
    """Whether two texts are identical, or where they part."""
    if one == other:
        return "the texts are identical"
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    return f"the texts differ from character {at + 1} on"
