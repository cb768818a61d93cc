"""The likeliest token of a dense head, found by reading half of its bytes.

    screen   a_v = s_v·(q_v·h) of an int8 copy of the head (`forms.Int8`); |w_v·h − a_v| ≤ e_v·‖h‖
    floor    L = w_u·h of the row u whose a_u is largest: no row below it can be the answer
    refine   w_v·h of the candidates, the rows with a_v + e_v·‖h‖ ≥ L
    choose   the first of the largest

Every row that could win is a candidate, so the answer is the bf16 head's, exactly; the copy decides
only how much of that head is read: a few rows for a state that has a likeliest token (on text, 3 of
the default target's 49152 in the median), all of them for one that has none. Candidates' products
are summed in fp32, one row of the head with one state at a time: a token depends neither on T nor
on the other states. A softcap moves no maximum.

x: [T, K] bf16, rows contiguous. w: [N, K] bf16. Bound by reading the copy once. The first kernel is
`heads`'s, with all logits of the copy; the last one, too.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import heads, tuned
from dflash_chat.runtime.kernels.forms import Int8, dequantize
from dflash_chat.runtime.kernels.tuned import Config

AT_ONCE = 4096  # columns of a row that are in flight together
REFINED = 256  # rows of the head that one program of `refine` looks at …
STATES = 4  # … for so many states: what several of them want of these is read one by one
WARPS = 4  # one row of the head is read by 128 threads


def reference(x: Tensor, w: Tensor, copy: Int8) -> tuple[Tensor, Tensor]:
    """The tokens, int64 [T], and which rows are candidates, bool [T, N]."""
    near, lengths = x.float() @ dequantize(copy).T, x.float().norm(dim=-1, keepdim=True)
    exact = x.float() @ w.float().T
    floor = exact.gather(-1, near.argmax(-1, keepdim=True))
    candidates = near + copy.error * lengths >= floor
    return exact.where(candidates, float("-inf")).argmax(-1), candidates


@triton.jit
def _product(x_row, w_row, K, BK: tl.constexpr):
    """w·x and Σ|wᵢ·xᵢ| of two rows of K columns, in fp32."""
    k = tl.arange(0, BK)
    product = tl.zeros([BK], tl.float32)
    size = tl.zeros([BK], tl.float32)
    for i in tl.range(0, tl.cdiv(K, BK)):
        column = i * BK + k
        x = tl.load(x_row + column, mask=column < K, other=0.0).to(tl.float32)
        w = tl.load(w_row + column, mask=column < K, other=0.0).to(tl.float32)
        product += x * w
        size += tl.abs(x * w)
    return tl.sum(product, axis=0), tl.sum(size, axis=0)


@triton.jit
def _floor_kernel(
    x_ptr, stride_x, w_ptr, best_ptr, best_row_ptr, floor_ptr, length_ptr, tiles, N, K,
    TILES: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """L and ‖h‖ of one state, L less what two ways to sum it may differ by."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    best, row = heads.of_tiles(best_ptr, best_row_ptr, t, tiles, N, TILES)
    x_row = x_ptr + t * stride_x
    squared, _ = _product(x_row, x_row, K, BK)
    _, first = heads.largest_of_tiles(best, row, N)
    product, size = _product(x_row, w_ptr + first * K, K, BK)
    tl.store(floor_ptr + t, product - size * (K * 1.1920929e-07))  # 2⁻²³
    tl.store(length_ptr + t, tl.sqrt(squared))


