"""Which pair a person means: a name or alias of the catalogue, and perhaps one of its builds.

The one module others ask; entries.py says what a pair is, catalogue.py and custom.py read them.
"""

from __future__ import annotations

from difflib import get_close_matches

from dflash_chat import catalogue, custom
from dflash_chat.catalogue import load_catalogue, user_file
from dflash_chat.entries import (
    Build,
    Drafter,
    Fact,
    FolderSource,
    HubSource,
    Pair,
    PyPISource,
    Source,
)
from dflash_chat.errors import UnknownModelError

__all__ = [
    "Build", "Drafter", "Fact", "FolderSource", "HubSource", "Pair", "PyPISource", "Source", "find",
    "load_catalogue", "user_file",
]  # fmt: skip


def find(name: str) -> Pair:
    """The pair with this name or alias, in any case; names go before aliases.

    `name@build` names a build as well, which is then the pair's `quant`; `target+drafter` is a pair
    of one's own folders or hub repositories. UnknownModelError with the nearest names if there is
    no such pair or build.
    """
    if custom.is_custom(name):
        return custom.find(name)
    wanted, at, quant = name.strip().lower().partition("@")
    known = load_catalogue(catalogue.user_file())
    found = [pair for pair in known if pair.name == wanted]
    found += [pair for pair in reversed(known) if wanted in pair.aliases]
    if not found:
        raise UnknownModelError(f"no pair named {name!r}", hint=_nearest(wanted, known))
    return found[0].narrowed(quant) if at else found[0]


def _nearest(wanted: str, known: tuple[Pair, ...]) -> str:
    names = [name for pair in known for name in (pair.name, *pair.aliases)]
    near = get_close_matches(wanted, names, n=3, cutoff=0.4) or [pair.name for pair in known][:3]
    return f"did you mean {' or '.join(near)}?"
