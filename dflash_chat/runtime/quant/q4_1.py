"""Q4_1: w = d·q + m with q in 0..15 and fp16 d, m for each 32 weights of a row.

Source: ggml `block_q4_1`. A block is 20 bytes: d, m, then 16 bytes of which byte i holds weight i
in its low nibble and weight i + 16 in its high one. Knows the block and its arithmetic; how a CPU
multiplies by it is `cpu.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.quant.blocks import Codec, Int4Parts

BLOCK_BYTES = 20


def pack(parts: Parts) -> Packed:
    """parts["blocks"]: uint8 [N, K/32·20]."""
    return CODEC.pack(parts["blocks"])


def dequantize(blocks: Tensor) -> Tensor:
    """uint8 [N, K/32·20] -> fp32 [N, K], the truth every faster path is tested against."""
    scales, minima, q = unpack(blocks)
    return q.float().mul_(scales[..., None]).add_(minima[..., None]).flatten(1)


def int4(blocks: Tensor) -> Int4Parts:
    """w = (q - 8)·d + (m + 8·d)."""
    scales, minima, q = unpack(blocks)
    return q.flatten(1), scales, minima + 8 * scales


def unpack(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [N, K/32·20] -> d and m fp32 [N, K/32], q uint8 [N, K/32, 32]."""
    block = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    halves = block[..., :4].contiguous().view(torch.float16).float()  # [N, K/32, 2]
    return halves[..., 0], halves[..., 1], nibbles(block[..., 4:])


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K/32, 16] -> uint8 [N, K/32, 32]: low nibbles first, then high ones."""
    packed = packed.contiguous()  # strided bytes are not vectorised
    return torch.stack((packed & 15, packed >> 4), dim=-2).flatten(-2)


CODEC = Codec("q4_1", BLOCK_BYTES, dequantize, int4)
