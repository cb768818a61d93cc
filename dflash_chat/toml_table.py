"""A TOML file read key by key, strictly: every mistake names file, entry and key.

Knows TOML's types and how to say what is wrong. Knows no key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from dflash_chat.errors import UsageError

T = TypeVar("T")
_ENTRY = re.compile(r"\[\[(\w+)\]\]")
_ANY = re.compile(r"(?s).*\S.*")


def read(path: Path) -> dict[str, Any]:
    """The file's values. UsageError if it cannot be read or is no TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}{_place(text, str(error))} not valid TOML: {error}") from error


def _place(text: str, mistake: str) -> str:
    """Entry and key of the line that a parser's message names."""
    lines = text.split("\n")
    at = re.search(r"at line (\d+)", mistake)
    above = [line.strip() for line in lines[: int(at[1]) if at else len(lines)]]
    headers = [header[1] for line in above if (header := _ENTRY.match(line))]
    entry = f", {headers[-1]} {len(headers)}" if headers else ""
    key, equals, _ = above[-1].partition("=")
    return f"{entry}: key {key.strip()!r:.80} is" if equals else f"{entry}:"


class Table:
    """A TOML table; what nobody asked for is an error in the end. `where` names file and entry."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.asked: list[str] = []

    def wrong(self, key: str, problem: str, hint: str = "") -> UsageError:
        """The error for one key."""
        return UsageError(f"{self.where}: key {key!r} {problem}", hint)

    def get(self, key: str, kind: type[T], expected: str, default: T | None = None) -> T:
        """The value if it is of `kind`, the default if it is absent, else an error."""
        self.asked.append(key)
        if key not in self.values:
            if default is None:
                raise self.wrong(key, "is missing", f"expected: {expected}")
            return default
        value = self.values[key]
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise self.wrong(key, f"must be {expected}, not {value!r:.80}")
        return value

    def text(self, key: str, default: str | None = None, shape: re.Pattern[str] = _ANY) -> str:
        """A text that fits `shape`."""
        value = self.get(key, str, "text", default)
        if value != default and not shape.fullmatch(value):
            raise self.wrong(key, f"has an unusable value: {value!r:.80}")
        return value

    def choice(self, key: str, *choices: str) -> str:
        """One of a few texts."""
        value = self.get(key, str, "text")
        if value not in choices:
            raise self.wrong(key, f"must be {' or '.join(choices)}, not {value!r:.80}")
        return value

    def yes(self, key: str, default: bool = False) -> bool:
        """true or false."""
        return self.get(key, bool, "true or false", default)

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number within both limits."""
        value = self.get(key, int, "a whole number", default)
        if value != default and not low <= value <= high:
            raise self.wrong(key, f"must be from {low} to {high}, not {value}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number within both limits; a whole one will do."""
        whole = isinstance(self.values.get(key), int)
        value = float(self.get(key, int if whole else float, "a number", default))
        if value != default and not low <= value <= high:
            raise self.wrong(key, f"must be from {low:g} to {high:g}, not {value:g}")
        return value

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        """A list of texts."""
        values = self.get(key, list, "a list of texts", default)
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise self.wrong(key, f"must be a list of texts, not {values!r:.80}")
        return tuple(values)

    def wholes(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers, each within both limits."""
        values = self.get(key, list, "a list of whole numbers")
        if not all(type(value) is int and low <= value <= high for value in values):
            raise self.wrong(key, f"must hold numbers from {low} to {high}, not {values!r:.80}")
        return tuple(values)

    def table(self, key: str, default: dict[str, Any] | None = None) -> Table:
        """A table below this one."""
        return Table(self.get(key, dict, "a table", default), f"{self.where}, {key}")

    def tables(self, key: str, default: list[Any] | None = None) -> Iterator[Table]:
        """A list of tables, one or more unless there is a default."""
        values = self.get(key, list, "a list of tables", default)
        if not values and default is None:
            raise self.wrong(key, "needs at least one entry")
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                raise self.wrong(key, f"must be a list of tables, not {values!r:.80}")
            yield Table(value, f"{self.where}, {key} {number}")

    def done(self) -> None:
        """Raise for keys that nobody asked for."""
        for key in self.values:
            if key not in self.asked:
                near = get_close_matches(key, self.asked, n=1, cutoff=0.5)
                known = f"known: {', '.join(self.asked)}"
                raise self.wrong(key, "is not known", f"did you mean {near[0]}?" if near else known)
