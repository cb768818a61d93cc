"""The plan screen: the planner's own words, changed by keys, beside what was measured."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from textual.widget import Widget

from dflash_chat import calibration, gpu, pairs, planner
from dflash_chat.calibration import Key
from dflash_chat.candidates import Plan, Wishes
from dflash_chat.gpu import Gpu, Survey
from dflash_chat.plan import as_json
from dflash_chat.reasons import gib
from dflash_chat.runtime.api import EngineOptions, Load
from dflash_chat.runtime.costs import CostTable
from dflash_chat.ui import clipboard, plan_page
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.words import flowing
from tests.ui.fake_client import INFO
from tests.ui.test_chat_flow import Chat, open_chat

GB = 1 << 30
CARD = Gpu(0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 * GB, 23 * GB, capability=(8, 9), driver="580")
ON_CARD = replace(INFO, pair="big", device=CARD.name, other_bytes=GB)
HELD = ON_CARD.target_bytes + ON_CARD.drafter_bytes + ON_CARD.cache_bytes + ON_CARD.other_bytes


@pytest.fixture
def big(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of an 8B pair; of its builds bf16 and fp8 lie in folders of this machine."""
    lines = ["[[pair]]", 'based_on = "qwen3-8b"', 'name = "big"']
    for build, bits in (("bf16", 16), ("fp8", 8)):
        (own_folders / build).mkdir()
        lines += [
            "[[pair.build]]", f'name = "{build}"', f'weights = "{build}"', f"bits = {bits}",
            f'format = "{"safetensors" if bits == 16 else "fp8"}"', 'kind = "folder"',
            f'path = "{own_folders / build}"', f"bytes = {bits * 1_000_000_000}",
        ]  # fmt: skip
    folder = own_folders / "drafter"
    folder.mkdir()
    lines += ["[pair.drafter]", 'kind = "folder"', f'path = "{folder}"', "block_size = 16"]
    config = dict(pairs.find("qwen3-8b").drafter.config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    path = own_folders / "config" / "dflash-chat" / "models.toml"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    monkeypatch.setattr(gpu, "survey", lambda: Survey((CARD,)))
    monkeypatch.setattr(clipboard, "ways", lambda environ: [])


@asynccontextmanager
async def opened(size: tuple[int, int] = (120, 40), on_card: bool = True) -> AsyncIterator[Chat]:
    """The chat with its plan over it."""
    async with open_chat(size) as chat:
        if on_card:
            chat.screen.dialogue.load = Load("big")
        await chat.load(ON_CARD if on_card else INFO)
        await chat.pilot.press("f4")
        await planned(chat)
        yield chat


def plan_screen(chat: Chat) -> PlanScreen:
    assert isinstance(chat.app.screen, PlanScreen)
    return chat.app.screen


async def until(chat: Chat, condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await chat.pilot.pause(0.01)
    assert condition()


async def planned(chat: Chat) -> PlanScreen:
    """The screen once its plan is made."""
    await until(chat, lambda: isinstance(chat.app.screen, PlanScreen))
    screen = plan_screen(chat)
    await until(chat, lambda: screen.settled)
    await chat.pilot.pause()
    return screen


async def press(chat: Chat, *keys: str) -> Plan:
    screen = plan_screen(chat)
    await chat.pilot.press(*keys)
    await planned(chat)
    assert screen.made is not None
    return screen.made


def text(widget: Widget) -> str:
    return "\n".join(s.text.rstrip() for s in widget.render_lines(widget.outer_size.region))


def shown(chat: Chat, part: str) -> str:
    return text(chat.app.screen.query_one(f"#plan-{part}"))


def expected(wishes: Wishes = Wishes()) -> Plan:
    """What `plan` says of the card without our engine."""
    card = replace(CARD, free=CARD.free + HELD)
    return planner.plan(pairs.find("big"), wishes, card, 0, calibration.read)


async def test_bar_legend_reasons_and_json_are_the_planners(big: None) -> None:
    async with opened() as chat:
        made = expected()
        bar, *legend = shown(chat, "memory").splitlines()
        cells = {letter: bar.count(letter) for letter in "WDCGR·"}

        assert cells["W"] > cells["C"] > cells["D"] > 0
        weights = made.budget.target + made.budget.screen
        assert cells["W"] / len(bar) == pytest.approx(weights / made.free, abs=0.02)
        assert f"W  weights {gib(weights)}" in " ".join(legend)
        assert f"{gib(made.spare)} spare" in " ".join(legend)
        reasons = " ".join(shown(chat, "why").split())
        for why in as_json(made)["why"]:
            assert " ".join(f"{why['choice']}: {why['because']}".split()) in reasons
            assert why["instead"] in reasons
        assert "RTX 4090" in shown(chat, "title")
        assert f"{gib(made.spare)} left: if they take more before it is loaded" in reasons
        await press(chat, "j")
        await until(chat, lambda: chat.app.clipboard)
        assert json.loads(chat.app.clipboard) == json.loads(json.dumps(as_json(made)))


async def test_every_choice_changes_with_the_arrows_and_shows_its_effect(big: None) -> None:
    async with opened() as chat:
        before = await press(chat, "r")
        smaller = await press(chat, "left")
        assert smaller.build.name == pairs.find("big").builds[-1].name
        assert (await press(chat, "right", "right")).build.name == "bf16"
        assert "◂ bf16 ▸" in shown(chat, "choices")
        await press(chat, "r")
        assert (await press(chat, "down", "right")).num_speculative_tokens == 1
        assert "you named it" in shown(chat, "why")
        assert (await press(chat, "down", "right")).context_tokens == 1024
        shrunk = await press(chat, "right")
        assert shrunk.context_tokens == 2048
        assert shrunk.budget.target_cache < before.budget.target_cache
        assert gib(shrunk.budget.total) in shown(chat, "figures")
        assert await press(chat, "up", "up", "r") == before


async def test_what_does_not_fit_says_so(big: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "survey", lambda: Survey((replace(CARD, free=12 * GB),)))
    async with opened() as chat:
        problem = " ".join(shown(chat, "problem").split())
        assert problem.startswith("✗ big@bf16 with a context of ")
        assert "a 24 GB card would take it" in problem
        assert "✗ does not fit" in shown(chat, "memory")
        await chat.pilot.press("a")
        assert isinstance(chat.app.screen, PlanScreen)


async def test_a_number_is_typed_for_the_context_or_the_width(big: None) -> None:
    async with opened() as chat:
        made = await press(chat, *"16000")
        assert made.context_tokens == 16_000
        assert "context  ◂ 16000▏" in shown(chat, "choices")
        assert (await press(chat, "backspace")).context_tokens == 1600
        assert (await press(chat, "up", "9")).num_speculative_tokens == 9
        await press(chat, "9")
        assert "! k 99 is more than this drafter proposes" in shown(chat, "problem")
        await chat.pilot.press("a")
        assert isinstance(chat.app.screen, PlanScreen)  # that cannot be loaded


async def test_it_is_loaded_as_planned_and_the_chat_goes_on(big: None) -> None:
    async with opened() as chat:
        await chat.pilot.press("escape")
        await chat.type("One?")
        chat.client.answer("First.")
        await chat.settle()
        await chat.pilot.press("f4")
        await planned(chat)
        await press(chat, "down", *"5", "down", *"8000")
        await chat.pilot.press("a")
        await until(chat, lambda: chat.client.starts == 2)
        await chat.settle()
        build = expected().build.name
        options = EngineOptions(context_tokens=8000, draft_tokens=5)

        assert chat.client.sent[-1] == Load("big", build, options)
        assert f"Loading big@{build}" in chat.text
        await chat.type("Two?")
        assert len(chat.client.asked) == 1  # it waits for the engine
        await chat.load(ON_CARD)
        assert [m.content for m in chat.client.asked[-1].messages] == ["One?", "First.", "Two?"]


async def test_what_was_measured_stands_beside_the_estimates(big: None) -> None:
    build = expected().build.name
    table = CostTable.even((1, 2, 4, 8))
    calibration.write(Key(CARD.name, CARD.driver, "big", build), "rig", table)
    async with opened() as chat:
        figures = " ".join(shown(chat, "figures").split())
        loaded = expected(Wishes(build, EngineOptions(context_tokens=ON_CARD.context_tokens)))

        weights = loaded.budget.target + loaded.budget.screen
        estimate, measured = gib(weights), gib(ON_CARD.target_bytes)
        assert f"{estimate} {measured}" in figures
        assert f"in all {gib(expected().budget.total)}" in figures
        assert f"{gib(HELD)}" in figures
        assert "passes estimated 1 row" in figures
        assert "passes measured 1 row" in figures
        assert "plain pass now 25.0 ms, measured at load at 1 024 tokens" in figures


async def test_a_cpu_has_a_plan_too(own_folders: Path) -> None:
    async with opened((80, 24), on_card=False) as chat:
        made = plan_screen(chat).made
        assert made is not None
        assert made.gpu is None
        assert "on the CPU" in shown(chat, "title")
        bar, *legend = shown(chat, "memory").splitlines()
        assert bar.startswith("WDC·")
        assert "W  weights 92 MiB" in legend[0]
        assert "the pair's own first choice" in shown(chat, "why")
        assert gib(INFO.cache_bytes) in shown(chat, "figures")
        assert "kB estimated, 3.7 kB measured" in shown(chat, "figures")
        assert (await press(chat, *"2000")).context_tokens == 2000
        assert "card would take" not in shown(chat, "why")


async def test_it_fits_a_small_screen(big: None) -> None:
    async with opened((50, 20)) as chat:
        for widget in chat.app.screen.query("#plan-page > *"):
            assert widget.region.width <= 50
        assert max(map(len, shown(chat, "why").splitlines())) <= 50
        page = chat.app.screen.query_one("#plan-page")
        await chat.pilot.press("pagedown")
        assert page.scroll_y > 0
        await chat.pilot.press("pageup")
        assert page.scroll_y == 0
        await chat.pilot.press("f4")
        assert not isinstance(chat.app.screen, PlanScreen)


def test_no_line_of_a_legend_breaks_inside_a_part() -> None:
    pieces = ["W weights 1 GiB", "C caches 2 GiB", "spare"]
    assert flowing(pieces, 80) == "W weights 1 GiB   C caches 2 GiB   spare"
    assert flowing(pieces, 30) == "W weights 1 GiB\nC caches 2 GiB   spare"
    assert flowing(pieces, 5) == "\n".join(pieces)


def test_cells_stand_for_what_is_free_or_for_what_would_be_needed() -> None:
    made = [plan_page.Part("W", "weights", 60), plan_page.Part("C", "caches", 15)]
    assert plan_page.cells(made, 100, 20) == [("W", 12), ("C", 3), ("·", 5)]
    assert plan_page.cells(made, 10_000, 20) == [("W", 1), ("C", 1), ("·", 18)]
    assert plan_page.cells(made, 50, 20) == [("W", 16), ("C", 4), ("·", 0)]
    assert plan_page.cells(made, 0, 20) == [("W", 16), ("C", 4), ("·", 0)]
