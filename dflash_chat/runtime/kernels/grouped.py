"""Routed experts of a prompt's chunk: many rows, sorted by expert, one GEMM tile after another.

    y[t] = Σ_r weight[t, r] · down[e] · (gelu_tanh(gate[e]·x[t]) · (up[e]·x[t])),  e = slots[t, r]

    x [T, C] bf16, slots int [T, k], weights fp32 [T, k] → [T, C]
    gate_up [E, 2I, C] (gate's rows, then up's), down [E, C, I], in a format of `expert_weights.py`

The T·k places of the block are sorted by expert, and each expert's stretch is cut into tiles of BM
places; who owns which tile is worked out on the device, and the grid is the most tiles there can
be, so that nothing waits for the host. gate_up gathers rows of x and writes [T·k, I] in sorted
order; down writes [T·k, C] by (row, rank), times its routing weight, and a row's ranks are summed
in fp32. Nothing depends on the other rows but the time.

Bound by tensor cores, and by reading every expert once: ~128 rows an expert (2048 rows, 8 of 128)
take as long as their weights. fp8 and int4 are widened to bf16 on the way into shared memory, int4
with its scale. Half of a word's nibbles, or all, are 64 columns in an order of their own, so x
comes in that order instead.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.attention import card
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import CHUNK
from dflash_chat.runtime.kernels.int4_product import pair
from dflash_chat.runtime.kernels.narrow import widen


class GroupedConfig(NamedTuple):
    """Places, output columns (pairs for gate_up) and input columns of a tile; launch."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


CONFIGS = {  # (launch, format of the experts)
    ("gate_up", "plain"): GroupedConfig(128, 128, 64, 8, 4),
    ("gate_up", "fp8"): GroupedConfig(128, 128, 64, 8, 4),
    ("gate_up", "int4"): GroupedConfig(128, 128, 64, 8, 4),
    ("down", "plain"): GroupedConfig(128, 256, 64, 8, 3),
    ("down", "fp8"): GroupedConfig(128, 256, 64, 8, 4),
    ("down", "int4"): GroupedConfig(128, 256, 64, 8, 4),
}
NARROW_CONFIG = GroupedConfig(64, 64, 64, 4, 3)  # for cards that are not roomy


class Groups(NamedTuple):
    """Places sorted by expert. A place is a flat (row, rank); E is the expert of unused tiles."""

    order: Tensor  # int64 [P], the place at each sorted position
    ends: Tensor  # int64 [E], where each expert's positions end
    expert: Tensor  # int64 [tiles]
    first: Tensor  # int64 [tiles], the first position of a tile


