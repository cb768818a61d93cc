"""Gemma 4's feed-forward half in two launches: the dense MLP beside the routed experts.

    gate_up   a = gelu_tanh(x·gateᵀ) · (x·upᵀ)      down   y = a·downᵀ

    h_dense, h_moe [T, C]     gate_up weights: gate's rows, then up's: [2D, C] and [E, 2I, C]
    down weights [C, D], [E, C, I]
    dense_act [T, D], expert_act [P, T, I]: of place i of the router's list at i, written where a
    row belongs to that place
    dense partials [S, T, C] to be summed, experts' outputs [k, T, C] by rank, unweighted: bf16

Bound by the bytes of the weights of the experts that any row chose. A CTA multiplies one tile of
output channels of one expert with the rows of one place of the router's list: eight, or sixteen of
a plain weight, padded for the tensor cores. CTAs behind the list's end exit at once. The dense MLP
is treated as D/I more experts, of all rows; its down projection is split along K to about the
experts' I, so that all CTAs of a launch are equal. A tile has gate's rows, then up's: if they took
turns, a request for int4 would ask for half as many neighbours, and memory gave a fifth less. With
`pdl` the dense tiles, which come first, ask for weights before they wait for the previous kernel;
the experts' tiles need its list. gate_up's dense tiles do not wait for the router at all: what they
read was written by the launch before it, which had ended when the router let gate_up begin. It is
in L2 then, where they read it, past L1 or with an L1 that has let go of what it held.
A single row has as many places as ranks: given its logits instead of a list, the gate_up CTAs of
place i look for the expert of rank i themselves, and a CTA more writes the list down. int4 without
zeros multiplies a single row as `int4_product.only_row` does. Its gate_up lets down begin after the
first step: by then all of its CTAs stand, as evenly as the norms' did, and leave room for down's.
Others have taken that room, and let down begin shortly before their end.

Activations bf16, accumulation fp32, weights in any format of `expert_weights.py`, which
`tile_product.py` reads.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202, E741 (Triton takes no annotations but its own; I is the field's name)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.linear import MAX_ROWS
from dflash_chat.runtime.kernels.router import HIGH, Routing, expert_at_rank, list_only_row
from dflash_chat.runtime.kernels.tile_product import forget, prefetch, tile_product


class Choice(NamedTuple):
    """Of one row: logits fp32 [1, E] and the experts' own factors [E]."""

    logits: Tensor
    per_expert_scale: Tensor


class MoeConfig(NamedTuple):
    """Output channels (pairs for gate_up) and columns of a tile, warps of a CTA, stages. registers:
    of a thread at most. Told 255 the assembler takes a quarter more than by itself, and lets fewer
    products wait for the last one.
    """

    bn: int
    bk: int
    warps: int
    stages: int
    registers: int | None = None


NARROW_ROWS = 8  # of a product with narrow weights
ANY = MAX_ROWS
# (launch, format of the experts): {rows up to which: what is quickest}, measured on an H200. All of
# a line sum in the same order.
CONFIGS = {
    ("gate_up", "plain"): {ANY: MoeConfig(32, 128, 4, 4)},
    ("gate_up", "fp8"): {
        1: MoeConfig(16, 128, 2, 6), 4: MoeConfig(16, 128, 2, 4), ANY: MoeConfig(32, 256, 4, 3),
    },
    ("gate_up", "int4"): {
        1: MoeConfig(8, 256, 1, 4, 255), 2: MoeConfig(16, 256, 1, 3, 255),
        8: MoeConfig(32, 128, 2, 3), ANY: MoeConfig(32, 128, 2, 4),
    },
    ("down", "plain"): {ANY: MoeConfig(64, 64, 2, 5)},
    ("down", "fp8"): {2: MoeConfig(64, 128, 4, 3, 255), ANY: MoeConfig(64, 128, 4, 4, 255)},
    ("down", "int4"): {
        1: MoeConfig(32, 256, 1, 3, 255), 2: MoeConfig(64, 64, 2, 4, 255),
        ANY: MoeConfig(128, 64, 2, 3, 255),
    },
}  # fmt: skip


