"""The forms in which kernels read a weight [N, K], and how int4 is packed. Plain torch.

Tensor  bf16, as it is.
Fp8     e4m3 with one scale per row [N], or per 128×128 block [⌈N/128⌉, ⌈K/128⌉].
Int4    w = (q − zero)·scale in groups of g ∈ {32, 64, 128} along K. Every 32 bytes hold 64
        columns: the low nibbles columns 0 … 31, the high ones 32 … 63, so that both are plain
        tiles. The four bytes of a word hold columns 0, 2, 1, 3 of its four: bits 0 … 3 and
        16 … 19 of the shifted word are then neighbours, and one instruction unpacks them both.
Int8    w = q·scale + δ with one scale per row [N], of a head alone: who knows how far ‖δ‖ reaches
        knows which rows can have the largest logit without reading the others (`screen.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # columns per 32 bytes of int4
BYTE_ORDER = [0, 2, 1, 3]  # its own inverse
INT8_MAX = 127
ROUNDED_AT_ONCE = 4096  # rows, which bounds what `round_to_int8` needs for a while


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


class Int8(NamedTuple):
    """weight: int8 [N, K] of −127 … 127; scale, error: fp32 [N].

    For every state h, |w·h − s·(q·h)| ≤ error·‖h‖₂, however either product was summed in fp32 and
    ‖h‖₂ taken: see `round_to_int8`. Short of underflow.
    """

    weight: Tensor
    scale: Tensor
    error: Tensor


Weight = Tensor | Fp8 | Int4 | Int8


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


def round_to_int8(weight: Tensor) -> Int8:
    """A copy of `weight` [N, K] of a float dtype, in int8 with a scale per row.

    With u = 2⁻²⁴, K products summed in fp32 in any order err by K·u·‖w‖‖h‖ at most, and by twice
    that where tensor cores cut off instead of rounding: together 3K·u. `error` is ‖δ‖ + 4K·u·‖w‖,
    and 2⁻¹⁰ of that more for lengths that were themselves summed in fp32.
    """
    n, k = weight.shape
    assert k <= 1 << 13, f"{k} columns"
    device = weight.device
    q = torch.empty(n, k, dtype=torch.int8, device=device)
    scale, error = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    chunks = (torch.split(tensor, ROUNDED_AT_ONCE) for tensor in (weight, q, scale, error))
    for exact, q_rows, scale_rows, error_rows in zip(*chunks, strict=True):
        wide = exact.float()
        scale_rows.copy_(wide.abs().amax(-1).clamp(min=1e-30) / INT8_MAX)
        rounded = (wide / scale_rows[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
        q_rows.copy_(rounded)
        length = torch.linalg.vector_norm(wide, dim=-1)
        lost = torch.linalg.vector_norm(wide - rounded.mul_(scale_rows[:, None]), dim=-1)
        error_rows.copy_((lost + k * 2.0**-22 * length) * (1 + 2.0**-10))
    return Int8(q, scale, error)


def shape(w: Weight) -> tuple[int, int]:
    """(N, K)."""
    if isinstance(w, Int4):
        return w.packed.shape[0], 2 * w.packed.shape[1]
    weight = w if isinstance(w, Tensor) else w.weight
    return weight.shape[0], weight.shape[1]


def dequantize(w: Weight, halves: int = 1) -> Tensor:
    """[N, K] in fp32. `halves` is 2 for a fused gate_up, whose halves start blocks of their own."""
    n, k = shape(w)
    if isinstance(w, Tensor):
        return w.float()
    if isinstance(w, Int8):
        return w.weight.float() * w.scale[:, None]
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
    if isinstance(w, Tensor):
        return "bf16"
    return "int4" if isinstance(w, Int4) else "int8" if isinstance(w, Int8) else "fp8"
