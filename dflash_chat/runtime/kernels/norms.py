"""Everything between two GEMMs of a layer in one launch: sum, add, scale, and RMS-normalise.

    n(y, w) = y / √(mean y² + eps) · w
    branch  = Σ_s weight[t, s] · values[s, t]          then n(branch, norm), where there is one
    sum     = branch + branch                          then n(sum, post), where there is one
    new     = (x + sum) · scale                        rounded to x's dtype
    out_i   = n(new, norms_i)                          up to three, of one mean square
    logits  = n(new, router.norm) · router.projᵀ       where experts are chosen, fp32 [T, E]

x: [T, C] bf16, the residual. values: [S, T, C] or [T, C], fp32 or bf16, the partial sums of a split
GEMM or the outputs of S experts. fp32 inside. One program per row, so that a row is read once and
kept in registers; at T ≤ 17 it is bound by latency. So the loads of all parts are in flight at
once: volatile ones, which the assembler does not put off until their values are needed, and with
all the registers that there are. Eight warps for 4096 columns: more of them issue addresses and
reductions over and over, fewer have too much to hold.
With a router, a row has a program for every few experts: each adds up the whole row, has asked for
its part of proj before, and is done sooner than a launch of the router's own would begin. With PDL
a single row has one for every multiprocessor: the next launch's programs come while they run, go
where most registers are free, and stay there, so all multiprocessors have to look alike.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def, assignment"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.attention import card

MAX_WIDTH = 8192
ROUTED = 8  # experts of a program's share at most


class Branch(NamedTuple):
    """values: [S, T, C] or [T, C]; weights: fp32 [T, S]; norm: [C]."""

    values: Tensor
    weights: Tensor | None = None
    norm: Tensor | None = None


class Router(NamedTuple):
    """norm: [C], with every factor before proj [E, C]. told: rows [≥ T, C] that are multiplied
    instead, where a measurement dictates the routing.
    """

    norm: Tensor
    proj: Tensor
    told: Tensor | None = None


def reference(
    x: Tensor,
    branches: Sequence[Branch],
    norms: Sequence[Tensor],
    eps: float,
    *,
    post: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The same in plain torch, in x's dtype wherever a tensor would be stored."""
    total = torch.zeros_like(x)
    for values, weights, norm in branches:
        parts = values.float().view(-1, *x.shape)  # [S, T, C]
        if weights is not None:
            parts = parts * weights.T[:, :, None]
        branch = parts.sum(0).to(x.dtype)
        total = total + (branch if norm is None else _normalised(branch, norm, eps))
    if post is not None:
        total = _normalised(total, post, eps)
    new = x + total
    if scale is not None:
        new = new * scale
    return new, [_normalised(new, weight, eps) for weight in norms]


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


@triton.jit
def _rms(y, weight, C: tl.constexpr, eps):
    return y * tl.rsqrt(tl.sum(y * y, axis=0) / C + eps) * weight


@triton.jit
def _weight(ptr, c, inside):
    """A norm's weight, or 0 if there is no such norm."""
    if ptr is not None:
        return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _row(ptr, row, stride, c, inside):
    """A row that another launch wrote, as it is stored: [BLOCK]."""
    return tl.load(ptr + row.to(tl.int64) * stride + c, mask=inside, other=0.0, volatile=True)


@triton.jit
def _parts(values_ptr, t, T, c, inside, PARTS: tl.constexpr, C: tl.constexpr):
    """Row t of each part of a branch: a tuple of [BLOCK]."""
    parts = ()
    for s in tl.static_range(PARTS):
        parts = parts + (_row(values_ptr, s * T + t, C, c, inside),)  # noqa: RUF005 (Triton)
    return parts


@triton.jit
def _part_weights(weights_ptr, t, PARTS: tl.constexpr):
    """What each part weighs, a tuple; nothing if none is weighted."""
    weights = ()
    if weights_ptr is not None:
        for s in tl.static_range(PARTS):
            weight = tl.load(weights_ptr + t * PARTS + s, volatile=True)
            weights = weights + (weight,)  # noqa: RUF005 (Triton)
    return weights


@triton.jit
def _sum(parts, weights, c):
    """A branch: fp32 [BLOCK]."""
    total = tl.zeros_like(c).to(tl.float32)
    for s in tl.static_range(len(parts)):
        part = parts[s].to(tl.float32)
        if len(weights) > 0:
            part *= weights[s]
        total += part
    return total


@triton.jit
def _rows(w_ptr, n, c, inside, C: tl.constexpr):
    """Rows n of a [·, C] weight: [BN, BLOCK]."""
    return tl.load(w_ptr + n[:, None] * C + c[None, :], mask=inside[None, :], other=0.0)


