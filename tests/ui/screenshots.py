"""Pictures of the real app in scripted states: `python -m tests.ui.screenshots [FOLDER]`.

Writes an SVG each, and a PNG where `resvg-py` is installed (a tool for the documents, not a
dependency). The SVG names a web font; the PNG is drawn with DejaVu Sans Mono in its place.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from textual.widgets import OptionList

from dflash_chat import gpu
from dflash_chat.access import Access, State
from dflash_chat.gpu import Gpu, Survey
from dflash_chat.progress import Step
from dflash_chat.runtime.api import Load, StepStats, Tokens
from dflash_chat.ui import gate
from dflash_chat.ui.models_screen import ModelsScreen
from dflash_chat.ui.prompt import Prompt
from tests.ui.fake_client import INFO
from tests.ui.test_chat_flow import Chat, open_chat

FOLDER = Path(__file__).parents[2] / "screenshots"
FONT = "DejaVu Sans Mono"

CARD = Gpu(
    0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 << 30, 7 << 30, capability=(8, 9), driver="580.1",
    bandwidth_gb_s=1008,
)  # fmt: skip
QUESTION = "Write a ring buffer in Python, and say what it costs."
ANSWER = """\
A **ring buffer** keeps two indices into one list, so that *both ends* cost the same:

1. `push` writes at the tail and moves it on, wrapping at the end of the list, which is never
   copied and never grows
2. `pop` reads at the head

```python
class Ring:
    def __init__(self, size: int) -> None:
        self.items = [None] * size
        self.head = self.count = 0

    def push(self, item: object) -> None:
        # overwrites the oldest item once full
        self.items[(self.head + self.count) % len(self.items)] = item
        self.count = min(self.count + 1, len(self.items))
```

