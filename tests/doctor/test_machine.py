"""Packages, the person's own catalogue and the disks: each line's healthy and failing form."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from dflash_chat.doctor import machine
from dflash_chat.doctor.line import State
from dflash_chat.progress import size

GB = 10**9


def test_python_is_named() -> None:
    (line,) = machine.python()
    assert line.state is State.OK
    assert line.text.startswith(".".join(map(str, sys.version_info[:3])))


@pytest.fixture
def needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs, as far as pip's records tell, a dflash-chat with these requirements."""

    def write(*requirements: str) -> None:
        info = tmp_path / "dflash_chat-9.dist-info"
        info.mkdir()
        wanted = "".join(f"Requires-Dist: {text}\n" for text in requirements)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dflash-chat\n{wanted}")
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


def test_packages_that_fit(needs: Callable[..., None]) -> None:
    needs("pytest<9,>=8", 'pytest-asyncio>=99; extra == "dev"')
    (line,) = machine.packages()
    assert (line.state, line.text) == (State.OK, f"pytest {metadata.version('pytest')}")


def test_packages_that_are_missing_or_do_not_fit(needs: Callable[..., None]) -> None:
    needs("pytest<2,>=1", "no-such-package>=3", "ruff")
    (line,) = machine.packages()
    assert line.state is State.FAIL
    pytest_version = metadata.version("pytest")
    assert line.text == f"pytest is {pytest_version}; no-such-package is missing"
    assert line.fix == 'pip install "pytest<2,>=1" "no-such-package>=3"'


def test_packages_when_pip_does_not_know_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGE", "dflash-chat-that-is-not-there")
    (line,) = machine.packages()
    assert line.state is State.SKIPPED


def test_a_catalogue_of_ones_own(own_folders: Path) -> None:
    (line,) = machine.catalogue()
    assert line.state is State.OK
    assert "none of your own" in line.text


@pytest.mark.parametrize("text", ["not TOML", "[[pair]]\nname = 3\n"])
def test_a_catalogue_of_ones_own_with_a_mistake(own_folders: Path, text: str) -> None:
    path = own_folders / "config" / "dflash-chat" / "models.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (line,) = machine.catalogue()
    assert line.state is State.FAIL
    assert str(path) in line.text
    assert line.fix.startswith(f"correct {path}")


def test_settings_of_ones_own(own_folders: Path) -> None:
    (line,) = machine.settings()
    assert (line.state, "none of your own" in line.text) == (State.OK, True)
    path = own_folders / "config" / "dflash-chat" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[keys]\nhelpp = "f7"\n')
    (line,) = machine.settings()
    assert line.state is State.FAIL
    assert f"{path}: there is no action 'helpp'" in line.text
    assert "help" in line.fix


@pytest.mark.parametrize(
    ("free", "state"), [(300 * GB, State.OK), (3 * GB, State.WARN), (GB // 10, State.FAIL)]
)
def test_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: State
) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    (line,) = machine.disk("hub cache", tmp_path / "to" / "come", "HF_HOME")
    assert line.state is state
    assert size(free) in line.text
    assert ("HF_HOME" in line.fix) is (state is not State.OK)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (line,) = machine.disk("own cache", tmp_path / "file" / "cache", "DFLASH_CHAT_CACHE")
    assert line.state is State.FAIL
    assert "DFLASH_CHAT_CACHE" in line.fix
