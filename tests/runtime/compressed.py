"""Weights quantised by the real compressed-tensors library, and its own word of what they mean."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

INT4: dict[str, dict[str, Any]] = {
    "group 32": {"strategy": "group", "group_size": 32},
    "group 64": {"strategy": "group", "group_size": 64},
    "group 128": {"strategy": "group", "group_size": 128},
    "channel": {"strategy": "channel"},
}
FP8: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
    "block": {"strategy": "block", "block_structure": [128, 128]},
}


def int4(scales: str, symmetric: bool) -> dict[str, Any]:
    """The `weights` object of a config group."""
    return {"num_bits": 4, "type": "int", "symmetric": symmetric, **INT4[scales]}


def fp8(scales: str) -> dict[str, Any]:
    """The `weights` object of a config group."""
    return {"num_bits": 8, "type": "float", "symmetric": True, **FP8[scales]}


def qparams(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scale and zero point by the extremes of each group, row, tensor or block."""
    n, k = weight.shape
    match args.strategy:
        case "group":
            areas = weight.view(n, -1, args.group_size)
            low, high = areas.amin(-1), areas.amax(-1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "tensor":
            low, high = weight.amin().view(1), weight.amax().view(1)
        case _:
            side = 128
            padded = torch.nn.functional.pad(weight, (0, -k % side, 0, -n % side))
            areas = padded.unfold(0, side, side).unfold(1, side, side)
            low, high = areas.amin((-1, -2)), areas.amax((-1, -2))
    return calculate_qparams(low, high, args)


def compress(weight: Tensor, weights: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors by their names in the module, and what the library decompresses them to."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    name = "pack-quantized" if args.type == "int" else "float-quantized"
    compressor = BaseCompressor.get_value_from_registry(name)
    scale, zero = qparams(weight, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(tensors, scheme)["weight"]


def parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a format's `pack` takes them."""
    return {name.removeprefix("weight_"): tensor for name, tensor in tensors.items()}


def random_matrix(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows of different sizes, so that a scale out of place shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(n, 1, generator=generator) + 0.1
    return (torch.randn(n, k, generator=generator) * sizes + 0.05).to(dtype)
