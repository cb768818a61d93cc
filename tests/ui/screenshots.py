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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from pytest import MonkeyPatch  # noqa: PT013
from textual.widgets import OptionList, Static

from dflash_chat import gpu
from dflash_chat.access import Access, State
from dflash_chat.chat import Conversation
from dflash_chat.entries import HubSource
from dflash_chat.gpu import Gpu, Survey
from dflash_chat.keeper import Keeper
from dflash_chat.progress import Step
from dflash_chat.runtime.api import Load, Progress, SamplingParams, StepStats, Tokens
from dflash_chat.runtime.client import EngineClient
from dflash_chat.settings import DEFAULT_PAIR
from dflash_chat.ui import gate, models_table
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.app import ChatApp
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.models_screen import ModelsScreen
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.xray import XrayScreen
from tests.saved import branched
from tests.ui.fake_client import INFO
from tests.ui.test_chat_flow import Chat, open_chat

FOLDER = Path(__file__).parents[2] / "screenshots"
FONT = "DejaVu Sans Mono"

CARD = Gpu(
    0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 << 30, 7 << 30, capability=(8, 9), driver="580.1",
    bandwidth_gb_s=1008,
)  # fmt: skip
QUESTION = "Write a ring buffer in Python, and say what it costs."
REAL_QUESTION = "Write a Python function that returns the n-th Fibonacci number."
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
    assert isinstance(pictured.app.screen, XrayScreen)
    pictured.app.screen.show_news()


async def xray_light(pictured: Chat) -> None:
    """The same in a light theme."""
    pictured.app.theme = "textual-light"
    await xray(pictured)


async def loading(pictured: Chat) -> None:
    """A message waits while the weights come."""
    pictured.client.emit(Progress("reading weights", 31_000_000, 93_000_000))
    await pictured.type("Are you there?")


async def help_(pictured: Chat) -> None:
    """Keys and commands over the chat."""
    await chat(pictured)
    await pictured.pilot.press("f1")


async def sessions(pictured: Chat) -> None:
    """Saved chats, one of them found by its words."""
    await pictured.load()
    keeper = pictured.screen.dialogue.record.keeper
    assert keeper is not None
    with keeper.store() as store:
        for question, said in (("Write a ring buffer.", ANSWER), ("Capital of France?", SHORT)):
            talk = Conversation(pair="smollm2-135m")
            talk.ask(question)
            talk.answer(said)
            store.save(talk, talk.turns)
    await pictured.pilot.press("ctrl+o", "slash", *"seine")


async def reopened(pictured: Chat) -> None:
    """A saved chat with branches, after a restart."""
    await pictured.load()
    pictured.screen.dialogue.open(branched())
    await pictured.settle()


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
    verdict = pictured.app.screen.query_one("#verdict", Static)
    while "identical" not in str(verdict.content):
        await pictured.settle()


async def until(pictured: Chat, condition: Callable[[], object]) -> None:
    while not condition():
        await pictured.pilot.pause(0.05)


async def plan(pictured: Chat) -> None:
    """What an 8B pair takes of a 24 GB card, with another context than the loaded one."""
    loaded = replace(
        INFO, pair="qwen3-8b", device=CARD.name, target_bytes=8_190_000_000,
        drafter_bytes=1_088_000_000, cache_bytes=5_030_000_000, other_bytes=1_350_000_000,
        context_tokens=32_768, plain_ms=12.4,
    )  # fmt: skip
    pictured.screen.dialogue.load = Load("qwen3-8b", "fp8")
    await pictured.load(loaded)
    await pictured.pilot.press("f4")
    await until(pictured, lambda: isinstance(pictured.app.screen, PlanScreen))
    screen = pictured.app.screen
    assert isinstance(screen, PlanScreen)
    await until(pictured, lambda: screen.settled)
    await pictured.pilot.press("down", "down", *"24000")
    await until(pictured, lambda: screen.settled)


async def plan_light(pictured: Chat) -> None:
    """The same in a light theme."""
    pictured.app.theme = "textual-light"
    await plan(pictured)


