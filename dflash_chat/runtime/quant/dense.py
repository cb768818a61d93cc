"""Dense weights: F32, F16 and BF16 tensors as they are in the file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts


@dataclass
class DenseWeight:
    """weight: [N, K] or [N] of a float dtype."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (N,)."""
        return tuple(self.weight.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.weight.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`."""
        return self.weight.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> fp32 [T, K]."""
        return self.weight[ids].float()


def pack(parts: Parts) -> Packed:
    """parts["weight"]: [N, K] or [N]."""
    return DenseWeight(parts["weight"])
