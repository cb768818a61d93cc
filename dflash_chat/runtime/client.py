"""The UI's end of the engine process: start it, talk to it, notice its death, end it.

The only file that knows processes. Events pile up in a deque that the UI drains on its own clock,
so drawing never slows the engine down. Works inside any running asyncio loop; starts no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dflash_chat.runtime.api import Event, Request, Shutdown, decode, encode

WORKER = (sys.executable, "-u", "-m", "dflash_chat.runtime.worker")
LOG_BYTES_MAX = 1 << 20
LOG_LINES_SHOWN = 8
PIPE_BYTES = 1 << 20  # room for seconds of events while the UI is busy
SHUTDOWN_S = 2.0
TERMINATE_S = 1.0

_SIGNALS = {
    signal.SIGKILL: "it was killed (SIGKILL); often that is the system running out of memory",
    signal.SIGSEGV: "it crashed in native code (SIGSEGV)",
    signal.SIGABRT: "it aborted in native code (SIGABRT)",
    signal.SIGBUS: "it lost memory it had mapped (SIGBUS); was a weight file changed?",
    signal.SIGILL: "it met an instruction this processor lacks (SIGILL)",
    signal.SIGTERM: "it was asked to end (SIGTERM)",
}


@dataclass(frozen=True)
class EngineDied:
    """The engine process ended without being asked to: why, in words, and its last log lines."""

    reason: str
    log_lines: tuple[str, ...]


def exit_reason(code: int) -> str:
    """A process's return code in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    number = signal.Signals(-code)
    return _SIGNALS.get(number, f"it was ended by {number.name}")


def log_path() -> Path:
    """The engine's log file, in the platform's folder for state, which is created."""
    from platformdirs import user_state_dir

    path = Path(user_state_dir("dflash-chat")) / "engine.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class EngineClient:
    """One engine process at a time. `command` is what runs it; two numbers are added to it."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = tuple(command)
        self._process: Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._events: deque[Event | EngineDied] = deque()

    @property
    def pid(self) -> int | None:
        """The engine's process id while there is a process."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the engine process; `Hello` follows among the events."""
        assert self._process is None, f"engine {self.pid} is already running"
        log = _open_log(log_path())
        log_start = log.tell()  # now: what the process writes moves it, as the file is one
        read_fd, write_fd = os.pipe()
        with contextlib.suppress(OSError, AttributeError):  # a bonus where the system allows it
            fcntl.fcntl(read_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(write_fd),
                str(os.getpid()),
                stdin=PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_fd)
            log.close()
            self._events.append(EngineDied(f"it could not be started: {error}", ()))
            return
        finally:
            os.close(write_fd)
        self._process = process
        self._watcher = asyncio.create_task(self._watch(process, read_fd, log, log_start))

    def send(self, request: Request) -> None:
        """Queue one request for the engine; does nothing once the engine has died."""
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(encode(request))

    def drain(self) -> list[Event | EngineDied]:
        """All events since the last call, oldest first."""
        events = list(self._events)
        self._events.clear()
        return events

    async def restart(self) -> None:
        """End the present process, if any, and start a new one. What the old one still says is
        nobody's.
        """
        self._events.clear()
        await self.close()
        await self.start()

    async def close(self) -> None:
        """Shut the engine down: ask, then terminate, then kill, always by its own pid."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it may be gone already
            process.stdin.write(encode(Shutdown()))
            process.stdin.close()
        for patience_s, signal_it in ((SHUTDOWN_S, process.terminate), (TERMINATE_S, process.kill)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
                break
            with contextlib.suppress(ProcessLookupError):
                signal_it()
        if self._watcher:
            await self._watcher

    async def _watch(self, process: Process, read_fd: int, log: BinaryIO, log_start: int) -> None:
        """Own the pipe and the log until the process ends; report an end that nobody asked for."""
        with os.fdopen(read_fd, "rb", buffering=0) as pipe, log:
            events = Lines(self._events)
            reader = asyncio.StreamReader(limit=PIPE_BYTES)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            reason = ""
            try:
                while data := await reader.read(PIPE_BYTES):
                    if self._process is process:  # else it is being ended
                        events.feed(data)
            except ValueError as error:
                reason = f"it wrote something that is {error}"
                process.kill()
            transport.close()
            reason = reason or exit_reason(await process.wait())
            if self._process is process:
                self._process = None
                self._events.append(EngineDied(reason, _tail(log, log_start)))


class Lines:
    """Bytes in pieces → decoded messages appended to `out`."""

    def __init__(self, out: deque[Event | EngineDied]) -> None:
        self._out = out
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the pipe; a half line waits for its other half."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = decode(line)
            assert not isinstance(event, Request), line
            self._out.append(event)


def _open_log(path: Path) -> BinaryIO:
    """The log for appending, moved aside once it is large."""
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    log = path.open("a+b")
    log.seek(0, os.SEEK_END)
    return log


def _tail(log: BinaryIO, start: int) -> tuple[str, ...]:
    """The last lines written since byte `start`."""
    end = log.seek(0, os.SEEK_END)
    log.seek(max(start, end - 8192))
    lines = log.read().decode(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip())[-LOG_LINES_SHOWN:]
