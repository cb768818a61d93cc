"""Progress on stderr: a bar on a terminal, otherwise a line per stage and per ten percent.

Call it with `(stage, done, total)` in bytes. Stages without a total show as a spinner on a terminal
and not at all elsewhere.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 1.0
_STEP = 10  # percent


class Reporter:
    """A context manager; what it draws on a terminal is gone when it ends."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._percent = 0
        self._last_line = 0.0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        elif total > 0:
            self._line(stage, done, total)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if self._task is None or stage != self._stage:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(stage, total=total or None)
            self._stage = stage
        self._bars.update(self._task, completed=done, total=total or None)

    def _line(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done // total // _STEP * _STEP
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._percent = stage, -1
        if percent > self._percent and now - self._last_line >= _LINE_EVERY_S:
            self._percent, self._last_line = percent, now
            sys.stderr.write(f"{stage}: {percent} % of {total / 1e6:.0f} MB\n")
            sys.stderr.flush()


def _bars() -> Progress:
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    room = max(20, console.width - 54)  # what the other columns leave on one line
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn(
            "{task.description}",
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=room),
        ),
        progress.BarColumn(bar_width=16),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
