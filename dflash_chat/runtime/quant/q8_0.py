"""Q8_0: w = d·q with int8 q and one fp16 d for each 32 weights of a row.

Source: ggml `block_q8_0`. A block is 34 bytes: d, then 32 int8. Knows the block and its arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.quant.blocks import Codec

BLOCK_BYTES = 34


def pack(parts: Parts) -> Packed:
    """parts["blocks"]: uint8 [N, K/32·34]."""
    return CODEC.pack(parts["blocks"])


def dequantize(blocks: Tensor) -> Tensor:
    """uint8 [N, K/32·34] -> fp32 [N, K], the truth every faster path is tested against."""
    block = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    scales = block[..., :2].contiguous().view(torch.float16).float()  # [N, K/32, 1]
    q = block[..., 2:].contiguous().view(torch.int8)  # [N, K/32, 32]
    return q.float().mul_(scales).flatten(1)


CODEC = Codec("q8_0", BLOCK_BYTES, dequantize)
