"""int4 times a few rows: channels of `forms.Int4` weights, their columns one after the other.

    Σ x·((q − 8)·s + z) = s·(Σ x·q − Σ x·8) + z·Σ x          once per group of 32 columns

A nibble in the bits 4 … 7 of a bf16 counts 16 times as much as one in the bits 0 … 3, so a word of
four is shifted once. Σ x·8 is a product with a constant matrix, the same for all channels, so
computed once per warp. The weights come first in the product, whose second matrix may have eight
columns while its first needs sixteen rows: eight rows of x, or of a single one eight groups, each
beside zeros, whose sums then stand side by side. That takes three tenths fewer instructions, and
the sums are the same to the bit, since they are added up in the same order.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.narrow import lifted, meant


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


@functools.cache
def apart(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2, 8, 8]: what x of each group is multiplied by for the product with group g, `lifted` as
    even nibbles ask for, then as odd ones; 0 where it is not g.
    """
    lifts = (2.0**93, 2.0**89) if dtype == torch.bfloat16 else (1.0, 1.0)
    return torch.stack([torch.eye(8) * lift for lift in lifts]).to(device, dtype)


@triton.jit
def _picked(x, factor):
    """x · factor, which is 0 or a power of two."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 none;
            mov.b32 none, 0x80008000;
            fma.rn.bf16x2 $0, $1, $2, none;
            }""",
            "=r,r,r",
            [x, factor],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return x * factor


@triton.jit
def _split(parts):
    """[.., 2G] → its even and its odd columns: [.., G] each."""
    return tl.split(tl.reshape(parts, (parts.shape[0], parts.shape[1] // 2, 2)))


@triton.jit
def _pair_of_groups(acc, even, odd, scale_ptr, inside):
    """acc + two neighbouring groups, one after the other."""
    scale = pair(tl.load(scale_ptr, mask=inside, other=0))
    acc += even * scale[0]
    return acc + odd * scale[1]


@triton.jit
def _eight_groups(acc, x_ptr, w_ptr, scale_ptr, factors, block, end, N, n, RUN: tl.constexpr):
    """acc [CHANNELS] + x · w[n]ᵀ over 256 columns from `block` of 4·RUN on, none from `end` on."""
    CHANNELS: tl.constexpr = n.shape[0]
    PARTS: tl.constexpr = 32 // RUN  # runs of a group
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, RUN)
    group = tl.arange(0, 8)
    column = block * (4 * RUN) + group * 32
    live = (column < end * (4 * RUN))[:, None]
    at = x_ptr + column[:, None] + i[None, :]
    x = tl.load(at, mask=live, other=0.0)
    minus_eight = _minus_eight((CHANNELS, RUN), False, dtype)
    eights = tl.dot(minus_eight, tl.trans(lifted(x)), tl.zeros([CHANNELS, 8], tl.float32))
    if PARTS == 2:
        more = tl.load(at + RUN, mask=live, other=0.0)
        eights = tl.dot(minus_eight, tl.trans(lifted(more)), eights)
    early, late = eights, eights  # two chains of products, each half as long
    for run in tl.static_range(256 // RUN):
        if run % 4 == 0:
            here = block + run // 4
            words = tl.load(
                w_ptr + (here * N + n)[:, None] * RUN + i[None, :], mask=here < end, other=0
            )
        if PARTS == 2 and run % 2 == 1:
            own = tl.trans(_picked(more, factors[run][:, None]))
        else:
            own = tl.trans(_picked(x, factors[run][:, None]))
        if run < 128 // RUN:
            early = tl.dot(_nibble(words, run % 4, dtype), own, early)
        else:
            late = tl.dot(_nibble(words, run % 4, dtype), own, late)
    even, odd = _split(tl.where((group < 4)[None, :], early, late))
    even_04, even_26 = _split(even)
    odd_15, odd_37 = _split(odd)
    even_0, even_4 = tl.split(even_04)
    even_2, even_6 = tl.split(even_26)
    odd_1, odd_5 = tl.split(odd_15)
    odd_3, odd_7 = tl.split(odd_37)
    at = scale_ptr + block * (RUN // 16) * N + n
    pairs = (end - block) * (RUN // 16)  # of groups, from here on
    acc = _pair_of_groups(acc, even_0, odd_1, at, pairs > 0)
    acc = _pair_of_groups(acc, even_2, odd_3, at + N, pairs > 1)
    acc = _pair_of_groups(acc, even_4, odd_5, at + 2 * N, pairs > 2)
    return _pair_of_groups(acc, even_6, odd_7, at + 3 * N, pairs > 3)


@triton.jit
def _factors(apart_ptr, RUNS: tl.constexpr):
    """Of each run of 256 columns what the eight groups' x is multiplied by, a tuple of [8]."""
    out = ()
    for run in tl.static_range(RUNS):
        at = apart_ptr + run % 2 * 64 + run * 8 // RUNS * 8 + tl.arange(0, 8)
        out = out + (tl.load(at),)  # noqa: RUF005 (Triton)
    return out


@triton.jit
def only_row(
    x_ptr, w_ptr, scale_ptr, apart_ptr, first, end, N, n, RUN: tl.constexpr, STAGES: tl.constexpr
):
    """x · w[n]ᵀ of one row over the blocks first … end of 4·RUN columns of int4: fp32 [CHANNELS].

    Eight groups of x stand where eight rows do in `int4_block`, each beside zeros, so that their
    sums come out side by side, with three tenths fewer instructions and the same bits.
    """
    acc = tl.zeros([n.shape[0]], tl.float32)
    factors = _factors(apart_ptr, 256 // RUN)
    for block in tl.range(first, end, 64 // RUN, num_stages=STAGES):  # pipelines the scales too
        acc = _eight_groups(acc, x_ptr, w_ptr, scale_ptr, factors, block, end, N, n, RUN)
    return meant(acc, x_ptr.dtype.element_ty, 40)
