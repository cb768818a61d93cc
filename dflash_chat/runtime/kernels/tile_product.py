"""The inner loop of the MoE kernels: a few rows times a tile of one expert's output channels.

    x [T, K] bf16, w in a format of `expert_weights.py` → x · w[n]ᵀ over a span of K, fp32

fp8 and int4 are widened to bf16 in registers, exactly, and multiplied on the tensor cores; fp8 is
scaled at the end, int4 once per group of 32, with 128 + q instead of q, which is free:

    Σ x·((q − 8)·s + z) = s·(Σ x·(128 + q) − Σ x·136) + z·Σ x

At 4.2 TB/s an SM has four issue slots for an int4 weight, so instructions bound the narrow formats.
The two conversions are written for pairs of bf16; Σ x·136 is a product with a constant matrix, the
same for all channels, so computed once per warp; and their rows come eight at a time, with the
weights first in the product, whose second matrix may have eight columns while its first needs
sixteen rows. The plain format has the same instructions for sixteen.
For fp16 (the interpreter) the conversions are plain casts.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(w, dtype: tl.constexpr):
    """The bytes of e4m3 → dtype, exactly; all else as it is. Hopper's own cvt of e4m3 goes through
    fp16 and is much slower, and cards before Ada know no such type.
    """
    if w.dtype != tl.uint8:
        return w.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, scale, none;
            mov.b32 scale, 0x7B807B80;
            mov.b32 none, 0x80008000;
            prmt.b32 low, $2, 0, 0x9180;
            prmt.b32 high, $2, 0, 0xB3A2;
            shl.b32 low, low, 4;
            shl.b32 high, high, 4;
            and.b32 low, low, 0x87F087F0;
            and.b32 high, high, 0x87F087F0;
            fma.rn.bf16x2 $0, low, scale, none;
            fma.rn.bf16x2 $1, high, scale, none;
            }""",  # a byte and its sign, eight times; ·16; then ·2¹²⁰ for the other bias, − 0
            "=&r,=&r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return w.to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _nibble(words, J: tl.constexpr, dtype: tl.constexpr):
    """128 + nibble J of each word in `dtype`, exact. In bf16 two at a time: 128's mantissa bits."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 q;
            shr.u32 q, $1, {4 * J};
            lop3.b32 $0, q, 0x000F000F, 0x43004300, 0xEA;
            }}""",
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return (((words >> (4 * J)) & 15) + 128).to(dtype)


@triton.jit
def pair(words):
    """Two bf16 of each 32-bit word, as fp32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


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
def prefetch(w_ptr, n, first, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """Ask L2 for what tile_product reads first: 512 bytes of each channel, 128 of int4."""
    i = tl.arange(0, 4)
    if FORMAT == "int4":
        block = tl.minimum(first // 64 + i, K // 64 - 1)
        at = w_ptr + (block[None, :] * N + n[:, None]) * 16
    else:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        at = w_ptr + n[:, None] * K + tl.minimum(first + i * LINE, K - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.uint64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tile_product(
    x_ptr, row, taken, w_ptr, scale_ptr, zero_ptr, n, first,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, K] · w[n]ᵀ over columns first … first + SPAN: fp32 [ROWS, CHANNELS].

    ROWS: eight, of a plain weight sixteen or more.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = row.shape[0]
    CHANNELS: tl.constexpr = n.shape[0]
    W_FIRST: tl.constexpr = FORMAT != "plain"
    acc = tl.zeros([CHANNELS, ROWS] if W_FIRST else [ROWS, CHANNELS], tl.float32)
    one = tl.full([ROWS], 1.0, tl.float32)
    if FORMAT == "int4":
        BLOCKS: tl.constexpr = SPAN // 64
        i = tl.arange(0, 16)
        offset = tl.full([CHANNELS, 16], -136, dtype)
        none = tl.zeros(acc.shape, tl.float32)
        for start in tl.range(0, BLOCKS, BK // 64, num_stages=STAGES):  # pipelines the scales too
            for step in tl.static_range(BK // 64):
                block = first // 64 + start + step
                inside = (start + step < BLOCKS) & (block < K // 64)
                channel = block * N + n
                w_at = w_ptr + channel[:, None] * 16 + i[None, :]
                words = tl.load(w_at, mask=inside, other=0)  # [CHANNELS, 16]
                scale = pair(tl.load(scale_ptr + channel, mask=inside, other=0))
                if HAS_ZERO:
                    zero = pair(tl.load(zero_ptr + channel, mask=inside, other=0))
                x_at = x_ptr + row[:, None] * K + block * 64 + i[None, :]
                for g in tl.static_range(2):
                    x_a = tl.load(x_at + 32 * g, mask=taken[:, None] & inside, other=0.0)
                    x_b = tl.load(x_at + 32 * g + 16, mask=taken[:, None] & inside, other=0.0)
                    part = _product(x_b, offset, _product(x_a, offset, none, W_FIRST), W_FIRST)
                    part = _product(x_a, _nibble(words, 2 * g, dtype), part, W_FIRST)
                    part = _product(x_b, _nibble(words, 2 * g + 1, dtype), part, W_FIRST)
                    acc += part * _outer(one, scale[g], W_FIRST)
                    if HAS_ZERO:
                        total = tl.sum(x_a.to(tl.float32) + x_b.to(tl.float32), axis=1)
                        acc += _outer(total, zero[g], W_FIRST)
    else:
        k = tl.arange(0, BK)
        if FORMAT == "fp8":
            scale = tl.load(scale_ptr + n)  # asked for before the weights, not behind them
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            x_at = x_ptr + row[:, None] * K + first + start + k[None, :]
            w_at = w_ptr + n[:, None] * K + first + start + k[None, :]
            if SPAN % BK == 0 and K % SPAN == 0:
                x = tl.load(x_at, mask=taken[:, None], other=0.0)  # [ROWS, BK]
                w = tl.load(w_at)  # [CHANNELS, BK]
            else:
                inside = (start + k < SPAN) & (first + start + k < K)
                x = tl.load(x_at, mask=taken[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[None, :], other=0.0)
            acc = _product(x, widen(w, dtype), acc, W_FIRST)
        if FORMAT == "fp8":
            acc *= _outer(one, scale, W_FIRST)
    return tl.trans(acc) if W_FIRST else acc
