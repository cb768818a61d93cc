"""What the screen costs the engine: `python -m tests.ui.engine_bench [gpu|cpu] [ROUNDS]`.

The same prompts in turns without a screen, as `bench` runs them, and in the real app in a pty, with
the real worker, protocol, tokenizer and store; both are loaded all the while, and one of them
waits. "cpu" is the default pair, three tokens drafted for every pass, so that both ways do the
same. "gpu" keeps all of its host work but for the tensors: steps end when those of a GPU would that
is given one step ahead, 6.35 ms a step for 5 tokens, as Gemma-4-26B-A4B in bf16 takes on an H200.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from subprocess import PIPE
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

PAIR, MAX_TOKENS, DRAFT_TOKENS = "smollm2-135m", 256, 3
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
    """Answer without a screen, a prompt for every line of stdin; print tokens per second."""
    session = loaded(kind, lambda progress: None)
    sys.stdout.write("ready\n")
    for prompt, _ in zip(itertools.cycle(prompts(kind)), sys.stdin, strict=False):
        messages = (Message("user", prompt),)
        request = Generate(1, messages, GREEDY, draft=True, draft_tokens=DRAFT_TOKENS)
        *_, finished = session.generate(request, lambda: False)
        assert isinstance(finished, Finished)
        sys.stdout.write(f"{finished.timing.tok_s}\n")
        sys.stdout.flush()


def worker(kind: str) -> None:
    """The engine's process as the app starts it."""
    from dflash_chat.runtime import worker as real

    del sys.argv[1:3]
    real.main(lambda request, progress: loaded(kind, progress))


def inside(kind: str, folder: str) -> None:
    """The app in its pty: a prompt for every file "ask N"; the file "told N" has its speed."""
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

    async def drive() -> None:
        dialogue = screen.dialogue
        while dialogue.info is None:
            await asyncio.sleep(0.1)
        dialogue.draft_tokens = DRAFT_TOKENS
        for number, prompt in enumerate(itertools.cycle(prompts(kind))):
            while not Path(folder, f"ask {number}").exists():
                await asyncio.sleep(0.1)
            screen.action_new_chat()
            dialogue.last_finished = None
            screen.post_message(Prompt.Submitted(prompt))
            while dialogue.last_finished is None:
                await asyncio.sleep(0.1)
            Path(folder, f"told {number}").write_text(f"{dialogue.last_finished.timing.tok_s}")

    tasks: list[asyncio.Task[None]] = []
    app.call_later(lambda: tasks.append(asyncio.create_task(drive())))
    app.run()
    keeper.close()


# ── outside ─────────────────────────────────────────────────────────────────────────────────────


def on_screen(folder: Path, number: int, master: int) -> float:
    """Tokens per second of the app's answer to prompt `number`; what it draws is thrown away."""
    told = folder / f"told {number}"
    (folder / f"ask {number}").touch()
    while not told.exists() or not told.read_text():
        if select.select([master], [], [], 0.1)[0]:
            data = os.read(master, 1 << 16)
            if b"\x1b[?2026$p" in data:  # the app asks for synchronised updates: yes
                os.write(master, b"\x1b[?2026;2$y")
    return float(told.read_text())


def compare(kind: str, rounds: int, folder: Path) -> None:
    """Every prompt both ways, the order of ways in turns; a line for each, and the sum of times."""
    os.environ["DFLASH_CHAT_DATA"] = str(folder)
    me = [sys.executable, "-m", __spec__.name]
    with subprocess.Popen([*me, "--alone", kind], stdin=PIPE, stdout=PIPE, text=True) as without:
        assert without.stdin is not None
        assert without.stdout is not None
        without.stdout.readline()
        app, master = in_pty([*me, "--inside", kind, str(folder)])
        spent = {"alone": 0.0, "on screen": 0.0}  # seconds per token
        for number in range(1 + rounds * len(prompts(kind))):
            speeds = {}
            for way in ("alone", "on screen") if number % 2 else ("on screen", "alone"):
                if way == "alone":
                    without.stdin.write("\n")
                    without.stdin.flush()
                    speeds[way] = float(without.stdout.readline())
                else:
                    speeds[way] = on_screen(folder, number, master)
                    time.sleep(1.0)  # until all of it is drawn and put in order
            if number:  # the first warms up
                for way, speed in speeds.items():
                    spent[way] += 1 / speed
                sys.stdout.write(" ".join(f"{w} {s:.1f}" for w, s in speeds.items()) + " tok/s\n")
        without.stdin.close()
        app.kill()
        app.wait()
    ratio = spent["alone"] / spent["on screen"]
    sys.stdout.write(f"{kind}: {ratio:.3f} of the speed alone\n")


def main() -> None:
    """Both ways of a kind, or one of the processes that takes."""
    match sys.argv[1:]:
        case ["--alone", kind]:
            alone(kind)
        case ["--worker", kind, *_]:
            worker(kind)
        case ["--inside", kind, folder]:
            inside(kind, folder)
        case words:
            kind, rounds = [*words, *("gpu", "3")[len(words) :]][:2]
            with tempfile.TemporaryDirectory() as folder:
                compare(kind, int(rounds), Path(folder))


if __name__ == "__main__":
    main()
