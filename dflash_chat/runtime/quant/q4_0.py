"""Q4_0: w = d·(q - 8) with q in 0..15 and one fp16 d, of either sign, for each 32 weights of a row.

Source: ggml `block_q4_0`. A block is 18 bytes: d, then 16 nibble bytes as in Q4_1. Knows the block
and its arithmetic; how a CPU multiplies by it is `int4.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.quant.blocks import GROUP, BlockWeight
from dflash_chat.runtime.quant.q4_1 import nibbles

BLOCK_BYTES = 18


def dequantize(blocks: Tensor) -> Tensor:
    """uint8 [N, K/32·18] -> fp32 [N, K], the truth every faster path is tested against."""
    scales, q = unpack(blocks)
    return (scales.float()[..., None] * (q.float() - 8)).flatten(1)


def unpack(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, K/32·18] -> d fp16 [N, K/32], q uint8 [N, K/32, 32]."""
    block = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    scales = block[..., :2].contiguous().view(torch.float16)[..., 0]  # [N, K/32]
    return scales, nibbles(block[..., 2:])


def pack(parts: Parts) -> Packed:
    """parts["blocks"]: uint8 [N, K/32·block bytes]."""
    blocks = parts["blocks"]
    shape = (blocks.shape[0], blocks.shape[1] // BLOCK_BYTES * GROUP)
    return BlockWeight(shape, blocks, dequantize)
