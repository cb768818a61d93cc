"""The driver's and the cards' lines: what is wrong, and what to do about it here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat import gpu
from dflash_chat.doctor import cards
from dflash_chat.doctor.line import State
from dflash_chat.gpu import Cause, Gpu, Survey

GIB = 2**30
CARD = Gpu(0, "GPU-a", "NVIDIA H200", 140 * GIB, 139 * GIB, GIB, (9, 0), "580.95", (13, 0), 4800.0)
HEALTHY = Survey((CARD,), driver="580.95", cuda=(13, 0))


@pytest.fixture(autouse=True)
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders in which cards, containers and Windows show; empty at first."""
    monkeypatch.setattr(cards, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(cards, "_CONTAINERS", (tmp_path / "container",))
    monkeypatch.setattr(cards, "_WSL_DEVICE", tmp_path / "dxg")
    monkeypatch.setattr(gpu, "under_wsl", lambda: False)
    return tmp_path


def plug_in(computer: Path, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    device = computer / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


def test_a_working_driver() -> None:
    (line,) = cards.driver(HEALTHY)
    assert (line.state, line.text) == (State.OK, "580.95, for CUDA up to 13.0")


def test_cards_that_are_kept_from_us_are_counted() -> None:
    (line,) = cards.driver(replace(HEALTHY, hidden=2))
    assert line.state is State.OK
    assert "2 more" in line.text


@pytest.mark.parametrize("cause", [Cause.NO_DRIVER, Cause.NOT_LOADED, Cause.NO_CARD])
def test_without_a_card_no_driver_is_missed(computer: Path, cause: Cause) -> None:
    plug_in(computer, vendor="0x8086")
    (line,) = cards.driver(Survey(problem="p", cause=cause))
    assert line.state is State.SKIPPED


@pytest.mark.parametrize(
    ("cause", "fix"),
    [
        (Cause.NO_PACKAGE, "pip install"),
        (Cause.NO_DRIVER, "ubuntu-drivers"),
        (Cause.NOT_LOADED, "modprobe nvidia"),
        (Cause.MISMATCH, "restart"),
        (Cause.FORBIDDEN, "/dev/nvidia"),
        (Cause.SILENT, "dmesg"),
        (Cause.NO_CARD, "dmesg"),
        (Cause.NO_INSTANCE, "mig -cgi"),
    ],
)
def test_a_driver_that_does_not_work_fails_with_its_fix(
    computer: Path, cause: Cause, fix: str
) -> None:
    plug_in(computer)
    (line,) = cards.driver(Survey(problem="what NVML said", cause=cause))
    assert (line.state, line.text) == (State.FAIL, "what NVML said")
    assert fix in line.fix


def test_hiding_cards_may_be_meant() -> None:
    (line,) = cards.driver(Survey(problem="hidden", cause=Cause.HIDDEN, hidden=1))
    assert line.state is State.WARN
    assert "CUDA_VISIBLE_DEVICES" in line.fix


def test_one_card_that_works_is_enough() -> None:
    (line,) = cards.driver(replace(HEALTHY, problem="card 1 is lost", cause=Cause.SILENT))
    assert (line.state, line.text) == (State.WARN, "card 1 is lost")
    assert line.fix


def test_in_a_container_the_card_must_be_passed_in(computer: Path) -> None:
    plug_in(computer)
    (computer / "container").touch()
    (line,) = cards.driver(Survey(problem="p", cause=Cause.NO_DRIVER))
    assert "--gpus all" in line.fix


def test_under_wsl_the_driver_is_windows(computer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "under_wsl", lambda: True)
    (line,) = cards.driver(Survey(problem="p", cause=Cause.NO_DRIVER))
    assert line.state is State.SKIPPED
    (computer / "dxg").touch()
    (line,) = cards.driver(Survey(problem="p", cause=Cause.NO_DRIVER))
    assert line.state is State.FAIL
    assert "in Windows" in line.fix


def test_a_card() -> None:
    (line,) = cards.cards(HEALTHY)
    assert line.state is State.OK
    assert line.text == (
        "cuda:0 NVIDIA H200, 139.0 of 140.0 GiB free, compute capability 9.0, 4800 GB/s"
    )


def test_a_card_that_tells_little() -> None:
    bare = Gpu(0, "MIG-a", "A MIG instance", GIB, GIB, notes="a MIG instance")
    (line,) = cards.cards(Survey((bare,)))
    assert line.text == "cuda:0 A MIG instance, 1.0 of 1.0 GiB free, a MIG instance"


def test_a_card_that_others_fill() -> None:
    full = replace(CARD, free=GIB)
    (line,) = cards.cards(Survey((full,)))
    assert line.state is State.WARN
    assert "nvidia-smi" in line.fix


@pytest.mark.parametrize(
    ("vendor", "kind", "is_card"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),  # the sound that HDMI carries
        ("0x1002", "0x030000", False),
    ],
)
def test_what_counts_as_a_card(computer: Path, vendor: str, kind: str, is_card: bool) -> None:
    plug_in(computer, vendor, kind)
    assert cards.card_in_machine() is is_card
