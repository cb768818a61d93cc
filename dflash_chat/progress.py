"""How far something long is: `Step`, and what shows it on stderr or as JSON lines on stdout.

A report is called with `(stage, done, total)` in bytes; a stage without a total shows as a spinner
on a terminal and not at all elsewhere. A fetch says more, in a `Step`. `Reporter` draws a bar on a
terminal and writes a line per stage and per ten percent elsewhere; `JsonLines` is for programs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dflash_chat import terminals
from dflash_chat.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WINDOW_S = 10.0
_LINE_EVERY_S = 1.0
_JSON_EVERY_S = 0.2
_STEP = 10  # percent


@dataclass(frozen=True)
class Step:
    """Where a pull stands; `pull --json` writes one per line. Fields are part of the interface.

    `done` and `total` are bytes over all repositories of the pair; within one stage `done` never
    falls. `speed` is bytes per second over the last ten seconds, `eta_s` the seconds left at that
    speed (null while unknown). `files_done` of `files` are complete and stay whatever happens;
    the unfinished ones, `restart_bytes` in all, would start again. The last line has the stage
    "done", with `path`, or "failed" or "interrupted", with what the error says in `note` and
    `hint`, and the exit code.
    """

    stage: str
    done: int = 0
    total: int = 0
    speed: float = 0.0
    eta_s: float | None = None
    files_done: int = 0
    files: int = 0
    restart_bytes: int = 0
    note: str = ""
    hint: str = ""
    path: str = ""
    exit_code: int = EXIT_OK

    def label(self) -> str:
        """The stage as it stands beside a bar."""
        return (
            f"{self.stage} ({self.files_done} of {self.files} files)" if self.files else self.stage
        )

    def kept(self) -> str:
        """What an interruption leaves, in words; "" if nothing was being fetched."""
        if not self.files:
            return ""
        text = f"{self.files_done} of {self.files} files are complete and kept"
        if self.restart_bytes:
            text += f"; what was in flight ({size(self.restart_bytes)}) starts again next time"
        return text


Watch = Callable[[Step], None]


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and hubs count them."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 or not count else f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Bytes per second over the last `WINDOW_S`, and the time left at that speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, done: int, total: int) -> tuple[float, float | None]:
        """Note that `done` of `total` bytes are there; the speed and the seconds left."""
        now = self._clock()
        if not total:
            return 0.0, None
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        speed = (done - before) / (now - then) if now > then else 0.0
        return speed, (total - done) / speed if speed > 0 else None


class Reporter:
    """A context manager; what it draws on a terminal is gone when it ends."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._last = Step("")
        self._percent = 0
        self._last_line = 0.0
        self._meter = Meter()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the bar off the screen, before something else is written there."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = self._task = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.show(Step(stage, done, total, *self._meter(done, total)))

    def show(self, step: Step) -> None:
        """Draw a step, or write it down where nothing can be drawn."""
        if sys.stderr.isatty() and not terminals.only_lines(os.environ):
            self._draw(step)
        elif step.total > 0:
            self._line(step)
        self._last = step

    def _draw(self, step: Step) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if self._task is None or step.total != self._last.total:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(step.label(), total=step.total or None, pace="")
        self._bars.update(
            self._task,
            description=step.label(),
            completed=step.done,
            total=step.total or None,
            pace=step.note or pace(step),
        )

    def _line(self, step: Step) -> None:
        percent = 100 * step.done // step.total // _STEP * _STEP
        now = time.monotonic()
        if step.total != self._last.total or step.done < self._last.done:
            self._percent = -1
        if percent > self._percent and now - self._last_line >= _LINE_EVERY_S:
            self._percent, self._last_line = percent, now
            told = f" · {pace(step)}" if step.speed else ""
            sys.stderr.write(f"{step.label()}: {percent} % of {size(step.total)}{told}\n")
            sys.stderr.flush()


class JsonLines:
    """The same for programs: a `Step` per line, at most five a second, and always the last one."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._meter = Meter()
        self._last = Step("")
        self._last_line = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.show(Step(stage, done, total, *self._meter(done, total)))

    def show(self, step: Step) -> None:
        now = time.monotonic()
        news = (step.stage, step.note) != (self._last.stage, self._last.note)
        self._last = step
        if news or step.done == step.total or now - self._last_line >= _JSON_EVERY_S:
            self._write(step)
            self._last_line = now

    def end(self, step: Step) -> None:
        """The last line: where the stage before stood, and how it ended."""
        last = self._last
        told = replace(
            step,
            done=last.done,
            total=last.total,
            files_done=last.files_done,
            files=last.files,
            restart_bytes=0 if step.stage == "done" else last.restart_bytes,
        )
        self._write(told)

    def failed(self, error: UserError) -> None:
        """`end`, for an error."""
        self.end(Step("failed", note=error.message, hint=error.hint, exit_code=error.exit_code))

    def _write(self, step: Step) -> None:
        self._out.write(json.dumps(asdict(step)) + "\n")
        self._out.flush()


def pace(step: Step) -> str:
    """Speed and time left, as shown beside the bar."""
    if not step.speed:
        return ""
    left = "" if step.eta_s is None else f" · {duration(step.eta_s)} left"
    return f"{step.speed / 1e6:.1f} MB/s{left}"


def _bars() -> Progress:
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    room = max(20, console.width - 62)  # what the other columns leave on one line
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn(
            "{task.description}",
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=room),
        ),
        progress.BarColumn(bar_width=16),
        progress.DownloadColumn(),
        progress.TextColumn("{task.fields[pace]}"),
        console=console,
        transient=True,
    )