@triton.jit(do_not_specialize=["T"])
def _refine_kernel(
    x_ptr, stride_x, w_ptr, error_ptr, near_ptr, best_ptr, floor_ptr, length_ptr,
    exact_ptr, row_ptr, T, N, K, tiles,
    ROWS: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUP tiles of BN rows of the head and ROWS states: per state the largest product of its
    candidates, −inf without one, and that row.
    """
    SPAN: tl.constexpr = GROUP * BN
    group = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    t = first + tl.arange(0, ROWS)
    n = tl.arange(0, SPAN)
    row = group * SPAN + n
    error = tl.load(error_ptr + row, mask=row < N, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    floor = tl.load(floor_ptr + t, mask=t < T, other=float("inf"))
    length = tl.load(length_ptr + t, mask=t < T, other=0.0)
    tile = group * GROUP + tl.arange(0, GROUP)
    inside = (t < T)[None, :] & (tile < tiles)[:, None]
    best = tl.load(best_ptr + t[None, :] * tiles + tile[:, None], mask=inside, other=float("-inf"))
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    winner = tl.full([ROWS], N - 1, tl.int32)
    highest = tl.max(best, axis=0) + tl.max(error, axis=0) * length
    if tl.max((highest >= floor).to(tl.int32), axis=0) > 0:
        at = near_ptr + t[None, :].to(tl.int64) * N + row[:, None]
        live = (t < T)[None, :] & (row < N)[:, None]
        near = tl.load(at, mask=live, other=float("-inf"))
        candidate = near + error[:, None] * length[None, :] >= floor[None, :]
        place = n[:, None] * ROWS + (t - first)[None, :]
        END: tl.constexpr = SPAN * ROWS
        i = tl.min(tl.min(tl.where(candidate, place, END), axis=1), axis=0)
        while i < END:  # in the order of rows, so that the first of equals stays
            state = first + i % ROWS
            v = group * SPAN + i // ROWS
            w_row = w_ptr + v.to(tl.int64) * K
            product, _ = _product(x_ptr + state * stride_x, w_row, K, BK)
            better = (t == state) & (product > largest)
            largest = tl.where(better, product, largest)
            winner = tl.where(better, v, winner)
            later = candidate & (place > i)
            i = tl.min(tl.min(tl.where(later, place, END), axis=1), axis=0)
    at = t * tl.num_programs(0) + group
    tl.store(exact_ptr + at, largest, mask=t < T)
    tl.store(row_ptr + at, winner, mask=t < T)


def argmax(
    x: Tensor, w: Tensor, copy: Int8, *, config: Config | None = None, pdl: bool = False
) -> Tensor:
    """[T, K] → int64 [T]: the row of w with the largest product, the first of equals. `copy` is w
    as `forms.round_to_int8` rounds it. A state that is not finite gets some row.
    """
    rows, (n, k) = x.shape[0], w.shape
    assert w.shape == copy.weight.shape, f"{tuple(w.shape)}, {tuple(copy.weight.shape)}"
    assert w.is_contiguous(), f"{tuple(w.shape)} {w.stride()}"
    config = config or tuned.head("int8", n, k, rows)
    near = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    best, best_row = heads.by_tiles(x, copy, near, None, 0.0, config, pdl)
    tiles = best.shape[1]
    floor, length = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    options = {
        "BK": min(AT_ONCE, triton.next_power_of_2(k)), "PDL": pdl,
        "num_warps": WARPS, "launch_pdl": pdl,
    }  # fmt: skip
    _floor_kernel[(rows,)](
        x, x.stride(0), w, best, best_row, floor, length, tiles, n, k,
        TILES=triton.next_power_of_2(tiles), **options,
    )  # fmt: skip
    group = max(1, REFINED // config.bn)
    groups = triton.cdiv(tiles, group)
    exact = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    exact_row = torch.empty(rows, groups, dtype=torch.int32, device=x.device)
    states = min(STATES, triton.next_power_of_2(rows))
    _refine_kernel[(groups, triton.cdiv(rows, states))](
        x, x.stride(0), w, copy.error, near, best, floor, length, exact, exact_row,
        rows, n, k, tiles, ROWS=states, BN=config.bn, GROUP=group, **options,
    )  # fmt: skip
    return heads.first_best(exact, exact_row, n, pdl=pdl)
