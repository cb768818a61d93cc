"""Slash commands: what a line that starts with "/" asks for. Pure text; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from dflash_chat.errors import UsageError

USAGE = {
    "/help": "/help             this list",
    "/clear": "/clear            start a new chat",
    "/system": "/system TEXT      set the system prompt; without TEXT none",
    "/draft": "/draft on|off     draft with the small model, or decode plainly",
    "/set": "/set key=value    temperature, top_p, top_k, seed, max_tokens …",
    "/xray": "/xray             the last answer by block and origin",
    "/quit": "/quit             leave",
}


@dataclass(frozen=True)
class Command:
    """One command and what follows it."""

    name: str
    argument: str


def parse(line: str) -> Command | None:
    """The command in `line`, None if it is an ordinary message. Raises UsageError with a hint."""
    if not line.startswith("/") or line.startswith("//"):
        return None
    name, _, argument = line.partition(" ")
    name, argument = name.lower(), argument.strip()
    if name not in USAGE:
        near = get_close_matches(name, USAGE, n=1)
        hint = f"Did you mean {near[0]}?" if near else "/help lists them."
        raise UsageError(f"There is no command {name}.", hint)
    if name == "/draft" and argument not in ("on", "off"):
        raise UsageError("/draft is either on or off.", "Type /draft on or /draft off.")
    if name == "/set" and "=" not in argument:
        raise UsageError("/set needs a key and a value.", "For example /set temperature=0.7")
    return Command(name, argument)
