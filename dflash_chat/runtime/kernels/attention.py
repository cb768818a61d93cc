"""Attention of one block, 1 to 17 rows, over a cache whose length only the device knows.

    out[t, h] = Σ_n softmax_n(scale · q[t, h] · k[n]) v[n],    g = h // (H/G) names k and v

over the positions n that row t, at position p = length + t, may see: p − (window − 1) and later
(window 0: from the start), with `causal` none after p, without it all rows of the block. Position n
stands in slot n % S of keys and values [G, S, D], the block's own rows included; sliding layers
need S ≥ window − 1 + T.

Split-KV: the visible range is cut into SPLITS equal shares, computed from `length` on the device,
so a captured graph stays valid as the context grows. The T · H/G rows of a kv head form the
M dimension of each dot (row m = t · H/G + j), so keys and values are read once. A share leaves its
normalised output in q's dtype (fp32 would cost as many bytes as the cache itself) and its
log₂-sum-exp in fp32; a second kernel merges the shares. bf16 in and out, fp32 softmax. Bound by
reading keys and values; at short contexts by the chain length → keys → partial → merge. With PDL
the keys travel to L2 while the rope kernel still runs: a prefetch reads nothing, so rows that are
being written cannot make it wrong.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
GRAIN = tl.constexpr(16)  # keys; shares are multiples of it


class Config(NamedTuple):
    """Tile sizes and launch of one shape."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def reference(
    q: Tensor, keys: Tensor, values: Tensor, length: int, window: int, causal: bool, scale: float
) -> Tensor:
    """The formula in plain torch, in q's dtype: [T, H, D] → [T, H·D]."""
    rows, heads, _ = q.shape
    groups, slots, _ = keys.shape
    end = length + rows
    first = max(0, length - window + 1) if window else 0
    n = torch.arange(first, end, device=q.device)
    k, v = (
        x[:, n % slots].to(q.dtype).repeat_interleave(heads // groups, 0) for x in (keys, values)
    )
    p = torch.arange(length, end, device=q.device)[:, None]
    hidden = (n > p) if causal else torch.zeros_like(n > p)
    if window:
        hidden = hidden | (n <= p - window)
    scores = torch.einsum("thd,hnd->htn", q, k) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("htn,hnd->thd", weights, v).flatten(1)


@triton.jit
def slots_of(start, slots, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where positions [start, start + BLOCK_N) stand; only a windowed cache may be a ring."""
    if WINDOW:
        slot = start % slots + tl.arange(0, BLOCK_N)
        return tl.where(slot >= slots, slot - slots, slot)
    else:
        return start + tl.arange(0, BLOCK_N)


@triton.jit
def softmax_step(s, v, top, total, acc):
    """The running maximum, sum [M] and weighted values [M, D] after scores [M, N] and v [N, D]."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    w = tl.exp2(s - safe[:, None])
    keep = tl.exp2(top - safe)
    acc = tl.dot(w.to(v.dtype), v, acc * keep[:, None])
    return new_top, total * keep + tl.sum(w, 1), acc


@triton.jit
def attend_tile(
    q, p, first_p, last_p, k_base, v_base, start, hi, slots, scale, top, total, acc,
    D: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: queries [M, D] at p [M] see keys [start, min(hi, +BLOCK_N)).

    first_p and last_p bound p: between them lies every edge of what rows may see. top, total [M]
    and acc [M, D] are the running maximum, sum and weighted values; scores are in powers of two,
    hence `scale` holds log₂ e.
    """
    n = start + tl.arange(0, BLOCK_N)
    at = slots_of(start, slots, WINDOW, BLOCK_N)[:, None] * D + tl.arange(0, D)[None, :]
    inside = n < hi
    k = tl.load(k_base + at, mask=inside[:, None], other=0.0)
    v = tl.load(v_base + at, mask=inside[:, None], other=0.0)
    s = tl.dot(q, tl.trans(k)) * scale  # [M, BLOCK_N]
    last = hi - 1
    if CAUSAL:
        last = tl.minimum(last, first_p)
    edge = start + BLOCK_N - 1 > last
    if WINDOW:
        edge = edge | (start <= last_p - WINDOW)
    if edge:  # elsewhere every row sees every key
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= p[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > p[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
    return softmax_step(s, v, top, total, acc)


@triton.jit
def _share(split, length, T, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """The positions [lo, hi) of one share."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - (WINDOW - 1), 0)
    end = length + T
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), GRAIN) * GRAIN
    lo = first + split * share
    return lo, tl.minimum(lo + share, end)


@triton.jit
def ask_for(base, start, hi, slots, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask L2 for rows [start, min(hi, +BLOCK_N)) of a [S, D] cache, one request per line."""
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth  # elements
    slot = slots_of(start, slots, WINDOW, BLOCK_N)
    slot = tl.where(start + tl.arange(0, BLOCK_N) < hi, slot, start % slots)
    column = tl.arange(0, (D + LINE - 1) // LINE) * LINE
    line = base + slot[:, None] * D + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, out_ptr,
    SPLITS: tl.constexpr, POW2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T · H, D / BLOCK_D): the shares of one row, weighed by their sums."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, POW2)
    at = split * rows + row
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lse = tl.load(lse_ptr + at, mask=split < SPLITS, other=float("-inf"))
    part = tl.load(
        partial_ptr + at[:, None] * D + d[None, :], mask=(split < SPLITS)[:, None], other=0.0
    ).to(tl.float32)  # [POW2, BLOCK_D]
    weight = tl.exp2(lse - tl.max(lse, 0))  # 0 for a share without a key
    part = tl.where((weight > 0)[:, None], part, 0.0)  # what an empty share left is not read
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + row * D + d, merged.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _attention_kernel(
    q_ptr, keys_ptr, values_ptr, length_ptr, partial_ptr, lse_ptr,
    slots, scale, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, M tiles, G)."""
    split, g = tl.program_id(0), tl.program_id(2)
    GROUP: tl.constexpr = H // G
    begin = tl.program_id(1) * BLOCK_M
    m = begin + tl.arange(0, BLOCK_M)
    used = m < T * GROUP
    t = m // GROUP
    row = t * H + g * GROUP + m % GROUP  # of [T · H, D]
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    k_base = keys_ptr + g.to(tl.int64) * slots * D
    v_base = values_ptr + g.to(tl.int64) * slots * D
    # Last written before the previous launch began, hence there already, if not in every L1.
    length = tl.load(length_ptr, cache_modifier=".cg")
    lo, hi = _share(split, length, T, WINDOW, SPLITS)
    if PDL:
        for start in range(lo, tl.minimum(hi, lo + 2 * BLOCK_N), BLOCK_N):
            ask_for(k_base, start, hi, slots, D, WINDOW, BLOCK_N)
            ask_for(v_base, start, hi, slots, D, WINDOW, BLOCK_N)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q = tl.load(q_ptr + at, mask=used[:, None], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        top, total, acc = attend_tile(
            q, length + t, length + begin // GROUP, length + T - 1, k_base, v_base, start, hi,
            slots, scale, top, total, acc, D, WINDOW, CAUSAL, BLOCK_N,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # a row without a key here: top is −inf, acc 0
    tl.store(lse_ptr + split * (T * H) + row, top + tl.log2(total), mask=used)
    if lo < hi:
        part = (acc * (1.0 / total)[:, None]).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + split * (T * H * D) + at, part, mask=used[:, None])


class Card(NamedTuple):
    """What a config depends on."""

    multiprocessors: int
    roomy: bool  # 227 KB of shared memory for a program (Hopper, GB100), elsewhere 99 or more


@cache
def card(device: torch.device) -> Card:
    """The device's; the interpreter plays an H200."""
    if device.type != "cuda":
        return Card(132, roomy=True)
    found = torch.cuda.get_device_properties(device)
    return Card(found.multi_processor_count, roomy=found.major in (9, 10))


def default_config(rows: int, heads: int, keys: Tensor, window: int) -> Config:
    """Tiles of 64 KB of keys and values, and as many shares as run at once, none without a tile.

    Tiles 64 rows high go through wgmma, whose buffers are one more than the others'. A share of one
    tile has nothing to run ahead for.
    """
    groups, slots, dim = keys.shape
    sms, roomy = card(keys.device)
    m = rows * heads // groups
    block_m = min(max(16, triton.next_power_of_2(m)), 64 if roomy or dim <= 128 else 32)
    block_n = max(16, min(64 if block_m == 64 else 128, 16384 // dim))
    visible = min(slots, window - 1 + rows) if window else slots
    tiles = triton.cdiv(visible, block_n)
    if block_m > 16 and window:
        tiles = triton.cdiv(tiles, 2)  # many rows: fewer partials to write and read
    at_once = 2 * sms if roomy and window and block_m < 64 else sms
    splits = min(tiles, at_once // (groups * triton.cdiv(m, block_m)))
    return Config(
        block_m, block_n, max(1, splits),
        warps=8 if block_m > 16 and block_m * dim >= 8192 else 4,
        stages=3 if roomy and splits * block_n < visible and (block_m < 64 or dim <= 128) else 2,
    )  # fmt: skip


def block_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    *,
    window: int,
    causal: bool,
    scale: float,
    pdl: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Attention of a block whose keys and values are in the cache: [T, H, D] → [T, H·D].

    keys, values: [G, S, D]. length: int32 [1] on the device, the position of the block's first row.
    window 0 is full attention; otherwise the cache may be a ring.
    """
    rows, heads, dim = q.shape
    groups, slots, _ = keys.shape
    assert heads % groups == 0, f"{heads} heads on {groups}"
    assert keys.shape == values.shape == (groups, slots, dim), f"{keys.shape}, {values.shape}"
    assert q.dtype == keys.dtype == values.dtype, f"{q.dtype}, {keys.dtype}, {values.dtype}"
    assert length.dtype == torch.int32, f"length {length.dtype}"
    for x in (q, keys, values):
        assert x.is_contiguous(), f"{tuple(x.shape)} {x.stride()}"
    c = config or default_config(rows, heads, keys, window)
    tiles_m = triton.cdiv(rows * heads // groups, c.block_m)
    partial = torch.empty(c.splits, rows * heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(c.splits, rows * heads, dtype=torch.float32, device=q.device)
    _attention_kernel[(c.splits, tiles_m, groups)](
        q, keys, values, length, partial, lse, slots, scale * LOG2E, rows,
        H=heads, G=groups, D=dim, WINDOW=window, CAUSAL=causal, SPLITS=c.splits,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, STAGES=c.stages, PDL=pdl,
        num_warps=c.warps, num_stages=c.stages, launch_pdl=pdl,
    )  # fmt: skip
    return merge(partial, lse, rows, pdl)


def merge(partial: Tensor, lse: Tensor, rows: int, pdl: bool) -> Tensor:
    """Shares [S, T·H, D] by their log₂-sum-exp, fp32 [S, T·H] → [T, H·D]. −inf: one not to read."""
    splits, heads, dim = partial.shape
    out = torch.empty(rows, heads // rows * dim, dtype=partial.dtype, device=partial.device)
    pow2 = triton.next_power_of_2(splits)
    block_d = min(dim, 64 if pow2 <= 32 else 32)  # so that one warp does without a barrier
    _merge_kernel[(heads, dim // block_d)](
        partial, lse, out, SPLITS=splits, POW2=pow2, D=dim, BLOCK_D=block_d, PDL=pdl,
        num_warps=max(1, pow2 * block_d // 4096), launch_pdl=pdl,
    )  # fmt: skip
    return out
