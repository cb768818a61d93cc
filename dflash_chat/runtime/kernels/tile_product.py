"""What the matmuls of few rows have in common: narrow weights, a few rows times a tile of them.

    x [T, K] bf16, w in a format of `expert_weights.py` → x · w[n]ᵀ over a span of K, fp32

fp8 and int4 are multiplied on the tensor cores as bf16 numbers of which they are the bits, which
makes them a power of two of what they mean, part of them subnormal; x is multiplied by another one
beforehand, and the sums by what is left. All of that is exact while |x| < 2³⁴. A nibble in the bits
4 … 7 of a bf16 counts 16 times as much as one in the bits 0 … 3, so a word of four is shifted once.
fp8 is scaled at the end, int4 once per group of 32:

    Σ x·((q − 8)·s + z) = s·(Σ x·q − Σ x·8) + z·Σ x

At 4.2 TB/s an SM has four issue slots for an int4 weight, so instructions count as requests do.
Σ x·8 is a product with a constant matrix, the same for all channels, so computed once per warp; and
their rows come eight at a time, with the weights first in the product, whose second matrix may have
eight columns while its first needs sixteen rows. The plain format has the same instructions for
sixteen. For fp16 and fp32 (the interpreter) the conversions are plain casts.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _times(x, POWER: tl.constexpr):
    """bf16 x times the bf16 of which POWER has the bits."""
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .b32 power, none;
        mov.b32 power, {POWER * 0x10001};
        mov.b32 none, 0x80008000;
        fma.rn.bf16x2 $0, $1, power, none;
        }}""",
        "=r,r",
        [x],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def small(w, dtype: tl.constexpr):
    """The bytes of e4m3 → in bf16 2⁻¹²⁰ of what they mean, in other types just that."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            prmt.b32 low, $2, 0, 0x9180;
            prmt.b32 high, $2, 0, 0xB3A2;
            shl.b32 low, low, 4;
            shl.b32 high, high, 4;
            and.b32 $0, low, 0x87F087F0;
            and.b32 $1, high, 0x87F087F0;
            }""",  # a byte and its sign, eight times; ·16; the exponent ends with bit 7
            "=&r,=&r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return w.to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def widen(w, dtype: tl.constexpr):
    """The bytes of e4m3 → dtype, exactly; all else as it is. Hopper's own cvt of e4m3 goes through
    fp16 and is much slower, and cards before Ada know no such type.
    """
    if w.dtype != tl.uint8:
        return w.to(dtype)
    elif dtype == tl.bfloat16:
        return _times(small(w, dtype), 0x7B80)  # 2¹²⁰
    else:
        return small(w, dtype)


@triton.jit
def lifted(x, ODD: tl.constexpr = False):
    """bf16 x times 2⁹³, for odd nibbles 2⁸⁹: with `small` 2⁻²⁷ of a product, with `_nibble` 2⁻⁴⁰.
    Other types stay.
    """
    if x.dtype == tl.bfloat16:
        return _times(x, 0x6C00 if ODD else 0x6E00)
    else:
        return x


@triton.jit
def _nibble(words, J: tl.constexpr, dtype: tl.constexpr):
    """Nibble J of each word: in bf16 2⁻¹³³ of it, or 2⁻¹²⁹ where J is odd, two words at a time."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 q;
            shr.u32 q, $1, {J // 2 * 8};
            and.b32 $0, q, {0xF000F0 if J % 2 else 0xF000F};
            }}""",
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return ((words >> (4 * J)) & 15).to(dtype)


@triton.jit
def _minus_eight(shape: tl.constexpr, ODD: tl.constexpr, dtype: tl.constexpr):
    """−8 as `_nibble` would have it."""
    if dtype == tl.bfloat16:
        bits: tl.constexpr = -0x7F80 if ODD else -0x7FF8  # the sign, and 128 or 8
        return tl.full(shape, bits, tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return tl.full(shape, -8, dtype)


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
def meant(acc, x_dtype: tl.constexpr, POWER: tl.constexpr):
    """2 to the POWER of acc, where x was lifted."""
    if x_dtype == tl.bfloat16:
        return acc * 2.0**POWER
    else:
        return acc


@triton.jit
def _run(x_at, taken, J: tl.constexpr, RUN: tl.constexpr):
    """x of run J, lifted and transposed [RUN, ROWS], and 2⁻⁴⁰ of each row's sum."""
    columns = J * RUN + tl.arange(0, RUN)
    x = tl.load(x_at[:, None] + columns[None, :], mask=taken[:, None], other=0.0)
    total = meant(tl.sum(x.to(tl.float32), axis=1), x.dtype, -40)
    return tl.trans(lifted(x, J % 2 == 1)), total


@triton.jit
def _group(words, x_at, taken, G: tl.constexpr, dtype: tl.constexpr):
    """Group G's columns of x · (q − 8)ᵀ, and the rows' sums. What the eights are is the same for
    all channels, so computed once per warp, and first.
    """
    RUN: tl.constexpr = words.shape[1]
    none = tl.zeros([words.shape[0], x_at.shape[0]], tl.float32)
    if RUN == 32:
        x, total = _run(x_at, taken, G, RUN)
        part = tl.dot(_minus_eight(words.shape, G % 2 == 1, dtype), x, none)
        part = tl.dot(_nibble(words, G, dtype), x, part)
    else:
        x, total = _run(x_at, taken, 2 * G, RUN)
        more, rest = _run(x_at, taken, 2 * G + 1, RUN)
        part = tl.dot(_minus_eight(words.shape, False, dtype), x, none)
        part = tl.dot(_minus_eight(words.shape, True, dtype), more, part)
        part = tl.dot(_nibble(words, 2 * G, dtype), x, part)
        part = tl.dot(_nibble(words, 2 * G + 1, dtype), more, part)
        total += rest
    return part, total


@triton.jit
def int4_block(
    acc, x_at, taken, w_ptr, scale_ptr, zero_ptr, block, N, n, inside,
    RUN: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """acc + 4·RUN columns of x · w[n]ᵀ, fp32 [CHANNELS, ROWS], 2⁻⁴⁰ of it where x is lifted.

    x_at: where each row's columns begin, [ROWS]. What is not `taken` or not `inside` counts 0.
    """
    i = tl.arange(0, RUN)
    words = tl.load(w_ptr + (block * N + n)[:, None] * RUN + i[None, :], mask=inside, other=0)
    for pairs in tl.static_range(RUN // 16):
        at = (block * (RUN // 16) + pairs) * N + n
        scale = pair(tl.load(scale_ptr + at, mask=inside, other=0))
        if HAS_ZERO:
            zero = pair(tl.load(zero_ptr + at, mask=inside, other=0))
        for g in tl.static_range(2):
            part, total = _group(words, x_at, taken & inside, 2 * pairs + g, x_at.dtype.element_ty)
            acc += part * scale[g][:, None]
            if HAS_ZERO:
                acc += zero[g][:, None] * total[None, :]
    return acc


@triton.jit
def tile_product(
    x_ptr, row, taken, w_ptr, scale_ptr, zero_ptr, n, first,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
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
        BLOCK: tl.constexpr = 4 * RUN
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
        if FORMAT == "fp8":
            acc *= _outer(one, meant(scale, dtype, 27), W_FIRST)
    return tl.trans(acc) if W_FIRST else acc
