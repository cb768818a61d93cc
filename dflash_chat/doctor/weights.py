"""What is installed, and what was left half fetched.

Looks at sizes and manifests only (`pull --verify` hashes), and asks nobody.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from dflash_chat import hub, pairs
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.entries import FolderSource, Pair
from dflash_chat.hub import Installed
from dflash_chat.progress import size

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


def complete() -> list[Line]:
    """A line for each build that was pulled once: is it still as it was then?"""
    known = pairs.load_catalogue(pairs.user_file())
    lines = [line for pair in known for line in _pulled(pair)]
    return lines or [skipped("pair", "none is installed; the first question fetches the default")]


def _pulled(pair: Pair) -> Iterator[Line]:
    """Of one pair: every finished pull, every broken-off one, and what no catalogue names now."""
    fix = f"dflash-chat pull {pair.name}"
    folder = hub.folder_of(pair)
    begun = set(folder.glob(f"{hub.UNFINISHED}*.json"))
    finished = set()
    for build in pair.builds:
        if isinstance(build.source, FolderSource) or not (manifest := hub.manifest_of(pair, build)):
            continue
        finished.add(manifest.path)
        name = f"{pair.name}@{build.name}"
        if damage := manifest.damage():
            yield fail("pair", f"{name} is damaged: {damage}", f"dflash-chat pull {name}")
        else:
            yield ok("pair", f"{name} is complete, {size(manifest.bytes)}")
    if begun:
        text = f"a pull of {pair.name} was broken off, or still runs"
        yield warn("pair", text, f"{fix} goes on with it, dflash-chat rm {pair.name} deletes it")
    if old := set(folder.glob("*.json")) - finished - begun:
        text = f"{pair.name} was pulled when the catalogue named other files for it ({len(old)})"
        yield warn("pair", text, f"{fix} fetches those of today")


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
