"""The forms in which kernels read a weight [N, K], and how int4 is packed. Plain torch.

Tensor  bf16, as it is.
Fp8     e4m3 with one scale per row [N], or per 128×128 block [⌈N/128⌉, ⌈K/128⌉].
Int4    w = (q − 8)·scale + zero, one scale for 32 columns of a row. Word i of a row's 4R columns b
        holds K = 4R·b + R·j + i in its bits 4j … 4j+3, so that each j of all words is a plain
        [R, N] operand, whose columns share a scale. R is 32, or 16 where K is no multiple of 128:
        there j = 0 and 1 share a scale, as do 2 and 3. What a tile of rows has of 4R columns stands
        together: requests for memory are of whole lines. Groups of 64 and 128 are stored as so many
        of 32.
Int8    w = q·scale + δ with one scale per row [N], of a head alone: who knows how far ‖δ‖ reaches
        knows which rows can have the largest logit without reading the others (`screen.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # columns of int4 that must stand together
GROUP = 32  # columns with one scale
INT8_MAX = 127
ROUNDED_AT_ONCE = 4096  # rows, which bounds what `round_to_int8` needs for a while


class Fp8(NamedTuple):
    """weight: e4m3 [N, K]; scale: [N], or [⌈N/128⌉, ⌈K/128⌉].

    Each half of a fused gate_up [2I, K] starts a block of its own: scale [2⌈I/128⌉, ⌈K/128⌉].
    """

    weight: Tensor
    scale: Tensor


class Int4(NamedTuple):
    """words: int16 [.., K/4R, N, R]; scale, zero: bf16 [.., K/64, N, 2], no zero if all are 0."""

    words: Tensor
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


def int4_fits(columns: int, group: int) -> bool:
    """Whether `Int4` can hold rows of so many columns in such groups."""
    return columns % CHUNK == 0 and group in (32, 64, 128)


def int4_run(columns: int) -> int:
    """R of rows of so many columns."""
    return 16 if columns % 128 else 32


def pack_int4(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Int4:
    """q: uint8 [.., N, K] of 0 … 15; scale, zero: [.., N, K/g], rounded to bf16."""
    *rows, k = q.shape
    group = k // scale.shape[-1]
    assert int4_fits(k, group), f"{k} columns in groups of {group}"
    run = int4_run(k)
    shifts = torch.arange(0, 16, 4, device=q.device)[:, None]
    words = (q.int().view(*rows, k // (4 * run), 4, run) << shifts).sum(-2)  # [.., N, K/4R, R]
    words = torch.where(words < 2**15, words, words - 2**16).to(torch.int16)

    def pairs(per_group: Tensor) -> Tensor:  # [.., N, K/g] → [.., K/64, N, 2]
        halves = per_group.bfloat16().repeat_interleave(group // GROUP, -1)
        return halves.view(*rows, k // CHUNK, 2).transpose(-3, -2).contiguous()

    zero = None if zero is None else pairs(zero)
    return Int4(words.transpose(-3, -2).contiguous(), pairs(scale), zero)


def unpack_int4(w: Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """[.., N, K]."""
    shifts = torch.arange(0, 16, 4, device=w.words.device)[:, None]
    q = (w.words.int()[..., None, :] >> shifts) & 15  # [.., K/4R, N, 4, R]
    q = q.flatten(-2).transpose(-3, -2).flatten(-2)  # [.., N, K]

    def spread(pairs: Tensor) -> Tensor:  # [.., K/64, N, 2] → [.., N, K]
        return pairs.to(dtype).transpose(-3, -2).flatten(-2).repeat_interleave(GROUP, -1)

    wide = (q - 8) * spread(w.scale)
    return wide if w.zero is None else wide + spread(w.zero)


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
        blocks, n, run = w.words.shape
        return n, blocks * 4 * run
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
    return unpack_int4(w)


def kind(w: Weight) -> str:
    """The weight's form, as `tuned` calls it."""
    if isinstance(w, Tensor):
        return "bf16"
    return "int4" if isinstance(w, Int4) else "int8" if isinstance(w, Int8) else "fp8"
