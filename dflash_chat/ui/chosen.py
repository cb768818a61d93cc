"""The theme that was chosen in the chat, kept over a restart in the folder of the chats.

What was said last holds: a choice, until config.toml names another theme than it did then. That
file is the person's own and is never written. Losing ours costs a choice of colours and no more, so
nothing is said of it. Knows no widgets.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

from dflash_chat.store import data_folder

log = logging.getLogger(__name__)


def theme(configured: str, themes: Collection[str]) -> str:
    """The theme to begin with, where config.toml names `configured`; "" is the usual one."""
    try:
        choice = json.loads(file().read_text(encoding="utf-8"))
        name, instead_of = choice["theme"], choice["instead_of"]
    except (OSError, ValueError, LookupError, TypeError):
        return configured
    return name if instead_of == configured and name in themes else configured


def keep(name: str, configured: str) -> None:
    """This theme was chosen, where config.toml names `configured`."""
    path = file()
    new = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new.write_text(json.dumps({"theme": name, "instead_of": configured}), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        log.info("the theme is not kept: %s", error)


def file() -> Path:
    """Where the choice lies."""
    return data_folder() / "chosen.json"
