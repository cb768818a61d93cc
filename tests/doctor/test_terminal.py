"""The terminal's lines; and the question to the terminal, asked of one that the test plays."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat.doctor import terminal
from dflash_chat.doctor.line import Line, State
from dflash_chat.doctor.terminal import Terminal

GOOD = Terminal(columns=120, rows=40, encoding="utf-8", kitty_keys=True)
ENVIRON = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def lines(shown: Terminal = GOOD, **environ: str) -> dict[str, Line]:
    return {line.check: line for line in terminal.judge(shown, ENVIRON | environ)}


def test_a_good_terminal() -> None:
    found = lines()
    assert {line.state for line in found.values()} == {State.OK}
    assert found["terminal"].text == "xterm-256color, 120 × 40"
    assert "Shift+Enter" in found["keyboard"].text


@pytest.mark.parametrize(
    ("check", "changes", "environ", "fix"),
    [
        ("terminal", {}, {"TERM": "dumb"}, "export TERM="),
        ("terminal", {}, {"TERM": ""}, "export TERM="),
        ("terminal", {"columns": 50}, {}, "60 × 16"),
        ("terminal", {"rows": 10}, {}, "60 × 16"),
        ("terminal", {"columns": 0, "rows": 0}, {}, "stty columns"),
        ("colours", {}, {"TERM": "xterm", "COLORTERM": ""}, "COLORTERM=truecolor"),
        ("characters", {"encoding": "ascii"}, {}, "LC_ALL=C.UTF-8"),
        ("characters", {"encoding": ""}, {}, "LC_ALL=C.UTF-8"),
        ("clipboard", {"tmux_clipboard": "off"}, {}, "set-clipboard on"),
        ("clipboard", {}, {"TERM": "screen.xterm"}, "tmux"),
        ("clipboard", {}, {"TERM_PROGRAM": "Apple_Terminal"}, "another terminal"),
    ],
)
def test_what_a_terminal_lacks_is_a_warning_with_its_fix(
    check: str, changes: dict[str, object], environ: dict[str, str], fix: str
) -> None:
    line = lines(replace(GOOD, **changes), **environ)[check]  # type: ignore[arg-type]
    assert line.state is State.WARN
    assert fix in line.fix


@pytest.mark.parametrize(
    ("check", "changes", "environ", "text"),
    [
        ("colours", {}, {"NO_COLOR": "1"}, "none, as NO_COLOR asks"),
        ("colours", {}, {"COLORTERM": ""}, "256"),
        ("keyboard", {"kitty_keys": False}, {}, "does not know the Kitty protocol"),
        ("keyboard", {"kitty_keys": None}, {}, "did not say"),
        ("clipboard", {"tmux_clipboard": "external"}, {"TERM": "tmux-256color"}, "through tmux"),
        ("clipboard", {}, {"DISPLAY": "", "WAYLAND_DISPLAY": ""}, "OSC 52"),
    ],
)
def test_what_is_merely_different_is_said(
    check: str, changes: dict[str, object], environ: dict[str, str], text: str
) -> None:
    line = lines(replace(GOOD, **changes), **environ)[check]  # type: ignore[arg-type]
    assert line.state is State.OK
    assert text in line.text


def test_a_clipboard_program_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "wl-copy"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "wl-copy" in lines(WAYLAND_DISPLAY="wayland-0")["clipboard"].text
    assert "wl-copy" not in lines(WAYLAND_DISPLAY="")["clipboard"].text


def test_without_a_terminal_nothing_is_judged() -> None:
    (line,) = terminal.lines(ENVIRON)  # pytest's stderr is a file
    assert (line.check, line.state) == ("terminal", State.SKIPPED)


# ── asking a terminal ───────────────────────────────────────────────────────────────────────────

CHILD = """
import fcntl, os, sys, termios
from dflash_chat.doctor import terminal
os.setsid()
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
before = termios.tcgetattr(2)
found = terminal.look({"TERM": sys.argv[1]}, float(sys.argv[2]))
assert termios.tcgetattr(2) == before, "the terminal was left changed"
print(found.kitty_keys, found.columns, found.rows)
"""


def asked(answer: bytes, term: str = "xterm") -> tuple[bytes, str]:
    """What a program in a terminal writes when it looks, and what it finds; `answer` is ours."""
    ours, its = pty.openpty()
    os.set_blocking(ours, False)
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    patience = "30" if answer.endswith(b"c") else "0.3"  # a busy machine answers late
    command = [sys.executable, "-c", CHILD, term, patience]
    child = subprocess.Popen(command, stdin=its, stderr=its, stdout=subprocess.PIPE, text=True)
    os.close(its)
    written = b""
    while child.poll() is None:
        if select.select([ours], [], [], 0.02)[0]:
            try:
                written += os.read(ours, 1024)
            except OSError:  # the last one closed it
                break
            if written.endswith(b"\x1b[c"):
                os.write(ours, answer)
    out = child.communicate(timeout=60)[0]
    os.close(ours)
    return written, out.strip()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"\x1b[?0u\x1b[?62;22c", "True"),
        (b"\x1b[?5u\x1b[?1;2c", "True"),
        (b"\x1b[?1;2c", "False"),
        (b"", "None"),
        (b"hello", "None"),
    ],
)
def test_the_terminal_is_asked_for_its_keyboard(answer: bytes, found: str) -> None:
    written, out = asked(answer)
    assert out == f"{found} 101 33"
    assert written == b"\x1b[?u\x1b[c"  # and nothing of the answer was echoed


def test_a_dumb_terminal_is_not_asked() -> None:
    assert asked(b"", term="dumb") == (b"", "None 101 33")


@pytest.fixture
def tmux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A tmux of our own, as its programs see it."""
    if not shutil.which("tmux"):
        pytest.skip("needs tmux")
    socket = tmp_path / "s"
    command = ["tmux", "-S", str(socket), "-f", os.devnull]
    subprocess.run([*command, "new-session", "-d", "sleep 60"], check=True, timeout=30)
    monkeypatch.setenv("TMUX", f"{socket},0,0")
    yield command
    subprocess.run([*command, "kill-server"], check=True, timeout=30)


def test_tmux_is_asked_for_its_clipboard(tmux: list[str]) -> None:
    for value in ("off", "external", "on"):
        subprocess.run([*tmux, "set", "-s", "set-clipboard", value], check=True, timeout=30)
        assert terminal._tmux_clipboard() == value


def test_a_tmux_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert terminal._tmux_clipboard() == "unknown"
