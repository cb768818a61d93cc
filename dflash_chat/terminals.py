"""What the terminal can do, before anything is drawn on it."""

from __future__ import annotations

from collections.abc import Mapping


def only_lines(environ: Mapping[str, str]) -> bool:
    """Whether it cannot place a cursor, so that nothing but lines can be shown."""
    term = environ.get("TERM", "")
    if term in ("", "dumb", "unknown"):
        return True
    import curses

    try:
        curses.setupterm(term, 1)
        return curses.tigetstr("cup") is None
    except curses.error:
        return False  # a terminal nobody described; those of today can
