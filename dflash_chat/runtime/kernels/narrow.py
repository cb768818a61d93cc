"""Narrow numbers as the bf16 of which they are the bits, for tensor cores.

fp8 and int4 are multiplied as bf16 numbers that are a power of two of what they mean, part of them
subnormal; x is multiplied by another one beforehand, and the sums by what is left. All of that is
exact while |x| < 2³⁴. For fp16 and fp32 (the interpreter) the conversions are plain casts.
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
def meant(acc, x_dtype: tl.constexpr, POWER: tl.constexpr):
    """2 to the POWER of acc, where x was lifted."""
    if x_dtype == tl.bfloat16:
        return acc * 2.0**POWER
    else:
        return acc
