"""What is installed, and what was left half fetched.

Looks at sizes and manifests only (`pull --verify` hashes), and asks nobody.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dflash_chat import hub, pairs
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.doctor.machine import size
from dflash_chat.hub import Installed

STAGING = ".staging-"  # begins the folders in which hub.py unpacks what it fetches
RESTING_MIN = 10  # what was touched later may belong to a download that still runs


def hub_cache() -> Path:
    """The folder in which the hub's own client keeps models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def installed() -> list[Installed]:
    """Every build of every pair that is complete on this machine."""
    found = [
        hub.installed(pair, build.name)
        for pair in pairs.load_catalogue(pairs.user_file())
        for build in pair.builds
    ]
    return [each for each in found if each]


def complete(present: Sequence[Installed]) -> list[Line]:
    """A line for each pair that was pulled once: is it still as it was then?"""
    lines = []
    for pair in pairs.load_catalogue(pairs.user_file()):
        mine = [each for each in present if each.pair.name == pair.name]
        manifests = list((hub.cache_dir() / "models" / pair.name).glob("*.json"))
        if mine:
            names = ", ".join(each.build.name for each in mine)
            total = size(sum(each.bytes for each in mine))
            lines.append(ok("pair", f"{pair.name} is complete ({names}, {total})"))
        if len(manifests) > len(mine):
            text = f"{pair.name} was pulled, but files are missing, changed or out of date"
            fix = f"dflash-chat pull {pair.name}, or dflash-chat rm {pair.name}"
            lines.append(warn("pair", text, fix) if mine else fail("pair", text, fix))
    return lines or [skipped("pair", "none is installed; the first question fetches the default")]


def leftovers() -> list[Line]:
    """Parts of downloads that were killed, below the hub's cache and our own."""
    hubs, ours = hub_cache(), hub.cache_dir()
    lines = []
    if parts := _resting(hubs.glob("*/blobs/*.incomplete")):
        options = f"-name '*.incomplete' -mmin +{RESTING_MIN} -delete"
        fix = f"find {shlex.quote(str(hubs))} -type f {options}"
        lines.append(warn("leftovers", _in_words(parts, hubs), fix))
    if staging := _resting(ours.glob(f"models/*/{STAGING}*")):
        fix = f"rm -r {shlex.join(str(path) for path in staging)}"
        lines.append(warn("leftovers", _in_words(staging, ours), fix))
    return lines or [ok("leftovers", "none")]


def _resting(paths: Iterable[Path]) -> dict[Path, int]:
    """Bytes of those in which nothing has changed for a while."""
    before = time.time() - RESTING_MIN * 60
    found = {path: _age_and_bytes(path) for path in paths}
    return {path: count for path, (touched, count) in found.items() if touched < before}


def _in_words(parts: Mapping[Path, int], folder: Path) -> str:
    what = "an unfinished download" if len(parts) == 1 else f"{len(parts)} unfinished downloads"
    return f"{what} in {folder}, {size(sum(parts.values()))}"


def _age_and_bytes(path: Path) -> tuple[float, int]:
    """When something in it was last changed (seconds since 1970), and its size."""
    touched, total = 0.0, 0
    for each in _files(path):
        with suppress(FileNotFoundError):  # a download may end while we look
            stat = each.stat()
            touched, total = max(touched, stat.st_mtime), total + stat.st_size
    return touched, total


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for root, _, names in os.walk(path):
        yield from (Path(root) / name for name in names)
