"""What the screen costs the engine: `python -m tests.ui.engine_bench [gpu|cpu] [ROUNDS]`.

The same prompts in turns without a screen, as `bench` runs them, and in the real app in a pty, with
the real worker, protocol, tokenizer and store. "cpu" is the default pair. "gpu" keeps all of its
host work but for the tensors: steps end when those of a GPU would that is given one step ahead,
6.35 ms a step for 5 tokens, as Gemma-4-26B-A4B in bf16 takes on an H200.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from dflash_chat.runtime.api import (
    EngineOptions,
    Finished,
    Generate,
    Load,
    Message,
    Progress,
    SamplingParams,
    StepStats,
)
from tests.ui.pty_bench import in_pty, text_of

if TYPE_CHECKING:
    from dflash_chat.runtime.engine import Prefilled, Step
    from dflash_chat.runtime.session import Session

PAIR, MAX_TOKENS = "smollm2-135m", 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)  # both ways write the same
STEP_S, STEP_TOKENS, GPU_TOKENS = 6.35e-3, 5, 4000


def loaded(kind: str, progress: Callable[[Progress], None]) -> Session:
    """The default pair as a session; of kind "gpu" with an engine that only keeps time."""
    from dflash_chat import hub, pairs
    from dflash_chat.runtime.session import Session

    installed = hub.ensure(pairs.find(PAIR), "", lambda stage, done, total: None)
    session = Session.load(installed, EngineOptions(), progress)
    if kind == "gpu":
        ids = session.tokenizer.encode(text_of("mixed", 8 * GPU_TOKENS))[:GPU_TOKENS]
        session.engine.generate = lambda *_: timed(ids)  # type: ignore[method-assign]
    return session


def timed(ids: list[int]) -> Generator[Prefilled | Step, None, None]:
    """Steps of an engine whose device is always given one step ahead."""
    from dflash_chat.runtime.engine import Prefilled, Step

    yield Prefilled(0, 9, 9)
    yield Step((ids[0],), None)
    done = time.perf_counter() + STEP_S  # of the step that is running
    for at in range(1, len(ids), STEP_TOKENS):
        queued = max(done, time.perf_counter()) + STEP_S
        while time.perf_counter() < done:
            pass
        last = at + STEP_TOKENS >= len(ids)
        stats = StepStats(7, STEP_TOKENS - 1, STEP_TOKENS, 0.7, 5.3, 0.1, 0.05, at)
        yield Step(tuple(ids[at : at + STEP_TOKENS]), stats, "length" if last else "")
        done = queued


def prompts(kind: str) -> list[str]:
    """What is asked: of a clock, once."""
    from dflash_chat import bench

    return ["go"] if kind == "gpu" else bench.read_prompts(None)[1:7]


def alone(kind: str) -> None:
    """Answer without a screen; print tokens per second, one answer a line."""
    session = loaded(kind, lambda progress: None)
    for prompt in prompts(kind):
        request = Generate(1, (Message("user", prompt),), GREEDY, draft=True)
        *_, finished = session.generate(request, lambda: False)
        assert isinstance(finished, Finished)
        sys.stdout.write(f"{finished.timing.tok_s}\n")


def worker(kind: str) -> None:
    """The engine's process as the app starts it."""
    from dflash_chat.runtime import worker as real

    del sys.argv[1:3]
    real.main(lambda request, progress: loaded(kind, progress))


def inside(kind: str, report: str) -> None:
    """The app in its pty: ask, wait, write what the engine says of its speed."""
    from dflash_chat.keeper import Keeper
    from dflash_chat.runtime.client import EngineClient
    from dflash_chat.ui import pace
    from dflash_chat.ui.app import ChatApp
    from dflash_chat.ui.chat_screen import ChatScreen
    from dflash_chat.ui.prompt import Prompt

    client = EngineClient((sys.executable, "-u", "-m", __spec__.name, "--worker", kind))
    keeper = Keeper()
    screen = ChatScreen(client, Load(PAIR), GREEDY, keeper=keeper)
    app = ChatApp(client, screen, pace.give_way)
    speeds: list[float] = []

    async def drive() -> None:
        while screen.dialogue.info is None:
            await asyncio.sleep(0.1)
        for prompt in prompts(kind):
            screen.action_new_chat()
            screen.dialogue.last_finished = None
            screen.post_message(Prompt.Submitted(prompt))
            while screen.dialogue.last_finished is None:
                await asyncio.sleep(0.1)
            speeds.append(screen.dialogue.last_finished.timing.tok_s)
            await asyncio.sleep(0.5)
        Path(report).write_text("".join(f"{speed}\n" for speed in speeds))
        app.exit()

    tasks: list[asyncio.Task[None]] = []
    app.call_later(lambda: tasks.append(asyncio.create_task(drive())))
    app.run()
    keeper.close()


# ── outside ─────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: str) -> str:
    """Run this module in a pty with `arguments`; what it wrote there."""
    process, master = in_pty([sys.executable, "-m", __spec__.name, *arguments])
    written = b""
    while process.poll() is None:
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                break
            written += data
            if b"\x1b[?2026$p" in data:  # the app asks for synchronised updates: yes
                os.write(master, b"\x1b[?2026;2$y")
    if process.wait():
        raise SystemExit(written[-4000:].decode(errors="replace"))
    return written.decode(errors="replace")


def harmonic(lines: str) -> float:
    """Tokens per second of answers of one length."""
    speeds = [float(line) for line in lines.split()]
    return len(speeds) / sum(1 / speed for speed in speeds)


def main() -> None:
    """Both ways in turns; one line of figures per round and one for all."""
    match sys.argv[1:]:
        case ["--alone", kind]:
            return alone(kind)
        case ["--worker", kind, *_]:
            return worker(kind)
        case ["--inside", kind, report]:
            return inside(kind, report)
        case [kind, rounds]:
            pass
        case _:
            kind, rounds = (sys.argv[1:] or ["gpu"])[0], "3"
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DFLASH_CHAT_DATA"] = folder
        for _ in range(int(rounds)):
            without = harmonic(run("--alone", kind))
            run("--inside", kind, f"{folder}/speeds")
            with_screen = harmonic(Path(folder, "speeds").read_text())
            ratios.append(with_screen / without)
            figures = {"alone": without, "on_screen": with_screen, "ratio": ratios[-1]}
            sys.stdout.write(json.dumps({k: round(v, 3) for k, v in figures.items()}) + "\n")
    sys.stdout.write(f"{kind}: {sorted(ratios)[len(ratios) // 2]:.3f} of the speed alone\n")


if __name__ == "__main__":
    main()
