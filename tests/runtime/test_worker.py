"""The engine process as seen through its pipes: no client, no widgets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from dflash_chat.errors import EXIT_DOES_NOT_FIT
from dflash_chat.runtime.api import (
    PROTOCOL_VERSION,
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
    Prefill,
    Progress,
    Ready,
    Request,
    Shutdown,
    Tokens,
    decode,
    encode,
)

SCRIPT = Path(__file__).with_name("scripted_worker.py")


class Engine:
    """A scripted engine process and both its pipes."""

    def __init__(self) -> None:
        read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(write_fd), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_fd,),
        )
        os.close(write_fd)
        assert self.process.stdin is not None
        self.commands = self.process.stdin
        self.events: BinaryIO = os.fdopen(read_fd, "rb")

    def send(self, *requests: Request) -> None:
        for request in requests:
            self.commands.write(encode(request))
        self.commands.flush()

    def receive(self) -> Request | Event:
        return decode(self.events.readline())

    def until(self, *kinds: type) -> list[Request | Event]:
        """Events up to and including the first of one of `kinds`."""
        seen = [self.receive()]
        while not isinstance(seen[-1], kinds):
            seen.append(self.receive())
        return seen

    def ask(self, generation: int, prompt: str) -> None:
        self.send(Generate(generation, (Message("user", prompt),)))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.process.kill()
    engine.process.wait()
    engine.events.close()
    engine.commands.close()


@pytest.fixture
def loaded(engine: Engine) -> Engine:
    engine.send(Load("pair"))
    engine.until(Ready)
    return engine


def test_hello_comes_first_and_names_the_process(engine: Engine) -> None:
    hello = engine.receive()

    assert isinstance(hello, Hello)
    assert (hello.protocol, hello.pid) == (PROTOCOL_VERSION, engine.process.pid)


def test_loading_reports_progress_then_ready(engine: Engine) -> None:
    engine.send(Load("pair"))

    _, *progress, ready = engine.until(Ready)

    assert progress
    assert all(isinstance(event, Progress) for event in progress)
    assert isinstance(ready, Ready)
    assert ready.info.pair == "pair"


def test_a_bench_says_how_far_it_is_and_ends_early_where_it_is_cancelled(loaded: Engine) -> None:
    loaded.send(Bench(1, (Message("user", "One?"),), seconds=0.02))
    states = [loaded.receive() for _ in range(5)]
    assert [s.reason for s in states if isinstance(s, Benched)] == ["", "", "", "", "done"]
    assert isinstance(states[0], Benched)
    assert states[0].rates == ((0, 40.0), (-1, 58.0))

    loaded.send(Bench(2, seconds=600))
    loaded.receive()
    loaded.send(Cancel(2))
    state = loaded.receive()
    while isinstance(state, Benched) and not state.reason:
        state = loaded.receive()
    assert isinstance(state, Benched)
    assert (state.id, state.reason) == (2, "cancelled")


def test_an_answer_is_prefill_then_tokens_then_finished(loaded: Engine) -> None:
    loaded.ask(1, "count")

    prefill, *tokens, finished = loaded.until(Finished)

    assert isinstance(prefill, Prefill)
    assert "".join(t.text for t in tokens if isinstance(t, Tokens)) == "0 1 2 3 4 5 "
    assert isinstance(finished, Finished)
    assert (finished.id, finished.reason) == (1, "stop")


def test_what_a_library_prints_does_not_reach_the_protocol(loaded: Engine) -> None:
    loaded.ask(1, "print")

    assert isinstance(loaded.until(Finished, Failed)[-1], Finished)


def test_cancel_ends_the_answer_within_a_block(loaded: Engine) -> None:
    loaded.ask(1, "forever")
    loaded.until(Tokens)
    sent = time.monotonic()
    loaded.send(Cancel(1))

    finished = loaded.until(Finished)[-1]

    assert isinstance(finished, Finished)
    assert finished.reason == "cancelled"
    assert time.monotonic() - sent < 3


def test_cancel_of_an_earlier_answer_leaves_this_one_alone(loaded: Engine) -> None:
    loaded.send(Cancel(1))
    loaded.ask(2, "count")

    finished = loaded.until(Finished)[-1]

    assert isinstance(finished, Finished)
    assert finished.reason == "stop"


def test_cancel_before_the_request_is_reached_still_counts(loaded: Engine) -> None:
    loaded.ask(1, "forever")
    loaded.ask(2, "forever")
    loaded.send(Cancel(2), Cancel(1))

    first, second = loaded.until(Finished)[-1], loaded.until(Finished)[-1]

    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert (first.reason, second.reason) == ("cancelled", "cancelled")


def test_a_user_error_keeps_its_hint_and_exit_code(engine: Engine) -> None:
    engine.send(Load("gated"))

    failed = engine.until(Failed)[-1]

    assert failed == Failed(0, "This pair is gated.", "Accept its licence first.", 3)


def test_a_bug_is_reported_with_its_trace_and_the_next_prompt_is_served(loaded: Engine) -> None:
    loaded.ask(1, "bug")
    loaded.ask(2, "count")

    failed, finished = loaded.until(Failed)[-1], loaded.until(Finished)[-1]

    assert isinstance(failed, Failed)
    assert failed.id == 1
    assert failed.message == "ZeroDivisionError: a bug"
    assert "scripted_worker.py" in failed.trace
    assert isinstance(finished, Finished)
    assert finished.id == 2


def test_an_answer_that_does_not_fit_fails_with_its_exit_code_and_the_next_is_served(
    loaded: Engine,
) -> None:
    loaded.ask(1, "large")
    loaded.ask(2, "count")

    failed, finished = loaded.until(Failed)[-1], loaded.until(Finished)[-1]

    assert failed == Failed(1, "The memory ran out.", "try -o ctx=1024", EXIT_DOES_NOT_FIT)
    assert isinstance(finished, Finished)
    assert finished.id == 2


def test_a_prompt_before_any_pair_is_refused(engine: Engine) -> None:
    engine.ask(1, "count")

    failed = engine.until(Failed)[-1]

    assert isinstance(failed, Failed)
    assert failed.message == "No pair is loaded."


def test_a_line_that_is_no_request_is_reported(loaded: Engine) -> None:
    loaded.commands.write(b"{}\n")
    loaded.commands.flush()

    failed = loaded.until(Failed)[-1]

    assert isinstance(failed, Failed)
    assert "not a protocol line" in failed.message


@pytest.mark.parametrize("prompt", ["count", "forever", "hang"])
def test_end_of_stdin_ends_the_process(loaded: Engine, prompt: str) -> None:
    loaded.ask(1, prompt)
    time.sleep(0.1)
    loaded.commands.close()

    assert loaded.process.wait(timeout=2) == 0


@pytest.mark.parametrize("pair", ["slow", "stuck"])
def test_shutdown_ends_a_load(engine: Engine, pair: str) -> None:
    engine.send(Load(pair))
    engine.until(Hello)
    time.sleep(0.1)
    engine.send(Shutdown())

    assert engine.process.wait(timeout=2) == 0
