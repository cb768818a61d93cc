"""int4 → bf16, one projection at a time, for GEMMs of so many rows that cuBLAS wins.

    w = (q − zero)·scale, or (q − 8)·scale + zero, formed in fp32 and rounded once: [N, K]

Reads either int4 layout: `forms.Int4`, or a projection in `expert_weights.MoeWeight`. Bound by
writing four times what it reads.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import forms
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import Int4

BN, BK = 8, 256


def reference(w: Int4 | MoeWeight) -> Tensor:
    """[N, K] in fp32."""
    return w.dequantize() if isinstance(w, MoeWeight) else forms.dequantize(w)


@triton.jit
def _unpack_kernel(
    w_ptr, scale_ptr, zero_ptr, out_ptr, N, K,
    GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile. GROUP is of a `forms.Int4`, or 0 for the layout of experts."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (n < N) & (k < K)
    if GROUP:
        c = k % 32
        byte = k // 64 * 32 + c // 4 * 4 + c % 2 * 2 + c // 2 % 2
        held = tl.load(w_ptr + n.to(tl.int64) * (K // 2) + byte, mask=inside, other=0)
        q = (held.to(tl.int32) >> (k // 32 % 2 * 4)) & 15
        at = k // GROUP * N + n
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        middle = 8.0
        if zero_ptr is not None:
            middle = tl.load(zero_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = (q.to(tl.float32) - middle) * scale
    else:
        channel = k // 64 * N + n
        held = tl.load(w_ptr + channel.to(tl.int64) * 16 + k % 16, mask=inside, other=0)
        q = (held.to(tl.int32) >> (k // 16 % 4 * 4)) & 15
        at = channel * 2 + k // 32 % 2
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = (q.to(tl.float32) - 8.0) * scale
        if zero_ptr is not None:
            w += tl.load(zero_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + n.to(tl.int64) * K + k
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=inside)


def unpack(w: Int4 | MoeWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, K] in `dtype`."""
    if isinstance(w, MoeWeight):
        assert w.format == "int4", w.format
        (n, k), group = w.shape, 0
        parts = w.data, w.scale, w.zero
    else:
        n, k = forms.shape(w)
        parts, group = w, k // w.scale.shape[0]
    for part in parts:
        assert part is None or part.is_contiguous(), f"{tuple(part.shape)} {part.stride()}"
    out = torch.empty(n, k, dtype=dtype, device=parts[0].device)
    _unpack_kernel[(triton.cdiv(n, BN), triton.cdiv(k, BK))](
        *parts, out, n, k, GROUP=group, BN=BN, BK=BK
    )
    return out
