"""One finding of `doctor`: what was looked at, how it stands, and the step that repairs it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """`WARN`: works, but worse than it could. `FAIL`: something will not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Line:
    """`fix` is what a person types or does; it is never empty for `WARN` and `FAIL`."""

    check: str
    state: State
    text: str
    fix: str = ""


def ok(check: str, text: str) -> Line:
    """All is well."""
    return Line(check, State.OK, text)


def warn(check: str, text: str, fix: str) -> Line:
    """It works, but worse than it could."""
    return Line(check, State.WARN, text, fix)


def fail(check: str, text: str, fix: str) -> Line:
    """Something will not work."""
    return Line(check, State.FAIL, text, fix)


def skipped(check: str, text: str) -> Line:
    """There was nothing to look at; the text says why."""
    return Line(check, State.SKIPPED, text)
