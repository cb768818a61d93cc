"""What is said of a fetch while it runs: speed, time left, lines, and what an interrupt keeps."""

from __future__ import annotations

import io
import json

import pytest

from dflash_chat.errors import EXIT_DISK, DiskError
from dflash_chat.progress import JsonLines, Meter, Reporter, Step, duration, pace, size


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_that_of_the_last_ten_seconds() -> None:
    clock = Clock()
    meter = Meter(clock)
    for second in range(21):  # 1 MB/s for ten seconds, then 3 MB/s
        clock.now = 100.0 + second
        done = 1_000_000 * (second if second <= 10 else 10 + 3 * (second - 10))
        speed, eta_s = meter(done, 100_000_000)
        if second == 10:
            assert speed == pytest.approx(1e6)
    assert speed == pytest.approx(3e6)
    assert eta_s == pytest.approx(20)


def test_speed_falls_to_nothing_where_nothing_arrives() -> None:
    clock = Clock()
    meter = Meter(clock)
    for second in range(25):
        clock.now = 100.0 + second
        speed, eta_s = meter(min(second, 10) * 1000, 50_000)
    assert (speed, eta_s) == (0.0, None)


def test_what_an_interrupt_keeps() -> None:
    assert Step("fetching").kept() == ""
    step = Step("fetching", files_done=2, files=11)
    assert step.kept() == "2 of 11 files are complete and kept"
    step = Step("fetching", files_done=2, files=11, restart_bytes=4_600_000_000)
    assert step.kept() == (
        "2 of 11 files are complete and kept; what was in flight (4.6 GB) starts again next time"
    )


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 kB"),
        (11, "11 bytes"),
        (1_500, "2 kB"),
        (93_000_000, "93 MB"),
        (16_912_000_000, "16.9 GB"),
    ],
)
def test_sizes_for_people(count: int, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (200, "3 min 20 s"), (7_500, "2 h 5 min")]
)
def test_durations_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_where_nothing_can_be_drawn_there_are_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("dflash_chat.progress.time.monotonic", clock)
    with Reporter() as reporter:
        for percent in range(101):
            clock.now += 1.1
            files = {"files_done": percent // 50, "files": 2}
            reporter.show(Step("fetching", percent * 10**7, 10**9, 1e7, 100 - percent, **files))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5] == "fetching (1 of 2 files): 50 % of 1.0 GB · 10.0 MB/s · 50 s left"


def test_json_lines_are_few_and_end_with_how_it_ended() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    for done in range(100):
        lines.show(Step("fetching", done, 1000, files_done=1, files=3, restart_bytes=done))
    lines.failed(DiskError("full", hint="free some"))
    told = [Step(**json.loads(line)) for line in out.getvalue().splitlines()]
    assert len(told) < 10
    assert told[-1] == Step(
        "failed", 99, 1000, files_done=1, files=3, restart_bytes=99, note="full",
        hint="free some", exit_code=EXIT_DISK,
    )  # fmt: skip


def test_the_pace_is_empty_while_it_is_unknown() -> None:
    assert pace(Step("fetching", 0, 10)) == ""
    assert pace(Step("fetching", 0, 10, 2_500_000.0)) == "2.5 MB/s"
