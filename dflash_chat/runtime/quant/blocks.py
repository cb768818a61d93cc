"""What the block formats share: a weight whose rows are blocks of 32 weights.

Knows how rows of blocks are kept, gathered, joined and made ready for a device. Does not know what
a block says; a format says it with a `Codec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.dense import DenseWeight

GROUP = 32

Int4Parts = tuple[Tensor, Tensor, Tensor]  # q uint8 [N, K], scale fp32 [N, K/32], zero fp32


@dataclass(frozen=True)
class Codec:
    """A block format. `int4` gives w = (q - 8)·scale + zero, if the format has 4 bits."""

    name: str
    block_bytes: int
    dequantize: Callable[[Tensor], Tensor]
    int4: Callable[[Tensor], Int4Parts] | None = None

    def pack(self, blocks: Tensor) -> BlockWeight:
        """blocks: uint8 [N, K/32·block_bytes], kept as it is."""
        count, rest = divmod(blocks.shape[1], self.block_bytes)
        assert rest == 0, f"{self.name} rows of {blocks.shape[1]} bytes"
        return BlockWeight((blocks.shape[0], count * GROUP), blocks, self)


@dataclass
class BlockWeight:
    """The blocks as the file has them, exact but slow: uint8 [N, K/32·block_bytes]."""

    shape: tuple[int, ...]
    blocks: Tensor
    codec: Codec

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "dequantising"

    @property
    def nbytes(self) -> int:
        """Bytes held now; of the mapped file, if the blocks are a view of it."""
        return self.blocks.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32."""
        return self.codec.dequantize(self.blocks).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> fp32 [T, K]."""
        return self.codec.dequantize(self.blocks[ids])

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """On a CPU in bf16, 4 bits stay 4 bits; elsewhere, and in fp32, a dense copy is made."""
        if device.type != "cpu":
            return DenseWeight(self.dequantize().to(device, dtype))
        if self.codec.int4 and cpu.int4_serves(self.shape, dtype):
            return cpu.Int4Weight.of(self, *self.codec.int4(self.blocks))
        if cpu.prepacking_serves(self.shape, dtype):
            return cpu.PrepackedWeight(self, dtype)
        return DenseWeight(self.dequantize(dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], dequantising each time: correct before `to`, never quick."""
        return F.linear(x, self.dequantize(x.dtype))

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """One weight if all are of this format."""
        blocks = [self.blocks]
        for other in others:
            if not isinstance(other, BlockWeight) or other.codec is not self.codec:
                return None
            blocks.append(other.blocks)
        return self.codec.pack(torch.cat(blocks))
