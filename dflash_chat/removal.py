"""`dflash-chat rm`: delete what one pair needs and no other installed pair does.

Two pairs may share a target, a drafter or a snapshot of the hub's cache; the manifests say who
needs what. What is freed is counted as it goes, blob by blob: a name in the cache may be a link to
bytes that something else still uses.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dflash_chat import hub, transfer
from dflash_chat.manifest import Manifest
from dflash_chat.pairs import HubSource, Pair


@dataclass(frozen=True)
class Removed:
    """Bytes that became free, and the names of files that stay since another pair needs them."""

    freed_bytes: int
    kept: tuple[str, ...]


def present(pair: Pair) -> list[Manifest]:
    """What there is to delete of the named build, or of all: finished pulls and broken-off ones."""
    builds = [pair.build(pair.quant)] if pair.quant else list(pair.builds)
    found = [hub.manifest_of(pair, build) for build in builds]
    found += [
        Manifest.read(hub.folder_of(pair) / f"{hub.UNFINISHED}{build.name}.json")
        for build in builds
    ]
    return [manifest for manifest in found if manifest]


def remove(pair: Pair) -> Removed:
    """Delete the named build of the pair, or all of them. UserError while the pair is fetched."""
    with hub.disk(hub.cache_dir()), hub.lock(pair, hub.quiet, wait=False):
        going = present(pair)
        staying = _others(going)
        needed = {path for manifest in staying for path, _ in manifest.entries()}
        folder = hub.folder_of(pair)
        listed = {path for manifest in going for path, _ in manifest.entries()}
        ours = {path for path in listed if os.path.lexists(path)}
        kept = tuple(sorted({path.name for path in ours & needed}))
        doomed = ours - needed
        freed = _from_hub({path for path in doomed if folder not in path.parents})
        own = {path for path in doomed if folder in path.parents}
        own |= {manifest.path for manifest in going}
        if not any(folder in manifest.path.parents for manifest in staying):
            own |= {path for path in folder.rglob("*") if path.is_file()}
        for path in own:
            freed += path.stat().st_size
            path.unlink()
        if folder.exists() and not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder)
        sources = (pair.drafter.source, *(build.source for build in pair.builds))
        for repo in {source.repo for source in sources if isinstance(source, HubSource)}:
            freed += transfer.sweep(repo)
    return Removed(freed, kept)


def _others(going: Iterable[Manifest]) -> list[Manifest]:
    """The manifests on this machine that stay, of this pair's other builds and of other pairs."""
    leaving = {manifest.path for manifest in going}
    paths = (hub.cache_dir() / "models").glob("*/*.json")
    found = (Manifest.read(path) for path in paths if path not in leaving)
    return [manifest for manifest in found if manifest]


def _from_hub(paths: set[Path]) -> int:
    """Delete snapshot files, and the revisions and repositories of which nothing is left."""
    freed = 0
    for folder in sorted({_snapshot(path) for path in paths}):
        mine = {path for path in paths if folder in path.parents}
        there = {path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
        freed += _revision(folder) if there <= mine else _files(folder, mine)
    return freed


def _snapshot(path: Path) -> Path:
    """The revision's folder: …/models--who--what/snapshots/COMMIT of a file in it."""
    parts = path.parts
    return Path(*parts[: parts.index("snapshots") + 2])


def _revision(folder: Path) -> int:
    """A whole revision goes the hub's own way, which also knows blobs shared by repositories."""
    from huggingface_hub import scan_cache_dir

    repo = folder.parent.parent
    info = scan_cache_dir(repo.parent)
    plan = info.delete_revisions(folder.name)
    plan.execute()
    return plan.expected_freed_size


def _files(folder: Path, paths: set[Path]) -> int:
    """Some files of a revision: each name, and the blob behind it if no other name leads there."""
    freed = 0
    for path in paths:
        blob, alone = _blob(path), not path.is_symlink()
        freed += path.stat().st_size if alone else 0
        path.unlink()
        names = (folder.parent.parent / "snapshots").rglob("*")
        if alone or blob in {_blob(name) for name in names if name.is_symlink()}:
            continue
        if blob.is_symlink():  # into the store that repositories share; the hub's client sweeps it
            blob.unlink()
        elif blob.exists():
            freed += blob.stat().st_size
            blob.unlink()
    return freed


def _blob(name: Path) -> Path:
    """Where a name in a snapshot leads, one step; itself on file systems without links."""
    if not name.is_symlink():
        return name
    return Path(os.path.normpath(name.parent / name.readlink()))
