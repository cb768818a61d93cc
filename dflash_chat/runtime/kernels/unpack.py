"""int4 → bf16, one projection at a time, for GEMMs of so many rows that cuBLAS wins.

    w = (q − 8)·scale + zero, formed in fp32 and rounded once: [N, K]

Bound by writing four times what it reads.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import forms
from dflash_chat.runtime.kernels.forms import Int4

BN, BK = 8, 256


def reference(w: Int4) -> Tensor:
    """[N, K] in fp32."""
    return forms.unpack_int4(w)


@triton.jit
def _unpack_kernel(
    w_ptr, scale_ptr, zero_ptr, out_ptr, N, K,
    RUN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (n < N) & (k < K)
    channel = (k // (4 * RUN) * N + n).to(tl.int64)
    held = tl.load(w_ptr + channel * RUN + k % RUN, mask=inside, other=0)
    q = (held.to(tl.int32) >> (k // RUN % 4 * 4)) & 15
    at = (k // 64 * N + n) * 2 + k // 32 % 2
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = (q.to(tl.float32) - 8.0) * scale
    if zero_ptr is not None:
        w += tl.load(zero_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + n.to(tl.int64) * K + k
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=inside)


def unpack(w: Int4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, K] in `dtype`."""
    n, k = forms.shape(w)
    for part in w:
        assert part is None or part.is_contiguous(), f"{tuple(part.shape)} {part.stride()}"
    out = torch.empty(n, k, dtype=dtype, device=w.words.device)
    _unpack_kernel[(triton.cdiv(n, BN), triton.cdiv(k, BK))](
        *w, out, n, k, RUN=w.words.shape[-1], BN=BN, BK=BK
    )
    return out
