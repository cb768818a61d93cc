"""Query/key norms, rotary positions and the write into the cache, in one launch.

    x = Σ_p qkv[p, t]                          the projection's split-K partials, summed here
    y = x · w / √(mean(x²) + eps)              per head; models without head norms skip it
    rotate(y)[i], [i + D/2] = y[i] c − y[i + D/2] s, y[i + D/2] c + y[i] s     for i < D/2

A projected row is [q heads | k heads | v heads] × D. Where values start from the raw key projection
(`k_eq_v`) it has no v heads. cos and sin are fp32 [positions, D/2]; dimensions that do not rotate
have cos 1 and sin 0. Keys and values of position p go to slot p % S of [G, S, D] caches, so the
same code serves full layers (S = capacity) and rings. Everything is computed in fp32 and rounded
once. A block moves a few hundred KB: bound by latency, hence one small program per row and head.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x · weight / rms(x) over the last dimension."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-rotate x [T, heads, D] by cos, sin [T, D/2]."""
    lo, hi = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)


def reference(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, length: int, eps: float, v_norm: bool, k_eq_v: bool,
) -> Tensor:  # fmt: skip
    """`qk_rope_write` of one summed projection [T, N] in plain torch, in qkv's dtype."""
    rows, (groups, slots, dim) = len(qkv), keys.shape
    x = qkv.view(rows, -1, dim)
    heads = x.shape[1] - groups * (1 if k_eq_v else 2)
    q, k = x[:, :heads], x[:, heads : heads + groups]
    v = k if k_eq_v else x[:, heads + groups :]
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if v_norm:
        v = rms_norm(v, None, eps)
    at = torch.arange(length, length + rows, device=qkv.device)
    keys[:, at % slots] = rotate(k, cos[at], sin[at]).transpose(0, 1).to(keys.dtype)
    values[:, at % slots] = v.transpose(0, 1).to(values.dtype)
    return rotate(q, cos[at], sin[at])


