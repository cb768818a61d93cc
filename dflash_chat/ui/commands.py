"""Slash commands: what a line that starts with "/" asks for. Pure text; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from dflash_chat.errors import UsageError
from dflash_chat.ui.actions import COMMANDS, Action


@dataclass(frozen=True)
class Command:
    """One command and what follows it."""

    action: Action
    argument: str


def is_command(line: str) -> bool:
    """Whether a line asks for something; one that begins with a path or `//` is a message."""
    return line.startswith("/") and "/" not in line.split(None, 1)[0][1:]


def parse(line: str) -> Command | None:
    """The command in `line`, None if it is an ordinary message. Raises UsageError with a hint."""
    if not is_command(line):
        return None
    name, argument = ([*line.split(None, 1), ""])[:2]
    name, argument = name.lower(), argument.strip()
    action = COMMANDS.get(name)
    if action is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else "/help lists them."
        raise UsageError(f"There is no command {name}.", hint)
    if action.needs_argument and not argument:
        raise UsageError(f"{name} needs something behind it.", f"Type {action.usage}")
    if argument and not action.argument:
        raise UsageError(f"{name} takes nothing behind it.", f"Type {name} alone.")
    return Command(action, argument)
