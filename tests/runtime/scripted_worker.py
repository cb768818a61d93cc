"""An engine process whose pair is a script: the prompt says what the engine does.

Run by the tests in place of `dflash_chat.runtime.worker`, with the same two arguments.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from dflash_chat.errors import AccessError, DoesNotFitError, UserError
from dflash_chat.runtime.api import (
    Bench,
    Benched,
    Finished,
    Generate,
    Load,
    ModelInfo,
    Prefill,
    Progress,
    Spec,
    StepStats,
    Timing,
    Tokens,
    Usage,
)
from dflash_chat.runtime.worker import LoadedPair, main

STEP = StepStats(7, 1, 2, 1.0, 4.0, 0.2, 0.1, 100)


class ScriptedPair:
    """Answers "count", "echo" and "forever"; anything else is an accident named by the prompt."""

    def __init__(self, pair: str) -> None:
        self.info = ModelInfo(
            pair, "target", "drafter", "cpu", "fp32", "torch", 2048, 8, 7, 1, 1, 1, 0.1
        )

    def generate(
        self, request: Generate, cancelled: Callable[[], bool]
    ) -> Iterator[Prefill | Tokens | Finished]:
        prompt = request.messages[-1].content
        if prompt == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "print":
            print("a library prints", flush=True)  # noqa: T201 -- what the test is about
        if prompt == "bug":
            raise ZeroDivisionError("a bug")
        if prompt == "refuse":
            raise UserError("The prompt is too long.", "Start a new chat.")
        if prompt == "large":
            raise DoesNotFitError("The memory ran out.", "try -o ctx=1024")
        if prompt == "hang":
            time.sleep(60)
        yield Prefill(request.id, 0, 4, 4)
        yield Tokens(request.id, "0 ", 1)
        steps, reason = 0, "stop"
        while steps < 5 or prompt == "forever":
            if cancelled():
                reason = "cancelled"
                break
            time.sleep(0.005)
            steps += 1
            yield Tokens(request.id, f"{steps} ", 2, STEP)
        spec = Spec(steps, 7 * steps, steps, (0, steps))
        yield Finished(request.id, reason, Usage(4, 0, 1 + 2 * steps), spec, Timing(0, 0.1, 0.1, 9))

    def bench(self, request: Bench, cancelled: Callable[[], bool]) -> Iterator[Benched]:
        """Rounds of 5 ms until it is cancelled or its seconds are over."""
        rounds, rates = 0, ((0, 40.0), (-1, 58.0))
        while not cancelled() and rounds * 0.005 < request.seconds:
            yield Benched(request.id, rounds, rounds * 0.005, rates)
            time.sleep(0.005)
            rounds += 1
        yield Benched(request.id, rounds, reason="cancelled" if cancelled() else "done")


def load(request: Load, progress: Callable[[Progress], None]) -> LoadedPair:
    """Load by name: "gated" refuses, "slow" takes a minute, "stuck" does so without a word."""
    if request.pair == "gated":
        raise AccessError("This pair is gated.", "Accept its licence first.")
    if request.pair == "stuck":
        time.sleep(60)
    for done in range(600 if request.pair == "slow" else 3):
        progress(Progress("weights", done, 600))
        time.sleep(0.1 if request.pair == "slow" else 0)
    return ScriptedPair(request.pair)


if __name__ == "__main__":
    assert "torch" not in sys.modules, "the worker imports torch before Hello"
    main(load)
