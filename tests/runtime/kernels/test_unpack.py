"""int4 → bf16, and a weight that holds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import kernels
from dflash_chat.runtime.kernels import forms, unpack
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.quant import Packed, kernel_weights
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good, relative_error


def int4(*shape: int, group: int, zeros: bool) -> Int4GroupWeight:
    """As the file has it."""
    generator = torch.Generator().manual_seed(sum(shape))
    *rows, columns = shape
    words = torch.randint(-(2**31), 2**31, (*rows, columns // 8), generator=generator)
    scale = (torch.rand(*rows, columns // group, generator=generator) + 0.5).bfloat16()
    zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8)
    packed = words.to(torch.int32).to(DEVICE)
    return Int4GroupWeight(
        shape, packed, scale.to(DEVICE), zero.to(DEVICE) if zeros else None, torch.bfloat16
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DEVICE were a GPU for `to`, which prepares 2-D weights for a CPU in other ways."""
    monkeypatch.setattr(kernels, "serve", lambda *_: True)


def for_kernels(weight: Int4GroupWeight) -> Packed:
    return weight._for_kernels()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 33])
def test_projections(rows: int, group: int, zeros: bool) -> None:
    weight = int4(rows, 384, group=group, zeros=zeros)
    ready = for_kernels(weight)
    assert isinstance(ready, kernel_weights.KernelWeight)
    assert isinstance(ready.form, forms.Int4)
    if zeros:  # they round to bf16
        assert relative_error(ready.dequantize(), weight.dequantize()) < 2**-8
    else:
        assert torch.equal(ready.dequantize(), weight.dequantize())
        assert torch.equal(ready.dequantize(LOW), weight.dequantize(LOW))
    assert torch.equal(unpack.unpack(ready.form, LOW), ready.dequantize(LOW))
    ids = torch.tensor([0, rows - 1], device=DEVICE)
    assert torch.equal(ready.rows(ids), ready.dequantize(torch.bfloat16)[ids])
    if not zeros:
        assert torch.equal(ready.rows(ids), weight.rows(ids))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_a_projection_beside_experts(group: int, zeros: bool) -> None:
    """Is the same tensors, and still multiplies by itself."""
    ready = for_kernels(int4(33, 320, group=group, zeros=zeros))
    form = kernel_weights.experts(ready)
    assert isinstance(form, MoeWeight)
    linear = kernel_weights.linear(ready)
    assert isinstance(linear, forms.Int4)
    assert form.data is linear.words
    assert form.shape == ready.shape == (33, 320)
    assert torch.equal(form.dequantize(), ready.dequantize())


def test_experts_are_packed_one_by_one(served: None) -> None:
    weight = int4(3, 8, 128, group=32, zeros=False)
    ready = weight.to(DEVICE, torch.bfloat16)
    assert isinstance(ready, kernel_weights.KernelWeight)
    assert ready.shape == (3, 8, 128)
    assert torch.equal(ready.dequantize(), weight.dequantize())
    assert torch.equal(ready.expert(2).dequantize(), weight.expert(2).dequantize())
    assert ready.nbytes == weight.packed.nbytes + weight.scale.nbytes


@pytest.mark.parametrize("group", [16, 384])
def test_groups_without_a_kernel_stay_as_the_file_has_them(served: None, group: int) -> None:
    weight = int4(2, 8, 384, group=group, zeros=False)
    ready = weight.to(DEVICE, torch.bfloat16)
    assert isinstance(ready, Int4GroupWeight)
    with pytest.raises(CheckpointError):
        kernel_weights.experts(ready)


def fp8(*shape: int) -> tuple[Float8Weight, kernel_weights.KernelWeight]:
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-1], 1) + 0.5
    weight = Float8Weight(q.to(DEVICE), scale.to(DEVICE), (1, shape[-1]))
    return weight, kernel_weights.fp8(weight.weight, weight.scale)


def test_fp8_is_lent_not_copied() -> None:
    weight, ready = fp8(24, 64)
    assert torch.equal(ready.dequantize(), weight.dequantize())
    form = kernel_weights.experts(ready)
    assert form.data.data_ptr() == weight.weight.data_ptr()
    assert torch.equal(ready.dequantize(), weight.dequantize())
    weight, ready = fp8(3, 24, 64)
    assert torch.equal(ready.expert(1).dequantize(), weight.expert(1).dequantize())


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_matmul_of_few_and_many_rows(kind: str, rows: int) -> None:
    plain: Packed
    if kind == "fp8":
        plain, ready = fp8(48, 128)
    else:
        plain = int4(48, 128, group=32, zeros=False)
        held = for_kernels(plain)
        assert isinstance(held, kernel_weights.KernelWeight)
        ready = held
    x: Tensor = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, LOW)
    truth = x.double() @ plain.dequantize(torch.float64).T
    assert_as_good(ready.matmul(x), x @ plain.dequantize(LOW).T, truth)