async def models(pictured: Chat) -> None:
    """All pairs on a 24 GB card; one is behind a gate, another is being fetched."""
    pull = pictured.screen.pull
    pull.pair = "gemma-4-26b-a4b"
    pull.step = Step("fetching", 11_960_000_000, 16_900_000_000, 84e6, 58.8, 5, 9, 1_200_000_000)
    await pictured.load()
    await pictured.pilot.press("f8")
    await until(pictured, lambda: isinstance(pictured.app.screen, ModelsScreen))
    screen = pictured.app.screen
    assert isinstance(screen, ModelsScreen)
    await until(pictured, lambda: screen.chosen)
    names = [entry.name for entry in screen._listed]
    screen.query_one("#models-list", OptionList).highlighted = names.index("llama-3.1-8b")
    words = screen.query_one("#models-words", Static)
    await until(pictured, lambda: "every 5 s" in str(words.content))


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
    "tiny": ((50, 20), chat),
    "loading": ((80, 24), loading),
    "help": ((120, 40), help_),
    "sessions": ((80, 24), sessions),
    "reopened": ((80, 24), reopened),
    "menu": ((80, 24), menu),
    "turn": ((80, 24), turn),
    "compare": ((120, 40), compare),
    "plan-wide": ((120, 40), plan),
    "plan-light": ((80, 24), plan_light),
    "plan-tiny": ((50, 20), plan),
    "models-wide": ((120, 40), models),
    "models-light": ((80, 24), models_light),
    "models-tiny": ((50, 20), models),
}


def _on_a_machine(folder: Path, patch: MonkeyPatch) -> None:
    """One with a 24 GB card and nothing installed, to which the hub does not give Llama yet."""
    page = "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct"
    shut = Access(
        State.NOT_ACCEPTED,
        "meta-llama/Llama-3.1-8B-Instruct is behind a gate and its terms are not accepted yet",
        f"accept the terms at {page} with the account of the token from HF_TOKEN, then try again",
        page,
    )

    async def answer(asked: list[HubSource]) -> list[Access]:
        return [shut] if any("Llama-3.1" in source.repo for source in asked) else []

    for name in ("DFLASH_CHAT_CACHE", "XDG_CONFIG_HOME", "HF_HOME"):
        patch.setenv(name, str(folder))
    patch.setattr(gpu, "survey", lambda: Survey((CARD,)))
    patch.setattr(gate, "ask", answer)
    patch.setattr(models_table, "disk_words", lambda: "611 GB of disk free")


@asynccontextmanager
async def scene(name: str, size: tuple[int, int] = (0, 0)) -> AsyncIterator[Chat]:
    """The app in the state of one picture, at its size or another; what it saves is gone
    afterwards."""
    pictured, play = PICTURES[name]
    with TemporaryDirectory() as folder, MonkeyPatch.context() as patch:
        _on_a_machine(Path(folder), patch)
        keeper = Keeper(Path(folder))
        async with open_chat(size if any(size) else pictured, keeper=keeper) as chat:
            await play(chat)
            await chat.settle()
            yield chat
        keeper.close()


async def take(name: str, folder: Path) -> None:
    """Write one picture."""
    width, height = PICTURES[name][0]
    async with scene(name) as chat:
        draw(chat.app, folder / f"{name}.svg", f"dflash-chat {width}×{height}")


async def take_real(folder: Path) -> None:
    """Write the picture of the default pair really answering, with this machine's figures."""
    client = EngineClient()
    screen = ChatScreen(client, Load(DEFAULT_PAIR), SamplingParams(max_tokens=300))
    app = ChatApp(client, screen)
    async with app.run_test(size=(120, 40)) as pilot:
        screen.post_message(Prompt.Submitted(REAL_QUESTION, REAL_QUESTION))
        while screen.dialogue.last_finished is None or screen.query_one(AnswerTurn).behind:
            await pilot.pause(0.1)
        screen.show_numbers()
        await pilot.pause()
        draw(app, folder / "real.svg", f"{DEFAULT_PAIR}, really")


def draw(app: ChatApp, file: Path, title: str) -> None:
    """Write what is on the screen."""
    svg = app.export_screenshot(title=title)
    file.write_text(svg)
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        return
    png = resvg.svg_to_bytes(svg_string=svg.replace("Fira Code", FONT), font_family=FONT)
    file.with_suffix(".png").write_bytes(bytes(png))


async def main(folder: Path) -> None:
    """Write all pictures."""
    for name in PICTURES:
        await take(name, folder)
    await take_real(folder)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
