"""Files of hub repositories into the hub's cache, two at a time, in a process of their own.

`run` starts the process, counts bytes and says when nothing moves; `sweep` removes what a process
that was killed left behind. A thread cannot be stopped, a process can, at any moment and without
damage: the hub's client moves a file into place when it is complete, and only then.
Knows nothing of pairs, permission or disk space. `python -m dflash_chat.transfer` is the process:
the job comes through stdin, JSON lines leave through stdout, and no token passes through either.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_chat import access, errors
from dflash_chat.errors import DiskError, UserError
from dflash_chat.progress import Meter, Step, Watch, duration

WORKERS = 2  # a large file is parallel inside; few files in flight are few that start again
STALL_S = 30.0
_POLL_S = 0.25
_TELL_EVERY_S = 0.1
_CHUNK = 1 << 16  # the hub's 10 MB would show nothing for seconds on a slow line
_TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One file to fetch. `commit` is a commit hash; `again` replaces a copy that is there."""

    repo: str
    commit: str
    name: str
    bytes: int
    again: bool = False


def run(items: Sequence[Item], watch: Watch, stall_s: float = STALL_S) -> None:
    """Fetch `items` in their order and report while at it. Raises UserError; complete files stay.

    Whatever ends it, an interrupt included, no partial file stays behind.
    """
    tally = _Tally(items)
    watch(tally.step())
    try:
        with _process(items) as lines:
            while not all(tally.complete):
                line = _next(lines)
                if "error" in line:
                    raise _as_error(line["error"])
                if line:
                    tally.count(line["item"], line["bytes"], line["complete"])
                elif tally.still_s() > stall_s and not tally.note:
                    tally.note = f"nothing has arrived for {duration(tally.still_s())}"
                    log.warning("%s: still trying; complete files are kept", tally.note)
                watch(tally.step())
    finally:
        for repo in sorted({item.repo for item in items}):
            sweep(repo)


class _Tally:
    """What has arrived of each file. The sum never falls, though a file may start again."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.total = sum(item.bytes for item in items)
        self.got = [0] * len(items)
        self.complete = [False] * len(items)
        self.note = ""
        self._done = 0
        self._meter = Meter()
        self._moved_at = time.monotonic()

    def count(self, item: int, bytes_: int, complete: bool) -> None:
        """Item number `item` has `bytes_` now."""
        self.got[item], self.complete[item] = bytes_, complete
        self._done = max(self._done, min(self.total, sum(self.got)))
        self._moved_at, self.note = time.monotonic(), ""

    def still_s(self) -> float:
        """For how long nothing has arrived."""
        return time.monotonic() - self._moved_at

    def step(self) -> Step:
        """Where it all stands."""
        speed, eta_s = self._meter(self._done, self.total)
        partial = (got for got, whole in zip(self.got, self.complete, strict=True) if not whole)
        return Step(
            "fetching",
            self._done,
            self.total,
            speed,
            eta_s,
            files_done=sum(self.complete),
            files=len(self.complete),
            restart_bytes=sum(partial),
            note=self.note,
        )


def sweep(repo: str) -> int:
    """Delete partial files of `repo` that no running download holds; the bytes that were freed.

    The client names them blob.random.incomplete and holds a lock per blob while it writes one.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    folder = f"models--{repo.replace('/', '--')}"
    freed = 0
    for partial in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{partial.name.split('.')[0]}.lock"
        try:
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = partial.stat().st_size
                partial.unlink()
        except OSError:  # somebody is writing it, or it is gone
            continue
        freed += size
        log.info("removed a partial file of %s: %d bytes", repo, size)
    return freed


def as_error(error: Exception, repo: str, revision: str) -> UserError:
    """What the hub's client raised, as what a person should read."""
    full = "the disk filled up while fetching: complete files are kept, nothing is damaged"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        import errno

        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskError(full, hint="free some space, or point HF_HOME at another disk")
        return DiskError(f"cannot write the hub cache: {error.strerror}")
    if "No space left" in str(error):  # the Xet client's own words
        return DiskError(full, hint="free some space, or point HF_HOME at another disk")
    return access.explain(error, repo, revision).error()


# ── this side ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _process(items: Sequence[Item]) -> Iterator[queue.Queue[dict[str, Any]]]:
    """The fetching process and what it says, ended with us whatever happens."""
    debug = os.environ.get("DFLASH_CHAT_LOG", "").upper() == "DEBUG"
    child = subprocess.Popen(
        [sys.executable, "-m", "dflash_chat.transfer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl+C is ours to handle
    )
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    assert child.stdin is not None
    assert child.stdout is not None

    def read(stream: Any) -> None:  # noqa: ANN401  an IO[str]
        for line in stream:
            lines.put(json.loads(line))
        how = "was ended" if child.wait() < 0 else "broke"
        lines.put({"error": {"kind": "UserError", "message": f"the fetching process {how}"}})

    reader = threading.Thread(target=read, args=(child.stdout,), daemon=True)
    try:
        reader.start()
        with child.stdin as stdin:
            json.dump([asdict(item) for item in items], stdin)
        yield lines
    finally:
        child.kill()
        child.wait()
        reader.join()


def _next(lines: queue.Queue[dict[str, Any]]) -> dict[str, Any]:
    try:
        return lines.get(timeout=_POLL_S)
    except queue.Empty:
        return {}


def _as_error(told: dict[str, str]) -> UserError:
    kind: type[UserError] = getattr(errors, told["kind"])
    return kind(told["message"], hint=told.get("hint", ""))


# ── the other side ──────────────────────────────────────────────────────────────────────────────


def main() -> int:
    """The fetching process. It may be killed at any moment, and dies with whoever started it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    sys.stdout = sys.stderr  # what a library prints is no line of ours
    items = [Item(**entry) for entry in json.load(sys.stdin)]
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(_fetch, number, item) for number, item in enumerate(items)]
        finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in finished:
            if isinstance(error := job.exception(), UserError):
                told = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
                _tell({"error": told})
                os._exit(1)  # the other file in flight is given up; `run` sweeps
            if error is not None:
                raise error
    return 0


def _fetch(number: int, item: Item) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, XetDownloadError  # type: ignore[attr-defined]

    for attempt in range(1, _TRIES + 1):
        try:
            hf_hub_download(
                item.repo,
                item.name,
                revision=item.commit,
                force_download=item.again,
                tqdm_class=_counter(number, item),
            )
        except (OSError, ValueError, HTTPError, XetDownloadError) as error:
            if attempt == _TRIES or not _passing(error):
                raise as_error(error, item.repo, item.commit) from error
            time.sleep(attempt)
        else:
            _tell({"item": number, "bytes": item.bytes, "complete": True})
            return


def _passing(error: Exception) -> bool:
    """What the client does not try again by itself, but may go well the next time."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status >= 500 or "Consistency check failed" in str(error)


def _counter(number: int, item: Item) -> Any:  # noqa: ANN401  a tqdm, which is untyped
    """The client's progress bars as lines. Its bars of one file overlap: the furthest counts."""
    from tqdm import tqdm

    furthest, told_at = [0], [0.0]

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: Any) -> None:  # noqa: ANN401
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            furthest[0] = max(furthest[0], min(int(self.n), item.bytes))
            now = time.monotonic()
            if now - told_at[0] >= _TELL_EVERY_S:
                told_at[0] = now
                _tell({"item": number, "bytes": furthest[0], "complete": False})

    return Counter


_TELL = threading.Lock()


def _tell(line: dict[str, Any]) -> None:
    out = sys.__stdout__
    assert out is not None
    with _TELL:
        out.write(json.dumps(line) + "\n")
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
