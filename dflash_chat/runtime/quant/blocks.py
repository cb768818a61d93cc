"""What the block formats share: a weight whose rows are blocks of 32 weights.

Knows how rows of blocks are kept, gathered and joined. Does not know what a block says; a format
passes its `dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32


@dataclass
class BlockWeight:
    """blocks: uint8 [N, K/32·block_bytes]."""

    shape: tuple[int, ...]
    blocks: Tensor
    decode: Callable[[Tensor], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.blocks.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32."""
        return self.decode(self.blocks).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> fp32 [T, K]."""
        return self.decode(self.blocks[ids])
