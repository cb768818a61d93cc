"""config.toml: what it may say, and that every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_chat import config
from dflash_chat.config import Config
from dflash_chat.errors import EXIT_USAGE, UsageError

DEFAULTS = {"panel": "f2", "help": "f1", "page_up": "pageup", "copy_turn": "y"}
THEMES = ("textual-dark", "textual-light", "ansi-dark")


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return config.load(path, DEFAULTS, THEMES)


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert config.load(tmp_path / "config.toml", DEFAULTS, THEMES) == Config()


def test_keys_and_theme_are_read(tmp_path: Path) -> None:
    text = 'theme = "ansi-dark"\n[keys]\npanel = "f5, alt+p"\nhelp = "?"\n'

    assert load(tmp_path, text) == Config("ansi-dark", {"panel": "f5,alt+p", "help": "?"})


def test_two_actions_may_swap_their_keys(tmp_path: Path) -> None:
    assert load(tmp_path, '[keys]\npanel = "f1"\nhelp = "f2"\n').keys["panel"] == "f1"


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("theme = ", "not valid TOML", ""),
        ('theme = "textual-ligth"', "no theme 'textual-ligth'", "textual-light"),
        ("theme = 3", "no theme 3", "known"),
        ('colour = "red"', "no setting 'colour'", "theme"),
        ('[keys]\npannel = "f5"', "no action 'pannel'", "did you mean panel"),
        ('[keys]\npanel = "f99"', "'f99' is not a key", "e.g. f5"),
        ("[keys]\npanel = 5", "5 is not a key", "e.g. f5"),
        ('[keys]\npanel = ""', "'' is not a key", "e.g. f5"),
        ('[keys]\npanel = "hyperspace+x"', "is not a key", "e.g. f5"),
        ('[keys]\npanel = "f1"', "f1 would be both help and panel", "another key"),
        ("keys = 3", "'keys' must be a table", "[keys]"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, text)

    assert words in refused.value.message
    assert "config.toml" in refused.value.message
    assert hint in refused.value.hint
    assert refused.value.exit_code == EXIT_USAGE
