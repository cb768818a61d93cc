"""Every built-in theme: all text can be read, as the Web Content Accessibility Guidelines ask."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from rich.segment import Segment
from textual.color import Color
from textual.screen import ModalScreen
from textual.theme import BUILTIN_THEMES

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
