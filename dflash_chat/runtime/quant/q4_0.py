"""Q4_0: w = d·(q - 8) with q in 0..15 and one fp16 d, of either sign, for each 32 weights of a row.

Source: ggml `block_q4_0`. A block is 18 bytes: d, then 16 nibble bytes as in Q4_1. Knows the block
and its arithmetic; how a CPU multiplies by it is `cpu.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.quant.blocks import Codec, Int4Parts
from dflash_chat.runtime.quant.q4_1 import nibbles

BLOCK_BYTES = 18


def pack(parts: Parts) -> Packed:
    """parts["blocks"]: uint8 [N, K/32·18]."""
    return CODEC.pack(parts["blocks"])


def dequantize(blocks: Tensor) -> Tensor:
    """uint8 [N, K/32·18] -> fp32 [N, K], the truth every faster path is tested against."""
    scales, q = unpack(blocks)
    return q.float().sub_(8).mul_(scales[..., None]).flatten(1)


def int4(blocks: Tensor) -> Int4Parts:
    """w = (q - 8)·d + 0."""
    scales, q = unpack(blocks)
    return q.flatten(1), scales, torch.zeros_like(scales)


def unpack(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, K/32·18] -> d fp32 [N, K/32], q uint8 [N, K/32, 32]."""
    block = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    scales = block[..., :2].contiguous().view(torch.float16).float()  # [N, K/32, 1]
    return scales[..., 0], nibbles(block[..., 2:])


CODEC = Codec("q4_0", BLOCK_BYTES, dequantize, int4)