| operation | time | memory          |
|:----------|:----:|----------------:|
| `push`    | O(1) | none            |
| `pop`     | O(1) | none            |
"""
SHORT = "The capital of France is **Paris**, on the Seine."


async def chat(chat: Chat) -> None:
    """Two turns, the second still being written."""
    await chat.load()
    await chat.type("What is the capital of France?")
    chat.client.answer(SHORT, prompt=36)
    await chat.settle()
    await chat.type(QUESTION)
    chat.client.answer(ANSWER, cached=48, prompt=109)
    await chat.settle()
    chat.screen.query_one(Prompt).text = "and make it thread-safe"


async def crash(chat: Chat) -> None:
    """The engine was killed in the middle of an answer."""
    await chat.load()
    await chat.type(QUESTION)
    chat.client.stream("A **ring buffer** keeps two indices into one list, so that *both ends* co")
    await chat.settle()
    chat.client.die(
        "it was killed (SIGKILL); often that is the system running out of memory",
        [
            "INFO dflash_chat.runtime.session loaded smollm2-135m in 1.2 s",
            "INFO dflash_chat.runtime.session reading 61 tokens",
        ],
    )
    await chat.settle()


async def xray(pictured: Chat) -> None:
    """An answer by block and origin, a word to a token."""
    await pictured.load()
    await pictured.type(QUESTION)
    words = re.findall(r"\s*(?:\w+|[^\w\s]+)", ANSWER)
    pictured.client.emit(Tokens(1, words[0], 1))
    left, accepted = words[1:], itertools.cycle((3, 1, 6, 2, 0, 4, 7, 2, 5))
    while left:
        taken, left = left[: (n := next(accepted)) + 1], left[n + 1 :]
        stats = StepStats(7, n, len(taken), 2.4, 31.2, 0.6, 0.9, 300, "commits most per second")
        lengths = tuple(map(len, taken))
        pictured.client.emit(Tokens(1, "".join(taken), len(taken), stats, lengths))
    await pictured.settle()
    await pictured.pilot.press("f3", "home", "tab")


async def xray_light(pictured: Chat) -> None:
    """The same in a light theme."""
    pictured.app.theme = "textual-light"
    await xray(pictured)


async def menu(pictured: Chat) -> None:
    """A command is being typed."""
    await chat(pictured)
    prompt = pictured.screen.query_one(Prompt)
    prompt.put("/t")
    await pictured.settle()
    await pictured.pilot.press("down")


async def turn(pictured: Chat) -> None:
    """The cursor stands on a stopped answer that began with a thought."""
    await pictured.load()
    await pictured.type(QUESTION)
    spec = pictured.client.stream(
        "<think>\nTwo indices, or one and a count?\n</think>\n\n" + ANSWER
    )
    pictured.client.finish(spec, prompt=109, reason="cancelled")
    await pictured.settle()
    await pictured.pilot.press("alt+up")


async def compare(pictured: Chat) -> None:
    """The same prompt with and without drafting."""
    await pictured.load()
    await pictured.type(QUESTION)
    pictured.client.answer(SHORT)
    await pictured.settle()
    await pictured.pilot.press("f9")
    pictured.client.answer(ANSWER)
    await pictured.settle()
    pictured.client.finish(pictured.client.stream(ANSWER, draft=False))
    await pictured.settle()


async def plan(pictured: Chat) -> None:
    """What an 8B pair takes of a 24 GB card, with another context than the loaded one."""
    gpu.survey = lambda *_: Survey((CARD,))
    loaded = replace(
        INFO, pair="qwen3-8b", device=CARD.name, target_bytes=8_190_000_000,
        drafter_bytes=1_088_000_000, cache_bytes=5_030_000_000, other_bytes=1_350_000_000,
        context_tokens=32_768, plain_ms=12.4,
    )  # fmt: skip
    pictured.screen.dialogue.load = Load("qwen3-8b", "fp8")
    await pictured.load(loaded)
    await pictured.pilot.press("f4", "down", "down", *"24000")
    await pictured.pilot.pause(1)


async def plan_light(pictured: Chat) -> None:
    """The same in a light theme."""
    pictured.app.theme = "textual-light"
    await plan(pictured)


async def models(pictured: Chat) -> None:
    """All pairs on a 24 GB card; one is behind a gate, another is being fetched."""
    gpu.survey = lambda *_: Survey((CARD,))
    shut = Access(
        State.NOT_ACCEPTED,
        "meta-llama/Llama-3.1-8B-Instruct is behind a gate and its terms are not accepted yet",
        "accept the terms at https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct with the "
        "account of the token from /home/ada/.cache/huggingface/token, then try again",
    )

    async def answers(*_: object) -> list[Access]:
        return [shut]

    gate.ask = answers
    pull = pictured.screen.pull
    pull.pair = "gemma-4-26b-a4b"
    pull.step = Step("fetching", 11_960_000_000, 16_900_000_000, 84e6, 58.8, 5, 9, 1_200_000_000)
    await pictured.load()
    await pictured.pilot.press("f8")
    await pictured.pilot.pause(0.5)
    screen = pictured.app.screen
    assert isinstance(screen, ModelsScreen)
    names = [entry.name for entry in screen._listed]
    screen.query_one("#models-list", OptionList).highlighted = names.index("llama-3.1-8b")
    await pictured.pilot.pause(1)


async def models_light(pictured: Chat) -> None:
    """The same in a light theme."""
    pictured.app.theme = "textual-light"
    await models(pictured)


async def light(pictured: Chat) -> None:
    """The same chat in a light theme."""
    pictured.app.theme = "textual-light"
    await chat(pictured)


PICTURES: dict[str, tuple[tuple[int, int], Callable[[Chat], Awaitable[None]]]] = {
    "chat-wide": ((120, 40), chat),
    "chat": ((80, 24), chat),
    "narrow": ((60, 20), chat),
    "crash": ((120, 40), crash),
    "light": ((120, 40), light),
    "xray": ((80, 24), xray),
    "xray-light": ((120, 40), xray_light),
    "menu": ((80, 24), menu),
    "turn": ((80, 24), turn),
    "compare": ((120, 40), compare),
    "plan-wide": ((120, 40), plan),
    "plan": ((80, 24), plan),
    "plan-narrow": ((50, 20), plan),
    "plan-light": ((120, 40), plan_light),
    "models-wide": ((120, 40), models),
    "models": ((80, 24), models),
    "models-narrow": ((50, 20), models),
    "models-light": ((120, 40), models_light),
}


async def take(name: str, folder: Path) -> None:
    """Write one picture."""
    size, scene = PICTURES[name]
    async with open_chat(size) as chat:
        await scene(chat)
        await chat.settle()
        svg = chat.app.export_screenshot(title=f"dflash-chat {size[0]}×{size[1]}")
    (folder / f"{name}.svg").write_text(svg)
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        return
    png = resvg.svg_to_bytes(svg_string=svg.replace("Fira Code", FONT), font_family=FONT)
    (folder / f"{name}.png").write_bytes(bytes(png))


async def main(folder: Path) -> None:
    """Write all pictures."""
    for name in PICTURES:
        await take(name, folder)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
