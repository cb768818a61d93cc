"""Router: softmax of the logits → top-k → renormalise → × per_expert_scale.

    p = softmax(logits) over all E, fp32                the k largest, ties to the lower expert
    weights = p_top / Σ p_top · per_expert_scale        so they do not sum to 1

The softmax's denominator cancels, so only the chosen logits count.

    logits fp32 [T, E] → weights fp32 [T, k] by rank, and a list of places: an expert and the rows
    that go to it, at most A of them, the number that its kernel multiplies at once
    experts int32 [P]: expert + 2¹⁶·rows, experts ascending, each with as many places as it needs
    members int32 [P, A]: row + 2¹⁶·rank        active int32 [1]: how many of the P mean something

Bound by latency. The logits come out of the norms' launch (`norms.py`). One program does the rest
for all rows: a row of 128 experts belongs to one warp, and a logit is compared by its bits, as
integers of the same order, so that a maximum over the warp is one instruction, and nothing waits
for a barrier or for memory until the list of experts is made. That needs one exchange among the
warps, of who chose whom; each then counts through all experts itself. A single row needs no
launch: inside the experts' own kernel each program finds with `expert_at_rank` whom to multiply,
and one, `list_only_row`, writes down what later launches read. Sums go by rank in both kernels, so
a row's weights do not depend on how many rows there are.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels.linear import MAX_ROWS

HIGH = tl.constexpr(1 << 16)


class Routing(NamedTuple):
    """Who goes where: see the file."""

    experts: Tensor
    active: Tensor
    members: Tensor
    weights: Tensor


def reference(logits: Tensor, per_expert_scale: Tensor, top_k: int = 8) -> tuple[Tensor, Tensor]:
    """slots [T, k] and weights [T, k], in fp32 or, for fp64 inputs, in fp64."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p = logits.to(wide).softmax(-1)  # [T, E]
    top, slots = p.sort(dim=-1, descending=True, stable=True)
    top, slots = top[:, :top_k], slots[:, :top_k]
    return slots, top / top.sum(-1, keepdim=True) * per_expert_scale.to(wide)[slots]


@triton.jit
def _key(logits):
    """int32, ordered as the logits are."""
    return _flipped(logits.to(tl.int32, bitcast=True))


@triton.jit
def _flipped(bits):
    """A negative number's other bits the other way round; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(key, e):
    """The largest logit of each row [R, E], and where it stands first: fp32 and int32 [R]."""
    largest = tl.max(key, axis=1)
    first = tl.min(tl.where(key == largest[:, None], e, e.shape[1]), axis=1)
    return _flipped(largest).to(tl.float32, bitcast=True), first


@triton.jit
def _order(logits, e, TOP: tl.constexpr):
    """Each logit's place among the TOP largest of its row, TOP for the others: int32 [ROWS, E]; and
    of each row the largest, and Σ exp(logit − largest) over the TOP, by rank: fp32 [ROWS].
    """
    key = _key(logits)
    order = tl.full(key.shape, TOP, tl.int32)
    total = tl.zeros([key.shape[0]], tl.float32)
    top = tl.zeros([key.shape[0]], tl.float32)
    for r in tl.static_range(TOP):
        logit, first = _largest(key, e[None, :])
        if r == 0:
            top = logit
        total += tl.exp(logit - top)
        order = tl.where(e[None, :] == first[:, None], r, order)
        key = _without(key, e[None, :], first)
    return order, top, total


@triton.jit
def _weigh(logits, top, total, scale):
    """Each row's weights [R, E], of which those of the experts it chose mean something."""
    return tl.exp(logits - top[:, None]) * (1 / total)[:, None] * scale[None, :]


@triton.jit
def _without(key, e, first):
    """The keys of each row but the one at `first`."""
    return tl.where(e == first[:, None], -(2**31), key)


@triton.jit
def _only_row(logits_ptr, E: tl.constexpr, WARPS: tl.constexpr):
    """Its logits, all of them in every warp: [WARPS, E]."""
    return tl.load(logits_ptr + tl.arange(0, WARPS)[:, None] * 0 + tl.arange(0, E)[None, :])


@triton.jit
def expert_at_rank(logits_ptr, r, E: tl.constexpr, WARPS: tl.constexpr):
    """Of the only row: the expert of rank r."""
    key, e = _key(_only_row(logits_ptr, E, WARPS)), tl.arange(0, E)[None, :]
    for _ in range(r):
        _, first = _largest(key, e)
        key = _without(key, e, first)
    _, first = _largest(key, e)
    return tl.max(first, axis=0)


