"""The engine process: requests come in on stdin, events leave on a pipe of their own.

Knows processes, JSON lines and how to end in time; knows no tensors. Two threads only: a reader
that turns stdin into a queue and a set of cancelled ids, and the main loop, which owns the loaded
pair. stdout and stderr belong to the log file, so no stray print of a library can break the
protocol. torch is imported after `Hello` has left, by the first `Load`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from dflash_chat import __version__
from dflash_chat.errors import EXIT_OTHER, UserError
from dflash_chat.runtime.api import (
    PROTOCOL_VERSION,
    Bench,
    Benched,
    Cancel,
    Event,
    Failed,
    Generate,
    Hello,
    Load,
    ModelInfo,
    Progress,
    Ready,
    Shutdown,
    Tokens,
    decode,
    encode,
)

GRACE_S = 1.0  # how long the main loop may take to come back once nobody listens any more
PROGRESS_PERIOD_S = 0.05
_FEW_CORES = len(os.sched_getaffinity(0)) <= 2 if hasattr(os, "sched_getaffinity") else False
FLUSH_PERIOD_S = 0.15 if _FEW_CORES else 0.05  # a flush wakes the reader, who may share our cores
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class LoadedPair(Protocol):
    """What the main loop needs of a loaded pair."""

    info: ModelInfo

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Prefill, Tokens, Finished; looks at `cancelled` once per block."""

    def bench(self, request: Bench, cancelled: Callable[[], bool]) -> Iterator[Benched]:
        """One after every answer; the last has a reason."""


Asking = Generate | Bench
Loader = Callable[[Load, Callable[[Progress], None]], LoadedPair]


class Inbox:
    """The reader thread and what it has read: requests in order, cancelled ids at once."""

    def __init__(self, commands: BinaryIO) -> None:
        self._commands = commands
        self._requests: queue.SimpleQueue[Load | Asking | ValueError | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    @property
    def closed(self) -> bool:
        """Nobody waits for answers any more: stdin has ended or `Shutdown` came."""
        return self._closed.is_set()

    def next(self) -> Load | Asking | None:
        """The next request, None when the process should end. Raises ValueError for a bad line."""
        request = self._requests.get()
        if isinstance(request, ValueError):
            raise request
        return None if self.closed else request

    def cancelled(self, generation: int) -> bool:
        """True once generation `generation` need not go on."""
        return self.closed or generation in self._cancelled

    def _read(self) -> None:
        for line in self._commands:
            try:
                request = decode(line)
            except ValueError as error:
                self._requests.put(error)
                continue
            if isinstance(request, Shutdown):
                break
            if isinstance(request, Cancel):
                self._cancelled.add(request.id)
            elif isinstance(request, Load | Asking):
                self._requests.put(request)
        self._closed.set()
        self._requests.put(None)
        time.sleep(GRACE_S)  # a daemon thread: it does not outlive a main loop that returns in time
        os._exit(0)


class Outbox:
    """Events, one line each; tokens leave in groups, progress is thinned to what an eye can
    follow.
    """

    def __init__(self, events: BinaryIO, inbox: Inbox) -> None:
        self._events = events
        self._inbox = inbox
        self._stage = ""
        self._next_progress = 0.0
        self._next_flush = 0.0

    def send(self, event: Event) -> None:
        """Write one event, and what still waited before it."""
        self._events.write(encode(event))
        self._events.flush()

    def stream(self, event: Tokens) -> None:
        """Write tokens; the next event may have to push them out."""
        self._events.write(encode(event))
        now = time.monotonic()
        if now >= self._next_flush:
            self._next_flush = now + FLUSH_PERIOD_S
            self._events.flush()

    def progress(self, event: Progress) -> None:
        """Write a progress event if it is news; ends a load that nobody waits for."""
        if self._inbox.closed:
            raise SystemExit(0)
        now = time.monotonic()
        complete = event.total > 0 and event.done >= event.total
        if event.stage != self._stage or complete or now >= self._next_progress:
            self._stage, self._next_progress = event.stage, now + PROGRESS_PERIOD_S
            self.send(event)


def serve(commands: BinaryIO, events: BinaryIO, load: Loader) -> None:
    """Answer requests until stdin ends or `Shutdown` comes."""
    inbox = Inbox(commands)
    outbox = Outbox(events, inbox)
    outbox.send(Hello(__version__, PROTOCOL_VERSION, os.getpid()))
    pair: LoadedPair | None = None
    while True:
        generation = 0  # what a failure is about: 0 is loading
        try:
            request = inbox.next()
            if request is None:
                return
            if isinstance(request, Load):
                pair = None  # free the old pair before the new one needs its memory
                pair = load(request, outbox.progress)
                outbox.send(Ready(pair.info))
            else:
                generation = request.id
                _answer(pair, request, inbox, outbox)
        except (BrokenPipeError, SystemExit):
            return  # the other side is gone
        except UserError as error:
            outbox.send(Failed(generation, error.message, error.hint, error.exit_code))
        except Exception as error:  # noqa: BLE001 -- the one place: report the bug and keep serving
            trace = traceback.format_exc()
            log.error("request failed\n%s", trace)
            words = f"{type(error).__name__}: {error}"
            outbox.send(Failed(generation, words, "The engine log has more.", EXIT_OTHER, trace))


def _answer(pair: LoadedPair | None, request: Asking, inbox: Inbox, outbox: Outbox) -> None:
    if pair is None:
        raise UserError("No pair is loaded.", "Wait for the engine to load one.")

    def cancelled() -> bool:
        return inbox.cancelled(request.id)

    if isinstance(request, Bench):
        for state in pair.bench(request, cancelled):
            outbox.send(state)
        return
    for event in pair.generate(request, cancelled):
        if isinstance(event, Tokens):
            outbox.stream(event)
        else:
            outbox.send(event)


def load_session(request: Load, progress: Callable[[Progress], None]) -> LoadedPair:
    """Fetch what is missing, then load the pair."""
    from dflash_chat import hub, pairs

    def fetching(stage: str, done: int, total: int) -> None:
        progress(Progress(stage, done, total))

    installed = hub.ensure(pairs.find(request.pair), request.quant, fetching)
    progress(Progress("starting torch", 0, 0))
    from dflash_chat.runtime.session import Session

    return Session.load(installed, request.options, progress)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when `parent` dies; end now if it already has."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main(load: Loader = load_session) -> None:
    """Run as `python -m dflash_chat.runtime.worker EVENTS_FD PARENT_PID`."""
    events_fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    os.set_inheritable(events_fd, False)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with os.fdopen(events_fd, "wb") as events:
        serve(sys.stdin.buffer, events, load)
    os._exit(0)  # no teardown: the reader may hold stdin, and memory goes back sooner this way


if __name__ == "__main__":
    main()
