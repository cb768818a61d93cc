"""Q8_0: w = d·q with int8 q and one fp16 d for each 32 weights of a row.

Source: ggml `block_q8_0`. A block is 34 bytes: d, then 32 int8. Knows the block and its arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.quant.blocks import GROUP, BlockWeight

BLOCK_BYTES = 34


def dequantize(blocks: Tensor) -> Tensor:
    """uint8 [N, K/32·34] -> fp32 [N, K], the truth every faster path is tested against."""
    scales, q = unpack(blocks)
    return (scales.float()[..., None] * q).flatten(1)


def unpack(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, K/32·34] -> d fp16 [N, K/32], q int8 [N, K/32, 32]."""
    block = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    scales = block[..., :2].contiguous().view(torch.float16)[..., 0]  # [N, K/32]
    return scales, block[..., 2:].contiguous().view(torch.int8)


def pack(parts: Parts) -> Packed:
    """parts["blocks"]: uint8 [N, K/32·block bytes]."""
    blocks = parts["blocks"]
    shape = (blocks.shape[0], blocks.shape[1] // BLOCK_BYTES * GROUP)
    return BlockWeight(shape, blocks, dequantize)
