"""What is installed where, and how it gets there: `installed`, `ensure`, `verify`, `remove`.

A manifest beside the weights is the mark of a finished pull: it lists every file with its size, and
for the hashed ones the time of the last check, so that starting up costs a few stat calls. Weights
from the package index live in our own cache folder; those from the hub stay in the hub's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from dflash_chat import fetch
from dflash_chat.errors import (
    AccessError,
    CheckpointError,
    DiskError,
    UnknownModelError,
    UserError,
)
from dflash_chat.fetch import Report
from dflash_chat.pairs import Build, FolderSource, HubSource, Pair, PyPISource, Source

_STAGING = ".staging-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installed:
    """A pair that is complete on this machine. `target` is the GGUF file or the snapshot folder."""

    pair: Pair
    build: Build
    target: Path
    drafter: Path
    bytes: int


def quiet(stage: str, done: int, total: int) -> None:
    """A report for those who do not care."""


def cache_dir() -> Path:
    """Only what may be deleted: DFLASH_CHAT_CACHE, or the platform's cache folder."""
    chosen = os.environ.get("DFLASH_CHAT_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path(user_cache_dir("dflash-chat"))


def installed(pair: Pair, quant: str = "") -> Installed | None:
    """The first complete build of the pair, or the one named. Looks at sizes only; no network."""
    name = quant or pair.quant
    for build in (pair.build(name),) if name else pair.builds:
        if found := _in_folders(pair, build):
            return found
        manifest = _Manifest.read(pair, build)
        if manifest and not manifest.damage():
            return manifest.installed(pair, build)
    return None


def ensure(pair: Pair, quant: str = "", report: Report = quiet, check: bool = False) -> Installed:
    """The pair, fetched first if need be. `check` hashes everything, however recently checked.

    Builds are tried in the pair's order, or the one named; why one failed is reported before the
    next is tried. Files that are damaged, or changed and no longer what they should be, are fetched
    again.
    """
    builds = pair.wanted(quant)
    for build in builds:
        if found := _healthy(pair, build, report, check):
            return found
    with _disk(cache_dir()), _lock(pair, report):
        _remove_stale(pair)
        for build in builds:  # another process may have fetched it while we waited
            if found := _healthy(pair, build, quiet, check=False):
                return found
        return _first_that_works(pair, builds, report)


def verify(found: Installed, report: Report = quiet) -> None:
    """Hash every file with a known hash; CheckpointError if one is not what it should be."""
    manifest = _Manifest.read(found.pair, found.build)
    wrong = (
        manifest.damage() or manifest.changed(report, check=True) if manifest else "is not there"
    )
    if wrong:
        raise CheckpointError(f"{found.pair.name}: {wrong}", hint="fetch it again with `pull`")


def remove(pair: Pair) -> int:
    """Delete the pair's weights, every build; returns the bytes that became free."""
    freed = 0
    with _disk(cache_dir()), _lock(pair, quiet, wait=False):
        for build in pair.builds:
            manifest = _Manifest.read(pair, build)
            if manifest and isinstance(build.source, HubSource):
                freed += _remove_snapshot(Path(manifest.folder))
        folder = _folder(pair)
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if folder.exists():
            shutil.rmtree(folder)
    return freed


def _remark(text: str, report: Report) -> None:
    """Something worth keeping on the screen: it is logged, and stands as a stage for a while."""
    log.warning(text)
    report(text, 0, 0)


# ── the manifest ────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Manifest:
    """`files`: name → bytes, sha256 ("" if unknown) and mtime_ns at the last good check.

    `drafter` is the drafter's folder, if it came from the hub as well.
    """

    path: Path
    identity: str
    folder: str
    files: dict[str, dict[str, Any]]
    fetched: str
    drafter: str = ""

    @classmethod
    def read(cls, pair: Pair, build: Build) -> _Manifest | None:
        """The manifest of a finished pull of exactly this build; None for anything else."""
        path = _manifest_path(pair, build)
        if isinstance(build.source, FolderSource) and not build.source.path.exists():
            return None
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(path, **body)
            if manifest.identity != _identity(pair, build.source):
                return None
            if isinstance(build.source, PyPISource):
                manifest.folder = str(path.parent)  # the cache folder may have been moved
            sizes = [entry["bytes"] + entry["mtime_ns"] for entry in manifest.files.values()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if sizes else None

    @classmethod
    def create(cls, pair: Pair, build: Build, folder: Path, drafter: str) -> _Manifest:
        """For files that were just fetched and checked."""
        source = build.source
        if isinstance(source, FolderSource):  # what was fetched is the drafter
            assert pair.drafter.source, "nothing was fetched"
            hashes = pair.drafter.source.sha256
        elif isinstance(source, PyPISource):
            hashes = {source.file_name: source.sha256}
        else:
            hashes = source.sha256
        names = (
            [source.file_name]
            if isinstance(source, PyPISource)
            else sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        )
        files = {
            name: {
                "bytes": (stat := (folder / name).stat()).st_size,
                "sha256": hashes.get(name, ""),
                "mtime_ns": stat.st_mtime_ns,
            }
            for name in names
        }
        path = _manifest_path(pair, build)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(path, _identity(pair, source), str(folder), files, now, drafter)

    def write(self) -> None:
        """Replace the file on disk in one step."""
        body = {key: value for key, value in vars(self).items() if key != "path"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)

    def installed(self, pair: Pair, build: Build) -> Installed:
        total = sum(entry["bytes"] for entry in self.files.values())
        folder = Path(self.folder)
        target = folder
        if isinstance(build.source, PyPISource):
            target = folder / build.source.file_name
        elif isinstance(build.source, FolderSource):
            target, total = build.source.path, build.source.bytes
        return Installed(pair, build, target, pair.drafter.path or Path(self.drafter), total)

    def damage(self) -> str:
        """What is missing or has the wrong size, in words; "" if nothing."""
        for name, entry in self.files.items():
            try:
                size = (Path(self.folder) / name).stat().st_size
            except OSError:
                return f"{name} is missing"
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
        return ""

    def changed(self, report: Report, check: bool) -> str:
        """Hash what was touched since its last check (`check`: everything); "" if all is well."""
        checked = False
        for name, entry in self.files.items():
            path = Path(self.folder) / name
            mtime_ns = path.stat().st_mtime_ns
            if not entry["sha256"] or (mtime_ns == entry["mtime_ns"] and not check):
                continue
            if fetch.sha256(path, report) != entry["sha256"]:
                return f"{name} does not have the sha256 it should"
            entry["mtime_ns"] = mtime_ns
            checked = True
        if checked:
            self.write()
        return ""


def _identity(pair: Pair, source: Source) -> str:
    """What must not have changed in the catalogue since the pull."""
    if isinstance(source, PyPISource):
        own = f"{source.package}=={source.version} {source.sha256}"
    elif isinstance(source, FolderSource):
        own = str(source.path)
    else:
        own = f"{source.repo}@{source.revision}"
    drafter = pair.drafter.source
    return f"{own} + {drafter.repo}@{drafter.revision}" if drafter else own


def _folder(pair: Pair) -> Path:
    return cache_dir() / "models" / pair.folder_name


def _manifest_path(pair: Pair, build: Build) -> Path:
    """A pair has one build from the package index at most: its file lies beside the manifest."""
    pypi = isinstance(build.source, PyPISource)
    return _folder(pair) / ("pypi.json" if pypi else f"hub-{build.name}.json")


def _in_folders(pair: Pair, build: Build) -> Installed | None:
    """A pair that lies in two folders of somebody else's, which are never checked here."""
    source, drafter = build.source, pair.drafter.path
    if not isinstance(source, FolderSource) or drafter is None or not source.path.exists():
        return None
    return Installed(pair, build, source.path, drafter, source.bytes)


# ── fetching ────────────────────────────────────────────────────────────────────────────────────


def _healthy(pair: Pair, build: Build, report: Report, check: bool) -> Installed | None:
    """What is installed and stands the checks; what does not is reported and counts as absent."""
    if found := _in_folders(pair, build):
        return found
    manifest = _Manifest.read(pair, build)
    if manifest is None:
        return None
    with _disk(_folder(pair)):
        wrong = manifest.damage() or manifest.changed(report, check)
        if wrong:
            _remark(f"{wrong}: refused, fetching it again", report)
            manifest.path.unlink(missing_ok=True)
            return None
    return manifest.installed(pair, build)


def _first_that_works(pair: Pair, builds: tuple[Build, ...], report: Report) -> Installed:
    failures: list[UserError] = []
    for build in builds:
        if failures:
            _remark(f"{failures[-1].message}; trying {build.source}", report)
        try:
            return _fetch(pair, build, report)
        except DiskError:
            raise
        except UserError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    reasons = "; ".join(
        f"{build.name}: {error.message}" for build, error in zip(builds, failures, strict=True)
    )
    kind = next((type(error) for error in failures if isinstance(error, AccessError)), UserError)
    hint = next((error.hint for error in failures if error.hint), "check the network")
    raise kind(f"could not fetch {pair.name}: {reasons}", hint=hint)


def _fetch(pair: Pair, build: Build, report: Report) -> Installed:
    source, of_drafter = build.source, pair.drafter.source
    if isinstance(source, FolderSource) and not source.path.exists():
        raise UnknownModelError(f"{pair.name}@{build.name}: there is nothing at {source.path}")
    drafter = str(_checked_snapshot(of_drafter, report)) if of_drafter else ""
    if isinstance(source, FolderSource):
        folder = Path(drafter)
    elif isinstance(source, HubSource):
        folder = _checked_snapshot(source, report)
    else:
        folder = _folder(pair)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=_STAGING, dir=folder, ignore_cleanup_errors=True
        ) as staging:
            fresh = fetch.from_index(source, Path(staging), report)
            os.replace(fresh, folder / source.file_name)
    manifest = _Manifest.create(pair, build, folder, drafter)
    manifest.write()
    return manifest.installed(pair, build)


def _checked_snapshot(source: HubSource, report: Report) -> Path:
    """The snapshot with its hashes checked; a bad copy in the hub's cache is fetched once more."""
    for again in (False, True):
        folder = fetch.from_hub(source, report, again)
        wrong = [
            name
            for name, expected in source.sha256.items()
            if not (folder / name).exists() or fetch.sha256(folder / name, report) != expected
        ]
        if not wrong:
            return folder
        if not again:
            _remark(f"{wrong[0]} is not what it should be: refused, fetching it again", report)
    raise CheckpointError(f"{', '.join(wrong)} from {source.repo}: the sha256 differs")


def _remove_snapshot(folder: Path) -> int:
    """Delete one revision from the hub's cache; files that another revision uses stay."""
    from huggingface_hub import scan_cache_dir

    plan = scan_cache_dir().delete_revisions(folder.name)
    plan.execute()
    return plan.expected_freed_size


def _remove_stale(pair: Pair) -> None:
    """Under the lock no other pull runs, so a staging folder belongs to one that was killed."""
    for stale in _folder(pair).glob(f"{_STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def _lock(pair: Pair, report: Report, wait: bool = True) -> Iterator[None]:
    """One pull per pair at a time, across processes; freed by the kernel when we die."""
    path = cache_dir() / "models" / f"{pair.folder_name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{pair.name} is being fetched by another process") from None
            if not told:
                _remark(f"another process is fetching {pair.name}; waiting for it", report)
                told = True
            time.sleep(0.1)
        yield


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full, read-only or forbidden disk becomes one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise DiskError(
            f"cannot write {where}: {error.strerror or error}",
            hint="free some space, or point DFLASH_CHAT_CACHE at another folder",
        ) from error
