"""What the matmuls of few rows have in common: a few rows times a tile of weights.

    x [T, K] bf16, w in a format of `expert_weights.py` → x · w[n]ᵀ over a span of K, fp32

fp8 is read as `narrow.py` tells and scaled at the end, int4 as `int4_product.py` does. At 4.2 TB/s
an SM has four issue slots for an int4 weight, so instructions count as requests do. Rows of narrow
formats come eight at a time, with the weights first in the product; the plain format has the same
instructions for sixteen.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import triton
import triton.language as tl

from dflash_chat.runtime.kernels.int4_product import LEFT, int4_block, let_go, only_row
from dflash_chat.runtime.kernels.narrow import lifted, meant, small


@triton.jit
def _product(x, w, acc, W_FIRST: tl.constexpr):
    """acc + x [ROWS, k] · w [CHANNELS, k]ᵀ, or its transpose."""
    if W_FIRST:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)


@triton.jit
def _outer(of_row, of_channel, W_FIRST: tl.constexpr):
    """Of each row times of each channel, as acc stands."""
    if W_FIRST:
        return of_channel[:, None] * of_row[None, :]
    else:
        return of_row[:, None] * of_channel[None, :]


@triton.jit
def prefetch(w_ptr, n, first, N, K, RUN: tl.constexpr):
    """Ask L2 for what is read first of each channel: 512 bytes, of int4 128. RUN: 0 for others."""
    if RUN:
        BLOCK: tl.constexpr = 4 * RUN
        block = tl.minimum(first // BLOCK + tl.arange(0, 64 // RUN), K // BLOCK - 1)
        at = w_ptr + (block[None, :] * N + n[:, None]) * RUN
    else:
        i = tl.arange(0, 4)
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        column = tl.minimum(first + i * LINE, K - 1)
        at = w_ptr + n[:, None].to(tl.int64) * K + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.uint64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def forget(scalar):
    """Let this multiprocessor's L1 go of all it holds, whatever the number."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, 0;", "=r,r", [scalar],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tile_product(
    x_ptr, row, taken, w_ptr, scale_ptr, zero_ptr, n, first,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, ALONE: tl.constexpr, LET_GO: tl.constexpr = False,
):  # fmt: skip
    """x [rows, K] · w[n]ᵀ over columns first … first + SPAN: fp32 [ROWS, CHANNELS].

    ROWS: eight, of a plain weight sixteen or more; one, if it is ALONE. LET_GO: the next launch may
    begin when LEFT columns are left, or when `only_row` lets it.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = row.shape[0]
    CHANNELS: tl.constexpr = n.shape[0]
    W_FIRST: tl.constexpr = FORMAT != "plain"
    acc = tl.zeros([CHANNELS, ROWS] if W_FIRST else [ROWS, CHANNELS], tl.float32)
    one = tl.full([ROWS], 1.0, tl.float32)
    BLOCK: tl.constexpr = 4 * RUN
    if ALONE:
        end = (first + SPAN) // BLOCK
        acc = only_row(x_ptr, w_ptr, scale_ptr, first // BLOCK, end, N, n, RUN, STAGES, LET_GO)
        acc = acc[:, None]
    elif FORMAT == "int4":
        BLOCKS: tl.constexpr = SPAN // BLOCK
        STEPS: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
        x_row = x_ptr + row * K
        for start in tl.range(0, BLOCKS, STEPS, num_stages=STAGES):  # pipelines the scales too
            for step in tl.static_range(STEPS):
                block = first // BLOCK + start + step
                inside = (start + step < BLOCKS) & (block < K // BLOCK)
                acc = int4_block(
                    acc, x_row + block * BLOCK, taken, w_ptr, scale_ptr, zero_ptr, block, N, n,
                    inside, RUN, HAS_ZERO,
                )  # fmt: skip
            if LET_GO:
                let_go(start, BLOCKS - LEFT // BLOCK)
        acc = meant(acc, dtype, 40)
    else:
        k = tl.arange(0, BK)
        if FORMAT == "fp8":
            scale = tl.load(scale_ptr + n)  # asked for before the weights, not behind them
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            x_at = x_ptr + row[:, None] * K + first + start + k[None, :]
            w_at = w_ptr + n[:, None] * K + first + start + k[None, :]
            if SPAN % BK == 0 and K % SPAN == 0:
                live = taken[:, None]
                w = tl.load(w_at)  # [CHANNELS, BK]
            else:
                inside = (start + k < SPAN) & (first + start + k < K)
                live = taken[:, None] & inside[None, :]
                w = tl.load(w_at, mask=inside[None, :], other=0.0)
            x = tl.load(x_at, mask=live, other=0.0, cache_modifier=".cg")  # [ROWS, BK], not from L1
            if FORMAT == "fp8":
                acc = _product(lifted(x), small(w, dtype), acc, W_FIRST)
            else:
                acc = _product(x, w.to(dtype), acc, W_FIRST)
            if LET_GO:
                let_go(start, SPAN - LEFT)
        if FORMAT == "fp8":
            acc *= _outer(one, meant(scale, dtype, 27), W_FIRST)
    return tl.trans(acc) if W_FIRST else acc
