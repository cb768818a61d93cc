"""Weights of a mixture of experts as the MoE kernels read them, with or without a dimension E.

Three formats, told apart by dtype and scale:

    plain   data bf16 [E, N, K]
    fp8     data e4m3 [E, N, K], scale fp32 [E, N]:  w = data·scale
    int4    data int16 [E, K/4R, N, R], scale bf16 [E, K/64, N, 2], zero likewise or None:
            `forms.Int4`

Plain torch, so that a loader needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.runtime.kernels import forms


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
    def run(self) -> int:
        """R of int4, 0 of other formats."""
        return self.data.shape[-1] if self.format == "int4" else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """([E,] N, K)."""
        if self.format != "int4":
            return tuple(self.data.shape)
        *experts, blocks, rows, run = self.data.shape
        return (*experts, rows, blocks * 4 * run)

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
        return forms.unpack_int4(forms.Int4(self.data, self.scale, self.zero), dtype)

    def expert(self, e: int) -> forms.Weight:
        """Expert e's [N, K], a view."""
        if self.scale is None:
            return self.data[e]
        if self.format == "fp8":
            return forms.Fp8(self.data[e], self.scale[e])
        return forms.Int4(self.data[e], self.scale[e], None if self.zero is None else self.zero[e])


def stack(experts: Sequence[MoeWeight]) -> MoeWeight:
    """[E, N, K] of experts [N, K] of one format."""
    scales = [w.scale for w in experts if w.scale is not None]
    zeros = [w.zero for w in experts if w.zero is not None]
    return MoeWeight(
        torch.stack([w.data for w in experts]),
        torch.stack(scales) if scales else None,
        torch.stack(zeros) if zeros else None,
    )