def reference(x: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, C] → [T, C], one row and expert after the other; weights [E, N, K] dequantised."""
    rows = []
    for row, experts, shares in zip(x, slots.tolist(), weights, strict=True):
        total = torch.zeros_like(row, dtype=torch.promote_types(x.dtype, torch.float32))
        for e, share in zip(experts, shares, strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            total += share * (down[e] @ (F.gelu(gate, approximate="tanh") * up))
        rows.append(total)
    return torch.stack(rows).to(x.dtype)


@triton.jit
def _nibble(words, J: tl.constexpr, scale, shift):
    """(128 + nibble J of each word [BN, 16])·scale + shift of its row, in fp32."""
    bits = ((words >> (4 * J)) & 15) << 16 | 0x43000000
    return bits.to(tl.float32, bitcast=True) * scale[:, None] + shift[:, None]


@triton.jit
def _columns(
    w_ptr, scale_ptr, zero_ptr, n, first,
    N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
    HAS_ZERO: tl.constexpr, RUN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Columns first … first + BK of rows n of one expert, [BN, BK]; fp8 without its scale."""
    if FORMAT == "int4":
        at = (first // (4 * RUN) * N + n)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        words = tl.load(w_ptr + at).to(tl.int32)  # [BN, RUN]
        channel = first // 64 * N + n
        low, high = pair(tl.load(scale_ptr + channel))  # of columns 0 … 31 and 32 … 63
        low_shift, high_shift = -136 * low, -136 * high
        if HAS_ZERO:
            low_zero, high_zero = pair(tl.load(zero_ptr + channel))
            low_shift += low_zero
            high_shift += high_zero
        if RUN == 32:
            words >>= first % 128 // 64 * 8
            a = _nibble(words, 0, low, low_shift).to(dtype)
            b = _nibble(words, 1, high, high_shift).to(dtype)
        else:
            a = tl.join(_nibble(words, 0, low, low_shift), _nibble(words, 2, high, high_shift))
            b = tl.join(_nibble(words, 1, low, low_shift), _nibble(words, 3, high, high_shift))
            a, b = a.to(dtype), b.to(dtype)
        return tl.reshape(tl.join(a, b), (n.shape[0], 64))
    else:
        k = first + tl.arange(0, BK)
        at = w_ptr + n[:, None] * K + k[None, :]
        w = tl.load(at) if K % BK == 0 else tl.load(at, mask=k[None, :] < K, other=0.0)
        return widen(w, dtype)


@triton.jit
def _grouped_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, order_ptr, ends_ptr, expert_ptr, first_ptr, shares_ptr,
    out_ptr,
    W_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr,
    OUT: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of BM places by BN of OUT columns; neighbours in the grid share their places.

    GATED reads x by row and writes by position, with two weights; else the other way around.
    """
    TILES: tl.constexpr = (OUT + BN - 1) // BN
    tile = tl.program_id(0) // TILES
    expert = tl.load(expert_ptr + tile)
    if expert < E:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        N: tl.constexpr = 2 * OUT if GATED else OUT
        position = tl.load(first_ptr + tile) + tl.arange(0, BM)
        taken = position < tl.load(ends_ptr + expert)
        place = tl.load(order_ptr + position, mask=taken, other=0)
        column = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
        n = tl.minimum(column, OUT - 1)
        w_ptr += expert * W_STRIDE
        scale_ptr += expert * SCALE_STRIDE
        zero_ptr += expert * SCALE_STRIDE
        if GATED:
            x_row = x_ptr + (place // TOP)[:, None] * K
            up = tl.zeros([BM, BN], tl.float32)
        else:
            x_row = x_ptr + position[:, None] * K
        acc = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, K, BK, num_stages=STAGES):
            k = first + tl.arange(0, BK)
            if K % BK == 0:
                x = tl.load(x_row + k[None, :], mask=taken[:, None], other=0.0)
            else:
                x = tl.load(x_row + k[None, :], mask=taken[:, None] & (k < K)[None, :], other=0.0)
            w = _columns(
                w_ptr, scale_ptr, zero_ptr, n, first, N, K, BK, FORMAT, HAS_ZERO, RUN, dtype
            )  # fmt: skip
            acc = tl.dot(x, tl.trans(w), acc)
            if GATED:
                w = _columns(
                    w_ptr, scale_ptr, zero_ptr, n + OUT, first, N, K, BK, FORMAT, HAS_ZERO, RUN,
                    dtype,
                )  # fmt: skip
                up = tl.dot(x, tl.trans(w), up)
        if FORMAT == "fp8":
            acc *= tl.load(scale_ptr + n)[None, :]
        if GATED:
            if FORMAT == "fp8":
                up *= tl.load(scale_ptr + n + OUT)[None, :]
            inner = 1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)  # 2·√(2/π)·(…)
            acc = acc * tl.sigmoid(inner) * up  # ½(1 + tanh(z)) = sigmoid(2z)
            out_row = position
        else:
            acc *= tl.load(shares_ptr + place, mask=taken, other=0.0)[:, None]
            out_row = place
        out = out_ptr + out_row[:, None] * OUT + column[None, :]
        mask = taken[:, None] & (column < OUT)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def group(slots: Tensor, experts: int, bm: int) -> Groups:
    """Sort the places of slots [T, k] by expert and cut each expert's stretch into tiles of bm."""
    device, places = slots.device, slots.numel()
    by_expert, order = slots.flatten().sort(stable=True)
    every = torch.arange(experts, dtype=slots.dtype, device=device)
    ends = torch.searchsorted(by_expert, every, right=True)
    begins = torch.searchsorted(by_expert, every)
    tiles = (ends - begins + (bm - 1)) // bm
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(min(places, places // bm + experts), device=device)
    expert = torch.searchsorted(tile_ends, tile, right=True)  # E behind the last tile
    e = expert.clamp(max=experts - 1)
    first = begins[e] + (tile - (tile_ends - tiles)[e]) * bm
    return Groups(order, ends, expert, first)


def routed_experts(
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    gate_up: MoeWeight,
    down: MoeWeight,
    *,
    configs: tuple[GroupedConfig, GroupedConfig] | None = None,
) -> Tensor:
    """Each row through its experts, summed by its weights: [T, C] → [T, C]. Both configs need one
    bm.
    """
    rows, width = x.shape
    experts, doubled, _ = gate_up.shape
    inner, top_k = doubled // 2, slots.shape[1]
    assert gate_up.shape[2] == width, f"x {tuple(x.shape)}, gate_up {gate_up.shape}"
    assert down.shape == (experts, width, inner), f"down {down.shape}, gate_up {gate_up.shape}"
    assert slots.shape == weights.shape == (rows, top_k), f"{slots.shape}, {weights.shape}"
    first, second = configs or (_config("gate_up", gate_up, x), _config("down", down, x))
    assert first.bm == second.bm, f"{first}, {second}"
    groups = group(slots, experts, first.bm)
    act = torch.empty(rows * top_k, inner, dtype=x.dtype, device=x.device)
    _launch(x, gate_up, groups, None, act, top_k, first)
    out = torch.empty(rows * top_k, width, dtype=x.dtype, device=x.device)
    _launch(act, down, groups, weights.float().contiguous(), out, top_k, second)
    return out.view(rows, top_k, width).sum(1, dtype=torch.float32).to(x.dtype)


def _config(launch: str, weight: MoeWeight, x: Tensor) -> GroupedConfig:
    return CONFIGS[launch, weight.format] if card(x.device).roomy else NARROW_CONFIG


def _launch(
    x: Tensor, w: MoeWeight, groups: Groups, shares: Tensor | None, out: Tensor, top_k: int,
    config: GroupedConfig,
) -> None:  # fmt: skip
    """gate_up without shares, down with them."""
    width = x.shape[1]
    if w.format == "int4":
        assert config.bk == CHUNK, f"{config} with int4"
        x = x.view(-1, width // CHUNK, CHUNK // w.run, w.run).transpose(2, 3)
    x = x.reshape(-1, width).contiguous()
    data, scale, zero = w.operands()
    tiles = groups.expert.numel() * triton.cdiv(out.shape[1], config.bn)
    _grouped_kernel[(tiles,)](
        x, data, scale, zero, *groups, x if shares is None else shares, out,
        W_STRIDE=data.stride(0), SCALE_STRIDE=scale.stride(0), E=w.shape[0], TOP=top_k,
        OUT=out.shape[1], K=width, GATED=shares is None,
        FORMAT=w.format, HAS_ZERO=w.zero is not None, RUN=w.run,
        BM=config.bm, BN=config.bn, BK=config.bk, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
