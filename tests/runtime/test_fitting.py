"""What a plan does to the options of a load, and what a load leaves for the next plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dflash_chat import calibration, gpu, pairs, planner
from dflash_chat.budget import CUDA_CONTEXT
from dflash_chat.calibration import Key
from dflash_chat.candidates import COMFORTABLE
from dflash_chat.gpu import Gpu, Survey
from dflash_chat.hub import Installed
from dflash_chat.planner import Wishes
from dflash_chat.runtime import fitting, memory
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.controller import Controller
from dflash_chat.runtime.costs import Costs, CostTable
from dflash_chat.speed import Survival

GIB = 2**30
CARD = Gpu(0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB, None, (8, 9), "580.1")
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def installed(own_folders: Path) -> Installed:
    pair = pairs.find("gemma-4-26b-a4b")
    return Installed(pair, pair.build("int4"), own_folders, own_folders, 0)


def test_the_card_is_the_one_that_torch_counts_and_our_context_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = replace(CARD, index=1, uuid="GPU-2")
    monkeypatch.setattr(gpu, "survey", lambda: Survey((CARD, second)))
    monkeypatch.setattr(memory, "available", lambda: 20 * GIB)
    assert fitting.card_of(CUDA) == replace(CARD, free=20 * GIB + CUDA_CONTEXT)
    found = fitting.card_of(torch.device("cuda", 1))
    assert found is not None
    assert found.uuid == "GPU-2"


def test_without_nvml_or_on_a_cpu_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "survey", lambda: Survey(problem="there is no driver"))
    assert fitting.card_of(CUDA) is None
    assert fitting.card_of(torch.device("cpu")) is None


def test_a_load_is_planned_as_the_command_says(installed: Installed) -> None:
    options = fitting.planned(installed, EngineOptions(), CARD, BF16)
    made = planner.plan(installed.pair, Wishes("int4"), CARD)
    assert options == replace(made.options, draft_tokens=0)
    assert options.context_tokens == COMFORTABLE


@pytest.mark.parametrize("card", [CARD, None])
def test_a_cpu_and_wide_activations_are_left_as_they_are(
    installed: Installed, card: Gpu | None
) -> None:
    dtype = torch.float32 if card else BF16
    assert fitting.planned(installed, EngineOptions(), card, dtype) == EngineOptions()


class Measured:
    """Of an engine what `fitting.measure` needs; counts how often it measures."""

    target = SimpleNamespace(kernels="ours", device=CUDA)
    draft_tokens = 3
    table = CostTable((1, 2, 4), (64,), (1.0,), ((5.0,), (5.5,), (7.0,)))

    def __init__(self, graphed: bool = True, present: CostTable | None = None) -> None:
        self.graphed = SimpleNamespace(widths=[1, 2, 4]) if graphed else None
        self.present = present
        self.compared: list[CostTable] = []
        self.measured: list[CostTable | None] = []
        self.survival: Sequence[float] = ()

    def at_present(self, known: CostTable) -> CostTable | None:
        self.compared.append(known)
        return self.present

    def measure(
        self, pinned: bool, known: CostTable | None = None, survival: Sequence[float] = ()
    ) -> None:
        self.measured.append(known)
        self.survival = survival
        self.controller = Controller(Costs(known or self.table), 3, late=True)


def test_measured_costs_are_kept_for_the_next_plan_and_the_next_start(
    installed: Installed,
) -> None:
    for known in (None, Measured.table):
        engine = Measured()
        fitting.measure(installed, cast(Any, engine), EngineOptions(), CARD)
        assert engine.measured == [known]
    kept = calibration.read(Key(CARD.name, "580.1", "gemma-4-26b-a4b", "int4")).costs
    assert kept is not None
    assert kept.verify_ms == {1: 5.0, 2: 5.5, 4: 7.0}
    assert kept.draft_ms == 1.0
    made = planner.plan(installed.pair, Wishes("int4"), CARD, measured=calibration.read)
    assert made.measured
    assert made.costs is not None
    assert made.costs.plain == 200
    coarser = Measured()
    fitting.measure(installed, cast(Any, coarser), EngineOptions(head="fp8"), CARD)
    assert coarser.measured == [None]


@pytest.mark.parametrize(("graphed", "card"), [(False, CARD), (True, None)])
def test_without_graphs_or_a_card_every_start_measures(
    installed: Installed, graphed: bool, card: Gpu | None
) -> None:
    engine = Measured(graphed)
    fitting.measure(installed, cast(Any, engine), EngineOptions(), card)
    assert engine.measured == [None]
    assert not calibration.file().exists()


class OnCpu(Measured):
    """The same on a processor, whose speed may have changed."""

    target = SimpleNamespace(kernels="ours", device=torch.device("cpu"))


def test_on_a_cpu_what_was_measured_is_looked_at_again(installed: Installed) -> None:
    first = OnCpu(graphed=False)
    fitting.measure(installed, cast(Any, first), EngineOptions(), None)
    assert first.measured == [None]
    assert not first.compared

    slower = Measured.table.scaled(1.2)
    again = OnCpu(graphed=False, present=slower)
    fitting.measure(installed, cast(Any, again), EngineOptions(), None)
    assert again.compared == [Measured.table]
    assert again.measured == [slower]

    other = OnCpu(graphed=False)  # its passes do not compare any more
    other.table = Measured.table.scaled(3.0)
    fitting.measure(installed, cast(Any, other), EngineOptions(), None)
    assert other.compared == [Measured.table], "a good look does not replace the measurement"
    assert other.measured == [None]
    kept = calibration.read(fitting.key_of(installed, None)).costs
    assert kept is not None
    assert kept.verify_ms == {1: 15.0, 2: 16.5, 4: 21.0}


def test_another_number_of_threads_is_measured_anew(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads in (2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        engine = OnCpu(graphed=False, present=Measured.table)
        fitting.measure(installed, cast(Any, engine), EngineOptions(), None)
        assert engine.measured == [None]


SURVIVAL = Survival((0.6, 0.3, 0.1), 50)


@pytest.mark.parametrize("card", [CARD, None], ids=["card", "CPU"])
def test_acceptance_is_kept_for_the_device_beside_the_costs(
    installed: Installed, card: Gpu | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "card_of", lambda _: card)
    engine = Measured() if card else OnCpu(graphed=False)
    fitting.measure(installed, cast(Any, engine), EngineOptions(), card)
    assert fitting.keep_survival(installed, cast(Any, engine), SURVIVAL)
    kept = calibration.read(fitting.key_of(installed, card))
    assert kept.survival == SURVIVAL
    assert kept.costs is not None
    assert kept.costs.verify_ms == {1: 5.0, 2: 5.5, 4: 7.0}
    made = planner.plan(installed.pair, Wishes("int4"), card, measured=calibration.read)
    assert made.survival == SURVIVAL
    assert not engine.survival
    fitting.measure(installed, cast(Any, engine), EngineOptions(), card)
    assert engine.survival == SURVIVAL.shares


def test_a_card_that_nvml_does_not_tell_of_keeps_nothing(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "card_of", lambda _: None)
    engine = Measured()
    engine.measure(False)
    assert not fitting.keep_survival(installed, cast(Any, engine), SURVIVAL)
    assert not calibration.file().exists()
