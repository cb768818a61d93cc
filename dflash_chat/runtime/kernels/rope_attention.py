"""Attention of a few rows straight from their projection: head norms, rotation, cache write and the
shares of `attention.py` in one launch, and the one that merges them.

What `rope.qk_rope_write` and `attention.block_attention` do one after the other: each program norms
and rotates the queries of its kv head itself. The block's own keys and values belong to the last
share, whose program computes them and writes them to the cache: of a single row they are where its
softmax begins, of several a tile of their own. So nothing that another program reads is written
meanwhile, and what the cache already holds can be asked for before the wait for the projection: a
share of a single tile into registers, others' first ones into L2.

Up to 16 rows of queries a kv head, T · H/G. bf16 in and out, everything between in fp32. Bound by
latency: the chain projection → queries → scores → share → merge.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import attention, rope
from dflash_chat.runtime.kernels.attention import (
    GRAIN,
    LOG2E,
    ask_for,
    merge,
    slots_of,
    softmax_step,
)

MOST = 16  # rows of queries a kv head
WIDEST = 256  # head, beyond which registers overflow


@triton.jit
def _weights(norm_ptr, rows, D: tl.constexpr):
    """Both halves of a norm's weights, fp32 [R, D/2]: as the rows they are for; 1 without any."""
    at = rows[:, None] * 0 + tl.arange(0, D // 2)[None, :]
    if norm_ptr is not None:
        lo, hi = tl.load(norm_ptr + at), tl.load(norm_ptr + D // 2 + at)
        return lo.to(tl.float32), hi.to(tl.float32)
    else:
        return 1.0, 1.0


@triton.jit
def _halves(qkv_ptr, at, part, used, P: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr):
    """Of each part of heads that begin at `at` [R] of the projection the lower half and the upper:
    a tuple of [R, D/2]. AT_ONCE: all asked for here, not where the assembler finds them needed.
    """
    halves = ()
    here = qkv_ptr + at[:, None] + tl.arange(0, D // 2)[None, :]
    for p in tl.static_range(P):
        lo = tl.load(here + p * part, mask=used[:, None], other=0.0, volatile=AT_ONCE)
        hi = tl.load(here + p * part + D // 2, mask=used[:, None], other=0.0, volatile=AT_ONCE)
        halves = halves + (lo, hi)  # noqa: RUF005 (Triton)
    return halves


@triton.jit
def _head(
    halves, w_lo, w_hi, cos, sin, eps,
    P: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Heads [R] of which `_halves` are the parts, normed and rotated: both halves [R, D/2]."""
    lo = tl.zeros(halves[0].shape, tl.float32)
    hi = tl.zeros(halves[0].shape, tl.float32)
    for p in tl.static_range(P):
        lo += halves[2 * p].to(tl.float32)
        hi += halves[2 * p + 1].to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(lo * lo + hi * hi, 1) / D + eps)[:, None]
        lo, hi = lo * scale * w_lo, hi * scale * w_hi
    if TURN:
        lo, hi = lo * cos - hi * sin, hi * cos + lo * sin
    return lo, hi


@triton.jit
def _stacked(x, ROWS: tl.constexpr):
    """[R, D] again and again: [ROWS, D]."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (ROWS // R, R, D)), (ROWS, D))


@triton.jit
def _attend(q_lo, q_hi, k_lo, k_hi, v, seen, scale, top, total, acc):
    """One step of the online softmax over keys [N, D/2] twice and values [N, D], [M, N] `seen`."""
    s = tl.dot(q_hi, tl.trans(k_hi), tl.dot(q_lo, tl.trans(k_lo))) * scale
    return softmax_step(tl.where(seen, s, float("-inf")), v, top, total, acc)


@triton.jit
def _tile(
    k_base, v_base, start, hi, slots, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Keys in two halves and values of positions [start, min(hi, +BLOCK_N))."""
    slot = slots_of(start, slots, WINDOW, BLOCK_N)[:, None] * D
    inside = (start + tl.arange(0, BLOCK_N) < hi)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    k_lo = tl.load(k_base + slot + half, mask=inside, other=0.0)
    k_hi = tl.load(k_base + slot + D // 2 + half, mask=inside, other=0.0)
    v = tl.load(v_base + slot + tl.arange(0, D)[None, :], mask=inside, other=0.0)
    return k_lo, k_hi, v


@triton.jit
def _own_parts(
    qkv_ptr, r, mine, g, part,
    P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K_EQ_V: tl.constexpr,
):  # fmt: skip
    """Of the only row, asked for at once: its key's `_halves`, and each part of its value [D]."""
    at = r * 0 + (H + g) * D  # for every query anew, so that a product needs no other layout
    halves = _halves(qkv_ptr, at, part, mine & (r >= 0), P, D, True)
    d = tl.arange(0, D)
    here = qkv_ptr + (H + g + (0 if K_EQ_V else G)) * D + d
    values = ()
    for p in tl.static_range(P):
        value = tl.load(here + p * part, mask=mine & (d >= 0), other=0.0, volatile=True)
        values = values + (value,)  # noqa: RUF005 (Triton)
    return halves, values


@triton.jit
def _own_row(
    q_lo, q_hi, scale, halves, values, w_lo, w_hi, cos, sin, k_base, v_base, slot, mine, eps,
    P: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, V_NORM: tl.constexpr,
):  # fmt: skip
    """Of the only row: the scores of its own key [R], and its value fp32 [D], from parts of both;
    −inf and 0 if they are not `mine`, else both are written.
    """
    dtype: tl.constexpr = q_lo.dtype
    r = tl.arange(0, q_lo.shape[0])
    k_lo, k_hi = _head(halves, w_lo, w_hi, cos, sin, eps, P, D, NORM, True)
    k_lo, k_hi = k_lo.to(dtype), k_hi.to(dtype)
    d = tl.arange(0, D)
    v = tl.zeros([D], tl.float32)
    for p in tl.static_range(P):
        v += values[p].to(tl.float32)
    if V_NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    v = v.to(dtype)
    at = slot * D + tl.arange(0, D // 2)[None, :] + r[:, None] * 0
    first = mine & (r == 0)[:, None]
    tl.store(k_base + at, k_lo, mask=first)
    tl.store(k_base + at + D // 2, k_hi, mask=first)
    tl.store(v_base + slot * D + d, v, mask=mine & (d >= 0))
    lows = q_lo.to(tl.float32) * k_lo.to(tl.float32)
    highs = q_hi.to(tl.float32) * k_hi.to(tl.float32)
    score = tl.sum(lows + highs, 1) * scale
    return tl.where(mine, score, float("-inf")), v.to(tl.float32)


@triton.jit
def _own_rows(
    q_lo, q_hi, query, top, total, acc, scale, qkv_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    k_base, v_base, length, slots, g, part, T, eps,
    P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    V_NORM: tl.constexpr, K_EQ_V: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write the block's keys and values of kv head g, and attend to them. query [M]: whose row."""
    M: tl.constexpr = q_lo.shape[0]
    WIDTH: tl.constexpr = (H + (1 if K_EQ_V else 2) * G) * D
    dtype: tl.constexpr = q_lo.dtype
    t = tl.arange(0, ROWS)
    half = tl.arange(0, D // 2)
    there = (t < T)[:, None]
    turn = (length + t)[:, None] * (D // 2) + half[None, :]
    cos = tl.load(cos_ptr + turn, mask=there, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=there, other=0.0)
    at = t * WIDTH + (H + g) * D
    w_lo, w_hi = _weights(k_norm_ptr, t, D)
    halves = _halves(qkv_ptr, at, part, t < T, P, D, False)
    if not K_EQ_V:
        at += G * D
    values = _halves(qkv_ptr, at, part, t < T, P, D, False)
    k_lo, k_hi = _head(halves, w_lo, w_hi, cos, sin, eps, P, D, k_norm_ptr is not None, True)
    v_lo, v_hi = _head(values, 1.0, 1.0, 0, 0, eps, P, D, V_NORM, False)
    k_lo, k_hi, v_lo, v_hi = k_lo.to(dtype), k_hi.to(dtype), v_lo.to(dtype), v_hi.to(dtype)
    slot = ((length + t) % slots)[:, None] * D + half[None, :]
    tl.store(k_base + slot, k_lo, mask=there)
    tl.store(k_base + slot + D // 2, k_hi, mask=there)
    tl.store(v_base + slot, v_lo, mask=there)
    tl.store(v_base + slot + D // 2, v_hi, mask=there)
    v = tl.reshape(tl.permute(tl.join(v_lo, v_hi), (0, 2, 1)), (ROWS, D))
    n = tl.arange(0, M)
    seen = (n < T)[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] <= query[:, None])
    return _attend(
        q_lo, q_hi, _stacked(k_lo, M), _stacked(k_hi, M), _stacked(v, M), seen, scale,
        top, total, acc,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _rope_attention_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, length_ptr,
    partial_ptr, lse_ptr, slots, scale, eps, T,
    P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    V_NORM: tl.constexpr, K_EQ_V: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    SPLITS: tl.constexpr, ALONE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, G). ROWS: T, padded. ALONE: no share of old keys has more than one tile."""
    M: tl.constexpr = 16
    GROUP: tl.constexpr = H // G
    OWN: tl.constexpr = ROWS * GROUP  # rows of queries
    R: tl.constexpr = OWN if OWN > 4 else 4  # so that a sum over a row stays within a warp
    WIDTH: tl.constexpr = (H + (1 if K_EQ_V else 2) * G) * D
    split, g = tl.program_id(0), tl.program_id(1)
    k_base = keys_ptr + g.to(tl.int64) * slots * D
    v_base = values_ptr + g.to(tl.int64) * slots * D
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    # Last written before the previous launch began, hence there already, if not in every L1.
    length = tl.load(length_ptr, cache_modifier=".cg")
    first = 0
    if WINDOW:
        first = tl.maximum(length - (WINDOW - 1), 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), GRAIN) * GRAIN
    lo = first + split * share
    hi = tl.minimum(lo + share, length)
    r = tl.arange(0, R) % OWN
    there = (r // GROUP < T)[:, None]
    turn = (length + r // GROUP)[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + turn, mask=there, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=there, other=0.0)
    q_w_lo, q_w_hi = _weights(q_norm_ptr, r, D)
    if ROWS == 1:
        k_w_lo, k_w_hi = _weights(k_norm_ptr, r, D)
    if ALONE:
        k_lo, k_hi, v = _tile(k_base, v_base, lo, hi, slots, D, WINDOW, BLOCK_N)
    if PDL:
        if not ALONE:
            for start in range(lo, tl.minimum(hi, lo + 2 * BLOCK_N), BLOCK_N):
                ask_for(k_base, start, hi, slots, D, WINDOW, BLOCK_N)
                ask_for(v_base, start, hi, slots, D, WINDOW, BLOCK_N)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    part = T * WIDTH
    at = r // GROUP * WIDTH + (g * GROUP + r % GROUP) * D
    halves = _halves(qkv_ptr, at, part, r // GROUP < T, P, D, ROWS == 1)
    if ROWS == 1:  # asked for with the queries, not behind them
        mine = split == SPLITS - 1
        own_halves, own_values = _own_parts(qkv_ptr, r, mine, g, part, P, H, G, D, K_EQ_V)
    q_lo, q_hi = _head(halves, q_w_lo, q_w_hi, cos, sin, eps, P, D, q_norm_ptr is not None, True)
    q_lo, q_hi = q_lo.to(dtype), q_hi.to(dtype)
    if ROWS == 1:
        score, own = _own_row(
            q_lo, q_hi, scale, own_halves, own_values, k_w_lo, k_w_hi, cos, sin, k_base, v_base,
            length % slots, mine, eps, P, D, k_norm_ptr is not None, V_NORM,
        )  # fmt: skip
    q_lo, q_hi = _stacked(q_lo, M), _stacked(q_hi, M)
    m = tl.arange(0, M) % OWN
    p = length + m // GROUP  # where each row stands
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if ROWS == 1:  # its own key is where the softmax begins
        top = tl.reshape(_stacked(score[:, None], M), (M,))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        acc += own[None, :]
    if ALONE:
        n = lo + tl.arange(0, BLOCK_N)
        seen = (n < hi)[None, :]
        if WINDOW:
            seen = seen & (n[None, :] > p[:, None] - WINDOW)
        top, total, acc = _attend(q_lo, q_hi, k_lo, k_hi, v, seen, scale, top, total, acc)
    else:
        for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
            k_lo, k_hi, v = _tile(k_base, v_base, start, hi, slots, D, WINDOW, BLOCK_N)
            n = start + tl.arange(0, BLOCK_N)
            seen = (n < hi)[None, :]
            if WINDOW:
                seen = seen & (n[None, :] > p[:, None] - WINDOW)
            top, total, acc = _attend(q_lo, q_hi, k_lo, k_hi, v, seen, scale, top, total, acc)
    if ROWS > 1 and split == SPLITS - 1:
        top, total, acc = _own_rows(
            q_lo, q_hi, m // GROUP, top, total, acc, scale, qkv_ptr, k_norm_ptr, cos_ptr, sin_ptr,
            k_base, v_base, length, slots, g, part, T, eps,
            P, H, G, D, ROWS, V_NORM, K_EQ_V, CAUSAL,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # a row without a key here: top is −inf, acc 0
    used = (tl.arange(0, M) < OWN) & (m // GROUP < T)
    row = m // GROUP * H + g * GROUP + m % GROUP  # of [T · H, D]
    tl.store(lse_ptr + split * (T * H) + row, top + tl.log2(total), mask=used)
    out = (acc * (1.0 / total)[:, None]).to(partial_ptr.dtype.element_ty)
    at = split * (T * H * D) + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(partial_ptr + at, out, mask=used[:, None])


def fits(rows: int, heads: int, groups: int, dim: int) -> bool:
    """Whether so many rows and heads on so many kv heads can be attended to here."""
    share = heads // groups
    padded = int(triton.next_power_of_2(rows))
    return padded * share <= MOST and share & (share - 1) == 0 and 32 <= dim <= WIDEST


def rope_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    *,
    eps: float,
    window: int,
    causal: bool,
    scale: float,
    v_norm: bool = False,
    k_eq_v: bool = False,
    pdl: bool = False,
    config: attention.Config | None = None,
) -> Tensor:
    """Partials of a projection, fp32 [P, T, N] → [T, H·D]; keys and values go to the cache.

    Arguments as `rope.qk_rope_write` and `attention.block_attention` have them. The block's own
    slots must be none of those that its rows see of earlier positions.
    """
    heads = rope.check(qkv, q_norm, k_norm, cos, sin, keys, values, length, k_eq_v)
    splits, rows, _ = qkv.shape
    groups, slots, dim = keys.shape
    assert fits(rows, heads, groups, dim), f"{rows} rows of {heads} heads on {groups}"
    c = config or _config(rows, heads, keys, window)
    visible = min(slots, window - 1) if window else slots
    partial = torch.empty(c.splits, rows * heads, dim, dtype=keys.dtype, device=keys.device)
    lse = torch.empty(c.splits, rows * heads, dtype=torch.float32, device=keys.device)
    _rope_attention_kernel[(c.splits, groups)](
        qkv, q_norm, k_norm, cos, sin, keys, values, length, partial, lse, slots, scale * LOG2E,
        eps, rows, P=splits, H=heads, G=groups, D=dim, ROWS=triton.next_power_of_2(rows),
        V_NORM=v_norm, K_EQ_V=k_eq_v, WINDOW=window, CAUSAL=causal, SPLITS=c.splits,
        ALONE=c.splits * c.block_n >= visible, BLOCK_N=c.block_n, STAGES=c.stages, PDL=pdl,
        num_warps=c.warps, num_stages=c.stages, launch_pdl=pdl,
    )  # fmt: skip
    return merge(partial, lse, rows, pdl)


def _config(rows: int, heads: int, keys: Tensor, window: int) -> attention.Config:
    """As for the attention alone, but more hands for a single row, which waits for each of them."""
    config = attention.default_config(rows, heads, keys, window)
    return config._replace(warps=8) if rows == 1 and window else config
