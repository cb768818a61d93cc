"""Where a step's time goes, without a synchronisation of its own.

On CUDA the marks are events, read after the step's one device-to-host copy has waited for them
anyway; on the CPU they are clock readings. The only file that makes events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Mark = float | torch.cuda.Event


def event() -> torch.cuda.Event:
    """An event that tells the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def mark(device: torch.device) -> Mark:
    """This point of the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    made = event()
    made.record()
    return made


def reach(point: Mark) -> None:
    """Wait until the device has come to `point`."""
    if not isinstance(point, float):
        point.synchronize()


def ms_between(begin: Mark, end: Mark) -> float:
    """Milliseconds between two points that the device has passed, to a tenth of a microsecond."""
    if isinstance(begin, float) and isinstance(end, float):
        return round((end - begin) * 1000, 4)
    assert not isinstance(begin, float)
    assert not isinstance(end, float)
    return round(float(begin.elapsed_time(end)), 4)


class StepTimer:
    """Milliseconds between marks of one step: start, then one mark at the end of each part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Mark]] = []
        self._started = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._marks = []
        self.mark("start")

    def mark(self, part: str) -> None:
        """The part of this name ends here."""
        self._marks.append((part, mark(self._device)))

    def read(self) -> dict[str, float]:
        """Milliseconds by part, and "host": what of the wall time no part explains.

        On CUDA every mark must have completed, which the step's own copy to the host ensures.
        """
        wall_ms = (time.perf_counter() - self._started) * 1000
        parts: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            parts[part] = parts.get(part, 0.0) + ms_between(begin, end)
        parts["host"] = round(max(0.0, wall_ms - sum(parts.values())), 4)
        return parts


def quickest_ms(
    passes: Sequence[Callable[[], object]], device: torch.device, rounds: int = 5
) -> list[float]:
    """The least wall time of each pass in milliseconds, all taking turns so that a disturbance of
    the machine does not single one out.
    """
    best = [float("inf")] * len(passes)
    for _ in range(rounds):
        for i, run in enumerate(passes):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[i] = min(best[i], (time.perf_counter() - started) * 1000)
    return best
