"""`dflash-chat doctor`: what may keep this machine from chatting, line by line, each with its fix.

Here is the order of the checks and how they are shown; what is looked at stands in the files beside
this one. Works without a card, a network or a torch that can be imported: a check that breaks is a
failing line, not the end of the others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from dflash_chat import __version__, gpu, hub
from dflash_chat.doctor import account, cards, compute, machine, terminal, weights
from dflash_chat.doctor.line import Line, State, fail, skipped
from dflash_chat.errors import EXIT_OK, EXIT_OTHER, UserError

log = logging.getLogger(__name__)


def run(as_json: bool) -> int:
    """Print every line, or one JSON object; the exit code is 1 if a line fails, else 0."""
    lines = []
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in told_once(examine()):
        lines.append(line)
        if not as_json:
            sys.stdout.write(in_words(line, columns))
            sys.stdout.flush()
    sys.stdout.write(as_object(lines) if as_json else summary(lines))
    return EXIT_OTHER if count(lines, State.FAIL) else EXIT_OK


def examine() -> Iterator[Line]:
    """Every check, the quick ones first; what takes long runs beside them from the beginning."""
    survey = gpu.survey()  # before the probe takes memory of the card
    asked = account.later(account.lines)
    with compute.probing() as probe:
        yield from _checked("python", machine.python)
        yield from _checked("packages", machine.packages)
        yield from _checked("config", machine.catalogue)
        yield from _checked("settings", machine.settings)
        yield from _checked("terminal", lambda: terminal.lines(os.environ))
        yield from _checked("disk", _disks)
        yield from _checked("pair", weights.complete)
        yield from _checked("leftovers", weights.leftovers)
        yield from _checked("token", asked.result)
        yield from _checked("driver", lambda: cards.driver(survey))
        yield from _checked("card", lambda: cards.cards(survey))
        yield from _checked("torch", lambda: compute.lines(probe.found(), survey))


def _disks() -> Iterator[Line]:
    yield from machine.disk("hub cache", weights.hub_cache(), "HF_HOME")
    yield from machine.disk("own cache", hub.cache_dir(), "DFLASH_CHAT_CACHE")


def told_once(lines: Iterable[Line]) -> Iterator[Line]:
    """A cause that several checks run into fails once: the later ones could not look."""
    causes = set()
    for line in lines:
        if line.state is State.FAIL and line.text in causes:
            yield skipped(line.check, "cannot be looked at before that is mended")
            continue
        if line.state is State.FAIL:
            causes.add(line.text)
        yield line


def _checked(check: str, lines: Callable[[], Iterable[Line]]) -> list[Line]:
    """The lines of one check; if it breaks, a line that says so."""
    try:
        return list(lines())
    except UserError as error:
        return [fail(check, error.message, error.hint or "see the lines above")]
    except Exception as error:  # whatever is wrong with this machine must not hide the rest
        log.debug("%s", check, exc_info=True)
        text = f"this check broke down: {type(error).__name__}: {error}"
        return [fail(check, text, "DFLASH_CHAT_LOG=debug dflash-chat doctor shows the traceback")]


# ── how it is shown ─────────────────────────────────────────────────────────────────────────────


def in_words(line: Line, columns: int = 0) -> str:
    """A line, wrapped at `columns` unless 0, and one for its fix, never broken: it is copied."""
    begin = f"{line.state:9} {line.check:12} "
    text = " ".join(line.text.split())
    if columns:
        room = max(20, columns - len(begin))
        parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        text = f"\n{'':{len(begin)}}".join(parts)
    fix = f"{'':{len(begin)}}→ {line.fix}\n" if line.fix else ""
    return f"{begin}{text}\n{fix}"


def summary(lines: list[Line]) -> str:
    """How many lines ask for something."""
    failed, warned = count(lines, State.FAIL), count(lines, State.WARN)
    return f"{failed} failed, {warned} could be better, {len(lines)} in all\n"


def as_object(lines: list[Line]) -> str:
    """One JSON object; its names are part of the interface."""
    body = {
        "version": __version__,
        "ok": not count(lines, State.FAIL),
        "failed": count(lines, State.FAIL),
        "warnings": count(lines, State.WARN),
        "lines": [asdict(line) for line in lines],
    }
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def count(lines: list[Line], state: State) -> int:
    """How many of the lines are in this state."""
    return sum(line.state is state for line in lines)
