"""The inner loop of the MoE kernels: a few rows times a tile of one expert's output channels.

    x [T, K] bf16, w in a format of `expert_weights.py` → x · w[n]ᵀ over a span of K, fp32

fp8 and int4 are widened to bf16 in registers, exactly, and multiplied on the tensor cores; fp8 is
scaled at the end, int4 once per group of 32:

    Σ x·((q − 8)·s + z) = s·Σ x·(q − 8) + z·Σ x

At 4.2 TB/s an SM has four issue slots for an int4 weight, so the two conversions are written as
instructions for pairs of bf16. For fp16 (the interpreter) they are plain casts.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _widen(w, dtype: tl.constexpr):
    """w in `dtype`, exact. sm_90 has no instruction from fp8 to bf16 and would go through fp32."""
    if w.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, scale, none;
            mov.b32 scale, 0x7B807B80;
            mov.b32 none, 0x80008000;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            shr.u32 $0, low, 4;
            shr.u32 $1, high, 4;
            and.b32 $0, $0, 0x07F007F0;
            and.b32 $1, $1, 0x07F007F0;
            lop3.b32 $0, low, none, $0, 0xEA;
            lop3.b32 $1, high, none, $1, 0xEA;
            fma.rn.bf16x2 $0, $0, scale, none;
            fma.rn.bf16x2 $1, $1, scale, none;
            }""",  # sign, exponent, mantissa in place, then ·2¹²⁰ for the other bias, − 0
            "=&r,=&r,r",
            [w.to(tl.int8, bitcast=True)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return w.to(dtype)


@triton.jit
def _nibble(words, J: tl.constexpr, dtype: tl.constexpr):
    """Nibble J of each word minus 8 in `dtype`, exact. In bf16 two at a time, by exponent bits."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 q, one, offset;
            mov.b32 one, 0x3F803F80;
            mov.b32 offset, 0xC308C308;
            shr.u32 q, $1, {4 * J};
            lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, q, one, offset;
            }}""",  # (128 + q) − 136
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return (((words >> (4 * J)) & 15) - 8).to(dtype)


@triton.jit
def _pair(words):
    """Two bf16 of each 32-bit word, as fp32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def tile_product(
    x_ptr, row, taken, w_ptr, scale_ptr, zero_ptr, n, first,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, K] · w[n]ᵀ over columns first … first + SPAN: fp32 [ROWS, CHANNELS]."""
    acc = tl.zeros([ROWS, CHANNELS], tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if FORMAT == "int4":
        BLOCKS: tl.constexpr = SPAN // 64
        i = tl.arange(0, 16)
        for start in tl.range(0, BLOCKS, BK // 64, num_stages=STAGES):  # pipelines the scales too
            for step in tl.static_range(BK // 64):
                block = first // 64 + start + step
                inside = (start + step < BLOCKS) & (block < K // 64)
                channel = block * N + n
                w_at = w_ptr + channel[None, :] * 16 + i[:, None]
                words = tl.load(w_at, mask=inside, other=0)
                scale = _pair(tl.load(scale_ptr + channel, mask=inside, other=0))
                if HAS_ZERO:
                    zero = _pair(tl.load(zero_ptr + channel, mask=inside, other=0))
                x_at = x_ptr + row[:, None] * K + block * 64 + i[None, :]
                for g in tl.static_range(2):
                    x_a = tl.load(x_at + 32 * g, mask=taken[:, None] & inside, other=0.0)
                    x_b = tl.load(x_at + 32 * g + 16, mask=taken[:, None] & inside, other=0.0)
                    part = tl.dot(x_a, _nibble(words, 2 * g, dtype))  # [ROWS, CHANNELS]
                    part = tl.dot(x_b, _nibble(words, 2 * g + 1, dtype), part)
                    acc += part * scale[g][None, :]
                    if HAS_ZERO:
                        total = tl.sum(x_a.to(tl.float32) + x_b.to(tl.float32), axis=1)
                        acc += total[:, None] * zero[g][None, :]
    else:
        k = tl.arange(0, BK)
        for start in tl.range(0, SPAN, BK, num_stages=STAGES):
            x_at = x_ptr + row[:, None] * K + first + start + k[None, :]
            w_at = w_ptr + n[None, :] * K + first + start + k[:, None]
            if SPAN % BK == 0 and K % SPAN == 0:
                x = tl.load(x_at, mask=taken[:, None], other=0.0)  # [ROWS, BK]
                w = tl.load(w_at)  # [BK, CHANNELS]
            else:
                inside = (start + k < SPAN) & (first + start + k < K)
                x = tl.load(x_at, mask=taken[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, _widen(w, dtype), acc)
        if FORMAT == "fp8":
            acc *= tl.load(scale_ptr + n)[None, :]
    return acc
