"""int4 times a few rows: channels of `forms.Int4` weights, their columns one after the other.

    Σ x·((q − 8)·s + z) = s·(Σ x·q − Σ x·8) + z·Σ x          once per group of 32 columns

A nibble in the bits 4 … 7 of a bf16 counts 16 times as much as one in the bits 0 … 3, so a word of
four is shifted once. Σ x·8 is a product with a constant matrix, the same for all channels, so
computed once per warp. The weights come first in the product, whose second matrix may have eight
columns while its first needs sixteen rows: eight rows of x, or of a single one eight groups. Then a
channel's words of a group meet all eight, and only what meets its own is kept. So no product waits
for another's sum but for its group's eights', and the sums are those of several rows to the bit,
since they are added up in the same order: of the step before, while a step's products are made.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import triton
import triton.language as tl

from dflash_chat.runtime.kernels.narrow import lifted, meant

LEFT = tl.constexpr(512)  # columns before a product's end, where the next launch may begin


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


@triton.jit
def _split(parts):
    """[.., 2G] → its even and its odd columns: [.., G] each."""
    return tl.split(tl.reshape(parts, (parts.shape[0], parts.shape[1] // 2, 2)))


@triton.jit
def _pair_of_groups(acc, even, odd, scales):
    """acc + two neighbouring groups times their scales, one after the other."""
    scale = pair(scales)
    acc += even * scale[0]
    return acc + odd * scale[1]


@triton.jit
def _add_up(acc, sums, scales):
    """acc [CHANNELS] + the sums of eight groups [CHANNELS, 8] times their scales, in order."""
    even, odd = _split(sums)
    even_04, even_26 = _split(even)
    odd_15, odd_37 = _split(odd)
    even_0, even_4 = tl.split(even_04)
    even_2, even_6 = tl.split(even_26)
    odd_1, odd_5 = tl.split(odd_15)
    odd_3, odd_7 = tl.split(odd_37)
    acc = _pair_of_groups(acc, even_0, odd_1, scales[0])
    acc = _pair_of_groups(acc, even_2, odd_3, scales[1])
    acc = _pair_of_groups(acc, even_4, odd_5, scales[2])
    return _pair_of_groups(acc, even_6, odd_7, scales[3])


@triton.jit
def _scales(scale_ptr, block, first, end, N, n, RUN: tl.constexpr):
    """Of eight groups from `block` on, in pairs: four times [CHANNELS]; 0 before `first`."""
    at = scale_ptr + block * (RUN // 16) * N + n
    pairs = tl.where(block < first, 0, (end - block) * (RUN // 16))  # from here on
    return (
        tl.load(at, mask=pairs > 0, other=0),
        tl.load(at + N, mask=pairs > 1, other=0),
        tl.load(at + 2 * N, mask=pairs > 2, other=0),
        tl.load(at + 3 * N, mask=pairs > 3, other=0),
    )


@triton.jit
def _eight_groups(x_ptr, w_ptr, block, end, N, n, RUN: tl.constexpr):
    """x · (q − 8)ᵀ of 256 columns from `block` of 4·RUN on, by group: fp32 [CHANNELS, 8]. From
    `end` on they are not read, and their scales have to be 0.
    """
    CHANNELS: tl.constexpr = n.shape[0]
    BLOCKS: tl.constexpr = 64 // RUN  # whose channels stand one below the other
    GROUPS: tl.constexpr = 8 // BLOCKS  # of a block
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, RUN)
    group = tl.arange(0, 8)
    column = block * (4 * RUN) + group * 32
    live = (column < end * (4 * RUN))[:, None]
    x_at = x_ptr + column[:, None] + i[None, :]
    x = tl.load(x_at, mask=live, other=0.0)
    own = block + tl.arange(0, BLOCKS * CHANNELS) // CHANNELS
    channel = tl.reshape(tl.broadcast_to(n[None, :], (BLOCKS, CHANNELS)), (BLOCKS * CHANNELS,))
    w_at = w_ptr + (own * N + channel)[:, None] * RUN + i[None, :]
    words = tl.load(w_at, mask=(own < end)[:, None], other=0)

    # The eights as `_group` has them: −8 · 2⁹³x and −128 · 2⁸⁹x are one number, but a tensor core
    # lines products up by their factors' exponents before it cuts off what is small.
    none = tl.zeros([BLOCKS * CHANNELS, 8], tl.float32)
    even = tl.trans(lifted(x))
    eights = tl.dot(_minus_eight(words.shape, False, dtype), even, none)
    if RUN == 16:
        odd = tl.trans(lifted(tl.load(x_at + RUN, mask=live, other=0.0), True))
        eights = tl.dot(_minus_eight(words.shape, True, dtype), odd, eights)
    else:
        odd = tl.trans(lifted(x, True))
        odd_eights = tl.dot(_minus_eight(words.shape, True, dtype), odd, none)
    sums = eights
    for g in tl.static_range(GROUPS):
        if RUN == 16:
            part = tl.dot(_nibble(words, 2 * g, dtype), even, eights)
            part = tl.dot(_nibble(words, 2 * g + 1, dtype), odd, part)
        elif g % 2 == 0:
            part = tl.dot(_nibble(words, g, dtype), even, eights)
        else:
            part = tl.dot(_nibble(words, g, dtype), odd, odd_eights)
        sums = tl.where((group % GROUPS == g)[None, :], part, sums)
    sums = tl.reshape(sums, (BLOCKS, CHANNELS, 8))
    met = (group // GROUPS)[None, None, :] == tl.arange(0, BLOCKS)[:, None, None]
    return tl.sum(tl.where(met, sums, 0.0), axis=0)


@triton.jit
def let_go(now, since):
    """Let the next launch begin if it is `since` or later."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred late;
        setp.ge.s32 late, $1, $2;
        @late griddepcontrol.launch_dependents;
        mov.b32 $0, 0;
        }""",
        "=r,r,r", [now, since], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def only_row(
    x_ptr, w_ptr, scale_ptr, first, end, N, n, RUN: tl.constexpr, STAGES: tl.constexpr,
    LET_GO: tl.constexpr = False,
):  # fmt: skip
    """x · w[n]ᵀ of one row over the blocks first … end of 4·RUN columns of int4: fp32 [CHANNELS].

    Eight groups of x stand where eight rows do in `int4_block`: three tenths fewer instructions,
    and the same bits. LET_GO: the next launch may begin after the first 256 columns.
    """
    STEP: tl.constexpr = 64 // RUN
    acc = tl.zeros([n.shape[0]], tl.float32)
    before = tl.zeros([n.shape[0], 8], tl.float32)
    last = _scales(scale_ptr, first + (end - first - 1) // STEP * STEP, first, end, N, n, RUN)
    for block in tl.range(first, end, STEP, num_stages=STAGES):  # pipelines the scales too
        scales = _scales(scale_ptr, block - STEP, first, end, N, n, RUN)
        sums = _eight_groups(x_ptr, w_ptr, block, end, N, n, RUN)
        acc = _add_up(acc, before, scales)
        before = sums
        if LET_GO:
            let_go(block, first + STEP)
    acc = _add_up(acc, before, last)
    return meant(acc, x_ptr.dtype.element_ty, 40)
