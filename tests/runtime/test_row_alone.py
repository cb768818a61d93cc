"""On a CPU a row computes the same, bit for bit, alone and with others behind it: what is verified
is what plain decoding would have chosen, however close two tokens are.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dflash_chat.runtime import layers
from dflash_chat.runtime.cache import Geometry, KVCache
from dflash_chat.runtime.width import MAX_ROWS
from tests.runtime.tiny import CPU

BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        torch.cpu._is_amx_tile_supported(), reason="what AMX adds up in which order is not known"
    ),
)
CAPACITY, LARGEST = 230, 20
SHAPES = [  # kv heads, queries of each, dim
    (3, 3, 64),
    (8, 1, 64),
    (2, 7, 128),
    (8, 4, 128),
    (1, 8, 256),
    (1, 16, 256),
]


def attended(
    cache: KVCache, rows: tuple[Tensor, Tensor, Tensor], first: int, n: int, heads: int
) -> Tensor:
    """Rows [first, first + n) as a block behind the first `first`: [n, H·D]."""
    q, k, v = (x[first : first + n] for x in rows)
    return layers.Causal(cache, n, heads)(0, q, k, v)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_of_a_row_does_not_hang_on_the_rows_behind_it(
    shape: tuple[int, int, int], window: int, dtype: torch.dtype
) -> None:
    groups, share, dim = shape
    heads, dice = groups * share, random.Random(3)
    noise = torch.Generator().manual_seed(1)
    rows = tuple(
        torch.randn(CAPACITY, n, dim, generator=noise).to(dtype) for n in (heads, groups, groups)
    )
    caches = [
        KVCache([Geometry(groups, dim, window)], CAPACITY, dtype, CPU, LARGEST) for _ in range(2)
    ]
    alone = []
    for position in range(CAPACITY):
        alone.append(attended(caches[0], rows, position, 1, heads)[0])
        caches[0].commit(1)
    position = 0
    while position < CAPACITY:
        n = min(dice.randint(1, MAX_ROWS), CAPACITY - position)
        block = attended(caches[1], rows, position, n, heads)
        for i in range(n):
            assert torch.equal(block[i], alone[position + i]), (position, i, n)
        kept = dice.randint(1, n)
        caches[1].commit(kept)
        position += kept
