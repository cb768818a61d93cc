"""Attention of a prompt's chunk, up to a few thousand rows: causal, over the cache and itself.

The formula, layouts and `reference` are `attention`'s. Here the rows alone fill the card, so there
are no shares and no merge: a program owns BLOCK_M of the T · H/G rows of a kv head (row
m = t · H/G + j) and walks the keys that these rows may see; tiles outside the window or beyond the
diagonal are never read. Bound by tensor cores: tiles are at least 64 rows high, for wgmma.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.attention import LOG2E, attend_tile, card

MIN_ROWS = 18  # fewer have too few programs to read a long cache quickly


class Config(NamedTuple):
    """Tile sizes and launch of one head dim."""

    block_m: int
    block_n: int
    warps: int
    stages: int


CONFIGS = {  # by head dim; shared memory holds a tile of q and `stages` tiles of keys and values
    64: Config(128, 128, 8, 3),
    128: Config(128, 128, 8, 2),
    256: Config(128, 64, 8, 2),
    512: Config(64, 32, 8, 2),
}
NARROW_CONFIGS = {  # for cards that are not roomy
    64: Config(128, 64, 8, 2),
    128: Config(64, 64, 4, 2),
    256: Config(64, 32, 8, 2),
    512: Config(32, 32, 8, 2),
}


@triton.jit(do_not_specialize=["length", "T"])
def _chunk_attention_kernel(
    q_ptr, keys_ptr, values_ptr, out_ptr, length, slots, scale, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (G, M tiles); the last rows see most keys and start first."""
    g = tl.program_id(0)
    GROUP: tl.constexpr = H // G
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    m = begin + tl.arange(0, BLOCK_M)
    used = m < T * GROUP
    t = m // GROUP
    at = (t * H + g * GROUP + m % GROUP)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + at, mask=used[:, None], other=0.0)
    p = length + t
    lo = 0
    if WINDOW:
        lo = tl.maximum(length + begin // GROUP - (WINDOW - 1), 0)
    hi = length + tl.minimum((begin + BLOCK_M - 1) // GROUP + 1, T)

    k_base = keys_ptr + g.to(tl.int64) * slots * D
    v_base = values_ptr + g.to(tl.int64) * slots * D
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        top, total, acc = attend_tile(
            q, p, length + begin // GROUP, hi - 1, k_base, v_base, start, hi,
            slots, scale, top, total, acc, D, WINDOW, True, BLOCK_N,
        )  # fmt: skip
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=used[:, None])


def chunk_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    *,
    window: int,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """Causal attention of a chunk whose keys and values are in the cache: [T, H, D] → [T, H·D].

    keys, values: [G, S, D]. `length` is the position of the chunk's first row, on the host.
    """
    rows, heads, dim = q.shape
    groups, slots, _ = keys.shape
    assert heads % groups == 0, f"{heads} heads on {groups}"
    assert keys.shape == values.shape == (groups, slots, dim), f"{keys.shape}, {values.shape}"
    assert q.dtype == keys.dtype == values.dtype, f"{q.dtype}, {keys.dtype}, {values.dtype}"
    needed = min(length, window - 1) + rows if window else length + rows
    assert needed <= slots, f"{needed} visible rows in {slots} slots"
    for x in (q, keys, values):
        assert x.is_contiguous(), f"{tuple(x.shape)} {x.stride()}"
    c = config or (CONFIGS if card(q.device).roomy else NARROW_CONFIGS)[dim]
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    _chunk_attention_kernel[(groups, triton.cdiv(rows * heads // groups, c.block_m))](
        q, keys, values, out, length, slots, scale * LOG2E, rows,
        H=heads, G=groups, D=dim, WINDOW=window,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, STAGES=c.stages,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
