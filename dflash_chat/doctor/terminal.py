"""What the terminal can show and tell: size, colours, characters, keys, clipboard.

The chat is drawn on stderr, so that is the stream looked at. The terminal itself is asked one
question, about its keyboard, and only if it is ours to ask.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Mapping
from dataclasses import dataclass

from dflash_chat.doctor.line import Line, ok, skipped, warn

LEAST_COLUMNS, LEAST_ROWS = 60, 16  # below, the chat has room for little more than its own frame
ANSWER_S = 0.5
_DUMB = ("", "dumb", "unknown")


@dataclass(frozen=True)
class Terminal:
    """What is known of the terminal on stderr.

    `kitty_keys` is None if the terminal could not be asked or did not answer. `tmux_clipboard` is
    tmux's option set-clipboard, "" outside of tmux.
    """

    columns: int
    rows: int
    encoding: str
    kitty_keys: bool | None = None
    tmux_clipboard: str = ""


def look(environ: Mapping[str, str], answer_s: float = ANSWER_S) -> Terminal | None:
    """The terminal on stderr, if it is one; `answer_s` is how long it may take to answer."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    columns, rows = os.get_terminal_size(sys.stderr.fileno())
    dumb = environ.get("TERM", "") in _DUMB
    return Terminal(
        columns=columns,
        rows=rows,
        encoding=sys.stderr.encoding or "",
        kitty_keys=None if dumb else ask_for_kitty_keys(answer_s),
        tmux_clipboard=_tmux_clipboard() if environ.get("TMUX") else "",
    )


def lines(environ: Mapping[str, str]) -> list[Line]:
    """How the chat will look and feel in the terminal that we are in, if we are."""
    terminal = look(environ)
    if terminal is None:
        return [skipped("terminal", "stderr is not a terminal; the chat would need one")]
    return judge(terminal, environ)


def judge(terminal: Terminal, environ: Mapping[str, str]) -> list[Line]:
    """The same for a terminal that was already looked at."""
    return [
        _type(terminal, environ),
        _colours(environ),
        _characters(terminal),
        _keys(terminal),
        _clipboard(terminal, environ),
    ]


def _type(terminal: Terminal, environ: Mapping[str, str]) -> Line:
    name = environ.get("TERM", "")
    text = f"{name or 'TERM is not set'}, {terminal.columns} × {terminal.rows}"
    if name in _DUMB:
        fix = "export TERM=xterm-256color, or what your terminal is"
        return warn("terminal", f"{text}: it says that it cannot move the cursor", fix)
    if not (terminal.columns and terminal.rows):
        fix = "stty columns 120 rows 40, or what it has"
        return warn("terminal", f"{name}: it does not tell its size", fix)
    if terminal.columns < LEAST_COLUMNS or terminal.rows < LEAST_ROWS:
        fix = f"make it {LEAST_COLUMNS} × {LEAST_ROWS} or larger"
        return warn("terminal", f"{text}: little room for the chat", fix)
    return ok("terminal", text)


def _colours(environ: Mapping[str, str]) -> Line:
    if environ.get("NO_COLOR"):
        return ok("colours", "none, as NO_COLOR asks")
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return ok("colours", "16 million")
    if re.search("256|direct|kitty|ghostty|alacritty", environ.get("TERM", "")):
        return ok("colours", "256; if it can do more: export COLORTERM=truecolor")
    fix = "export TERM=xterm-256color COLORTERM=truecolor, if the terminal can do that"
    return warn("colours", "16, and shades look alike", fix)


def _characters(terminal: Terminal) -> Line:
    if terminal.encoding.lower().replace("-", "") == "utf8":
        return ok("characters", "UTF-8")
    fix = "export LC_ALL=C.UTF-8 (or your language's, as locale -a lists them)"
    text = f"{terminal.encoding or 'an unknown encoding'}: most of the world's signs become ?"
    return warn("characters", text, fix)


def _keys(terminal: Terminal) -> Line:
    if terminal.kitty_keys:
        return ok("keyboard", "Kitty protocol: Shift+Enter is told from Enter")
    why = "did not say whether it knows" if terminal.kitty_keys is None else "does not know"
    return ok("keyboard", f"{why} the Kitty protocol: break lines with Ctrl+J")


def _clipboard(terminal: Terminal, environ: Mapping[str, str]) -> Line:
    if terminal.tmux_clipboard == "off":
        fix = "tmux set -s set-clipboard on, also in ~/.tmux.conf"
        return warn("clipboard", "tmux keeps copies to itself (set-clipboard off)", fix)
    if terminal.tmux_clipboard:
        return ok("clipboard", f"through tmux (set-clipboard {terminal.tmux_clipboard})")
    for program, display in (("wl-copy", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY")):
        if environ.get(display) and shutil.which(program):
            return ok("clipboard", f"OSC 52, and {program} is there")
    if environ.get("TERM", "").startswith("screen"):
        fix = "use tmux, or copy with the mouse while Shift is held"
        return warn("clipboard", "GNU screen does not pass OSC 52 on", fix)
    if environ.get("TERM_PROGRAM") == "Apple_Terminal":
        fix = "use another terminal (iTerm2, Ghostty, kitty), or copy with the mouse"
        return warn("clipboard", "Apple's Terminal does not know OSC 52", fix)
    return ok("clipboard", "OSC 52, which the terminal must allow")


# ── asking ──────────────────────────────────────────────────────────────────────────────────────


def ask_for_kitty_keys(limit_s: float) -> bool | None:
    """Ask the controlling terminal for its keyboard protocol; None if there is no answer.

    Every terminal answers the second question (what are you?), those with the protocol also the
    first, before it. Source: Kitty's "Comprehensive keyboard handling", detection of support.
    """
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if os.tcgetpgrp(fd) != os.getpgrp():  # in the background: asking would stop us
            return None
        before = termios.tcgetattr(fd)
        try:
            tty.setcbreak(fd)
            os.write(fd, b"\x1b[?u\x1b[c")
            answer = _read_answer(fd, limit_s)
        finally:
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
    except (OSError, termios.error):
        return None
    finally:
        os.close(fd)
    return re.search(rb"\x1b\[\?\d+u", answer) is not None if answer else None


def _read_answer(fd: int, limit_s: float) -> bytes:
    """What arrives up to the end of the second answer; b"" if that never comes."""
    answer = b""
    until = time.monotonic() + limit_s
    while (left := until - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
        chunk = os.read(fd, 256)
        if not chunk:
            break
        answer += chunk
        if re.search(rb"\x1b\[\?[\d;]*c", answer):
            return answer
    return b""


def _tmux_clipboard() -> str:
    """tmux's set-clipboard: on, external or off; "unknown" if tmux does not say."""
    try:
        done = subprocess.run(
            ("tmux", "show-options", "-sv", "set-clipboard"),
            capture_output=True,
            text=True,
            timeout=2,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
