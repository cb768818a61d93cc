"""Files in a message: `@notes.txt` or `@"my notes.txt"` puts a file's text below the message.

Knows paths and text; knows neither widgets nor the engine. Only what exists is a file: other words
that begin with "@" stay words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dflash_chat.errors import UsageError
from dflash_chat.progress import size

LIMIT_BYTES = 256_000
_BYTES_PER_TOKEN = 4  # roughly, of English and of code; the engine alone counts exactly
_NAMED = re.compile(r'(?<!\S)@(?:"([^"\n]+)"|([^\s"]+))')
_BELOW = re.compile(r"\n\n([^\n]+):\n`{3,}\n")  # where a file begins
_PUNCTUATION = ".,;:!?)]}'"


@dataclass(frozen=True)
class File:
    """A file as a message names it."""

    name: str
    text: str
    bytes: int

    def __str__(self) -> str:
        return _words(self.name, self.bytes)


def sizes(text: str) -> list[str]:
    """The files that `text` names and what they add to it, in words, before anything is read."""
    return [_words(name, Path(name).expanduser().stat().st_size) for name in named(text)]


def named(text: str) -> list[str]:
    """The files that `text` names and that exist, each once."""
    found = []
    for match in _NAMED.finditer(text):
        name = match[1] or match[2]
        bare = name.rstrip(_PUNCTUATION)
        found += [each for each in dict.fromkeys((name, bare)) if _is_file(each)][:1]
    return list(dict.fromkeys(found))


def read(name: str) -> File:
    """The file of this name. Raises UsageError: missing, too large, no text, not readable."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"{name} is a folder.", "Name a file in it.")
    if not path.is_file():
        raise UsageError(f"There is no file {name}.", f"Paths start at {Path.cwd()}")
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}.") from error
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            f"{name} has {size(path.stat().st_size)}, and a message takes files of up to "
            f"{LIMIT_BYTES // 1000} kB.",
            "Paste the part that matters.",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text.", "Only text can be included.") from error
    if "\0" in text:
        raise UsageError(f"{name} is not text.", "Only text can be included.")
    return File(name, text, len(data))


def files(text: str) -> tuple[File, ...]:
    """The files that `text` names. Raises UsageError."""
    return tuple(read(name) for name in named(text))


def below(text: str, included: Sequence[File]) -> str:
    """`text` with files below it, as Markdown."""
    return "\n\n".join([text, *map(_fenced, included)])


def typed(message: str) -> str:
    """What was typed to send `message`: without the files `below` it, if all of them are there
    still, to be read again."""
    for match in _BELOW.finditer(message):
        head = message[: match.start()]
        there = named(head)
        mentioned = {name.rstrip(_PUNCTUATION) for pair in _NAMED.findall(head) for name in pair}
        gone = mentioned - {"", *there}
        if match[1] in there and not any(f"\n\n{name}:\n```" in message for name in gone):
            return head
    return message


def quoted(name: str) -> str:
    """How a message names this file."""
    return f'@"{name}"' if re.search(r"\s", name) else f"@{name}"


def candidates(begun: str, limit: int = 50) -> list[str]:
    """Paths that go on from `begun`, folders with a slash; hidden ones only if asked for, and none
    that a message cannot name."""
    folder, _, start = begun.rpartition("/")
    before = begun[: len(begun) - len(start)]
    where = Path(folder or ("/" if before else ".")).expanduser()
    try:
        with os.scandir(where) as entries:
            found = [
                before + entry.name + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name.lower().startswith(start.lower())
                and (start.startswith(".") or not entry.name.startswith("."))
                and (entry.name.isprintable() and '"' not in entry.name)
            ]
    except OSError:
        return []
    return sorted(found)[:limit]


def _words(name: str, count: int) -> str:
    return f"{name} · {size(count)} ≈ {count // _BYTES_PER_TOKEN} tokens"


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a zero byte
        return False


def _fenced(file: File) -> str:
    """The file in a fence longer than any in it."""
    ticks = max((len(run) for run in re.findall(r"`{3,}", file.text)), default=2) + 1
    fence = "`" * max(ticks, 3)
    end = "" if file.text.endswith("\n") else "\n"
    return f"{file.name}:\n{fence}\n{file.text}{end}{fence}"
