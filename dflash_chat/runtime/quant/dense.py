"""Dense weights: F32, F16 and BF16 tensors as they are in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts, cpu


@dataclass
class DenseWeight:
    """weight: [N, K], [N] or stacked experts [E, N, K] of a float dtype."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), (N,) or (E, N, K)."""
        return tuple(self.weight.shape)

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "torch"

    @property
    def nbytes(self) -> int:
        """Bytes held now; of the mapped file, if the weight is a view of it."""
        return self.weight.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`."""
        return self.weight.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K] in the weight's dtype."""
        return self.weight[ids]

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """In `dtype` on `device`; on a CPU for oneDNN if that serves."""
        if device.type == "cpu" and cpu.prepacking_serves(self.shape, dtype):
            return cpu.PrepackedWeight(self, dtype)
        return DenseWeight(self.weight.to(device, dtype))

    def expert(self, e: int) -> Packed:
        """Expert e's [N, K], a view."""
        return DenseWeight(self.weight[e])

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return F.linear(x, self.weight.to(x.dtype))

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """One weight if all are dense and of one dtype."""
        tensors = [self.weight]
        for other in others:
            if not isinstance(other, DenseWeight) or other.weight.dtype != self.weight.dtype:
                return None
            tensors.append(other.weight)
        return DenseWeight(torch.cat(tensors))


def pack(parts: Parts) -> Packed:
    """parts["weight"]: [N, K], [N] or [E, N, K]."""
    return DenseWeight(parts["weight"])
