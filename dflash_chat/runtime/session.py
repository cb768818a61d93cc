"""A loaded pair that speaks text: chat → token ids → engine steps → text.

The one place that knows both sides: templates and tokenizer above, `Engine` below. The worker wraps
it for the TUI; `--once` and `bench` use it in their own process. How a pair is loaded stands in
`loading.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dflash_chat.errors import DoesNotFitError
from dflash_chat.hub import Installed
from dflash_chat.runtime import loading, memory, text
from dflash_chat.runtime.api import (
    Bench,
    Benched,
    EngineOptions,
    Event,
    Finished,
    Generate,
    ModelInfo,
    Prefill,
    Spec,
    Timing,
    Tokens,
    Usage,
)
from dflash_chat.runtime.engine import Engine, Prefilled, Step
from dflash_chat.runtime.loading import ReportProgress
from dflash_chat.speed import Survival

log = logging.getLogger(__name__)


class Session:
    """One pair in memory. Not safe for two generations at once; `generate` reuses what is
    cached.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: text.Tokenizer,
        info: ModelInfo,
        what_fits: str = "",
        keep: Callable[[Survival], bool] = lambda survival: False,
    ) -> None:
        self.engine, self.tokenizer, self.info = engine, tokenizer, info
        self.keep = keep  # what a bench has found, for the next plan; says whether it is kept
        self._what_fits = what_fits  # the hint, should memory run out
        self._said: _Said | None = None

    @classmethod
    def load(
        cls, installed: Installed, options: EngineOptions, progress: ReportProgress
    ) -> Session:
        """Load an installed pair. Raises what `loading.load` does."""
        pair = loading.load(installed, options, progress)
        return cls(pair.engine, pair.tokenizer, pair.info, pair.what_fits, pair.keep)

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Answer a chat: Prefill events, Tokens events, one Finished. Cancels between blocks.

        Raises DoesNotFitError when memory runs out; the next prompt is then read from its
        beginning.
        """
        try:
            yield from self._answer(request, cancelled)
            return
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            log.exception("memory ran out")
        self.engine.forget()  # here, where the error holds no tensors any more
        if self.engine.cache.device.type == "cuda":
            torch.cuda.empty_cache()
        raise DoesNotFitError("the GPU's memory ran out during this answer", self._what_fits)

    def bench(self, request: Bench, cancelled: Callable[[], bool]) -> Iterator[Benched]:
        """Measure; an answer that was cut can still be continued as if nothing had been asked."""
        from dflash_chat.runtime import bench

        said = self._said
        try:
            yield from bench.run(self, request, cancelled)
        finally:
            self._said = said

    def _answer(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        started = time.perf_counter()
        said = self._partial(request) if request.continue_last else self._nothing(request)
        answer = _Answer(request, self.tokenizer, started, said)
        self._said = None
        steps = self.engine.generate(
            [*said.prompt, *said.ids],
            request.params,
            request.draft,
            request.draft_tokens,
            len(said.ids),
        )
        if opening := answer.opening():
            yield Tokens(request.id, opening, 0)
        for step in steps:
            if isinstance(step, Prefilled):
                answer.prefilled(step)
                yield Prefill(request.id, step.cached, step.done, step.total)
            else:
                yield answer.committed(step)
            if answer.reason or (cancelled() and answer.cancel()):
                break
        steps.close()
        if tail := answer.tail():
            yield tail
        self._said = answer.said()
        yield answer.finished(self.engine)

    def _nothing(self, request: Generate) -> _Said:
        """The beginning of an answer."""
        return _Said(tuple(self.tokenizer.render(request.messages)), (), "")

    def _partial(self, request: Generate) -> _Said:
        """The answer to be continued. The ids of the last one are known; another text is turned
        into ids anew, and these may differ from those that wrote it.
        """
        *before, partial = request.messages
        assert partial.role == "assistant", partial.role
        prompt = tuple(self.tokenizer.render(before))
        said = self._said
        if said is not None and (said.prompt, said.text) == (prompt, partial.content):
            return said
        text = partial.content.removeprefix(self.tokenizer.opening(prompt))
        return _Said(prompt, tuple(self.tokenizer.encode(text)), partial.content)


@dataclass(frozen=True)
class _Said:
    """An answer as far as it came: the ids it stands behind, its own, and its text as shown."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


