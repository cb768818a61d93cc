"""A bench of the engine that is loaded: starting, stopping, and what is said of it, as text.

The engine measures and keeps what it finds (`runtime/bench.py`); the chat lends it for that long,
and its questions wait. Knows no widgets.
"""

from __future__ import annotations

from collections.abc import Callable

from dflash_chat.runtime.api import Bench, Benched, Failed
from dflash_chat.runtime.client import EngineDied
from dflash_chat.ui.bars import bar, grouped
from dflash_chat.ui.dialogue import AnswerEvent, Dialogue

_WIDTH = 20  # cells of the bar


class Benching:
    """One bench at a time of the `dialogue`'s engine, if there is one. `ended` is called after
    each.
    """

    def __init__(self, dialogue: Dialogue | None, ended: Callable[[], object]) -> None:
        self._dialogue, self._ended = dialogue, ended
        self._request = Bench(0)
        self._state: Benched | None = None
        self._problem = ""
        self.running = False
        self._stopping = False

    def start(self) -> None:
        """Begin, unless it runs; or say why not."""
        dialogue = self._dialogue
        if self.running:
            return
        self._state = None
        if dialogue is None:
            self._problem = "this pair is not loaded; /bench in the chat measures the one that is"
        elif dialogue.info is None:
            self._problem = "nothing is loaded yet that could be measured"
        elif dialogue.busy:
            self._problem = "an answer is being written; b measures once it is done"
        else:
            self._request = Bench(0, dialogue.chat.messages(), dialogue.params)
            self._state, self._problem = Benched(0), ""
            self.running, self._stopping = True, False
            dialogue.lend(self._request, self._take)

    def stop(self) -> None:
        """Ask it to end; it says what became of the cache."""
        assert self._dialogue is not None, "nothing was begun"
        self._stopping = True
        self._dialogue.stop_guest()

    def close(self) -> None:
        """Nobody looks any more."""
        if self.running:
            self._give_back()

    def _take(self, event: AnswerEvent | EngineDied) -> None:
        match event:
            case Benched():
                self._state = event
                if event.reason:
                    self._end()
            case Failed():
                self._fail(f"{event.message} {event.hint}".strip())
            case EngineDied():
                self._fail(f"the engine stopped: {event.reason}")
            case _:
                pass  # of an answer; a bench has none

    def _fail(self, why: str) -> None:
        self._state, self._problem = None, why
        self._end()

    def _end(self) -> None:
        self._give_back()
        self._ended()

    def _give_back(self) -> None:
        assert self._dialogue is not None, "nothing was begun"
        self.running = False
        self._dialogue.give_back()

    def lines(self) -> list[str]:
        """How far it is, or what it has found; nothing before the first."""
        state = self._state
        if self._problem:
            return [f"! {self._problem}"]
        if state is None:
            return []
        lines = [_rates_words(state)] if state.rates else []
        if self.running:
            share = min(state.seconds / self._request.seconds, 1.0)
            doing = "stopping …" if self._stopping else "Esc stops it"
            return [
                f"{bar(share, _WIDTH)} round {state.rounds + 1} · {state.seconds:.0f} of about "
                f"{self._request.seconds:.0f} s · {doing}",
                *lines,
            ]
        if state.reason == "cancelled":
            lines.append("stopped; nothing of it is kept")
        else:
            lines.append(self._end_words(state))
        if state.forgotten:
            tokens = grouped(state.forgotten)
            lines.append(f"{tokens} tokens of this chat are read again with the next question")
        return lines

    def _end_words(self, state: Benched) -> str:
        temperature = self._request.params.temperature
        words = [f"measured on {state.rounds} prompts, temperature {temperature:g}"]
        if state.before:
            words.append(f"behind {grouped(state.before)} tokens of this chat")
        words.append("kept: plans go by it" if state.kept else "not kept")
        return " · ".join(words)


def _rates_words(state: Benched) -> str:
    """Plain decoding in tok/s, and how many times that the other ways are."""
    rates = dict(state.rates)
    plain = rates.pop(0)
    words = [f"plain {plain:.1f} tok/s"]
    for drafted, rate in rates.items():
        name = f"K{drafted}" if drafted > 0 else "auto"
        words.append(f"{name} {rate / plain:.2f}×" if plain else f"{name} {rate:.1f} tok/s")
    return " · ".join(words)
