"""Every format means what its formula says, one weight at a time, and gathers and joins exactly."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from dflash_chat.runtime import quant
from dflash_chat.runtime.quant import Packed, q4_1
from dflash_chat.runtime.quant.stacked import StackedWeight
from tests.runtime.gguf_writer import quantize_q4_1

FORMATS = ("q4_0", "q4_1", "q8_0", "pack_quantized", "float_quantized")


def half(generator: torch.Generator) -> tuple[bytes, float]:
    raw = struct.pack("<e", torch.randn((), generator=generator).item() * 0.05)
    return raw, struct.unpack("<e", raw)[0]


def block(name: str, generator: torch.Generator) -> tuple[bytes, list[float]]:
    """One random block and its 32 weights by the plain formula."""
    raw, d = half(generator)
    if name == "q8_0":
        q = torch.randint(-128, 128, (32,), generator=generator).tolist()
        return raw + struct.pack("<32b", *q), [d * value for value in q]
    m = 0.0
    if name == "q4_1":
        minimum, m = half(generator)
        raw += minimum
    q = torch.randint(0, 16, (32,), generator=generator).tolist()
    raw += bytes(q[i] | q[i + 16] << 4 for i in range(16))
    return raw, [d * (v - 8) if name == "q4_0" else d * v + m for v in q]


def random_weight(name: str, n: int, k: int, seed: int = 0) -> tuple[Packed, Tensor]:
    """A packed weight and its truth in fp64, [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    if name == "dense":
        weight = torch.randn(n, k, generator=generator) * 0.05
        return quant.load_format(name).pack({"weight": weight}), weight.double()
    if name == "pack_quantized":
        return random_int4(n, k, generator)
    if name == "float_quantized":
        q = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        scale = (torch.rand(n, 1, generator=generator) * 0.05).bfloat16()
        packed = quant.load_format(name).pack({"weight": q, "scale": scale})
        return packed, q.double() * scale.double()
    made = [[block(name, generator) for _ in range(k // 32)] for _ in range(n)]
    raw = bytearray(b"".join(raw for row in made for raw, _ in row))
    truth = [[w for _, ws in row for w in ws] for row in made]
    blocks = torch.frombuffer(raw, dtype=torch.uint8).view(n, -1)
    return quant.load_format(name).pack({"blocks": blocks}), torch.tensor(truth).double()


def random_int4(n: int, k: int, generator: torch.Generator) -> tuple[Packed, Tensor]:
    """Asymmetric groups of 32: element i in word i // 8 at bit 4·(i mod 8)."""
    q = torch.randint(0, 16, (n, k), generator=generator)
    zero = torch.randint(0, 16, (n, k // 32), generator=generator)
    scale = (torch.rand(n, k // 32, generator=generator) * 0.05).bfloat16()
    parts = {"packed": words(q), "zero_point": words(zero.T).T.contiguous(), "scale": scale}
    truth = (q.view(n, -1, 32) - zero[..., None]) * scale[..., None].double()
    return quant.load_format("pack_quantized").pack(parts), truth.flatten(1)


def words(values: Tensor) -> Tensor:
    """[.., K] in 0..15 -> int32 [.., ⌈K/8⌉]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % 8))
    shifted = padded.view(*values.shape[:-1], -1, 8) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_the_formula(name: str) -> None:
    packed, truth = random_weight(name, 5, 96)
    assert packed.shape == (5, 96)
    torch.testing.assert_close(packed.dequantize(), truth.float(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_rows_are_the_rows(name: str) -> None:
    packed, _ = random_weight(name, 48, 64)
    ids = torch.tensor([3, 0, 47, 3])
    assert torch.equal(packed.rows(ids), packed.dequantize()[ids])
    for dtype in (torch.float32, torch.bfloat16):
        ready = packed.to(torch.device("cpu"), dtype)
        assert torch.equal(ready.rows(ids), packed.dequantize()[ids].to(dtype))


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_weights_of_one_format_join_into_one(name: str) -> None:
    parts = [random_weight(name, n, 64, seed=n)[0] for n in (16, 32, 48)]
    joined = quant.cat(parts)
    assert not isinstance(joined, StackedWeight)
    assert joined.shape == (96, 64)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_weights_of_several_formats_stay_apart_behind_one_face() -> None:
    parts = [random_weight(name, 32, 64)[0] for name in ("q4_1", "q8_0", "dense")]
    joined = quant.cat(parts)
    x = torch.randn(3, 64)
    assert joined.shape == (96, 64)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    ready = joined.to(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ready.matmul(x), x @ joined.dequantize().T)
    assert torch.equal(joined.rows(torch.tensor([40])), joined.dequantize()[40:41])


def test_one_weight_joins_to_itself() -> None:
    packed, _ = random_weight("q4_1", 16, 32)
    assert quant.cat([packed]) is packed


def test_there_is_no_other_format() -> None:
    with pytest.raises(ModuleNotFoundError):
        quant.load_format("q6_k")


def test_quantize_rounds_to_the_nearest_step() -> None:
    weight = torch.randn(8, 96)
    groups = weight.view(8, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (q4_1.dequantize(quantize_q4_1(weight)) - weight).view(8, 3, 32).abs().amax(-1)
    assert (error <= step * 0.51).all()


def test_quantize_keeps_constant_groups() -> None:
    weight = torch.full((1, 32), 0.5)
    assert torch.equal(q4_1.dequantize(quantize_q4_1(weight)), weight)
