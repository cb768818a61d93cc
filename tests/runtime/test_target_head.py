"""Which heads are rounded, which are screened, and who is told that it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dflash_chat.errors import UsageError
from dflash_chat.runtime import kernels, target_head
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import rounded
from tests.runtime.tiny import CPU

META = torch.device("meta")  # stands for any device that is not the CPU
BF16 = torch.bfloat16
SCREENED = EngineOptions(head="screened")


@dataclass
class Target:
    lm_head: Packed
    screen: Packed | None = None


def target() -> Target:
    return Target(DenseWeight(torch.randn(40, 64, dtype=BF16, device=META)))


@pytest.fixture
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "serve", lambda *_: True)


@pytest.mark.usefixtures("kernels_serve")
def test_a_screened_head_has_a_copy_in_int8_beside_it() -> None:
    made = target()
    dense = made.lm_head
    target_head.refuse_screening(SCREENED, META, BF16)
    target_head.settle(made, SCREENED, META, BF16)
    assert made.lm_head is dense
    assert made.screen is not None
    assert made.screen.shape == (40, 64)
    assert made.screen.nbytes == 40 * (64 + 8)


@pytest.mark.usefixtures("kernels_serve")
def test_a_quantised_head_is_not_screened() -> None:
    made = Target(rounded(torch.randn(40, 64)))
    target_head.settle(made, SCREENED, META, BF16)
    assert made.screen is None


@pytest.mark.parametrize("head", ["auto", "own"])
def test_a_head_nobody_wants_changed_stays(head: str) -> None:
    made = target()
    dense = made.lm_head
    target_head.settle(made, EngineOptions(head=head), META, BF16)
    assert made.lm_head is dense
    assert made.screen is None


def test_a_rounded_head_takes_the_places_of_the_files() -> None:
    made = target()
    target_head.settle(made, EngineOptions(head="fp8"), META, BF16)
    assert made.lm_head.nbytes < 40 * 64 * 2
    assert made.screen is None


def test_without_our_kernels_it_is_refused_where_somebody_asks_and_left_out_elsewhere() -> None:
    with pytest.raises(UsageError, match="needs our CUDA kernels") as caught:
        target_head.refuse_screening(SCREENED, CPU, BF16)
    assert "answers are the same" in caught.value.hint
    target_head.refuse_screening(EngineOptions(head="fp8"), CPU, BF16)
    made = target()
    target_head.settle(made, SCREENED, CPU, BF16)
    assert made.screen is None