class _Answer:
    """Text, counts and times of one answer in the making."""

    def __init__(
        self, request: Generate, tokenizer: text.Tokenizer, started: float, said: _Said
    ) -> None:
        self.id, self.reason = request.id, ""
        self._tokenizer, self._stop_ids = tokenizer, tokenizer.stop_ids
        self._stream = tokenizer.decode_stream()
        self._stops = text.StopStrings(request.params.stop)
        self._said, self._ids, self._text = said, list(said.ids), [said.text]
        self._stream.push(said.ids)
        self._shown_again = self._stops.resume(said.text)  # characters
        self._lengths = text.Lengths()
        self._started, self._rendered = started, time.perf_counter()
        self._first = self._last = 0.0
        self._usage = Usage(0, 0, 0)
        self._spec = Spec()
        self._decoded = 0

    def prefilled(self, step: Prefilled) -> None:
        self._usage = Usage(step.total, step.cached, 0)

    def committed(self, step: Step) -> Tokens:
        """Count a step's tokens and turn them into text that is safe to show."""
        self._last = time.perf_counter()
        timing = None
        if not self._first:
            self._first = self._last
            timing = Timing(ttft_s=self._ttft_s, prefill_s=self._prefill_s)
        self._usage = Usage(
            self._usage.prompt, self._usage.cached, self._usage.completion + len(step.tokens)
        )
        if step.stats is not None:
            stats = step.stats
            self._decoded += stats.committed
            self._spec = self._spec.add(stats)
        self._ids += [token for token in step.tokens if token not in self._stop_ids]
        pieces = [
            "" if token in self._stop_ids else self._stream.push((token,)) for token in step.tokens
        ]
        emit, stopped = self._stops.push("".join(pieces))
        self.reason = "stop" if stopped else step.reason
        shown = self._new(emit)
        lengths = self._lengths.share(map(len, pieces), len(shown))
        return Tokens(self.id, shown, len(step.tokens), step.stats, lengths, timing)

    def opening(self) -> str:
        """What the prompt has begun of the answer; it belongs to its text."""
        return "" if self._said.text else self._new(self._tokenizer.opening(self._said.prompt))

    def said(self) -> _Said | None:
        """All of it, for the case that it is continued; None if it is complete."""
        if self.reason == "stop":
            return None
        return _Said(self._said.prompt, tuple(self._ids), "".join(self._text))

    def cancel(self) -> bool:
        """End here because the reader asked to."""
        self.reason = "cancelled"
        return True

    def tail(self) -> Tokens | None:
        """What was held back and turns out to be text after all. Half a character does not, where
        the answer may be continued.
        """
        rest = self._stream.finish() if self.reason == "stop" else ""
        emit, stopped = self._stops.push(rest)
        shown = self._new(emit if stopped else emit + self._stops.finish())
        if not shown:
            return None
        return Tokens(self.id, shown, 0, lengths=self._lengths.share((), len(shown)))

    def _new(self, emit: str) -> str:
        """`emit` without what was shown before the answer was continued."""
        again = min(self._shown_again, len(emit))
        self._shown_again -= again
        self._text.append(emit[again:])
        return emit[again:]

    @property
    def _ttft_s(self) -> float:
        return self._first - self._started if self._first else 0.0

    @property
    def _prefill_s(self) -> float:
        return self._first - self._rendered if self._first else 0.0

    def finished(self, engine: Engine) -> Finished:
        """The sums, beside what plain decoding would reach as the engine knows it."""
        plain, controller = engine.plain, engine.controller
        ar_tok_s = plain.tok_s if plain is not None else 0.0
        live = controller.baseline
        decode_s = max(0.0, self._last - self._first)
        tok_s = self._decoded / decode_s if decode_s else 0.0
        timing = Timing(
            ttft_s=self._ttft_s,
            decode_s=decode_s,
            tok_s=tok_s,
            prefill_s=self._prefill_s,
            ar_tok_s=ar_tok_s,
            speedup=tok_s / ar_tok_s if ar_tok_s else 0.0,
            ar_age_s=live.age_ms / 1000 if plain is not None and live is not None else None,
            ar_context_tokens=plain.context_tokens if plain is not None else 0,
        )
        why = controller.reason if engine.measured and self._spec.steps else ""
        return Finished(self.id, self.reason, self._usage, self._spec, timing, why)
