"""What may be typed next: commands, what follows them, and files behind "@".

Pure text and folders; knows neither widgets nor keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dflash_chat import attach
from dflash_chat.settings import SAMPLING_RANGES
from dflash_chat.ui.actions import COMMANDS


@dataclass(frozen=True)
class Choice:
    """A word to put in, and a note beside it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Completion:
    """Choices for what stands between `start` and the cursor, columns of the cursor's line.
    `whole`: that makes sense as it stands."""

    start: int
    choices: tuple[Choice, ...] = ()
    whole: bool = True


def complete(before: str, first_line: bool) -> Completion:
    """What fits to `before`, the cursor's line up to the cursor."""
    if first_line and before.startswith("/"):
        name, space, argument = before.partition(" ")
        if not space:
            return Completion(0, tuple(_commands(name)), name.lower() in COMMANDS)
        if (command := COMMANDS.get(name)) and command.id in _VALUES:
            values = _VALUES[command.id](argument)
            whole = command.argument == "PATH" or not argument or argument in values
            return Completion(len(before) - len(argument), tuple(map(Choice, values)), whole)
        return Completion(len(before))
    at = max(before.rfind(" @"), before.rfind("\t@")) + 1
    if not before[at:].startswith("@"):
        return Completion(len(before))
    begun = before[at + 1 :].removeprefix('"')
    if " " in begun and not before[at + 1 :].startswith('"'):
        return Completion(len(before))
    files = (Choice(attach.quoted(name)) for name in attach.candidates(begun))
    return Completion(at, tuple(files), not begun or bool(attach.named(before[at:])))


def _commands(begun: str) -> Iterable[Choice]:
    for name, action in COMMANDS.items():
        if name.startswith(begun.lower()):
            yield Choice(name + (" " if action.argument else ""), action.does)


def _starting(*words: str) -> Callable[[str], list[str]]:
    return lambda begun: [word for word in words if word.startswith(begun.lower())]


def themes(begun: str = "") -> list[str]:
    """Names of colour themes, by what they begin with."""
    from textual.theme import BUILTIN_THEMES

    return [name for name in BUILTIN_THEMES if name.startswith(begun.lower())]


_VALUES: dict[str, Callable[[str], list[str]]] = {
    "theme": themes,
    "draft": _starting("auto", "on", "off"),
    "copy_answer": _starting("code"),
    "set": _starting(*(f"{key}=" for key in (*SAMPLING_RANGES, "stop"))),
    "file": attach.candidates,
    "export": attach.candidates,
}
