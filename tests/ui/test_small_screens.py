"""Every screen where there is little room: nothing breaks, and what one types at is in view."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from textual.widgets import Input, OptionList

from dflash_chat.ui.key_bar import KeyBar
from dflash_chat.ui.menu import Menu
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.side_panel import SidePanel, StatusLine
from dflash_chat.ui.words import Words
from tests.ui.screenshots import scene
from tests.ui.test_chat_flow import Chat

SCREENS = ["xray", "compare", "help", "sessions", "plan-tiny", "models-tiny"]


def text(chat: Chat) -> str:
    """What is on the screen."""
    strips = chat.app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


async def resize(chat: Chat, size: tuple[int, int]) -> None:
    await chat.pilot.resize_terminal(*size)
    await chat.pilot.pause()


@pytest.mark.parametrize("name", SCREENS)
async def test_a_screen_lives_through_all_sizes(name: str) -> None:
    async with scene(name, (20, 6)) as chat:  # so small from the start on
        is_usable(chat)
        await resize(chat, (40, 12))
        is_usable(chat)
        for keys in chat.app.screen.query("KeyBar, #plan-keys, #models-keys, #session-keys"):
            assert isinstance(keys, KeyBar | Words)
            assert max(map(cell_len, str(keys.content).split("\n"))) <= keys.content_size.width
        await resize(chat, (3, 2))
        assert {cell_len(row) for row in text(chat).split("\n")} == {3}


def is_usable(chat: Chat) -> None:
    """Everything has its place, and where one types or chooses is in view."""
    screen, focused = chat.app.screen, chat.app.screen.focused
    assert screen.max_scroll_y == 0, "more than there is room for"
    if isinstance(focused, Input | OptionList):
        assert screen.region.contains_region(focused.region)
        assert focused.content_size.height >= 1


async def test_menu_prompt_and_palette_are_in_view_on_six_rows() -> None:
    async with scene("chat", (20, 6)) as chat:
        prompt = chat.screen.query_one(Prompt)
        prompt.put("/")
        await chat.settle()
        for _ in range(9):
            await chat.pilot.press("down")
            chosen = chat.screen.query_one(Menu).chosen
            assert f"› {chosen.text.strip()}" in text(chat)
        assert "▌ /" in text(chat)
        await chat.pilot.press("ctrl+p", "t", "h")
        while "Thoughts" not in text(chat):
            await chat.pilot.pause(0.05)
        assert "🔎 th" in text(chat)


async def test_a_long_message_leaves_room_for_the_chat() -> None:
    async with scene("chat", (60, 16)) as chat:
        chat.screen.query_one(Prompt).put("\n".join("abcdefghijklmnop"))
        await chat.settle()
        assert chat.screen.query_one("Transcript").size.height >= 4
        assert "│ p" in text(chat)


async def test_what_is_chosen_in_a_plan_is_in_view() -> None:
    async with scene("plan-tiny", (40, 12)) as chat:
        screen = chat.app.screen
        assert isinstance(screen, PlanScreen)
        await chat.pilot.press("up")
        await chat.settle()
        assert "› K " in text(chat)
        await chat.pilot.press("pagedown", "pagedown", "right")
        await chat.settle()
        assert "› K        ◂ 1 ▸" in text(chat)


async def test_the_panel_folds_to_a_line_and_then_the_footer_goes() -> None:
    async with scene("chat", (96, 24)) as chat:
        for width, shown in ((96, "SidePanel"), (95, "StatusLine"), (59, "StatusLine")):
            await resize(chat, (width, 24))
            chat.screen.show_numbers()
            await chat.pilot.pause()
            kinds = (SidePanel, StatusLine)
            assert [k.__name__ for k in kinds if chat.screen.query_one(k).display] == [shown]
            assert chat.screen.query_one(KeyBar).display == (width >= 60)
            assert "draft ON" in text(chat)


async def test_an_answer_goes_on_while_the_window_is_resized() -> None:
    async with scene("loading", (120, 40)) as chat:
        await chat.load()
        words = " ".join(f"word{n}" for n in range(300))
        spec = chat.client.stream(words)
        for size in [(20, 6), (96, 30), (59, 20), (3, 2), (80, 24)]:
            await resize(chat, size)
        chat.client.finish(spec)
        await chat.settle()
        assert "word299" in text(chat)
        assert chat.screen.query_one("Transcript").max_scroll_x == 0
