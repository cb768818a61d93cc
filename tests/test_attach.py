"""Files in a message: which words name them, what is refused, and how they go along."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dflash_chat import attach
from dflash_chat.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    (tmp_path / "my notes.md").write_text("```sh\nls\n```")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.py").write_text("pass")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zero").write_bytes(b"a\0b")
    (tmp_path / "large").write_bytes(b"x" * (attach.LIMIT_BYTES + 1))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see @notes.txt", ["notes.txt"]),
        ("@notes.txt, please (@sub/deep.py).", ["notes.txt"]),
        ('compare @"my notes.md" with @notes.txt.', ["my notes.md", "notes.txt"]),
        ("@notes.txt and @notes.txt", ["notes.txt"]),
        ("mail me@notes.txt or @nobody, use @property on @sub", []),
        ("@" + "x" * 5000, []),
        ("@~nobody/x @\0", []),
    ],
)
def test_only_files_that_exist_are_files(text: str, names: list[str]) -> None:
    assert attach.named(text) == names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sub", "is a folder"),
        ("nowhere", "There is no file nowhere"),
        ("binary", "is not UTF-8 text"),
        ("zero", "is not text"),
        ("large", "files of up to 256 kB"),
    ],
)
def test_what_cannot_go_along_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        attach.read(name)


def test_files_stand_below_the_message_in_fences_they_cannot_close() -> None:
    text = 'See @notes.txt and @"my notes.md"'
    sent = attach.below(text, attach.files(text))

    assert sent.startswith(text + "\n\nnotes.txt:\n```\none\ntwo\n```\n\n")
    assert sent.endswith("my notes.md:\n````\n```sh\nls\n```\n````")


def test_what_was_typed_comes_back_while_its_files_are_there() -> None:
    text = 'See @notes.txt, and\n\n@"my notes.md"'
    sent = attach.below(text, attach.files(text))

    assert attach.typed(sent) == text
    assert attach.typed(text) == text
    Path("notes.txt").unlink()
    assert attach.typed(sent) == sent  # else it would be gone
    aside = "No file\n\nnotes.txt:\n```\nx\n```"
    assert attach.typed(aside) == aside


def test_a_message_says_what_its_files_add() -> None:
    assert attach.sizes("see @notes.txt") == ["notes.txt · 8 bytes ≈ 2 tokens"]


def test_candidates_go_on_from_what_is_typed() -> None:
    assert attach.candidates("no") == ["notes.txt"]
    assert attach.candidates("su") == ["sub/"]
    assert attach.candidates("sub/") == ["sub/deep.py"]
    for name in (b"new\nline", b"e\x1b[2Jsc", b"bad \xff", b'quo"te'):
        Path(os.fsdecode(b"sub/" + name)).write_text("x")
    assert attach.candidates("sub/") == ["sub/deep.py"]
    assert ".hidden" not in attach.candidates("")
    assert attach.candidates(".h") == [".hidden"]
    assert attach.candidates("nowhere/x") == []
    assert attach.quoted("my notes.md") == '@"my notes.md"'
