"""The panel in the running app: shown, hidden, folded, watching a card."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Tooltip

import dflash_chat
from dflash_chat.gpu import Sample, Sampler
from dflash_chat.runtime.api import Prefill
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.sections import SECTIONS
from dflash_chat.ui.side_panel import SidePanel
from dflash_chat.ui.words import Words
from tests.ui.fake_client import INFO
from tests.ui.test_chat_flow import open_chat

CARD = replace(INFO, device="NVIDIA H200")
SAMPLE = Sample(58_100_000_000, 140_000_000_000, 97, 327.4, 700.0, 1980, 64, "")


class Card:
    """A sampler whose card draws one watt more each time it is looked at; `gone` loses it."""

    def __init__(self, available: bool = True) -> None:
        self.available, self.looked, self.closed, self.gone = available, 0, False, False

    def sample(self) -> Sample | None:
        self.looked += 1
        return None if self.gone else replace(SAMPLE, power_w=300.0 + self.looked)

    def close(self) -> None:
        self.closed = True


class Panel(App[None]):
    CSS_PATH = Path(dflash_chat.__file__).with_name("ui") / "app.tcss"

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def compose(self) -> ComposeResult:
        yield SidePanel(lambda: cast(Sampler, self.card))


@asynccontextmanager
async def panel_of(
    card: Card, monkeypatch: pytest.MonkeyPatch, rows: int = 40
) -> AsyncIterator[tuple[SidePanel, Pilot[None]]]:
    monkeypatch.setattr("dflash_chat.ui.side_panel.GPU_PERIOD_S", 0.02)
    app = Panel(card)
    async with app.run_test(size=(30, rows), tooltips=True) as pilot:
        yield app.query_one(SidePanel), pilot


async def looked(card: Card, pilot: Pilot[None], times: int) -> None:
    for _ in range(200):
        if card.looked >= times:
            return
        await pilot.pause(0.02)
    raise AssertionError(f"looked {card.looked} times")


def shown(panel: SidePanel, name: str) -> str:
    words = panel.query_one(f"#{name}", Words)
    return str(words.content) if words.display else ""


async def test_the_card_is_looked_at_again_and_again_and_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card()
    async with panel_of(card, monkeypatch) as (panel, pilot):
        await looked(card, pilot, 2)
        panel.show_numbers(Meter(), CARD, True, 0.0)
        assert "58.1 of 140.0 GB · 97%" in shown(panel, "gpu")
        before = card.looked
        await looked(card, pilot, before + 2)
        panel.show_numbers(Meter(), CARD, True, 0.0)
        assert "GHz · 64 °C" in shown(panel, "gpu")
        card.gone = True
        await looked(card, pilot, card.looked + 2)
        panel.show_numbers(Meter(), CARD, True, 0.0)
        assert shown(panel, "gpu") == ""
    assert card.closed


async def test_a_pair_on_the_cpu_hides_the_card_and_no_card_hides_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card()
    async with panel_of(card, monkeypatch) as (panel, pilot):
        await looked(card, pilot, 1)
        panel.show_numbers(Meter(), replace(INFO, device="CPU"), True, 0.0)
        assert shown(panel, "gpu") == ""
    none = Card(available=False)
    async with panel_of(none, monkeypatch) as (panel, pilot):
        await pilot.pause(0.2)
        panel.show_numbers(Meter(), CARD, True, 0.0)
        assert shown(panel, "gpu") == ""
    assert none.looked == 0


@pytest.mark.parametrize("rows", [20, 24, 30, 40, 60])
async def test_everything_fits_the_screen(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    async with panel_of(card, monkeypatch, rows) as (panel, pilot):
        await looked(card, pilot, 1)
        meter = Meter()
        meter.read(Prefill(1, 40, 61, 61))
        panel.show_numbers(meter, CARD, True, 0.0)
        await pilot.pause()
        assert panel.max_scroll_y == 0
        assert "draft ON k≤7" in shown(panel, "engine")


async def test_the_mouse_over_a_section_brings_up_what_its_numbers_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with panel_of(Card(False), monkeypatch) as (panel, pilot):
        panel.show_numbers(Meter(), INFO, True, 0.0)
        await pilot.pause()
        for name in SECTIONS:
            assert str(panel.query_one(f"#{name}").tooltip)
        await pilot.hover("#acceptance")
        await pilot.pause(0.5)
        tooltip = pilot.app.screen.get_child_by_type(Tooltip)
        assert tooltip.display
        assert "acceptance length: committed ÷ verify passes" in str(tooltip.visual)


async def test_f2_hides_the_panel_and_brings_it_back_with_todays_numbers() -> None:
    async with open_chat() as chat:
        await chat.load()
        panel = chat.screen.query_one(SidePanel)
        await chat.pilot.press("f2")
        assert not panel.display
        await chat.type("Hello?")
        chat.client.answer("The capital of France is Paris, on the Seine.", cached=12, prompt=73)
        await chat.settle()
        await chat.pilot.press("f2")
        await chat.settle()
        assert panel.display
        assert "cached 12 · read 61" in chat.shown("#prompt")
        assert "× plain, 40 tok/s" in chat.shown("#speed")
