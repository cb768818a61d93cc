"""Weights of a mixture of experts as the MoE kernels read them, with or without a dimension E.

Three formats, told apart by dtype and scale:

    plain   data bf16 [E, N, K]
    fp8     data e4m3 [E, N, K], scale fp32 [E, N]:  w = data·scale
    int4    data int16 [E, K/64, N, 16], scale bf16 [E, K/64, N, 2], zero likewise or None:
            w = (q − 8)·scale + zero, one scale for each 32 weights of a row

Word i of an int4 row's block b holds K = 64·b + 16·j + i in its bits 4j … 4j+3, so that each shift
of a block is a [16, N] operand, and its first two shifts share a scale, as do the last two. Groups
of 64 are stored as two groups of 32: 704 and 2112 are multiples of 64 but not of 128.

Plain torch, so that a loader needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
GROUP = 32


@dataclass(frozen=True)
class MoeWeight:
    """One projection of all experts, or of the dense MLP (no dimension E). See the file."""

    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def format(self) -> str:
        """plain, fp8 or int4."""
        if self.data.dtype == torch.int16:
            return "int4"
        return "fp8" if self.data.dtype == torch.float8_e4m3fn else "plain"

    @property
    def shape(self) -> tuple[int, ...]:
        """([E,] N, K)."""
        if self.format != "int4":
            return tuple(self.data.shape)
        *experts, blocks, rows, _ = self.data.shape
        return (*experts, rows, blocks * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and zeros."""
        return sum(part.nbytes for part in (self.data, self.scale, self.zero) if part is not None)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """data, scale, zero for a launch; data stands where a format lacks one, and is not read."""
        data, scale, zero = self.data, self.scale, self.zero
        assert data.is_contiguous(), f"data {data.stride()}"
        if self.format == "int4" and scale is not None:
            assert scale.dtype == torch.bfloat16, f"scale {scale.dtype}"
            scale = scale.view(torch.int32)  # a load of 4 bytes can be asynchronous
            zero = None if zero is None else zero.view(torch.int32)
        elif self.format == "fp8":
            data = data.view(torch.uint8)  # cards before Ada know no type for it
        return data, data if scale is None else scale, data if zero is None else zero

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, N, K]."""
        if self.scale is None:
            return self.data.to(dtype)
        if self.format == "fp8":
            return self.data.to(dtype) * self.scale.to(dtype)[..., None]
        shifts = torch.arange(0, 16, 4, device=self.data.device)[:, None]
        q = (self.data.int()[..., None, :] >> shifts) & 15  # [E, K/64, N, 4, 16]
        w = (q.view(*self.scale.shape, GROUP) - 8) * self.scale.to(dtype)[..., None]
        if self.zero is not None:
            w = w + self.zero.to(dtype)[..., None]
        return w.flatten(-2).transpose(-3, -2).flatten(-2)  # [E, K/64, N, 64] -> [E, N, K]

    def expert(self, e: int) -> MoeWeight:
        """Expert e's [N, K], a view."""
        return MoeWeight(
            self.data[e],
            None if self.scale is None else self.scale[e],
            None if self.zero is None else self.zero[e],
        )


def stack(experts: Sequence[MoeWeight]) -> MoeWeight:
    """[E, N, K] of experts [N, K] of one format."""
    scales = [w.scale for w in experts if w.scale is not None]
    zeros = [w.zero for w in experts if w.zero is not None]
    return MoeWeight(
        torch.stack([w.data for w in experts]),
        torch.stack(scales) if scales else None,
        torch.stack(zeros) if zeros else None,
    )


def pack_int4_experts(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> MoeWeight:
    """q uint8 [E, N, K] in 0..15, scale and zero [E, N, K/g] with g 32 or 64, rounded to bf16."""
    width = q.shape[-1]
    group = width // scale.shape[-1]
    assert width % BLOCK == 0, f"K {width}"
    assert group in (GROUP, BLOCK), f"groups of {group}"
    nibbles = q.int().view(*q.shape[:-1], width // BLOCK, 4, 16)
    shifts = torch.arange(0, 16, 4, device=q.device)[:, None]
    words = (nibbles << shifts).sum(-2)  # [E, N, K/64, 16], 0 … 65535
    words = torch.where(words < 2**15, words, words - 2**16).to(torch.int16)

    def pairs(per_group: Tensor) -> Tensor:  # [E, N, K/g] -> [E, K/64, N, 2]
        halves = per_group.bfloat16().repeat_interleave(group // GROUP, -1)
        return halves.view(*q.shape[:-1], width // BLOCK, 2).transpose(-3, -2).contiguous()

    return MoeWeight(
        words.transpose(-3, -2).contiguous(), pairs(scale), None if zero is None else pairs(zero)
    )
