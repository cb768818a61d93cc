"""`pull` and other commands of ours, run as processes beside the app.

A thread cannot be stopped and a process can; the token and the hub's client stay out of the app,
and what a person reads is what the command says. Knows no widgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable

from dflash_chat.errors import EXIT_OTHER
from dflash_chat.progress import Step, pace, size
from dflash_chat.ui.bars import bar

COMMAND = (sys.executable, "-m", "dflash_chat")
STOP_S = 10.0  # within which an interrupted pull has swept up
ENDS = ("done", "failed", "interrupted")


async def command(*arguments: str) -> tuple[int, str]:
    """Run one of our commands to its end: exit code, and all that it wrote."""
    process = await _start(*arguments)
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(errors="replace").strip()


async def _start(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )


class Pull:
    """One pull at a time. `pair` is what it fetches, "" while it fetches nothing; `step` is where
    it stands, or stood when it ended. `ended` is called with the last step.
    """

    def __init__(self, ended: Callable[[str, Step], None]) -> None:
        self.pair = ""
        self.step = Step("")
        self._ended = ended
        self._process: Process | None = None
        self._stopping = False

    async def fetch(self, pair: str, build: str = "") -> None:
        """Fetch a pair, or one build of it, to its end; nothing may be being fetched yet."""
        assert not self.pair, self.pair
        self.pair, self.step, self._stopping = pair, Step("starting"), False
        remark = ""
        try:
            process = self._process = await _start("pull", named(pair, build), "--json", "--yes")
            if self._stopping:
                process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            async for line in process.stdout:
                try:
                    self.step = Step(**json.loads(line))
                except (ValueError, TypeError):
                    remark = line.decode(errors="replace").strip() or remark
            code = await process.wait()
            if self.step.stage not in ENDS and self._stopping:
                self.step = Step("interrupted")
            elif self.step.stage not in ENDS:  # it could not even say why
                note = remark or f"the pull ended with exit code {code}"
                self.step = Step("failed", note=note, exit_code=code or EXIT_OTHER)
            self._process = None
        except asyncio.CancelledError:
            self.stop()  # the app ends; `close` waits for it
            raise
        finally:
            self.pair = ""
        self._ended(pair, self.step)

    def stop(self) -> None:
        """Interrupt it; complete files stay."""
        self._stopping = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    async def close(self) -> None:
        """Interrupt it and wait until it has swept up; then kill it."""
        process = self._process
        if process is None:
            return
        self.stop()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()

    def words(self, width: int = 10) -> str:
        """How far it is, in one line."""
        step = self.step
        if self._stopping:
            return "stopping …"
        if not step.total:
            return f"{step.stage} …"
        share = step.done / step.total
        return f"{bar(share, width)} {share:4.0%} {step.note or pace(step)}".rstrip()


def named(pair: str, build: str) -> str:
    """A pair, or one build of it, as our commands take them."""
    return f"{pair}@{build}" if build else pair


def end_words(pair: str, step: Step) -> str:
    """How a pull ended, and what of it stays."""
    if step.stage == "done":
        return f"{pair} is installed"
    if step.stage == "interrupted":
        return f"{pair}: stopped. {step.kept() or 'nothing was fetched'}"
    words = f"{pair}: {step.note or 'not fetched'}"
    return "\n".join(part for part in (words, step.hint, step.kept()) if part)


def safe_words(step: Step) -> str:
    """While it runs: what stopping now would keep, and what it would cost."""
    if not step.files:
        return ""
    words = f"{step.files_done} of {step.files} files done, safe to stop"
    if step.restart_bytes:
        words += f"; what is in flight ({size(step.restart_bytes)}) would start again"
    return words
