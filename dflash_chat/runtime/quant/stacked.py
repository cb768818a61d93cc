"""Weights of different formats behind one face: the rows of the first, then of the second, …

Knows how to ask each part and join the answers. Does not know any format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed


@dataclass
class StackedWeight:
    """parts: at least one weight, all of one K."""

    parts: tuple[Packed, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(sum of N, K)."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return " + ".join(sorted({part.kernel for part in self.parts}))

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32."""
        return torch.cat([part.dequantize(dtype) for part in self.parts])

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]; slow, no embedding is stacked."""
        return self.dequantize()[ids]

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Each part made ready on its own."""
        return StackedWeight(tuple(part.to(device, dtype) for part in self.parts))

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return torch.cat([part.matmul(x) for part in self.parts], dim=-1)

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """Stacks stay as they are."""
        return None
