"""The screen under load, measured in a real pty: `python -m tests.ui.pty_bench [KIND[:RATE] …]`.

Streams ten seconds of tokens, four characters each and 600 a second unless RATE says otherwise, as
one long list, table, code fence or as prose, into the real app with a scripted engine, and prints
one line of figures per kind. `start` measures the first paint of `dflash-chat` instead, `reopen`
the first text of a chat of 200 turns, both from exec on.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATE, SECONDS, STEP_TOKENS = 600, 10, 3
ROWS, COLUMNS = 40, 120
TURNS, LAST_WORDS = 200, b"all-is-said"

# ── inside the pty ──────────────────────────────────────────────────────────────────────────────


def text_of(kind: str, length: int) -> str:
    """`length` characters of one kind of Markdown."""
    lines = {
        "list": "- item {n} of a list with **bold** words and `code`\n",
        "table": "| {n} | some cell | another **cell** |\n",
        "code": "    value_{n} = compute({n}, name='x')  # step {n}\n",
        "prose": "Sentence {n} of a paragraph with *some* words in it. ",
        "mixed": "## Part {n}\n\nWords about it.\n\n- one\n- two\n\n```py\nx = {n}\n```\n\n",
    }
    heads = {"table": "| a | b | c |\n|---|---|---|\n", "code": "```python\n"}
    text = heads.get(kind, "")
    number = 0
    while len(text) < length:
        text += lines[kind].format(n=number)
        number += 1
        if kind == "prose" and number % 8 == 0:
            text += "\n\n"
    return text[:length]


def inside(kind: str, rate: int, report: str) -> None:
    """Run the app and write the figures to the file `report`."""
    from dflash_chat.runtime.api import Load, Prefill, SamplingParams, Spec, StepStats, Tokens
    from dflash_chat.ui.answer import AnswerTurn
    from dflash_chat.ui.app import ChatApp
    from dflash_chat.ui.chat_screen import ChatScreen
    from dflash_chat.ui.prompt import Prompt
    from tests.ui.fake_client import FakeClient

    client = FakeClient()
    screen = ChatScreen(client, Load("smollm2-135m"), SamplingParams())
    app = ChatApp(client, screen)
    stalls: list[float] = []
    came: list[float] = []  # when each piece did
    waits: list[float] = []  # of the oldest piece that a frame brought to the screen

    async def watch() -> None:
        shown = 0
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.02)
            now = time.perf_counter()
            stalls.append(now - before - 0.02)
            answer = screen.query(AnswerTurn)
            drawn = len(answer[0].turn.content) - answer[0].undrawn if answer else 0
            if (pieces := drawn // (4 * STEP_TOKENS)) > shown:
                waits.append(now - came[shown])
                shown = pieces

    def pieces(text: str) -> Iterator[str]:
        width = 4 * STEP_TOKENS
        return (text[at : at + width] for at in range(0, len(text), width))

    async def drive() -> None:
        await asyncio.sleep(1.0)
        client.ready()
        await asyncio.sleep(0.3)
        screen.post_message(Prompt.Submitted("go"))
        while not client.asked:
            await asyncio.sleep(0.02)
        watcher = asyncio.create_task(watch())
        started, cpu_started = time.perf_counter(), time.process_time()
        client.emit(Prefill(1, 0, 9, 9))
        sent = 0
        for piece in pieces(text_of(kind, 4 * rate * SECONDS)):
            stats = StepStats(7, STEP_TOKENS - 1, STEP_TOKENS, 1.0, 3.4, 0.3, 0.3, sent)
            came.append(time.perf_counter())
            client.emit(Tokens(1, piece, STEP_TOKENS, stats))
            sent += STEP_TOKENS
            while (spare := started + sent / rate - time.perf_counter()) > 0:
                await asyncio.sleep(spare)
        client.finish(Spec(2000, 14000, 4000, (0, 0, 2000)))
        answer = screen.query_one(AnswerTurn)
        while answer.behind:
            await asyncio.sleep(0.01)
        took = time.perf_counter() - started
        stalls.sort()
        figures = {
            "should_s": SECONDS,
            "took_s": took,
            "cpu": (time.process_time() - cpu_started) / took,
            "stall_p99_ms": 1000 * stalls[int(len(stalls) * 0.99)],
            "stall_max_ms": 1000 * stalls[-1],
            "behind_max_s": max(waits),
            "widgets": len(screen.query("*")),
        }
        watcher.cancel()
        with open(report, "w") as file:
            json.dump(figures, file)
        app.exit()

    tasks: list[asyncio.Task[None]] = []

    def start() -> None:  # returns at once: what it returned, the app would wait for
        tasks.append(asyncio.create_task(drive()))

    app.call_later(start)
    app.run()


# ── outside ─────────────────────────────────────────────────────────────────────────────────────


def in_pty(
    command: list[str], rows: int = ROWS, columns: int = COLUMNS
) -> tuple[subprocess.Popen[bytes], int]:
    """Start `command` in a pty of its own."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    for size in ("COLUMNS", "LINES"):  # would be believed before the pty
        env.pop(size, None)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    return process, master


