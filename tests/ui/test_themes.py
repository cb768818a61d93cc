"""Themes: all text can be read, as the Web Content Accessibility Guidelines ask, and what is chosen
is kept over a restart."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.color import Color
from textual.screen import ModalScreen
from textual.theme import BUILTIN_THEMES

from dflash_chat.config import Config
from dflash_chat.runtime.api import EngineOptions, SamplingParams
from dflash_chat.ui import app as app_module
from dflash_chat.ui import chosen
from dflash_chat.ui.app import ChatApp
from tests.ui.fake_client import FakeClient
from tests.ui.screenshots import scene
from tests.ui.test_chat_flow import Chat
from tests.ui.test_snapshots import contrast, rows

LEAST, LEAST_OF_A_TERMINAL = 4.5, 3.0  # the latter where it has colours of its own
HARDEST = ("solarized-dark", "atom-one-dark", "textual-light", "ansi-dark", "ansi-light")


def in_view(chat: Chat) -> Iterator[Segment]:
    """Text on the screen, or in the dialog that covers it."""
    screen = chat.app.screen
    part = screen.children[0].region if isinstance(screen, ModalScreen) else screen.region
    for row in rows(chat.app)[part.y : part.bottom]:
        _, inside, *_ = Segment.divide(row, [part.x, part.right])
        yield from (segment for segment in inside if re.search(r"\w", segment.text))


def readable(chat: Chat, segment: Segment) -> float:
    """The contrast of a piece of text."""
    app, style = chat.app, segment.style
    assert style is not None
    assert style.color is not None
    assert style.bgcolor is not None
    palette = app.ansi_theme_dark if app.current_theme.dark else app.ansi_theme_light
    text = Color(*style.color.get_truecolor(palette))
    ground = Color(*style.bgcolor.get_truecolor(palette, foreground=False))
    if style.dim:
        text = ground.blend(text, 0.66)  # so does Textual
    return contrast(text, ground)


@pytest.mark.parametrize(
    ("name", "themes"),
    [("turn", tuple(BUILTIN_THEMES)),
     *((name, HARDEST) for name in ("crash", "xray", "plan-tiny", "sessions"))],
)  # fmt: skip
async def test_all_text_can_be_read(name: str, themes: tuple[str, ...]) -> None:
    async with scene(name) as chat:
        for theme in themes:
            chat.app.theme = theme
            await chat.pilot.pause()
            ansi = BUILTIN_THEMES[theme].ansi
            least = LEAST_OF_A_TERMINAL if ansi else LEAST
            faint = {
                (theme, segment.text.strip(), round(found, 1))
                for segment in in_view(chat)
                if (found := readable(chat, segment)) < least
            }
            assert not faint


# ── what was chosen ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, own_folders: Path) -> Callable[[str], ChatApp]:
    """Starts the app as the command does, but for drawing it, where config.toml names a theme."""
    started: list[ChatApp] = []
    monkeypatch.setattr(app_module, "EngineClient", FakeClient)
    monkeypatch.setattr(ChatApp, "run", lambda app: started.append(app))
    monkeypatch.setattr(gc, "disable", lambda: None)

    def start(configured: str = "") -> ChatApp:
        config = Config(configured)
        app_module.run("", "", EngineOptions(), SamplingParams(), "", draft=True, config=config)
        return started[-1]

    return start


async def choose(app: ChatApp, theme: str) -> None:
    """/theme"""
    kept = chosen.file().exists()
    async with app.run_test() as pilot:
        assert chosen.file().exists() == kept  # a start is no choice
        before = app.theme
        await Chat(app, FakeClient(), pilot).type(f"/theme {theme}")
        assert app.theme == theme != before


async def test_a_theme_is_kept_until_the_config_file_names_another(
    start: Callable[[str], ChatApp],
) -> None:
    usual = start("").theme
    await choose(start(""), "nord")
    assert start("").theme == "nord"
    assert start("gruvbox").theme == "gruvbox"
    await choose(start("gruvbox"), "dracula")
    assert start("gruvbox").theme == "dracula"  # though the file names one, for it did so before
    assert start("textual-light").theme == "textual-light"
    assert start("").theme == usual


@pytest.mark.parametrize(
    "text", ["", "[]", '{"theme": "nord"}', '{"theme": "none such", "instead_of": ""}']
)
def test_a_choice_that_cannot_be_read_is_none(start: Callable[[str], ChatApp], text: str) -> None:
    chosen.file().parent.mkdir()
    chosen.file().write_text(text)

    assert start("dracula").theme == "dracula"
    assert start("").theme != "none such"


def test_where_nothing_can_be_written_a_theme_is_not_kept_and_nothing_fails(
    start: Callable[[str], ChatApp],
) -> None:
    chosen.file().parent.write_text("a file where the folder should be")
    chosen.keep("nord", "")

    assert start("").theme != "nord"
