"""NO_COLOR: no colour reaches the terminal, and every cue that had one has something else."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.widgets import OptionList

from dflash_chat.ui.prompt import Prompt
from tests.ui.pty_bench import in_pty
from tests.ui.screenshots import scene
from tests.ui.terminal import Terminal
from tests.ui.test_chat_flow import Chat
from tests.ui.test_snapshots import rows

STYLES = {0, 1, 2, 3, 4, 7, 9}  # SGR: none, bold, dim, italic, underline, reverse, strike


@pytest.fixture(autouse=True)
def no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def drawn(chat: Chat) -> list[Segment]:
    """All pieces of the screen; none has a colour."""
    segments = [segment for row in rows(chat.app) for segment in row]
    assert not [s for s in segments if s.style and (s.style.color or s.style.bgcolor)]
    return segments


def text_in(chat: Chat, style: str) -> str:
    """All text that is drawn "bold", "reverse" or "underline"."""
    return "".join(s.text for s in drawn(chat) if s.style and getattr(s.style, style))


def test_a_real_terminal_gets_no_colour_at_any_size(tmp_path: Path, own_folders: Path) -> None:
    command = [sys.executable, "-m", "tests.ui.scripted_chat", str(tmp_path / "log")]
    with Terminal(command, 100, 30) as terminal:
        terminal.wait_for("tok/s  answer")
        terminal.press("f3")
        terminal.wait_for("blocks · tau")
        terminal.press("f3")
        terminal.wait_for("SPEED")
        terminal.press("f1")
        terminal.wait_for("─ Help ─")
        terminal.press("f1")
        terminal.wait(lambda: "─ Help ─" not in terminal.text, "the chat to come back")
        for columns, line in ((59, "tok/s · "), (20, "Ask"), (110, "SPEED")):
            terminal.resize(columns, 20 if columns > 20 else 6)
            terminal.wait_for(line)
        terminal.press("escape")
        terminal.wait_for("● stopping")
        terminal.press("ctrl+q")
        assert terminal.end() == 0
    assert 1 in terminal.styles
    assert terminal.styles <= STYLES


def test_what_commands_print_on_a_terminal_has_no_order_in_it(own_folders: Path) -> None:
    code = (
        "from dflash_chat import cli\n"
        "for words in ('list', 'plan', 'plan qwen3-8b --vram 24G', 'show qwen3-8b', 'sessions',\n"
        "              '--help'):\n"
        "    try: print('exit code', cli.main(words.split()))\n"
        "    except SystemExit as end: print('exit code', end.code)\n"
    )
    process, master = in_pty([sys.executable, "-c", code])
    printed = b""
    with contextlib.suppress(OSError):  # the end
        while piece := os.read(master, 1 << 16):
            printed += piece
    os.close(master)
    assert process.wait() == 0
    assert printed.count(b"exit code 0") == 6, printed
    assert b"\x1b" not in printed


async def test_code_and_what_one_types_at_selects_and_drags_are_marked() -> None:
    async with scene("chat") as chat:
        prompt = chat.screen.query_one(Prompt)
        prompt.cursor_blink = False
        prompt.select_line(0)
        await chat.settle()
        assert prompt.text in text_in(chat, "reverse")
        assert "push" in text_in(chat, "bold"), "code in a sentence"
        grabs = [s for s in drawn(chat) if s.style and s.style.meta.get("@mouse.down") == "grab"]
        assert grabs, "the scroll bar can still be dragged"
        assert all(s.style and s.style.reverse for s in grabs if s.text == " ")


@pytest.mark.parametrize(("name", "row"), [("sessions", "Capital"), ("models-tiny", "llama-3.1")])
async def test_the_chosen_row_of_a_list_is_marked(name: str, row: str) -> None:
    async with scene(name) as chat:
        chat.app.screen.query_one(OptionList).focus()
        await chat.pilot.pause()
        assert row in text_in(chat, "underline")


async def test_the_turn_under_the_cursor_and_where_words_come_from_are_marked() -> None:
    async with scene("xray") as chat:
        assert text_in(chat, "reverse").count("▏") == 1, "the border of the block looked at"
        assert "▏~*~" in text_in(chat, "bold")
        text = "".join(segment.text for segment in drawn(chat))
        assert "~two~" in text
        assert "▸▏" in text
        await chat.pilot.press("escape")
        before = "".join(segment.text for segment in drawn(chat))
        await chat.pilot.press("alt+up")
        await chat.settle()
        text = "".join(segment.text for segment in drawn(chat))
        assert text.count("█") - before.count("█") > 10, "the bar beside the turn"


@pytest.mark.parametrize(("value", "colours"), [("1", False), ("", True)])
async def test_an_empty_no_color_asks_for_nothing_and_children_see_it(
    value: str, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", value)
    async with scene("loading") as chat:
        styles = [segment.style for row in rows(chat.app) for segment in row]
        assert any(style and style.color for style in styles) is colours
        assert os.environ["NO_COLOR"] == value
