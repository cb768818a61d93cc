"""The head of a verify block: its likeliest tokens, their probabilities, its logits. T ≤ 32 rows.

    logits = x wᵀ [T, N], softcap·tanh(logit/softcap) where there is one

One program a tile of rows of w, by `linear`'s loop over its columns; each leaves its best logit and
which row that is, and one program a row of x finds the first of the best. Logits are written only
where they are wanted. A softcap moves no maximum.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import tuned
from dflash_chat.runtime.kernels.forms import Weight, kind, shape
from dflash_chat.runtime.kernels.linear import (
    accumulate,
    check,
    depend,
    operands,
    overlapping,
    shape_options,
)
from dflash_chat.runtime.kernels.tuned import Config


@triton.jit(do_not_specialize=["T"])
def _head_kernel(
    x_ptr, stride_x, w_ptr, scale_ptr, zero_ptr, logits_ptr, best_ptr, best_row_ptr, sum_ptr,
    T, N, K, softcap,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BN rows of the head: its best logit and row per t; if wanted, the logits, and the
    sum of exp(logit − best).
    """
    tile = tl.program_id(0)
    n = tile * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)
    depend(w_ptr, row, N, K, 0, RUN, PDL)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    acc = accumulate(
        x_ptr, stride_x, w_ptr, scale_ptr, zero_ptr, row, row // 128, T, N, K,
        0, tl.cdiv(K, BK), ROWS, BN, BK, EVEN_K, FORMAT, RUN, STAGES,
    )  # fmt: skip
    t = tl.arange(0, ROWS)
    if logits_ptr is not None:
        tl.store(
            logits_ptr + t[None, :].to(tl.int64) * N + n[:, None],
            _capped(acc, softcap).to(logits_ptr.dtype.element_ty),
            mask=(t < T)[None, :] & (n < N)[:, None],
        )  # fmt: skip
    acc = tl.where(n[:, None] < N, acc, float("-inf"))
    best = tl.max(acc, axis=0)
    best_row = tl.min(tl.where(acc == best[None, :], n[:, None], N - 1), axis=0)
    at = t * tl.num_programs(0) + tile
    tl.store(best_ptr + at, best, mask=t < T)
    tl.store(best_row_ptr + at, best_row, mask=t < T)
    if sum_ptr is not None:
        behind = tl.exp(_capped(acc, softcap) - _capped(best, softcap)[None, :])
        tl.store(sum_ptr + at, tl.sum(tl.where(n[:, None] < N, behind, 0.0), axis=0), mask=t < T)


@triton.jit
def _capped(logits, softcap):
    if softcap > 0:
        logits = softcap * (2 * tl.sigmoid(2 / softcap * logits) - 1)
    return logits


@triton.jit
def of_tiles(best_ptr, best_row_ptr, t, tiles, N, TILES: tl.constexpr):
    """What `by_tiles` left for row t: every tile's best logit and its row, [TILES] each."""
    i = tl.arange(0, TILES)
    best = tl.load(best_ptr + t * tiles + i, mask=i < tiles, other=float("-inf"))
    return best, tl.load(best_row_ptr + t * tiles + i, mask=i < tiles, other=N - 1)


@triton.jit
def largest_of_tiles(best, row, N):
    """The largest logit and the first row that has it."""
    largest = tl.max(best, axis=0)
    return largest, tl.min(tl.where(best == largest, row, N - 1), axis=0).to(tl.int64)


@triton.jit
def _argmax_kernel(
    best_ptr, best_row_ptr, sum_ptr, ids_ptr, out_ptr, probability_ptr, tiles, N, softcap,
    TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first best row over all tiles, through `ids` if there are any, and its probability if
    wanted. One program per t.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    best, row = of_tiles(best_ptr, best_row_ptr, t, tiles, N, TILES)
    largest, winner = largest_of_tiles(best, row, N)
    if probability_ptr is not None:
        i = tl.arange(0, TILES)
        tile_sum = tl.load(sum_ptr + t * tiles + i, mask=i < tiles, other=0.0)
        behind = tl.exp(_capped(best, softcap) - _capped(largest, softcap))
        tl.store(probability_ptr + t, 1 / tl.sum(tile_sum * behind, axis=0))
    if ids_ptr is not None:
        winner = tl.load(ids_ptr + winner).to(tl.int64)
    tl.store(out_ptr + t, winner)


def argmax(
    x: Tensor,
    w: Weight,
    *,
    ids: Tensor | None = None,
    config: Config | None = None,
    pdl: bool = False,
) -> Tensor:
    """[T, K] → int64 [T]: the row of the largest logit, the first of equals, or that row's id."""
    return _head(x, w, None, None, 0.0, ids, config, pdl)


def confident(
    x: Tensor,
    w: Weight,
    *,
    softcap: float = 0.0,
    ids: Tensor | None = None,
    config: Config | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`argmax` and, fp32 [T], the softmax of the (capped) logits there."""
    probability = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return _head(x, w, None, probability, softcap, ids, config, pdl), probability


def logits_and_argmax(
    x: Tensor,
    w: Weight,
    *,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    ids: Tensor | None = None,
    config: Config | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """[T, K] → logits [T, N], softcap·tanh(logit/softcap) if there is one, and `argmax`."""
    logits = torch.empty(x.shape[0], shape(w)[0], dtype=dtype, device=x.device)
    return logits, _head(x, w, logits, None, softcap, ids, config, pdl)


def _head(
    x: Tensor, w: Weight, logits: Tensor | None, probability: Tensor | None, softcap: float,
    ids: Tensor | None, config: Config | None, pdl: bool,
) -> Tensor:  # fmt: skip
    n, k = shape(w)
    config = config or tuned.head(kind(w), n, k, x.shape[0])
    sums = None
    if probability is not None:
        sums = torch.empty(x.shape[0], triton.cdiv(n, config.bn), device=x.device)
    best, best_row = by_tiles(x, w, logits, sums, softcap, config, pdl)
    return first_best(best, best_row, n, sums, probability, softcap, ids, pdl=pdl)


def by_tiles(
    x: Tensor, w: Weight, logits: Tensor | None, sums: Tensor | None, softcap: float,
    config: Config, pdl: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every tile's best logit, fp32 [T, ⌈N/config.bn⌉], and its row, int32; fills [T, N] of
    `logits`, and of `sums`, fp32 [T, ⌈N/config.bn⌉], Σ exp(logit − best) of the capped ones.
    """
    rows = x.shape[0]
    n, k = shape(w)
    check(x, w)
    tiles = triton.cdiv(n, config.bn)
    best = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    best_row = torch.empty(rows, tiles, dtype=torch.int32, device=x.device)
    _head_kernel[(tiles,)](
        x, x.stride(0), *operands(w), logits, best, best_row, sums, rows, n, k, softcap,
        **shape_options(rows, w, config, pdl),
    )  # fmt: skip
    return best, best_row


def first_best(
    best: Tensor, best_row: Tensor, n: int, sums: Tensor | None = None,
    probability: Tensor | None = None, softcap: float = 0.0, ids: Tensor | None = None, *,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """What `by_tiles` found, [T, tiles] of a head of n rows → int64 [T]: the first best row, or
    its id; fills `probability`.
    """
    rows, tiles = best.shape
    out = torch.empty(rows, dtype=torch.int64, device=best.device)
    _argmax_kernel[(rows,)](
        best, best_row, sums, ids, out, probability, tiles, n, softcap,
        TILES=triton.next_power_of_2(tiles), PDL=pdl, num_warps=8, **overlapping(pdl),
    )  # fmt: skip
    return out
