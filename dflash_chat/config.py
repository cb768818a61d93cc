"""config.toml in the platform's folder for settings: keys and colours of the chat.

    theme = "textual-light"

    [keys]
    panel = "f5"

Reads strictly: what is not known is refused, naming the file and what was probably meant. Knows
which actions and themes there are only from whoever asks.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_chat.errors import UsageError
from dflash_chat.settings import suggest

_MODIFIED = re.compile(r"(?:(?:ctrl|alt|shift|super|meta|hyper)\+)*([a-z0-9_]+|[^\s+,])", re.I)
_FUNCTION = re.compile(r"f([1-9]|1[0-9]|2[0-4])")
_NAMED = {
    "escape", "enter", "tab", "space", "backspace", "delete", "insert", "home", "end", "pageup",
    "pagedown", "up", "down", "left", "right",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """`keys` by action id; `theme` "" is the usual one."""

    theme: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)


def config_file() -> Path:
    """Where it lies."""
    from platformdirs import user_config_dir

    return Path(user_config_dir("dflash-chat")) / "config.toml"


def load(path: Path, defaults: Mapping[str, str], themes: Collection[str]) -> Config:
    """The file's settings, none if there is no file. `defaults` are the keys of every action.

    Raises UsageError for anything that is not understood.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    for key in values:
        if key not in ("theme", "keys"):
            raise UsageError(
                f"{path}: there is no setting {key!r}", suggest(key, ("theme", "keys"))
            )
    theme = values.get("theme", "")
    if theme and theme not in themes:
        raise UsageError(f"{path}: there is no theme {theme!r}", suggest(str(theme), themes))
    return Config(theme, _keys(path, values.get("keys", {}), defaults))


def _keys(path: Path, table: Any, defaults: Mapping[str, str]) -> dict[str, str]:  # noqa: ANN401
    if not isinstance(table, dict):
        raise UsageError(f"{path}: 'keys' must be a table", 'e.g. [keys] and below it panel = "f5"')
    keys: dict[str, str] = {}
    for name, value in table.items():
        if name not in defaults:
            raise UsageError(f"{path}: there is no action {name!r}", suggest(name, defaults))
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else [""]
        if not all(map(_is_key, parts)):
            raise UsageError(
                f"{path}: {name} = {value!r} is not a key", "e.g. f5, ctrl+g, alt+up, or two: f5,f6"
            )
        keys[name] = ",".join(parts)
    _refuse_clashes(path, {**defaults, **keys}, keys)
    return keys


def _is_key(key: str) -> bool:
    match = _MODIFIED.fullmatch(key)
    if match is None:
        return False
    last = match[1]
    return len(last) == 1 or last in _NAMED or bool(_FUNCTION.fullmatch(last))


def _refuse_clashes(path: Path, all_keys: Mapping[str, str], changed: Mapping[str, str]) -> None:
    """One key does one thing; who moves an action away from its key frees that key."""
    owners: dict[str, str] = {}
    for name in sorted(all_keys, key=lambda name: name in changed):
        for key in all_keys[name].split(","):
            if key in owners:
                raise UsageError(
                    f"{path}: {key} would be both {owners[key]} and {name}",
                    "Give one of them another key.",
                )
            owners[key] = name