def bench(kind: str, rate: int) -> dict[str, Any]:
    """The figures of one kind."""
    report = f"/tmp/pty_bench.{os.getpid()}.json"
    arguments = ["tests.ui.pty_bench", "--inside", kind, str(rate), report]
    process, master = in_pty([sys.executable, "-m", *arguments])
    updates = size = 0
    while process.poll() is None:
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                break
            if b"\x1b[?2026$p" in data:  # the app asks for synchronised updates: yes
                os.write(master, b"\x1b[?2026;2$y")
            updates += data.count(b"\x1b[?2026h")
            size += len(data)
    process.wait()
    with open(report) as file:
        figures: dict[str, Any] = json.load(file)
    os.remove(report)
    return {**figures, "updates": updates, "kB_s": size / 1000 / figures["took_s"]}


def first_paint(command: list[str], mark: bytes = b"Enter") -> float:
    """Seconds from exec until the footer is on screen; quits the app then."""
    started = time.perf_counter()
    process, master = in_pty(command)
    seen = b""
    while mark not in seen:
        seen += os.read(master, 1 << 16)
    painted = time.perf_counter() - started
    time.sleep(0.5)
    os.write(master, b"\x11")
    while process.poll() is None:
        if select.select([master], [], [], 0.1)[0]:
            try:
                os.read(master, 1 << 16)
            except OSError:
                break
    process.wait()
    return painted


def reopened(saved: bool) -> list[str]:
    """What opens a saved chat of 200 turns of 2400 characters, if one is wanted."""
    from dflash_chat.chat import Conversation
    from dflash_chat.store import Store

    os.environ["DFLASH_CHAT_DATA"] = folder = tempfile.mkdtemp()
    if not saved:
        return []
    chat = Conversation()
    kinds = ("prose", "mixed", "code", "list", "table")
    for number in range(TURNS // 2):
        chat.ask(f"Question {number}")
        chat.answer(text_of(kinds[number % len(kinds)], 2400))
    chat.turns[-1].content += f"\n\n{LAST_WORDS.decode()}"
    with Store(Path(folder)) as store:
        store.save(chat)
    return ["--continue"]


def main() -> None:
    """Print the figures of the kinds named, or of all."""
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    for kind in sys.argv[1:] or ["prose", "mixed", "code", "list", "table"]:
        if kind in ("start", "reopen"):
            command = [sys.executable, "-m", "dflash_chat", *reopened(kind == "reopen")]
            mark = LAST_WORDS if kind == "reopen" else b"Enter"
            figures = {"first_paint_s": [round(first_paint(command, mark), 3) for _ in range(7)]}
        else:
            name, _, rate = kind.partition(":")
            figures = {k: round(v, 2) for k, v in bench(name, int(rate or RATE)).items()}
        sys.stdout.write(f"{kind:8} {json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
