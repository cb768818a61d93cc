"""CPU matmuls are as exact as plain torch, and a row does not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime import quant
from dflash_chat.runtime.quant import cpu
from dflash_chat.runtime.quant.dense import DenseWeight
from tests.runtime.gguf_writer import quantize_q4_1
from tests.runtime.quant.test_formats import random_weight

CPU = torch.device("cpu")
FORMATS = ("dense", "q4_0", "q4_1", "q8_0", "pack_quantized", "float_quantized")
DTYPES = (torch.float32, torch.bfloat16)

int8 = pytest.mark.skipif(not cpu.int8_serves(torch.bfloat16), reason="no fbgemm for this CPU")


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def rounding(x: Tensor, w: Tensor) -> float:
    """What one rounding of a sum in fp32 may be off by."""
    return 2**-24 * rms(x.abs().double() @ w.abs().double().T)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, cpu.INT4_MAX_ROWS, cpu.INT4_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_twice_plain_torchs(name: str, dtype: torch.dtype, rows: int) -> None:
    packed, truth = random_weight(name, 96, 160)
    x = torch.randn(rows, 160).to(dtype)
    exact = x.double() @ truth.T
    plain = F.linear(x, truth.to(dtype))
    ours = packed.to(CPU, dtype).matmul(x)
    assert (ours.dtype, ours.shape) == (dtype, (rows, 96))
    error, allowed = rms(ours - exact), 2 * rms(plain - exact) + rounding(x, truth)
    assert error <= allowed, f"rms error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("shape", [(96, 160), (64, 1536), (576, 576), (112, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "q4_1"])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    format_ = quant.load_format(name)
    parts = {"weight": weight} if name == "dense" else {"blocks": quantize_q4_1(weight)}
    ready = format_.pack(parts).to(CPU, dtype)
    x = torch.randn(17, shape[1], generator=generator).to(dtype)
    alone = torch.cat([ready.matmul(x[i : i + 1]) for i in range(17)])
    for rows in range(2, 18):
        assert torch.equal(ready.matmul(x[:rows]), alone[:rows]), f"{rows} rows"
        assert torch.equal(ready.matmul(x[17 - rows :]), alone[17 - rows :]), f"last {rows} rows"


def test_four_bits_stay_four_bits() -> None:
    packed, _ = random_weight("q4_1", 64, 256)
    ready = packed.to(CPU, torch.bfloat16)
    if not cpu.int4_serves(packed.shape, torch.bfloat16):
        pytest.skip("no int4 kernel on this CPU")
    assert isinstance(ready, cpu.Int4Weight)
    ready.matmul(torch.randn(1, 256).bfloat16())
    kernel_bytes = ready.nbytes - packed.nbytes
    assert kernel_bytes * 8 == 5 * 64 * 256  # 4 bits, and 32 bits of scale and zero per 32 weights


@int8
@pytest.mark.parametrize("rows", [13, 4176])  # the second in two chunks
def test_an_int8_copy_is_half_a_step_away(rows: int) -> None:
    chosen = torch.backends.quantized.engine
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[7], weight[8, 5] = 0, 40
    copy = cpu.Int8Copy.of(DenseWeight(weight))
    step = weight.float().abs().amax(1, keepdim=True) / 127
    exact = copy.dequantize()
    assert ((exact - weight.float()).abs() <= 0.501 * step).all()
    assert (exact[7] == 0).all()
    ids = torch.tensor([8, 0, 8])
    assert torch.equal(copy.rows(ids), exact[ids].bfloat16())
    assert torch.backends.quantized.engine == chosen, "what others pack is not our choice"


@int8
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_an_int8_copy_is_off_by_the_rounding_of_what_it_multiplies(rows: int) -> None:
    packed, _ = random_weight("q8_0", 96, 160)
    copy = cpu.Int8Copy.of(packed.to(CPU, torch.bfloat16))
    x = torch.randn(rows, 160).bfloat16()
    exact = x.double() @ copy.dequantize(torch.float64).T
    step = (x.max() - x.min()).double() / 127
    allowed = 0.51 * step * copy.dequantize().double().abs().sum(1) + 2**-8 * exact.abs()
    ours = copy.matmul(x)
    assert (ours.dtype, ours.shape) == (torch.bfloat16, (rows, 96))
    assert ((ours.double() - exact).abs() <= allowed).all()
    assert rms(ours.double() - exact) < 0.03 * rms(exact)


@pytest.mark.parametrize("shape", [(20, 64), (5, 32)])
@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
def test_row_counts_the_int4_kernel_refuses_still_multiply(
    name: str, shape: tuple[int, int]
) -> None:
    packed, truth = random_weight(name, *shape)
    x = torch.randn(3, shape[1]).bfloat16()
    ready = packed.to(CPU, torch.bfloat16)
    torch.testing.assert_close(ready.matmul(x).double(), x.double() @ truth.T, rtol=0.02, atol=0.02)


def test_wrong_activations_are_a_programming_error() -> None:
    packed, _ = random_weight("q4_1", 16, 32)
    with pytest.raises(AssertionError):
        packed.to(CPU, torch.bfloat16).matmul(torch.zeros(1, 32))


def test_a_weight_can_change_its_dtype() -> None:
    packed, truth = random_weight("q4_1", 16, 32)
    again = packed.to(CPU, torch.bfloat16).to(CPU, torch.float32)
    x = torch.randn(2, 32)
    torch.testing.assert_close(again.matmul(x), x @ truth.float().T)


def test_the_first_matmul_packs_and_counts_its_bytes() -> None:
    packed, _ = random_weight("q8_0", 16, 64)
    ready = packed.to(CPU, torch.float32)
    assert ready.nbytes == packed.nbytes
    ready.matmul(torch.zeros(1, 64))
    assert ready.nbytes == packed.nbytes + 16 * 64 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_the_error_is_at_most_twice_plain_torchs(name: str) -> None:
    packed, truth = random_weight(name, 96, 160)
    device = torch.device("cuda")
    x = torch.randn(5, 160).bfloat16()
    exact = x.double() @ truth.T
    plain = F.linear(x.to(device), truth.to(device, torch.bfloat16)).cpu()
    ours = packed.to(device, torch.bfloat16).matmul(x.to(device)).cpu()
    assert rms(ours - exact) <= 2 * rms(plain - exact) + rounding(x, truth)
