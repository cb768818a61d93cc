"""The forms in which kernels read a weight [N, K], and how int4 is packed. Plain torch.

Tensor  bf16, as it is.
Fp8     e4m3 with one scale per row [N], or per 128×128 block [⌈N/128⌉, ⌈K/128⌉].
Int4    w = (q − zero)·scale in groups of g ∈ {32, 64, 128} along K. Every 32 bytes hold 64
        columns: the low nibbles columns 0 … 31, the high ones 32 … 63, so that both are plain
        tiles. The four bytes of a word hold columns 0, 2, 1, 3 of its four: bits 0 … 3 and
        16 … 19 of the shifted word are then neighbours, and one instruction unpacks them both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # columns per 32 bytes of int4
BYTE_ORDER = [0, 2, 1, 3]  # its own inverse


class Fp8(NamedTuple):
    """weight: e4m3 [N, K]; scale: [N], or [⌈N/128⌉, ⌈K/128⌉].

    Each half of a fused gate_up [2I, K] starts a block of its own: scale [2⌈I/128⌉, ⌈K/128⌉].
    """

    weight: Tensor
    scale: Tensor


class Int4(NamedTuple):
    """packed: uint8 [N, K/2]; scale: [K/g, N]; zero: [K/g, N] of scale's dtype, or None for 8."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None


Weight = Tensor | Fp8 | Int4


def pack_int4(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Int4:
    """q: uint8 [N, K] of 0 … 15; scale, zero: [N, K/g] → the kernel's layout."""
    n, k = q.shape
    assert k % CHUNK == 0, f"int4 takes columns in multiples of {CHUNK}, not {k}"
    assert k // scale.shape[1] in (32, 64, 128), f"groups of {k / scale.shape[1]:g}"
    halves = q.view(n, k // CHUNK, 2, 8, 4)[..., BYTE_ORDER]
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    zero = None if zero is None else zero.to(scale.dtype).T.contiguous()
    return Int4(packed.reshape(n, k // 2), scale.T.contiguous(), zero)


def unpack_int4(w: Int4) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pack_int4` was given."""
    n, k = shape(w)
    words = w.packed.view(n, k // CHUNK, 8, 4)[..., BYTE_ORDER]
    q = torch.stack([words & 15, words >> 4], 2).view(n, k)
    return q, w.scale.T, None if w.zero is None else w.zero.T


def shape(w: Weight) -> tuple[int, int]:
    """(N, K)."""
    if isinstance(w, Int4):
        return w.packed.shape[0], 2 * w.packed.shape[1]
    weight = w.weight if isinstance(w, Fp8) else w
    return weight.shape[0], weight.shape[1]


def dequantize(w: Weight, halves: int = 1) -> Tensor:
    """[N, K] in fp32. `halves` is 2 for a fused gate_up, whose halves start blocks of their own."""
    n, k = shape(w)
    if isinstance(w, Tensor):
        return w.float()
    if isinstance(w, Fp8):
        scale = w.scale.float()
        if scale.dim() == 1:
            return w.weight.float() * scale[:, None]
        rows = torch.arange(n // halves, device=scale.device) // 128
        rows = torch.cat([rows + half * (scale.shape[0] // halves) for half in range(halves)])
        return w.weight.float() * scale[rows].repeat_interleave(128, 1)[:, :k]
    q, scale, zero = unpack_int4(w)
    zero = torch.full_like(scale, 8) if zero is None else zero
    group = k // scale.shape[1]
    spread = [part.float().repeat_interleave(group, 1) for part in (zero, scale)]
    return (q.float() - spread[0]) * spread[1]


def kind(w: Weight) -> str:
    """The weight's form, as `tuned` calls it."""
    return "int4" if isinstance(w, Int4) else "fp8" if isinstance(w, Fp8) else "bf16"
