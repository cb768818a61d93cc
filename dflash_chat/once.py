"""`dflash-chat --once`: one answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType

from dflash_chat import hub, pairs
from dflash_chat.errors import EXIT_INTERRUPTED, EXIT_OK
from dflash_chat.fenced import code_blocks
from dflash_chat.progress import Reporter
from dflash_chat.runtime.api import (
    Finished,
    Generate,
    Message,
    ModelInfo,
    Progress,
    Timing,
    Tokens,
)
from dflash_chat.settings import OnceArgs
from dflash_chat.thinking import split


def run(args: OnceArgs) -> int:
    """Load, answer, print. Returns the exit code; raises UserError for everything a person can
    fix.
    """
    started = time.perf_counter()
    with Reporter() as reporter:
        installed = hub.ensure(pairs.find(args.pair), args.settings.quant, reporter)
        from dflash_chat.runtime.session import Session  # torch comes in here, not before

        def loading(progress: Progress) -> None:
            reporter(progress.stage, progress.done, progress.total)

        session = Session.load(installed, args.settings.engine, loading)
    load_s = time.perf_counter() - started
    messages = (Message("system", args.system),) if args.system else ()
    request = Generate(
        1, (*messages, Message("user", args.prompt)), args.settings.sampling, args.draft
    )
    pieces: list[str] = []
    finished: Finished | None = None
    with InterruptAsCancel() as cancelled:
        for event in session.generate(request, cancelled):
            if isinstance(event, Tokens):
                pieces.append(event.text)
                if not (args.json or args.extract):
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    text = "".join(pieces)
    if args.extract:
        text = first_code(text)
        sys.stdout.write(text)
    if args.json:
        json.dump(as_json(text, finished, session.info, load_s), sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
    elif not text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if args.stats:
        sys.stderr.write(in_words(finished, load_s) + "\n")
    return EXIT_INTERRUPTED if finished.reason == "cancelled" else EXIT_OK


def first_code(answer: str) -> str:
    """The first code block of an answer, thoughts aside; the answer if it has none."""
    _, said = split(answer)
    return next(iter(code_blocks(said)), said)


def as_json(text: str, finished: Finished, info: ModelInfo, load_s: float) -> dict[str, object]:
    """The one object of `--json`; field names are part of the interface."""
    timing = replace(finished.timing, load_s=load_s)
    return {
        "text": text,
        "finish_reason": finished.reason,
        "usage": vars(finished.usage),
        "spec": finished.spec.to_json(),
        "timing": {
            key: value if value is None else round(value, 4) for key, value in vars(timing).items()
        },
        "why": finished.why,
        "pair": info.pair,
        "versions": info.versions,
    }


def in_words(finished: Finished, load_s: float) -> str:
    """The lines of `--stats`."""
    usage, spec, timing = finished.usage, finished.spec, finished.timing
    copied = f", {spec.copied} found in the text" if spec.lookups else ""
    against = f" ({timing.speedup:.2f}× plain)" if timing.speedup else ""
    return (
        f"{usage.completion} tokens · {timing.tok_s:.1f} tok/s{against} · "
        f"ttft {timing.ttft_s * 1000:.0f} ms · load {load_s:.1f} s · "
        f"prompt {usage.prompt} ({usage.cached} cached) · {finished.reason}\n"
        f"tau {spec.tau:.2f} = {max(0.0, spec.tau - 1):.2f} drafted + 1 · "
        f"{spec.steps} verify passes · accepted {spec.accepted} of {spec.drafted}{copied} · "
        f"histogram {list(spec.histogram)}\n"
        f"{width_words(spec.widths)}{_plain_words(timing)}\n"
        f"last step: {finished.why or 'there was none'}"
    )


def width_words(widths: Sequence[int]) -> str:
    """How many passes had how many rows."""
    rows = [f"{n}: {count}" for n, count in enumerate(widths, 1) if count]
    return f"passes by rows {', '.join(rows) or 'none'}"


def _plain_words(timing: Timing) -> str:
    """Plain decoding, and how old the figure is."""
    if not timing.ar_tok_s:
        return ""
    age = timing.ar_age_s
    when = "at load" if age is None else f"{age:.1f} s of decoding before the end"
    behind = f"behind {timing.ar_context_tokens} tokens"
    return f" · plain {timing.ar_tok_s:.1f} tok/s, measured {when}, {behind}"


class InterruptAsCancel:
    """The first Ctrl+C ends the answer after the block in flight, the second ends the program."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return lambda: self._asked

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
