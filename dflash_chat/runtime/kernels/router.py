"""Router: h · projᵀ → softmax → top-k → renormalise → × per_expert_scale, in one launch.

    p = softmax(h_router · projᵀ) over all E, fp32     the k largest, ties to the lower expert
    weights = p_top / Σ p_top · per_expert_scale        so they do not sum to 1

The softmax's denominator cancels, so only the chosen logits are exponentiated.

    h_router [T, C], proj [E, C] bf16 → slots int32 [T, k] (expert of each rank), weights fp32
    [T, k], experts int32 [min(E, k·T)] (the distinct ones, ascending), active int32 [1]

Bound by latency: 720 kB for E = 128, C = 2816. A CTA multiplies one [BN, BK] tile of proj without
a loop and leaves fp32 partial logits; the CTA that arrives last sums them in fixed order and does
the rest for all rows, so the result does not depend on the order of arrival. There a row of 128
experts belongs to one warp, and a logit is compared by its bits, as integers of the same order: a
maximum over the warp is then one instruction, and nothing waits for a barrier or for memory until
the list of experts is made.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Routing(NamedTuple):
    """Who goes where. Only the first `active` entries of `experts` mean something."""

    experts: Tensor  # int32 [min(E, k·T)]
    active: Tensor  # int32 [1]
    slots: Tensor  # int32 [T, k]
    weights: Tensor  # fp32 [T, k]


class RouteConfig(NamedTuple):
    """Experts and columns of a CTA's tile, warps of a CTA."""

    bn: int = 16
    bk: int = 512
    warps: int = 8


def reference(
    h_router: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int = 8
) -> tuple[Tensor, Tensor]:
    """slots [T, k] and weights [T, k], in fp32 or, for fp64 inputs, in fp64."""
    wide = torch.float64 if h_router.dtype == torch.float64 else torch.float32
    p = (h_router @ proj.T).to(wide).softmax(-1)  # [T, E]
    top, slots = p.sort(dim=-1, descending=True, stable=True)
    top, slots = top[:, :top_k], slots[:, :top_k]
    return slots, top / top.sum(-1, keepdim=True) * per_expert_scale.to(wide)[slots]


@triton.jit
def _order(logits, e, TOP: tl.constexpr):
    """Each logit's place among the TOP largest of its row, TOP for the others: int32 [ROWS, E]."""
    bits = logits.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the logits are
    order = tl.full(key.shape, TOP, tl.int32)
    for r in tl.static_range(TOP):
        largest = key == tl.max(key, axis=1)[:, None]
        first = tl.min(tl.where(largest, e[None, :], e.shape[0]), axis=1)  # ties: the lower index
        here = e[None, :] == first[:, None]
        order = tl.where(here, r, order)
        key = tl.where(here, -(2**31), key)
    return order


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    x_ptr, w_ptr, scale_ptr, partial_ptr, counter_ptr,
    experts_ptr, active_ptr, slots_ptr, weights_ptr, T,
    C: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    row = tl.arange(0, ROWS)
    e = tl.arange(0, E)
    w = tl.load(w_ptr + n[None, :] * C + k[:, None], mask=k[:, None] < C, other=0.0)  # [BK, BN]
    scale = tl.load(scale_ptr + e).to(tl.float32)  # here, so that the last CTA need not wait
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inside = (row[:, None] < T) & (k[None, :] < C)
    x = tl.load(x_ptr + row[:, None] * C + k[None, :], mask=inside, other=0.0)  # [ROWS, BK]
    out_ptr = partial_ptr + (tl.program_id(1) * T + row[:, None]) * E
    tl.store(out_ptr + n[None, :], tl.dot(x, w), mask=row[:, None] < T)

    tl.debug_barrier()  # every thread's partials precede the CTA's arrival
    SPLITS: tl.constexpr = (C + BK - 1) // BK
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS * (E // BN) - 1:
        tl.store(counter_ptr, 0)
        used = row[:, None] < T
        logits = tl.zeros([ROWS, E], tl.float32)
        for s in tl.static_range(SPLITS):
            in_ptr = partial_ptr + (s * T + row[:, None]) * E + e[None, :]
            logits += tl.load(in_ptr, mask=used, other=0.0, cache_modifier=".cg")

        order = _order(logits, e, TOP)
        chosen = used & (order < TOP)
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        total = tl.sum(tl.where(chosen, p, 0.0), axis=1)
        at = row[:, None] * TOP + order
        tl.store(slots_ptr + at, tl.broadcast_to(e[None, :], (ROWS, E)), mask=chosen)
        tl.store(weights_ptr + at, p / total[:, None] * scale[None, :], mask=chosen)

        hit = tl.max(chosen.to(tl.int32), axis=0)  # [E]
        tl.store(experts_ptr + tl.cumsum(hit, 0) - 1, e, mask=hit > 0)
        tl.store(active_ptr, tl.sum(hit, axis=0))


def route(
    h_router: Tensor,
    proj: Tensor,
    per_expert_scale: Tensor,
    counter: Tensor,
    *,
    top_k: int = 8,
    config: RouteConfig | None = None,
    pdl: bool = False,
) -> Routing:
    """Route the rows. `counter` int32 [1] starts at zero and is zero again afterwards; launches
    that may overlap must not share one.
    """
    config = config or RouteConfig()
    rows, width = h_router.shape
    experts = proj.shape[0]
    assert proj.shape[1] == width, f"proj {proj.shape}, width {width}"
    assert per_expert_scale.shape == (experts,), f"scale {per_expert_scale.shape}"
    assert h_router.is_contiguous(), f"h_router {h_router.stride()}"
    assert proj.is_contiguous(), f"proj {proj.stride()}"
    assert rows <= 32, f"{rows} rows"
    assert top_k <= experts, f"top {top_k} of {experts}"
    assert experts % config.bn == 0, f"{experts} experts, tiles of {config.bn}"
    assert experts & (experts - 1) == 0, f"{experts} experts"
    assert counter.dtype == torch.int32, f"counter {counter.dtype}"

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=h_router.device)

    splits = triton.cdiv(width, config.bk)
    partial = torch.empty(
        splits, rows, experts, dtype=torch.float32, device=h_router.device
    )  # [S, T, E]
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=h_router.device)
    routing = Routing(ints(min(experts, top_k * rows)), ints(1), ints(rows, top_k), weights)
    _route_kernel[(experts // config.bn, splits)](
        h_router, proj, per_expert_scale, partial, counter, *routing, rows,
        C=width, E=experts, TOP=top_k, ROWS=16 if rows <= 16 else 32,
        BN=config.bn, BK=config.bk, PDL=pdl,
        num_warps=config.warps, launch_pdl=pdl,
    )  # fmt: skip
    return routing