@triton.jit
def list_only_row(
    logits_ptr, scale, experts_ptr, active_ptr, members_ptr, weights_ptr,
    E: tl.constexpr, TOP: tl.constexpr, AT_ONCE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write down what `select` would of the only row, with places in the order of ranks. scale: the
    experts' own factors, fp32 [E].
    """
    e = tl.arange(0, E)
    warp = tl.arange(0, WARPS)[:, None]  # each does the same, the first writes
    logits = _only_row(logits_ptr, E, WARPS)
    rank, top, total = _order(logits, e, TOP)
    chosen = (rank < TOP) & (warp == 0)
    tl.store(weights_ptr + rank, _weigh(logits, top, total, scale), mask=chosen)
    tl.store(experts_ptr + rank, e[None, :] + HIGH, mask=chosen)
    tl.store(members_ptr + rank * AT_ONCE, rank * HIGH, mask=chosen)
    tl.store(active_ptr, TOP)


@triton.jit
def _ones(bits):
    """How many bits of each int32 are set."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 63


@triton.jit
def _put(at, value, mask, PDL: tl.constexpr):
    """Store four bytes each from where they are: `tl.store` would first put neighbours side by
    side, through shared memory. PDL: on a card that has it; else this is `tl.store`.
    """
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred taken;
            setp.ne.u32 taken, $3, 0;
            @taken st.global.b32 [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r",
            [at.to(tl.uint64, bitcast=True), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(at, value, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _select_kernel(
    logits_ptr, scale_ptr, experts_ptr, active_ptr, members_ptr, weights_ptr, T,
    E: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    e = tl.arange(0, E)
    scale = tl.load(scale_ptr + e).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    used = row[:, None] < T
    logits = tl.load(logits_ptr + row[:, None] * E + e[None, :], mask=used, other=0.0)
    rank, top, total = _order(logits, e, TOP)
    chosen = used & (rank < TOP)
    weights = _weigh(logits, top, total, scale)
    _put(weights_ptr + row[:, None] * TOP + rank, weights, chosen, PDL)

    bit = tl.full([ROWS], 1, tl.int32) << row
    rows = tl.sum(tl.where(chosen, bit[:, None], 0), axis=0)  # of each expert, as bits
    count = _ones(rows)
    places = (count + AT_ONCE - 1) // AT_ONCE
    first = tl.cumsum(places[None, :] + row[:, None] * 0, 1) - places[None, :]  # in every row
    only = (row == 0)[:, None]
    for nth in tl.static_range((ROWS + AT_ONCE - 1) // AT_ONCE):
        here = tl.minimum(count - nth * AT_ONCE, AT_ONCE)[None, :]
        _put(experts_ptr + first + nth, e[None, :] + here * HIGH, only & (here > 0), PDL)
    last = only & (e == E - 1)[None, :]
    _put(active_ptr + first * 0, first + places[None, :], last, PDL)
    before = _ones(rows[None, :] & (bit - 1)[:, None])  # how many rows of the expert
    at = members_ptr + first * AT_ONCE + before  # an expert's places are neighbours
    _put(at, row[:, None] + rank * HIGH, chosen, PDL)


def unmade(rows: int, experts: int, top_k: int, device: torch.device, at_once: int) -> Routing:
    """A routing that a kernel will write."""
    distinct = min(experts, top_k * rows)
    places = distinct + (top_k * rows - distinct) // at_once  # fewer where fewer are chosen

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    return Routing(ints(places), ints(1), ints(places, at_once), weights)


def select(
    logits: Tensor, per_expert_scale: Tensor, *, at_once: int, top_k: int = 8,
    pdl: bool = False,
) -> Routing:  # fmt: skip
    """Route the rows by their logits, fp32 [T, E]. at_once: rows of a place at most."""
    rows, experts = logits.shape
    assert logits.is_contiguous(), f"logits {logits.stride()}"
    assert per_expert_scale.shape == (experts,), f"scale {per_expert_scale.shape}"
    assert rows <= MAX_ROWS, f"{rows} rows"
    assert top_k <= experts, f"top {top_k} of {experts}"
    assert experts & (experts - 1) == 0, f"{experts} experts"
    routing = unmade(rows, experts, top_k, logits.device, at_once)
    padded = max(2, triton.next_power_of_2(rows))
    _select_kernel[(1,)](
        logits, per_expert_scale, *routing, rows, E=experts, TOP=top_k, ROWS=padded,
        AT_ONCE=at_once, PDL=pdl, num_warps=padded, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return routing
