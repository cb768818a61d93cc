"""What is installed where, and how it gets there: `installed`, `ensure`, `verify`.

A manifest is the mark of a finished pull. Weights from the package index live in our own cache
folder; those from the hub stay in the hub's, where other programs find them, too. What is asked
before anything is fetched is preflight.py's business, deleting is removal.py's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from platformdirs import user_cache_dir

from dflash_chat import fetch, preflight, transfer
from dflash_chat.errors import (
    AccessError,
    CheckpointError,
    DiskError,
    DoesNotFitError,
    UnknownModelError,
    UserError,
)
from dflash_chat.fetch import Report
from dflash_chat.manifest import Files, Manifest, describe
from dflash_chat.pairs import Build, FolderSource, Pair, PyPISource, Source
from dflash_chat.preflight import Fits, Listing, PullPlan
from dflash_chat.progress import Step, Watch, size

ASK_ABOVE_BYTES = 1_000_000_000
UNFINISHED = "unfinished-"
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


def only_small(plan: PullPlan) -> None:
    """What is fetched without being asked for: nothing that takes long or fills a disk."""
    if plan.missing_bytes > ASK_ABOVE_BYTES:
        raise UnknownModelError(
            f"{plan.pair.name} is not installed ({size(plan.missing_bytes)} to fetch)",
            hint=f"dflash-chat pull {plan.pair.name}",
        )


@dataclass(frozen=True)
class Asks:
    """Who decides about a fetch. `fits` says why a build cannot run here, or ""; `confirm` raises
    unless the plan is wanted; `watch` is told more than a report is.
    """

    fits: Fits = preflight.always
    confirm: Callable[[PullPlan], None] = only_small
    watch: Watch | None = None


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
        manifest = manifest_of(pair, build)
        if manifest and not manifest.damage():
            return _installed(pair, build, manifest)
    return None


def ensure(
    pair: Pair,
    quant: str = "",
    report: Report = quiet,
    check: bool = False,
    asks: Asks = Asks(),
) -> Installed:
    """The pair, fetched first if need be. `check` hashes everything, however recently checked.

    Where no build is named, any that is there will do. Builds to fetch are tried in the pair's
    order, or the one named; why one failed is reported before the next is tried. Files that are
    damaged, or changed and no longer what they should be, are fetched again; complete ones stay,
    whatever ends a fetch.
    """
    builds = pair.wanted(quant)
    others = [build for build in pair.loadable if build not in builds]
    for build in builds if quant or pair.quant else (*builds, *others):
        if found := _healthy(pair, build, report, check):
            return found
    with disk(cache_dir()), lock(pair, report):
        _remove_stale(pair)
        for build in builds:  # another process may have fetched it while we waited
            if found := _healthy(pair, build, quiet, check=False):
                return found
        if ready := preflight.there(pair, builds[0]):  # so may another program that uses the hub
            return _fetch(ready, report, check, asks)
        return _first_that_works(pair, builds, report, check, asks)


def plan(pair: Pair, quant: str = "", report: Report = quiet, asks: Asks = Asks()) -> PullPlan:
    """What `ensure` would do for the first of the wanted builds, without doing any of it."""
    return _plan(pair, pair.wanted(quant)[0], report, asks)


def verify(found: Installed, report: Report = quiet) -> None:
    """Hash every file with a known hash; CheckpointError if one is not what it should be."""
    manifest = manifest_of(found.pair, found.build)
    wrong = (
        manifest.damage() or manifest.changed(report, check=True) if manifest else "is not there"
    )
    if wrong:
        raise CheckpointError(f"{found.pair.name}: {wrong}", hint="fetch it again with `pull`")


# ── what is there ───────────────────────────────────────────────────────────────────────────────


def manifest_of(pair: Pair, build: Build) -> Manifest | None:
    """The manifest of a finished pull of exactly this build; None for anything else."""
    pypi = isinstance(build.source, PyPISource)
    if isinstance(build.source, FolderSource) and not build.source.path.exists():
        return None
    manifest = Manifest.read(_manifest_path(pair, build))
    if manifest is None or manifest.identity != _identity(pair, build.source):
        return None
    if pypi:
        manifest.folder = str(manifest.path.parent)  # the cache folder may have been moved
    return manifest


def folder_of(pair: Pair) -> Path:
    """Where the pair's manifests lie, and what came from the package index."""
    return cache_dir() / "models" / pair.folder_name


def _manifest_path(pair: Pair, build: Build) -> Path:
    """A pair has one build from the package index at most: its file lies beside the manifest."""
    pypi = isinstance(build.source, PyPISource)
    return folder_of(pair) / ("pypi.json" if pypi else f"hub-{build.name}.json")


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


def _installed(pair: Pair, build: Build, manifest: Manifest) -> Installed:
    target, bytes_ = Path(manifest.folder), manifest.bytes
    if isinstance(build.source, FolderSource):
        target, bytes_ = build.source.path, bytes_ + build.source.bytes
    elif isinstance(build.source, PyPISource):
        target /= build.source.file_name
    elif build.format == "gguf":
        target /= next(name for name in manifest.files if name.endswith(".gguf"))
    drafter = pair.drafter.path or Path(manifest.drafter)
    return Installed(pair, build, target, drafter, bytes_)


def _in_folders(pair: Pair, build: Build) -> Installed | None:
    """A pair that lies in two folders of somebody else's, which are never checked here."""
    source, drafter = build.source, pair.drafter.path
    if not isinstance(source, FolderSource) or drafter is None or not source.path.exists():
        return None
    return Installed(pair, build, source.path, drafter, source.bytes)


