"""FP8 weights, compressed-tensors `float-quantized` and Qwen's own: w = q·s with q e4m3.

Source: the library's FloatQuantizationCompressor; Qwen's `weight_scale_inv` multiplies, too. s
belongs to a row (channel), a matrix (tensor) or a block of 128×128. In memory, for blocks (R, C):

    weight  float8_e4m3fn [N, K]     the file's bytes
    scale   [⌈N/R⌉, ⌈K/C⌉]           in the file's dtype; (R, C) is (1, K) or (128, 128)

A scale per tensor becomes one per row. Stacked experts have a leading dimension E. Eight bits stay
eight bits on a device; activations are never rounded to FP8. `rounded` makes a weight of this kind
of a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime import kernels
from dflash_chat.runtime.quant import Packed, Parts, cpu
from dflash_chat.runtime.quant.dense import FLOATS, DenseWeight
from dflash_chat.runtime.quant.scheme import Scheme, scheme

BLOCK = 128
E4M3_MAX = 448.0
ROUNDED_AT_ONCE = 8192  # rows, which bounds what `rounded` needs for a while

Shape = tuple[int, ...]


@dataclass
class Float8Weight:
    """The tensors of the file's head; `dtype` is that of the activations."""

    weight: Tensor  # e4m3 [.., N, K]
    scale: Tensor  # [.., ⌈N/R⌉, ⌈K/C⌉]
    block: tuple[int, int]  # (R, C)
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> Shape:
        """(N, K) or (E, N, K)."""
        return tuple(self.weight.shape)

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "dequantising"

    @property
    def nbytes(self) -> int:
        """Bytes held now; of the mapped file, where they are views of it."""
        return self.weight.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[.., N, K], formed in fp32, where only the product is rounded."""
        scale = _spread(self._row_scale().float(), self.block[1], -1, self.shape[-1])
        return self.weight.float().mul_(scale).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]."""
        gathered = self.weight.view(torch.uint8)[ids].view(self.weight.dtype)
        scale = self.scale[ids // self.block[0]]
        return Float8Weight(gathered, scale, (1, self.block[1])).dequantize(self.dtype)

    def expert(self, e: int) -> Float8Weight:
        """The matrix of expert `e`, a view."""
        return replace(self, weight=self.weight[e], scale=self.scale[e])

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Still 8 bits on a device. On a CPU a matrix is dequantised once."""
        if device.type == "cpu" and len(self.shape) == 2:
            if cpu.prepacking_serves(self.shape, dtype):
                return cpu.PrepackedWeight(self, dtype)
            return DenseWeight(self.dequantize(dtype))
        weight, scale = self.weight.to(device), self.scale.to(device)
        if kernels.serve(device, dtype) and self.block == (1, self.shape[-1]):
            from dflash_chat.runtime.quant import kernel_weights

            return kernel_weights.fp8(weight, scale)
        return Float8Weight(weight, scale, self.block, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], dequantising each time: correct, never quick."""
        return F.linear(x, self.dequantize(x.dtype))

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """One weight if all have one K, one C and one scale dtype.

        Blocks stay blocks where they end with the rows of each weight; else each row gets a scale.
        """
        weights = [self]
        for other in others:
            if not isinstance(other, Float8Weight) or other._kind() != self._kind():
                return None
            weights.append(other)
        aligned = all(weight.shape[-2] % self.block[0] == 0 for weight in weights[:-1])
        blocks = aligned and all(weight.block == self.block for weight in weights)
        scales = [weight.scale if blocks else weight._row_scale() for weight in weights]
        block = self.block if blocks else (1, self.block[1])
        weight = torch.cat([weight.weight for weight in weights], -2)
        return Float8Weight(weight, torch.cat(scales, -2), block)

    def _kind(self) -> tuple[object, ...]:
        return (self.shape[:-2], self.shape[-1], self.block[1], self.scale.dtype)

    def _row_scale(self) -> Tensor:
        """[.., N, ⌈K/C⌉]."""
        return _spread(self.scale, self.block[0], -2, self.shape[-2])


def describe(name: str, parts: Parts) -> tuple[Shape, Scheme]:
    """The shape and scheme of weight `name`. Raises ValueError naming the tensor that is wrong.

    Only dtypes and shapes are read.
    """
    if odd := sorted(parts.keys() - {"weight", "scale", "scale_inv"}):
        raise ValueError(f"{name}_{odd[0]} has no place beside the FP8 weight {name}")
    weight, stored = parts["weight"], sorted(parts.keys() - {"weight"})
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise ValueError(f"{name} is FP8 of shape {tuple(weight.shape)} instead of [N, K]")
    if len(stored) != 1:
        raise ValueError(f"{name} is FP8 with {len(stored)} scales beside it instead of one")
    scale = parts[stored[0]]
    scales = _scales(tuple(weight.shape), tuple(scale.shape))
    if scale.dtype not in FLOATS or not scales:
        kind = str(scale.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}_{stored[0]} is {kind} {tuple(scale.shape)}, which does not scale "
            f"{tuple(weight.shape)} by channel, tensor or block of 128"
        )
    return tuple(weight.shape), scheme("8-bit float", True, *scales)


def pack(parts: Parts) -> Packed:
    """parts: `weight` e4m3 [.., N, K], and `scale` or `scale_inv`."""
    weight, scale = parts["weight"], parts.get("scale", parts.get("scale_inv"))
    assert scale is not None, parts.keys()
    *lead, n, k = weight.shape
    scales = _scales(tuple(weight.shape), tuple(scale.shape))
    if "channel" in scales:
        return Float8Weight(weight, scale, (1, k))
    if _BLOCKS in scales:
        return Float8Weight(weight, scale, (BLOCK, BLOCK))
    one = [1] * len(lead) if scale.numel() == 1 else lead
    return Float8Weight(weight, scale.view(*one, 1, 1).expand(*lead, n, 1).contiguous(), (1, k))


def rounded(weight: Tensor) -> Float8Weight:
    """`weight` [.., N, K] of a float dtype, rounded to e4m3 with a scale per row."""
    rows = weight.flatten(0, -2)
    q = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(rows), 1, device=weight.device)
    chunks = (torch.split(tensor, ROUNDED_AT_ONCE) for tensor in (rows, q, scale))
    for exact, q_rows, scale_rows in zip(*chunks, strict=True):
        wide = exact.float()
        scale_rows.copy_(wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX)
        q_rows.copy_(wide / scale_rows)
    scales = scale.view(*weight.shape[:-1], 1)
    return Float8Weight(q.view(weight.shape), scales, (1, weight.shape[-1]), weight.dtype)


_BLOCKS = f"block {BLOCK}×{BLOCK}"


def _scales(weight: Shape, scale: Shape) -> list[str]:
    """What a scale of this shape can mean."""
    *lead, n, k = weight
    channel = (*lead, n, 1)
    block = (*lead, -(-n // BLOCK), -(-k // BLOCK))
    tensor = ((), (1,), tuple(lead), (*lead, 1), (*lead, 1, 1))
    meanings = {"channel": scale == channel, _BLOCKS: scale == block, "tensor": scale in tensor}
    return [meaning for meaning, fits in meanings.items() if fits]


def _spread(scale: Tensor, times: int, dim: int, size: int) -> Tensor:
    """Each scale `times` times along `dim`, cut to `size`."""
    if scale.shape[dim] == size:
        return scale
    return scale.repeat_interleave(min(times, size), dim).narrow(dim, 0, size)
