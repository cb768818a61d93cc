"""What the screen looks like in each pictured state, cell by cell, and that all of it can be read.

`pytest tests/ui/test_snapshots.py --update-snapshots` writes the files anew. Colours are compared
by which cells share one, not by their values, so that a theme may be tuned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace

import pytest
from rich.color import Color as RichColor
from rich.segment import Segment
from textual.app import App
from textual.color import Color
from textual.screen import ModalScreen

from dflash_chat.ui import chat_screen, dialogue, pace
from tests.ui.screenshots import PICTURES, scene

FOLDER = Path(__file__).with_name("snapshots")
ATTRIBUTES = ("bold", "italic", "underline", "reverse", "strike")
FAINTEST = 2.5  # contrast of dimmed words; text that has to be read has far more


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still, and every terminal scrolls by the line."""
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(dialogue, "time", clock)
    monkeypatch.setattr(chat_screen, "time", clock)
    monkeypatch.setattr(pace, "SCROLL_ROWS", 1)


def rows(app: App[None]) -> list[list[Segment]]:
    """What is on the screen, from top to bottom."""
    return [list(strip) for strip in app.screen._compositor.render_strips()]


def look(drawn: list[list[Segment]]) -> str:
    """The text, then for each row its runs of one style and their cells, then the styles."""
    styles: dict[tuple[object, ...], str] = {}
    text, runs = [], []
    for row in drawn:
        text.append("".join(segment.text for segment in row).rstrip())
        cells: list[tuple[str, int]] = []
        for segment in row:
            style = segment.style
            assert style is not None, segment
            kinds = tuple(name for name in ATTRIBUTES if getattr(style, name))
            letter = styles.setdefault(
                (style.color, style.bgcolor, *kinds), ascii_letters[len(styles)]
            )
            before = cells.pop()[1] if cells and cells[-1][0] == letter else 0
            cells.append((letter, before + segment.cell_length))
        runs.append(" ".join(f"{letter}{n}" for letter, n in cells))
    legend = [" ".join([letter, *map(str, key[2:])]) for key, letter in styles.items()]
    shown = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "YYYY-MM-DD hh:mm", "\n".join(text))
    return "\n".join([shown, "── styles", *runs, "── of which", *legend, ""])


def contrasts(drawn: list[list[Segment]]) -> Iterator[tuple[float, str]]:
    """How well each piece of text stands out from what is behind it, 1 to 21."""
    for row in drawn:
        for segment in row:
            style = segment.style
            if style is None or not re.search(r"\w", segment.text):
                continue
            yield contrast(colour(style.color), colour(style.bgcolor)), segment.text


def colour(color: RichColor | None) -> Color:
    assert color is not None
    return Color.from_rich_color(color)


def contrast(one: Color, other: Color) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: Color) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color.normalized]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", PICTURES)
async def test_the_screen_looks_as_it_did(name: str, request: pytest.FixtureRequest) -> None:
    width, height = PICTURES[name][0]
    async with scene(name) as chat:
        drawn = rows(chat.app)
        covered = isinstance(chat.app.screen, ModalScreen)  # then the chat is dimmed on purpose
    assert len(drawn) == height
    assert {sum(segment.cell_length for segment in row) for row in drawn} == {width}
    assert covered or not [found for found in contrasts(drawn) if found[0] < FAINTEST]
    file = FOLDER / f"{name}.txt"
    if request.config.getoption("--update-snapshots"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(look(drawn), encoding="utf-8")
    assert look(drawn) == file.read_text(encoding="utf-8")


def test_no_snapshot_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(PICTURES)