def _healthy(pair: Pair, build: Build, report: Report, check: bool) -> Installed | None:
    """What is installed and stands the checks; what does not is reported and counts as absent."""
    if found := _in_folders(pair, build):
        return found
    manifest = manifest_of(pair, build)
    if manifest is None:
        return None
    with disk(folder_of(pair)):
        wrong = manifest.damage() or manifest.changed(report, check)
        if wrong:
            _remark(f"{wrong}: refused, fetching it again", report)
            manifest.path.unlink(missing_ok=True)
            return None
    return _installed(pair, build, manifest)


# ── fetching ────────────────────────────────────────────────────────────────────────────────────


def _first_that_works(
    pair: Pair, builds: tuple[Build, ...], report: Report, check: bool, asks: Asks
) -> Installed:
    failures: list[UserError] = []
    for build in builds:
        if failures:
            _remark(f"{failures[-1].message}; trying {build.source}", report)
        try:
            found = _plan(pair, build, report, asks)
        except (DiskError, DoesNotFitError):
            raise
        except UserError as error:
            failures.append(error)
            continue
        asks.confirm(found)
        try:
            return _fetch(found, report, check, asks)
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


def _plan(pair: Pair, build: Build, report: Report, asks: Asks) -> PullPlan:
    if isinstance(build.source, FolderSource) and not build.source.path.exists():
        raise UnknownModelError(
            f"{pair.name}@{build.name}: there is nothing at {build.source.path}"
        )
    found = preflight.plan(pair, build, folder_of(pair), report, asks.fits)
    preflight.require_space(found)
    return found


def _fetch(plan: PullPlan, report: Report, check: bool, asks: Asks) -> Installed:
    """Everything the plan lists, checked, and the manifest that says so."""

    def tell(step: Step) -> None:
        report(step.label(), step.done, step.total)

    pair, build = plan.pair, plan.build
    unfinished = _unfinished(plan)
    if plan.listings:
        unfinished.write()
    _transfer(plan, report, check, asks.watch or tell)
    manifest = replace(unfinished, path=_manifest_path(pair, build))
    if isinstance(build.source, PyPISource):
        folder, name = _from_index(pair, build.source, report), build.source.file_name
        manifest.folder = str(folder)
        manifest.files = describe(folder, [name], {name: build.source.sha256})
    if plan.target:
        manifest.files = _files(plan.target)
    if plan.drafter:
        manifest.drafter_files = _files(plan.drafter)
    manifest.write()
    unfinished.path.unlink(missing_ok=True)
    return _installed(pair, build, manifest)


def _unfinished(plan: PullPlan) -> Manifest:
    """What lies beside the manifests while a pull is under way or was broken off.

    It tells `rm` of other pairs what will be needed, and of this one what is to be deleted.
    """

    def listed(listing: Listing | None) -> tuple[str, Files]:
        files = listing.files if listing else ()
        sizes = {file.name: {"bytes": file.bytes, "sha256": "", "mtime_ns": 0} for file in files}
        return str(listing.folder) if listing else "", sizes

    return Manifest(
        folder_of(plan.pair) / f"{UNFINISHED}{plan.build.name}.json",
        _identity(plan.pair, plan.build.source),
        *listed(plan.target),
        "",
        *listed(plan.drafter),
    )


def _files(listing: Listing) -> Files:
    return describe(
        listing.folder,
        (file.name for file in listing.files),
        {file.name: file.sha256 for file in listing.files},
    )


def _transfer(plan: PullPlan, report: Report, check: bool, watch: Watch) -> None:
    """The hub's files of the plan. Bad ones are fetched once more; bad again, they are refused."""
    for listing in plan.listings:
        transfer.sweep(listing.access.repo)  # what a killed pull left behind
    items = plan.items()
    for last in (False, True):
        if items:
            transfer.run(items, watch)
        items = tuple(
            transfer.Item(listing.access.repo, listing.access.commit, name, bytes_, again=True)
            for listing in plan.listings
            for name, bytes_ in _wrong(listing, report, check)
        )
        if not items:
            return
        names = ", ".join(item.name for item in items)
        if last:
            raise CheckpointError(f"{names} from {items[0].repo}: the size or the sha256 differs")
        _remark(f"{names}: not what it should be: refused, fetching it again", report)


def _wrong(listing: Listing, report: Report, check: bool) -> Iterator[tuple[str, int]]:
    """Files without the size, or the hash the catalogue (with `check`: or the hub) states."""
    for file in listing.files:
        path = listing.folder / file.name
        pinned = file.name in listing.source.sha256 or check
        if (
            not path.exists()
            or path.stat().st_size != file.bytes
            or (pinned and file.sha256 and fetch.sha256(path, report) != file.sha256)
        ):
            yield file.name, file.bytes


def _from_index(pair: Pair, source: PyPISource, report: Report) -> Path:
    folder = folder_of(pair)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=_STAGING, dir=folder, ignore_cleanup_errors=True
    ) as staging:
        fresh = fetch.from_index(source, Path(staging), report)
        os.replace(fresh, folder / source.file_name)
    return folder


def _remark(text: str, report: Report) -> None:
    """Something worth keeping on the screen: it is logged, and stands as a stage for a while."""
    log.warning(text)
    report(text, 0, 0)


def _remove_stale(pair: Pair) -> None:
    """Under the lock no other pull runs, so a staging folder belongs to one that was killed."""
    for stale in folder_of(pair).glob(f"{_STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def lock(pair: Pair, report: Report, wait: bool = True) -> Iterator[None]:
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
def disk(folder: Path) -> Iterator[None]:
    """A full, read-only or forbidden disk becomes one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise DiskError(
            f"cannot write {where}: {error.strerror or error}",
            hint="free some space, or point DFLASH_CHAT_CACHE at another folder",
        ) from error