@triton.jit
def _product(w, h):
    """w [BN, BLOCK] · h [BLOCK]."""
    return tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], axis=1)


@triton.jit
def _write(out_ptr, unit, weight, t, c, inside, C: tl.constexpr):
    if out_ptr is not None:
        out = (unit * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t * C + c, out, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _residual_kernel(
    x_ptr, stride_x, ids_ptr, embedding_scale,
    a_ptr, a_weights_ptr, a_norm_ptr, b_ptr, b_weights_ptr, b_norm_ptr, post_ptr, scale_ptr,
    new_ptr, tap_ptr, stride_tap, w0_ptr, out0_ptr, w1_ptr, out1_ptr, w2_ptr, out2_ptr,
    router_norm_ptr, proj_ptr, told_ptr, logits_ptr, E, T, eps,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, and GROUPS times BN of its router's logits. With `ids_ptr` the row of x is looked up
    and scaled. A, B: parts of the branches.
    """
    t = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    mine = c + tl.program_id(1) * BLOCK < C  # what all of a row's programs have, the first stores
    if proj_ptr is not None:
        e = tl.program_id(1) * (GROUPS * BN) % E + tl.arange(0, BN)  # behind the last the first
        proj = _rows(proj_ptr, e, c, inside, C)
        if GROUPS == 2:
            more = _rows(proj_ptr, e + BN, c, inside, C)
        router_norm = _weight(router_norm_ptr, c, inside)
        if told_ptr is not None:
            told = tl.load(told_ptr + t * C + c, mask=inside, other=0.0)
    a_norm, b_norm = _weight(a_norm_ptr, c, inside), _weight(b_norm_ptr, c, inside)
    post = _weight(post_ptr, c, inside)
    w0, w1 = _weight(w0_ptr, c, inside), _weight(w1_ptr, c, inside)
    w2 = _weight(w2_ptr, c, inside)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    row = t
    if ids_ptr is not None:
        row = tl.load(ids_ptr + t)
    x = _row(x_ptr, row, stride_x, c, inside)
    a_weights = _part_weights(a_weights_ptr, t, A)
    b_weights = _part_weights(b_weights_ptr, t, B)
    a_parts, b_parts = _parts(a_ptr, t, T, c, inside, A, C), _parts(b_ptr, t, T, c, inside, B, C)
    x = x.to(tl.float32)
    if ids_ptr is not None:
        x *= embedding_scale
    total, other = _sum(a_parts, a_weights, c), _sum(b_parts, b_weights, c)
    if a_norm_ptr is not None and b_norm_ptr is not None:  # one reduction for both
        squares = tl.sum(tl.join(total * total, other * other), axis=0) / C + eps
        a_square, b_square = tl.split(squares)
        total *= tl.rsqrt(a_square) * a_norm
        other *= tl.rsqrt(b_square) * b_norm
    else:
        if a_norm_ptr is not None:
            total = _rms(total, a_norm, C, eps)
        if b_norm_ptr is not None:
            other = _rms(other, b_norm, C, eps)
    total += other
    if post_ptr is not None:
        total = _rms(total, post, C, eps)
    new = ((x + total) * scale).to(x_ptr.dtype.element_ty)
    if new_ptr is not None:
        tl.store(new_ptr + t * C + c, new, mask=mine)
    if tap_ptr is not None:
        tl.store(tap_ptr + t.to(tl.int64) * stride_tap + c, new, mask=mine)

    new = new.to(tl.float32)
    unit = new * tl.rsqrt(tl.sum(new * new, axis=0) / C + eps)
    if proj_ptr is not None:
        h = told if told_ptr is not None else (unit * router_norm).to(x_ptr.dtype.element_ty)
        tl.store(logits_ptr + t * E + e, _product(proj, h))
        if GROUPS == 2:
            tl.store(logits_ptr + t * E + e + BN, _product(more, h))
    _write(out0_ptr, unit, w0, t, c, mine, C)
    _write(out1_ptr, unit, w1, t, c, mine, C)
    _write(out2_ptr, unit, w2, t, c, mine, C)


def residual_norms(
    x: Tensor,
    branches: Sequence[Branch],
    norms: Sequence[Tensor],
    eps: float,
    *,
    post: Tensor | None = None,
    scale: Tensor | None = None,
    tap: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The new residual [T, C] and one normalised [T, C] per weight [C] of `norms`.

    scale: one element. tap: [T, C], rows contiguous; gets a copy of the new residual.
    """
    assert 1 <= len(branches) <= 2, f"{len(branches)} branches"
    new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outs, _ = _launch(
        x, None, 1.0, x.shape[0], branches, norms, eps, post, scale, tap, new, None, pdl
    )  # fmt: skip
    return new, outs


def residual_norms_and_logits(
    x: Tensor,
    branches: Sequence[Branch],
    norms: Sequence[Tensor],
    eps: float,
    router: Router,
    *,
    pdl: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The new residual [T, C], one normalised [T, C] per weight, and logits fp32 [T, E]."""
    assert 1 <= len(branches) <= 2, f"{len(branches)} branches"
    new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outs, logits = _launch(
        x, None, 1.0, x.shape[0], branches, norms, eps, None, None, None, new, router, pdl
    )  # fmt: skip
    assert logits is not None
    return new, outs, logits


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x [T, C] · weight [C] / rms(x)."""
    outs, _ = _launch(
        x, None, 1.0, x.shape[0], (), (weight,), eps, None, None, None, None, None, pdl
    )  # fmt: skip
    return outs[0]


def embed(
    ids: Tensor,
    table: Tensor,
    embedding_scale: float,
    norm: Tensor,
    eps: float,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """ids [T] → table[ids]·embedding_scale [T, C], and the same normalised by `norm`."""
    rows = ids.shape[0]
    new = torch.empty(rows, table.shape[1], dtype=table.dtype, device=table.device)
    outs, _ = _launch(
        table, ids, embedding_scale, rows, (), (norm,), eps, None, None, None, new, None, pdl
    )  # fmt: skip
    return new, outs[0]


def _launch(
    x: Tensor, ids: Tensor | None, embedding_scale: float, rows: int, branches: Sequence[Branch],
    norms: Sequence[Tensor], eps: float, post: Tensor | None, scale: Tensor | None,
    tap: Tensor | None, new: Tensor | None, router: Router | None, pdl: bool,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    width = x.shape[1]
    assert x.stride(1) == 1, f"x {x.stride()}"
    assert width <= MAX_WIDTH, f"rows of {width}"
    assert len(norms) <= 3, f"{len(norms)} norms"
    for values, weights, _ in branches:
        assert values.shape[-2:] == (rows, width), f"{tuple(values.shape)} of {rows} × {width}"
        assert values.is_contiguous(), f"values {values.stride()}"
        assert weights is None or weights.is_contiguous(), f"weights {weights.stride()}"
    assert tap is None or tap.shape == (rows, width), f"tap {tuple(tap.shape)}"
    assert tap is None or tap.stride(1) == 1, f"tap {tap.stride()}"
    block = triton.next_power_of_2(width)
    parts = [branch.values.numel() // (rows * width) for branch in branches]
    operands: list[Tensor | None] = [part for branch in branches for part in branch]
    operands += [None] * (6 - len(operands))
    outs = [torch.empty(rows, width, dtype=x.dtype, device=x.device) for _ in norms]
    pairs: list[Tensor | None] = [part for pair in zip(norms, outs, strict=True) for part in pair]
    pairs += [None] * (6 - len(pairs))
    experts, logits, groups, routed, programs = 0, None, 1, 1, 1
    if router is not None:
        experts = router.proj.shape[0]
        assert router.proj.shape == (experts, width), f"proj {tuple(router.proj.shape)}"
        assert router.proj.is_contiguous(), f"proj {router.proj.stride()}"
        groups = 2 if rows > 8 else 1  # so many rows would read the parts of each too often
        least = card(x.device).multiprocessors if rows == 1 and pdl else 1
        routed = min(ROUTED, triton.next_power_of_2(triton.cdiv(experts, least)))
        assert experts % (groups * routed) == 0, f"{experts} experts"
        programs = max(experts // (groups * routed), least)
        assert router.told is None or router.told.is_contiguous(), f"{router.told.stride()}"
        logits = torch.empty(rows, experts, dtype=torch.float32, device=x.device)
    _residual_kernel[(rows, programs)](
        x, x.stride(0), ids, embedding_scale, *operands, post, scale,
        new, tap, 0 if tap is None else tap.stride(0), *pairs,
        *(router or (None, None, None)), logits, experts, rows, eps,
        A=parts[0] if parts else 0, B=parts[1] if len(parts) > 1 else 0, C=width,
        BLOCK=block, BN=routed, GROUPS=groups, PDL=pdl,
        **_hands(block), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return outs, logits


def _hands(block: int) -> dict[str, int]:
    """Warps for so many columns, and all the registers that they can have of a multiprocessor."""
    warps = max(4, block // 512)
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps))}
