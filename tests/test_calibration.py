"""Measured costs outlive the program, and no file of them can do harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat import calibration
from dflash_chat.calibration import Key, Known
from dflash_chat.runtime.costs import CostTable
from dflash_chat.speed import Costs, Survival

KEY = Key("RTX 3090", "580.1", "gemma-4-26b-a4b", "int4")
RIG = "fp8 drafter"
TABLE = CostTable((1, 2, 4, 16), (64, 4096), (2.8, 3.0), ((5, 5.6), (6, 6), (8, 9), (17, 18)))
COSTS = Costs.of(TABLE, 2048)
SURVIVAL = Survival((0.7, 0.5, 0.5, 0.0), 812)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFLASH_CHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_written_is_read() -> None:
    assert calibration.read(KEY) == Known()
    calibration.write(KEY, RIG, TABLE)
    assert calibration.read(KEY) == Known(COSTS)


@pytest.mark.parametrize("field", ["gpu", "driver", "pair", "build"], ids=range(4))
def test_a_measurement_holds_for_its_card_driver_pair_and_build_alone(field: str) -> None:
    calibration.write(KEY, RIG, TABLE)
    assert calibration.read(replace(KEY, **{field: "another"})) == Known()


def test_a_table_is_taken_again_only_for_the_same_rig() -> None:
    calibration.write(KEY, RIG, TABLE)
    assert calibration.table(KEY, RIG) == TABLE
    assert calibration.table(KEY, "bf16 drafter") is None
    assert calibration.read(KEY) == Known(COSTS)


def test_measurements_live_side_by_side_and_the_last_one_counts() -> None:
    other = replace(KEY, build="fp8")
    calibration.write(KEY, RIG, TABLE)
    calibration.write(other, RIG, TABLE)
    newer = CostTable((1, 2), (64,), (2.5,), ((5.0,), (5.5,)))
    calibration.write(KEY, RIG, newer)
    assert calibration.table(KEY, RIG) == newer
    assert calibration.read(other).costs is not None


def test_acceptance_and_costs_are_kept_beside_each_other_in_any_order() -> None:
    calibration.write_survival(KEY, SURVIVAL)
    assert calibration.read(KEY) == Known(None, SURVIVAL)
    calibration.write(KEY, RIG, TABLE)
    assert calibration.read(KEY) == Known(COSTS, SURVIVAL)
    newer = Survival((0.8,), 20)
    calibration.write_survival(KEY, newer)
    assert calibration.read(KEY) == Known(COSTS, newer)
    assert calibration.table(KEY, RIG) == TABLE


def test_an_entry_from_before_acceptance_was_kept_still_has_its_costs() -> None:
    calibration.file().parent.mkdir(parents=True)
    old = {str(KEY): {"rig": RIG, "costs": TABLE.to_dict()}}
    calibration.file().write_text(json.dumps(old))
    assert calibration.read(KEY) == Known(COSTS)


@pytest.mark.parametrize(
    "acceptance",
    [
        None, 3, {}, {"survival": []}, {"survival": [0.5]}, {"survival": [0.5], "tokens": 0},
        {"survival": [], "tokens": 9}, {"survival": [0.5, 0.6], "tokens": 9},
        {"survival": [1.1], "tokens": 9}, {"survival": [0.1, -0.1], "tokens": 9},
        {"survival": [float("nan")], "tokens": 9}, {"survival": [0.5], "tokens": float("inf")},
        {"survival": ["x"], "tokens": 9},
    ],
    ids=range(13),
)  # fmt: skip
def test_an_acceptance_that_cannot_be_is_none_and_costs_stay(acceptance: object) -> None:
    calibration.write(KEY, RIG, TABLE)
    entries = json.loads(calibration.file().read_text())
    entries[str(KEY)]["acceptance"] = acceptance
    calibration.file().write_text(json.dumps(entries))
    assert calibration.read(KEY) == Known(COSTS)


def test_without_a_card_a_measurement_holds_for_this_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Key("", "", "smollm2-135m", "q4_1")
    monkeypatch.setattr(calibration, "processor", lambda: "CPU one")
    calibration.write(here, RIG, TABLE)
    assert calibration.read(here).costs == COSTS
    monkeypatch.setattr(calibration, "processor", lambda: "CPU two")
    assert calibration.read(here) == Known()


def test_the_processor_has_a_name() -> None:
    assert calibration.processor().removeprefix("CPU ").strip()


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, {"rig": RIG}, {"costs": None}, {"costs": []}, {"costs": {"version": 1}},
        {"costs": TABLE.to_dict() | {"version": 0}}, {"costs": TABLE.to_dict() | {"widths": [1]}},
        {"costs": TABLE.to_dict() | {"draft_ms": [1.0, float("nan")]}},
        {"costs": CostTable.even((1,)).to_dict()},
    ],
    ids=range(11),
)  # fmt: skip
def test_an_entry_that_is_no_measurement_is_none(entry: object) -> None:
    calibration.file().parent.mkdir(parents=True)
    calibration.file().write_text(json.dumps({str(KEY): entry}))
    assert calibration.read(KEY) == Known()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1', "\x00", "[" * 100_000], ids=range(6))
def test_a_broken_file_is_no_measurement_and_is_replaced(text: str) -> None:
    calibration.file().parent.mkdir(parents=True)
    calibration.file().write_text(text)
    assert calibration.read(KEY) == Known()
    calibration.write(KEY, RIG, TABLE)
    assert calibration.read(KEY) == Known(COSTS)


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_measurement(folder: Path) -> None:
    folder.parent.joinpath("cache").write_text("a file in the way")
    calibration.write(KEY, RIG, TABLE)
    assert calibration.read(KEY) == Known()
    assert list(folder.parent.iterdir()) == [folder]