def reference_gate_up(
    h_dense: Tensor, dense_w: Tensor, h_moe: Tensor, experts_w: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """dense_act [T, D], and the experts' activations by rank: [T, k, I]."""

    def act(x: Tensor, w: Tensor) -> Tensor:
        gate, up = (w @ x).chunk(2)
        return F.gelu(gate, approximate="tanh") * up

    dense = [act(x, dense_w) for x in h_dense]
    routed = [
        torch.stack([act(x, experts_w[e]) for e in row])
        for x, row in zip(h_moe, slots.tolist(), strict=True)
    ]
    return torch.stack(dense), torch.stack(routed)


def reference_down(
    dense_act: Tensor, dense_w: Tensor, expert_act: Tensor, experts_w: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """dense output [T, C], and the experts' outputs by rank [k, T, C]; expert_act is [T, k, I]."""
    routed = [
        torch.stack([experts_w[e] @ x for e, x in zip(row, act, strict=True)])
        for row, act in zip(slots.tolist(), expert_act, strict=True)
    ]
    return dense_act @ dense_w.T, torch.stack(routed, 1)


@triton.jit
def _place(experts_ptr, members_ptr, i, ROWS: tl.constexpr, FIRST: tl.constexpr):
    """Of place i the expert, the first of its rows, their ranks there, and whether there are so
    many: [FIRST] each.
    """
    c = tl.arange(0, FIRST)
    entry = tl.load(experts_ptr + i)
    member = tl.load(members_ptr + i * ROWS + c)
    taken = c < entry // HIGH
    return entry % HIGH, tl.where(taken, member % HIGH, 0), member // HIGH, taken


@triton.jit
def _store_activation(acc, out_ptr, row, taken, column, WIDTH: tl.constexpr, BN: tl.constexpr):
    """acc [ROWS, 2·BN] holds gate's channels, then up's."""
    gate, up = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, BN)), (0, 2, 1)))
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2·√(2/π)·(…)
    act = gate * tl.sigmoid(inner) * up  # ½(1 + tanh(z)) = sigmoid(2z)
    out = out_ptr + row[:, None] * WIDTH + column[None, :]
    mask = taken[:, None] & (column[None, :] < WIDTH)
    tl.store(out, act.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_rows(acc, out_ptr, row, taken, column, WIDTH: tl.constexpr):
    """acc [ROWS, BN] at rows of out [·, WIDTH]."""
    out = out_ptr + row[:, None] * WIDTH + column[None, :]
    mask = taken[:, None] & (column[None, :] < WIDTH)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _gate_up_kernel(
    h_dense_ptr, dense_w_ptr, dense_scale_ptr, dense_zero_ptr,
    h_moe_ptr, experts_w_ptr, experts_scale_ptr, experts_zero_ptr,
    experts_ptr, active_ptr, members_ptr, weights_ptr, logits_ptr, expert_scale_ptr,
    dense_act_ptr, expert_act_ptr, T,
    W_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    DENSE_FORMAT: tl.constexpr, DENSE_ZERO: tl.constexpr, DENSE_RUN: tl.constexpr,
    FORMAT: tl.constexpr, ZERO: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, DENSE_ROWS: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr,
    ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    DENSE_TILES: tl.constexpr = (D + BN - 1) // BN * GROUPS
    TILES: tl.constexpr = (I + BN - 1) // BN
    LISTS: tl.constexpr = 0 if logits_ptr is None else 1
    FIRST: tl.constexpr = 1 if ALONE else ROWS
    tile = tl.program_id(0) - LISTS
    pair = tl.arange(0, 2 * BN)
    column = tl.arange(0, BN)
    if tile < 0:
        if LISTS:
            factors = tl.load(expert_scale_ptr + tl.arange(0, E)).to(tl.float32)
            if PDL:
                tl.extra.cuda.gdc_wait()
            list_only_row(
                logits_ptr, factors, experts_ptr, active_ptr, members_ptr, weights_ptr,
                E, TOP, ROWS, WARPS,
            )  # fmt: skip
    elif tile < DENSE_TILES:
        dense_row = tile % GROUPS * DENSE_ROWS + tl.arange(0, DENSE_ROWS)
        first = tile // GROUPS * BN
        n = tl.minimum(first + pair % BN, D - 1) + pair // BN * D
        if PDL:
            prefetch(dense_w_ptr, n, 0, 2 * D, C, DENSE_RUN)
            if logits_ptr is not None:
                tl.extra.cuda.gdc_wait()
            elif DENSE_FORMAT == "int4":
                forget(tile)
        acc = tile_product(
            h_dense_ptr, dense_row, dense_row < T, dense_w_ptr, dense_scale_ptr, dense_zero_ptr,
            n, 0, 2 * D, C, C, DENSE_FORMAT, DENSE_ZERO, DENSE_RUN, BK, STAGES, ALONE, PDL,
        )  # fmt: skip
        _store_activation(acc, dense_act_ptr, dense_row, dense_row < T, first + column, D, BN)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        i = (tile - DENSE_TILES) // TILES
        first = (tile - DENSE_TILES) % TILES * BN
        if logits_ptr is not None:
            expert = expert_at_rank(logits_ptr, i, E, WARPS)
            active = TOP
            row = tl.arange(0, FIRST)
            taken = row < T
        else:
            active = tl.load(active_ptr)
            expert, row, _, taken = _place(experts_ptr, members_ptr, i, ROWS, FIRST)
        if i < active:
            n = tl.minimum(first + pair % BN, I - 1) + pair // BN * I
            e = expert.to(tl.int64)
            acc = tile_product(
                h_moe_ptr, row, taken, experts_w_ptr + e * W_STRIDE,
                experts_scale_ptr + e * SCALE_STRIDE, experts_zero_ptr + e * SCALE_STRIDE,
                n, 0, 2 * I, C, C, FORMAT, ZERO, RUN, BK, STAGES, ALONE, PDL,
            )  # fmt: skip
            _store_activation(acc, expert_act_ptr + i * T * I, row, taken, first + column, I, BN)
    if PDL:  # a GEMM follows, whose programs are to find free room
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["T"])
def _down_kernel(
    dense_act_ptr, dense_w_ptr, dense_scale_ptr, dense_zero_ptr,
    expert_act_ptr, experts_w_ptr, experts_scale_ptr, experts_zero_ptr,
    experts_ptr, active_ptr, members_ptr, dense_ptr, routed_ptr, T,
    W_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, I: tl.constexpr, SPAN: tl.constexpr,
    DENSE_FORMAT: tl.constexpr, DENSE_ZERO: tl.constexpr, DENSE_RUN: tl.constexpr,
    FORMAT: tl.constexpr, ZERO: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, DENSE_ROWS: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = (D + SPAN - 1) // SPAN
    TILES: tl.constexpr = (C + BN - 1) // BN
    FIRST: tl.constexpr = 1 if ALONE else ROWS
    item = tl.program_id(0) // TILES
    column = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    n = tl.minimum(column, C - 1)
    if item < SPLITS * GROUPS:
        split = item // GROUPS
        dense_row = item % GROUPS * DENSE_ROWS + tl.arange(0, DENSE_ROWS)
        if PDL:
            prefetch(dense_w_ptr, n, split * SPAN, C, D, DENSE_RUN)
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        acc = tile_product(
            dense_act_ptr, dense_row, dense_row < T, dense_w_ptr, dense_scale_ptr, dense_zero_ptr,
            n, split * SPAN, C, D, SPAN, DENSE_FORMAT, DENSE_ZERO, DENSE_RUN, BK, STAGES, ALONE,
        )  # fmt: skip
        _store_rows(acc, dense_ptr, split * T + dense_row, dense_row < T, column, C)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        i = item - SPLITS * GROUPS
        active = tl.load(active_ptr)
        expert, row, rank, taken = _place(experts_ptr, members_ptr, i, ROWS, FIRST)
        if i < active:
            e = expert.to(tl.int64)
            acc = tile_product(
                expert_act_ptr + i * T * I, row, taken, experts_w_ptr + e * W_STRIDE,
                experts_scale_ptr + e * SCALE_STRIDE, experts_zero_ptr + e * SCALE_STRIDE,
                n, 0, C, I, I, FORMAT, ZERO, RUN, BK, STAGES, ALONE,
            )  # fmt: skip
            _store_rows(acc, routed_ptr, rank * T + row, taken, column, C)


def gate_up(
    h_dense: Tensor,
    dense_w: MoeWeight,
    h_moe: Tensor,
    experts_w: MoeWeight,
    routing: Routing,
    *,
    choice: Choice | None = None,
    config: MoeConfig | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """dense_act [T, D] and expert_act [P, T, I], in h's dtype.

    With a `choice`, which is for one row, `routing` is written, its places in the order of ranks.
    With `pdl` and no choice the previous launch must be the router's, and not have written h_dense.
    """
    rows, width = h_moe.shape
    dense, inner = dense_w.shape[0] // 2, experts_w.shape[1] // 2
    assert h_dense.shape == (rows, width), f"h_dense {h_dense.shape}, h_moe {h_moe.shape}"
    assert h_dense.is_contiguous(), f"h_dense {h_dense.stride()}"
    assert h_moe.is_contiguous(), f"h_moe {h_moe.stride()}"
    assert dense_w.shape[1] == experts_w.shape[2] == width, f"{dense_w.shape} {experts_w.shape}"
    config = config or _config("gate_up", experts_w, rows)
    places = routing.experts.numel()
    assert choice is None or rows == 1, f"a choice for {rows} rows"
    assert choice is None or choice.logits.shape == (1, experts_w.shape[0]), "logits of experts"
    dense_act = torch.empty(rows, dense, dtype=h_moe.dtype, device=h_moe.device)
    expert_act = torch.empty(places, rows, inner, dtype=h_moe.dtype, device=h_moe.device)
    constants = _constants(rows, dense_w, experts_w, routing, config)
    dense_tiles = constants["GROUPS"] * triton.cdiv(dense, config.bn)
    lists = 0 if choice is None else 1
    _gate_up_kernel[(lists + dense_tiles + places * triton.cdiv(inner, config.bn),)](
        h_dense, *dense_w.operands(), h_moe, *experts_w.operands(), *routing,
        *(choice or (None, None)), dense_act, expert_act, rows, C=width, D=dense, I=inner,
        **constants, E=experts_w.shape[0], TOP=routing.weights.shape[1], WARPS=config.warps,
        PDL=pdl, num_warps=config.warps, maxnreg=config.registers, launch_pdl=pdl,
    )  # fmt: skip
    return dense_act, expert_act


def down(
    dense_act: Tensor,
    dense_w: MoeWeight,
    expert_act: Tensor,
    experts_w: MoeWeight,
    routing: Routing,
    *,
    config: MoeConfig | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """bf16 [S, T, C], whose sum is the dense MLP's output, and [k, T, C] by rank."""
    places, rows, inner = expert_act.shape
    dense, width = dense_act.shape[1], dense_w.shape[0]
    assert dense_act.is_contiguous(), f"dense_act {dense_act.stride()}"
    assert expert_act.is_contiguous(), f"expert_act {expert_act.stride()}"
    assert dense_w.shape == (width, dense), f"{dense_w.shape}, activation {dense_act.shape}"
    assert experts_w.shape[1:] == (width, inner), f"{experts_w.shape}, {expert_act.shape}"
    assert places == routing.experts.numel(), f"{places} of {routing.experts.numel()} experts"
    config = config or _config("down", experts_w, rows)
    span = inner if not dense_w.run else triton.cdiv(inner, 4 * dense_w.run) * 4 * dense_w.run
    splits, top_k = triton.cdiv(dense, span), routing.weights.shape[1]
    device = dense_act.device
    dense_out = torch.empty(splits, rows, width, dtype=expert_act.dtype, device=device)
    routed = torch.empty(top_k, rows, width, dtype=expert_act.dtype, device=device)
    constants = _constants(rows, dense_w, experts_w, routing, config)
    items = splits * constants["GROUPS"] + places
    _down_kernel[(items * triton.cdiv(width, config.bn),)](
        dense_act, *dense_w.operands(), expert_act, *experts_w.operands(), *routing[:3], dense_out,
        routed, rows, C=width, D=dense, I=inner, SPAN=span, **constants,
        PDL=pdl, num_warps=config.warps, maxnreg=config.registers, launch_pdl=pdl,
    )  # fmt: skip
    return dense_out, routed


def _config(launch: str, experts_w: MoeWeight, rows: int) -> MoeConfig:
    configs = CONFIGS[launch, experts_w.format]
    if experts_w.zero is not None:  # zeros are multiplied by sums in an order of the warps' own
        return configs[ANY]
    return next(config for most, config in configs.items() if rows <= most)


def at_once(experts_w: MoeWeight, rows: int) -> int:
    """How many rows the experts' kernels multiply at once, so how many a place may have."""
    return 16 * triton.cdiv(rows, 16) if experts_w.format == "plain" else NARROW_ROWS


def _constants(
    rows: int, dense_w: MoeWeight, experts_w: MoeWeight, routing: Routing, config: MoeConfig
) -> dict[str, Any]:
    """What both kernels are specialised by."""
    assert len(routing.weights) == rows <= MAX_ROWS, f"{routing.weights.shape}, {rows} rows"
    at_a_place = at_once(experts_w, rows)
    assert routing.members.shape[1] == at_a_place, f"places of {routing.members.shape[1]} rows"
    alone = rows == 1 and all(w.format == "int4" and w.zero is None for w in (dense_w, experts_w))
    dense_rows = 1 if alone else at_once(dense_w, rows)
    return {
        "W_STRIDE": experts_w.data.stride(0),
        "SCALE_STRIDE": experts_w.operands()[1].stride(0),
        "DENSE_FORMAT": dense_w.format,
        "DENSE_ZERO": dense_w.zero is not None,
        "DENSE_RUN": dense_w.run,
        "FORMAT": experts_w.format,
        "ZERO": experts_w.zero is not None,
        "RUN": experts_w.run,
        "ROWS": at_a_place,
        "DENSE_ROWS": dense_rows,
        "GROUPS": triton.cdiv(rows, dense_rows),
        "BN": config.bn,
        "BK": config.bk,
        "STAGES": config.stages,
        "ALONE": alone,
    }
