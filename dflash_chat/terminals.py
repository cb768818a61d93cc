"""What the terminal can do, before anything is drawn on it, and what it must not be told."""

from __future__ import annotations

from collections.abc import Mapping

# What a model writes must not reach the terminal as a control sequence.
CONTROLS: dict[int, str] = dict.fromkeys(
    (*range(0x20), 0x7F, *range(0x80, 0xA0)), "\N{REPLACEMENT CHARACTER}"
)
CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def only_lines(environ: Mapping[str, str]) -> str:
    """Why it cannot place a cursor, so that nothing but lines can be shown; "" if it can."""
    term = environ.get("TERM", "")
    if not term:
        return "TERM is not set"
    if term in ("dumb", "unknown"):
        return f"TERM is {term}"
    import curses

    try:
        curses.setupterm(term, 1)
        return f"TERM is {term}" if curses.tigetstr("cup") is None else ""
    except curses.error:
        return ""  # a terminal nobody described; those of today can
