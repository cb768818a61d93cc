"""What compressed-tensors wrote means the same here, bit for bit, and still multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dflash_chat.runtime import quant
from dflash_chat.runtime.quant import Experts, Packed, cpu, float_quantized, pack_quantized
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight
from dflash_chat.runtime.quant.stacked import StackedWeight
from tests.runtime import compressed
from tests.runtime.compressed import FP8, INT4, compress, fp8, parts, random_matrix

CPU = torch.device("cpu")
META = torch.device("meta")  # stands for any device that is not the CPU
BF16 = torch.bfloat16


def int4(scales: str, symmetric: bool, n: int = 48, k: int = 384, seed: int = 0) -> Packed:
    written, _ = compress(random_matrix(n, k, seed=seed), compressed.int4(scales, symmetric))
    return pack_quantized.pack(parts(written))


def float8(scales: str, n: int, k: int = 200, seed: int = 0) -> Packed:
    written, _ = compress(random_matrix(n, k, seed=seed), fp8(scales))
    return float_quantized.pack(parts(written))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scales", INT4)
def test_int4_means_what_the_library_says(scales: str, symmetric: bool, dtype: torch.dtype) -> None:
    weight = random_matrix(44, 384, dtype)  # 44 rows do not fill the last word of zero points
    written, truth = compress(weight, compressed.int4(scales, symmetric))
    assert ("weight_zero_point" in written) is not symmetric
    shape, scheme = pack_quantized.describe("w.weight", parts(written))
    packed = pack_quantized.pack(parts(written))
    assert packed.shape == shape == (44, 384)
    assert scales in scheme.scales
    assert scheme.symmetry == {"symmetric" if symmetric else "asymmetric"}
    assert torch.equal(packed.dequantize(dtype), truth)
    assert (packed.dequantize() - weight.float()).abs().max() < 0.6


def test_a_width_that_does_not_fill_a_word_needs_its_shape() -> None:
    written, truth = compress(random_matrix(16, 20), compressed.int4("channel", False))
    packed = pack_quantized.pack(parts(written))
    assert packed.shape == (16, 20)
    assert torch.equal(packed.dequantize(BF16), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 128), (200, 384)])
@pytest.mark.parametrize("scales", FP8)
def test_fp8_means_what_the_library_says(
    scales: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_matrix(*shape, dtype=dtype)
    written, truth = compress(weight, fp8(scales))
    packed = float_quantized.pack(parts(written))
    assert packed.shape == shape
    assert torch.equal(packed.dequantize(dtype), truth)
    torch.testing.assert_close(packed.dequantize(), weight.float(), rtol=0.08, atol=0.01)


def test_a_block_scale_may_be_called_inverse_and_still_multiplies() -> None:
    written, truth = compress(random_matrix(256, 256), fp8("block"))
    renamed = {"weight": written["weight"], "scale_inv": written["weight_scale"]}
    assert torch.equal(float_quantized.pack(renamed).dequantize(BF16), truth)


def test_blocks_may_end_within_a_row() -> None:
    weight = random_matrix(130, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    packed = float_quantized.pack({"weight": weight, "scale": scale})
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :200]
    assert torch.equal(packed.dequantize(), weight.float() * whole)


def test_a_scalar_scales_the_whole_tensor() -> None:
    weight = random_matrix(16, 32).to(torch.float8_e4m3fn)
    packed = float_quantized.pack({"weight": weight, "scale": torch.tensor(0.5)})
    assert torch.equal(packed.dequantize(), weight.float() * 0.5)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scales", INT4)
def test_on_a_cpu_four_bits_stay_four_bits_in_torchs_kernel(scales: str, symmetric: bool) -> None:
    packed = int4(scales, symmetric)
    ready = packed.to(CPU, BF16)
    if not cpu.int4_serves(packed.shape, BF16):
        pytest.skip("no int4 kernel on this CPU")
    assert ready.kernel == "int4"
    truth = packed.dequantize().double()
    for rows in (1, 7, cpu.INT4_MAX_ROWS + 1):
        x = torch.randn(rows, 384).to(BF16)
        exact = x.double() @ truth.T
        plain = (F.linear(x, truth.to(BF16)) - exact).square().mean().sqrt()
        ours = (ready.matmul(x) - exact).square().mean().sqrt()
        assert ours <= 2 * plain + 1e-6


@pytest.mark.parametrize("scales", ["group 64", "group 128"])
def test_an_int4_row_does_not_depend_on_the_rows_beside_it(scales: str) -> None:
    ready = int4(scales, False, n=96).to(CPU, BF16)
    x = torch.randn(17, 384).to(BF16)
    alone = torch.cat([ready.matmul(x[i : i + 1]) for i in range(17)])
    for rows in range(2, 18):
        assert torch.equal(ready.matmul(x[:rows]), alone[:rows]), f"{rows} rows"


def test_a_group_torchs_kernel_does_not_take_is_dequantised_once() -> None:
    written, _ = compress(
        random_matrix(48, 80),
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16},
    )
    packed = pack_quantized.pack(parts(written))
    ready = packed.to(CPU, BF16)
    assert ready.kernel != "int4"
    x = torch.randn(3, 80).to(BF16)
    torch.testing.assert_close(ready.matmul(x), F.linear(x, packed.dequantize(BF16)))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_on_a_device_four_bits_stay_four_bits(symmetric: bool) -> None:
    packed = int4("group 32", symmetric)
    moved = packed.to(META, BF16)
    assert isinstance(moved, Int4GroupWeight)
    assert moved.nbytes == packed.nbytes
    assert moved.nbytes * 8 == 48 * 384 * 4 + 48 * 12 * (16 if symmetric else 24)
    assert moved.matmul(torch.empty(3, 384, dtype=BF16, device=META)).shape == (3, 48)
    assert moved.rows(torch.zeros(2, dtype=torch.int64, device=META)).dtype == BF16


def test_on_a_device_eight_bits_stay_eight_bits() -> None:
    packed = float8("block", 256, 384)
    moved = packed.to(META, BF16)
    assert isinstance(moved, Float8Weight)
    assert moved.nbytes == packed.nbytes == 256 * 384 + 2 * 3 * 2
    assert moved.matmul(torch.empty(3, 384, dtype=BF16, device=META)).shape == (3, 256)
    assert moved.rows(torch.zeros(2, dtype=torch.int64, device=META)).dtype == BF16


@pytest.mark.parametrize("sizes", [(128, 256, 64), (100, 128)], ids=["whole blocks", "cut blocks"])
@pytest.mark.parametrize("scales", FP8)
def test_fp8_weights_join_into_one(scales: str, sizes: tuple[int, ...]) -> None:
    weights = [float8(scales, n, 256, seed=n) for n in sizes]
    joined = quant.cat(weights)
    assert isinstance(joined, Float8Weight)
    assert torch.equal(joined.dequantize(), torch.cat([w.dequantize() for w in weights]))
    assert (joined.block == (128, 128)) is (scales == "block" and sizes[0] == 128)


def test_weights_of_different_groups_or_symmetry_stay_apart() -> None:
    first = int4("group 32", True)
    for other in (int4("group 64", True), int4("group 32", False), float8("channel", 48, 384)):
        joined = quant.cat([first, other])
        assert isinstance(joined, StackedWeight)
        assert torch.equal(joined.dequantize()[48:], other.dequantize())


def stacked(name: str, experts: int = 3) -> tuple[Packed, list[Packed]]:
    """Experts in one weight, and each of them alone."""
    kinds = {
        "int4": (pack_quantized, compressed.int4("group 32", True)),
        "int4 with zeros": (pack_quantized, compressed.int4("group 32", False)),
        **{f"fp8 {scales}": (float_quantized, fp8(scales)) for scales in FP8},
    }
    format_, weights = kinds[name]
    written = [parts(compress(random_matrix(40, 128, seed=e), weights)[0]) for e in range(experts)]
    together = {part: torch.stack([w[part] for w in written]) for part in written[0]}
    return format_.pack(together), [format_.pack(alone) for alone in written]


@pytest.mark.parametrize(
    "name", ["int4", "int4 with zeros", "fp8 channel", "fp8 tensor", "fp8 block"]
)
def test_an_expert_is_a_view_of_the_stack(name: str) -> None:
    stack, alone = stacked(name)
    moved = stack.to(META, BF16)
    ready = stack.to(CPU, BF16)
    assert isinstance(stack, Experts)
    assert isinstance(moved, Experts)
    assert isinstance(ready, Experts)
    assert stack.shape == (3, 40, 128)
    assert moved.nbytes == stack.nbytes
    x = torch.randn(2, 128).to(BF16)
    for e, expert in enumerate(alone):
        assert stack.expert(e).shape == (40, 128)
        assert torch.equal(stack.expert(e).dequantize(), expert.dequantize())
        assert torch.equal(stack.dequantize()[e], expert.dequantize())
        assert torch.equal(ready.expert(e).matmul(x), F.linear(x, expert.dequantize(BF16)))
    tensor = "packed" if "int4" in name else "weight"
    storages = {getattr(w, tensor).untyped_storage().data_ptr() for w in (stack, stack.expert(2))}
    assert len(storages) == 1


@pytest.mark.parametrize("name", ["int4", "int4 with zeros", "fp8 tensor", "fp8 block"])
def test_stacks_join_expert_by_expert(name: str) -> None:
    stack, alone = stacked(name)
    joined = quant.cat([stack, stack])
    assert isinstance(joined, Experts)
    assert joined.shape == (3, 80, 128)
    for e, expert in enumerate(alone):
        assert torch.equal(joined.expert(e).dequantize(), expert.dequantize().repeat(2, 1))


def test_dense_experts_are_slices_too() -> None:
    weight = torch.randn(3, 8, 16)
    stack = quant.load_format("dense").pack({"weight": weight}).to(CPU, BF16)
    assert isinstance(stack, Experts)
    assert torch.equal(stack.expert(1).dequantize(BF16), weight[1].to(BF16))
    assert quant.cat([stack, stack]).shape == (3, 16, 16)