@triton.jit
def _load_head(x_ptr, part, d, P: tl.constexpr, D: tl.constexpr):
    """Both halves of one head, fp32 [D/2] each, summed over partials `part` elements apart."""
    lo = tl.zeros([D // 2], tl.float32)
    hi = tl.zeros([D // 2], tl.float32)
    for p in tl.static_range(P):
        lo += tl.load(x_ptr + p * part + d).to(tl.float32)
        hi += tl.load(x_ptr + p * part + D // 2 + d).to(tl.float32)
    return lo, hi


@triton.jit
def _norm(lo, hi, eps, D: tl.constexpr):
    scale = tl.rsqrt((tl.sum(lo * lo, 0) + tl.sum(hi * hi, 0)) / D + eps)
    return lo * scale, hi * scale


@triton.jit
def _halves(w_ptr, d, D: tl.constexpr):
    return tl.load(w_ptr + d).to(tl.float32), tl.load(w_ptr + D // 2 + d).to(tl.float32)


@triton.jit
def _turn(cos_ptr, sin_ptr, position, d, D: tl.constexpr):
    return tl.load(cos_ptr + position * (D // 2) + d), tl.load(sin_ptr + position * (D // 2) + d)


@triton.jit
def _rotate(lo, hi, c, s):
    return lo * c - hi * s, hi * c + lo * s


@triton.jit
def _store_head(out_ptr, lo, hi, d, D: tl.constexpr):
    tl.store(out_ptr + d, lo.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + D // 2 + d, hi.to(out_ptr.dtype.element_ty))


@triton.jit
def _qk_rope_write_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, length_ptr, q_ptr,
    slots, eps,
    P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V_NORM: tl.constexpr,
    K_EQ_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (heads of a projected row, T)."""
    head = tl.program_id(0)
    t = tl.program_id(1)
    width = tl.num_programs(0) * D
    part = tl.num_programs(1).to(tl.int64) * width
    d = tl.arange(0, D // 2)
    # Last written before the previous launch began, hence there already, if not in every L1.
    position = tl.load(length_ptr, cache_modifier=".cg") + t
    c, s = _turn(cos_ptr, sin_ptr, position, d, D)
    if q_norm_ptr is not None:
        w_lo, w_hi = _halves(q_norm_ptr if head < H else k_norm_ptr, d, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lo, hi = _load_head(qkv_ptr + t.to(tl.int64) * width + head * D, part, d, P, D)
    if head < H:
        if q_norm_ptr is not None:
            lo, hi = _norm(lo, hi, eps, D)
            lo, hi = lo * w_lo, hi * w_hi
        lo, hi = _rotate(lo, hi, c, s)
        _store_head(q_ptr + (t * H + head) * D, lo, hi, d, D)
    else:
        row = ((head - H) % G).to(tl.int64) * slots + position % slots  # of [G · S, D]
        if head >= H + G or K_EQ_V:
            v_lo, v_hi = lo, hi
            if V_NORM:
                v_lo, v_hi = _norm(lo, hi, eps, D)
            _store_head(values_ptr + row * D, v_lo, v_hi, d, D)
        if head < H + G:
            if k_norm_ptr is not None:
                lo, hi = _norm(lo, hi, eps, D)
                lo, hi = lo * w_lo, hi * w_hi
            lo, hi = _rotate(lo, hi, c, s)
            _store_head(keys_ptr + row * D, lo, hi, d, D)


@triton.jit
def _context_write_kernel(
    kv_ptr, k_norm_ptr, cos_ptr, sin_ptr, keys_ptrs, values_ptrs, slots, length_ptr, count_ptr, eps,
    P: tl.constexpr, L: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (2 L G, T); keys_ptrs, values_ptrs and slots are tuples of L."""
    head = tl.program_id(0)
    t = tl.program_id(1)
    width = 2 * L * G * D
    part = tl.num_programs(1).to(tl.int64) * width
    d = tl.arange(0, D // 2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if t < tl.load(count_ptr):
        lo, hi = _load_head(kv_ptr + t.to(tl.int64) * width + head * D, part, d, P, D)
        position = tl.load(length_ptr) + t
        layer = (head // G) % L
        if head < L * G:
            lo, hi = _norm(lo, hi, eps, D)
            w_lo, w_hi = _halves(k_norm_ptr + layer * D, d, D)
            c, s = _turn(cos_ptr, sin_ptr, position, d, D)
            lo, hi = _rotate(lo * w_lo, hi * w_hi, c, s)
        for i in tl.static_range(L):
            if layer == i:
                row = (head % G).to(tl.int64) * slots[i] + position % slots[i]
                if head < L * G:
                    _store_head(keys_ptrs[i] + row * D, lo, hi, d, D)
                else:
                    _store_head(values_ptrs[i] + row * D, lo, hi, d, D)


def qk_rope_write(
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
    v_norm: bool = False,
    k_eq_v: bool = False,
    pdl: bool = False,
) -> Tensor:
    """Normed and rotated queries [T, H, D]; keys and values go to the block's cache rows.

    qkv: partials fp32 [P, T, N] or the projection [T, N]. q_norm, k_norm: [D], or None for both.
    length: int32 [1] on the device. `v_norm` gives values an RMSNorm without weight.
    """
    parts = qkv if qkv.dim() == 3 else qkv[None]  # [P, T, N]
    heads = check(parts, q_norm, k_norm, cos, sin, keys, values, length, k_eq_v)
    splits, rows, width = parts.shape
    groups, slots, dim = keys.shape
    q = torch.empty(rows, heads, dim, dtype=keys.dtype, device=keys.device)
    _qk_rope_write_kernel[(width // dim, rows)](
        parts, q_norm, k_norm, cos, sin, keys, values, length, q, slots, eps,
        P=splits, H=heads, G=groups, D=dim, V_NORM=v_norm, K_EQ_V=k_eq_v, PDL=pdl,
        num_warps=_warps(dim), launch_pdl=pdl,
    )  # fmt: skip
    return q


def check(
    parts: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, length: Tensor, k_eq_v: bool,
) -> int:  # fmt: skip
    """How many query heads a projection's partials [P, T, N] hold."""
    width, (groups, _, dim) = parts.shape[2], keys.shape
    heads = width // dim - groups * (1 if k_eq_v else 2)
    assert (heads + groups * (1 if k_eq_v else 2)) * dim == width, f"{width} is no row of {dim}s"
    assert heads % groups == 0, f"{heads} heads on {groups}"
    assert (q_norm is None) == (k_norm is None), "norms for both of q and k, or for neither"
    _check(parts, cos, sin, keys, values, length)
    return heads


def context_write(
    kv: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[tuple[Tensor, Tensor]],
    length: Tensor,
    count: Tensor,
    *,
    eps: float,
    pdl: bool = False,
) -> None:
    """Write a drafter's context rows into the caches of all its layers, in one launch.

    kv: [P, T, N] or [T, N] with a row [k of L layers | v of L layers] × G × D; k_norm: [L, D];
    caches: keys and values [G, S, D] of each layer, S its own. Row t < count goes to position
    length + t; rows from count on are not written. length, count: int32 [1] on the device.
    """
    parts = kv if kv.dim() == 3 else kv[None]  # [P, T, N]
    splits, rows, width = parts.shape
    layers, (groups, _, dim) = len(caches), caches[0][0].shape
    assert width == 2 * layers * groups * dim, f"{width} ≠ 2 × {layers} × {groups} × {dim}"
    assert k_norm.shape == (layers, dim), f"k_norm {tuple(k_norm.shape)}"
    assert k_norm.is_contiguous(), f"k_norm {k_norm.stride()}"
    for keys, values in caches:
        assert (keys.shape[0], keys.shape[2]) == (groups, dim), f"keys {tuple(keys.shape)}"
        _check(parts, cos, sin, keys, values, length)
    _context_write_kernel[(2 * layers * groups, rows)](
        parts, k_norm, cos, sin, tuple(keys for keys, _ in caches),
        tuple(values for _, values in caches), tuple(keys.shape[1] for keys, _ in caches),
        length, count, eps,
        P=splits, L=layers, G=groups, D=dim, PDL=pdl, num_warps=_warps(dim), launch_pdl=pdl,
    )  # fmt: skip


def _check(
    parts: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> None:
    dim = keys.shape[2]
    assert dim & (dim - 1) == 0, f"head dim {dim} is no power of two"
    assert keys.shape == values.shape, f"keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    assert cos.shape == sin.shape == (len(cos), dim // 2), f"cos {tuple(cos.shape)}"
    assert length.dtype == torch.int32, f"length {length.dtype}"
    for x in (parts, cos, sin, keys, values):
        assert x.is_contiguous(), f"{tuple(x.shape)} {x.stride()}"


def _warps(dim: int) -> int:
    return max(1, dim // 256)
