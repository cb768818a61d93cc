"""Linear layers of a verify block: y = x wᵀ for T ≤ 32 rows, bound by reading w once.

x: [T, K] bf16, rows contiguous. w: [N, K] bf16, e4m3, int8 or int4 as in `forms`. Sums are fp32.
Quantised weights become bf16 in registers, as `narrow.py` tells; scales are applied to sums.

A program owns a tile of BN rows of w and a share of K. The shares of a tile meet in one of two
ways: `partials` writes them side by side, [S, T, N], and whoever reads them adds them up in fp32;
`matmul` and `gated` let the last program of a tile to arrive add them, always in the same order.
The rows of x are padded to 8, 16 or 32 in the kernel. A row's result depends neither on T nor on
the other rows, because how K is cut does not.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.kernels import tuned
from dflash_chat.runtime.kernels.forms import Fp8, Int4, Int8, Weight, dequantize, kind, shape
from dflash_chat.runtime.kernels.int4_product import LEFT, int4_block, let_go, only_row
from dflash_chat.runtime.kernels.narrow import lifted, meant, small
from dflash_chat.runtime.kernels.tile_product import prefetch
from dflash_chat.runtime.kernels.tuned import Config

MAX_ROWS = 32
MAX_TILES = 4096  # of `matmul` and `gated`

DENSE, CHANNEL, BLOCK, INT4 = (tl.constexpr(i) for i in range(4))  # forms of w
PARTIALS, PLAIN, SILU, GELU = (tl.constexpr(i) for i in range(4))  # what becomes of a tile


def reference(x: Tensor, w: Weight) -> Tensor:
    """[T, K] → [T, N] in x's dtype, over the dequantised weight."""
    return F.linear(x, dequantize(w).to(x.dtype))


def gated_reference(x: Tensor, w: Weight, activation: str) -> Tensor:
    """act(gate)·up of a fused [2I, K] weight: [T, K] → [T, I]."""
    gate, up = F.linear(x, dequantize(w, 2).to(x.dtype)).chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


# The seven bits below an int8's sign end 128's mantissa; the sign makes what is taken off 256.
_WIDEN_INT8 = tl.constexpr("""{
    .reg .b32 low, high, one, b0, b1;
    mov.b32 one, 0x3F803F80;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    lop3.b32 b0, low, 0x00800080, 0xC300C300, 0xEA;
    lop3.b32 b1, high, 0x00800080, 0xC300C300, 0xEA;
    lop3.b32 $0, low, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 $1, high, 0x007F007F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, b0;
    fma.rn.bf16x2 $1, $1, one, b1;
}""")


@triton.jit
def _widen(w, dtype: tl.constexpr):
    """int8 → dtype, exactly, or the bytes of e4m3 → `small`; all else as it is. Hopper has no
    instruction from int8 to bf16.
    """
    if w.dtype == tl.int8 and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _WIDEN_INT8, "=&r,=&r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif w.dtype == tl.uint8:
        return small(w, dtype)
    else:
        return w.to(dtype)


@triton.jit
def _lifted(x, w):
    """x for `_widen(w)`."""
    if w.dtype == tl.uint8:
        return lifted(x)
    else:
        return x


@triton.jit
def accumulate(
    x_ptr, stride_x, w_ptr, scale_ptr, zero_ptr, row, block_row, T, N, K, first, last,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
    ALONE: tl.constexpr = False, LET_GO: tl.constexpr = False,
):  # fmt: skip
    """w[row] · xᵀ over the chunks first … last of BK columns: [BN, ROWS] fp32.

    row: [BN] rows of w, block_row: [BN] their rows of block scales, N: all rows of w. LET_GO: the
    next launch may begin when LEFT columns are left; an ALONE row does not let it.
    """
    t = tl.arange(0, ROWS)
    x_row = x_ptr + t * stride_x
    live = t < T
    acc = tl.zeros([BN, ROWS], tl.float32)
    if ALONE:
        STEPS: tl.constexpr = BK // (4 * RUN)
        end = tl.minimum(last * STEPS, K // (4 * RUN))
        acc = only_row(x_ptr, w_ptr, scale_ptr, first * STEPS, end, N, row, RUN, STAGES)
        acc = tl.where((t == 0)[None, :], acc[:, None], 0.0)
    elif FORMAT == INT4:
        for i in tl.range(first, last, num_stages=STAGES):  # pipelines the scales too
            for step in tl.static_range(BK // (4 * RUN)):
                block = i * (BK // (4 * RUN)) + step
                acc = int4_block(
                    acc, x_row + block * (4 * RUN), live, w_ptr, scale_ptr, zero_ptr,
                    block, N, row, EVEN_K or block < K // (4 * RUN), RUN, zero_ptr is not None,
                )  # fmt: skip
            if LET_GO:
                let_go(i, last - LEFT // BK)
        acc = meant(acc, x_ptr.dtype.element_ty, 40)
    else:
        col = tl.arange(0, BK)
        w_row = w_ptr + row[:, None].to(tl.int64) * K
        if FORMAT == CHANNEL:  # asked for before the weights, not behind them
            scale = tl.load(scale_ptr + row)[:, None].to(tl.float32)
        if FORMAT == BLOCK:
            s_row = scale_ptr + block_row * tl.cdiv(K, 128)
            s = tl.load(s_row + first)
        for i in tl.range(first, last):
            k = i * BK + col
            if EVEN_K:
                x = tl.load(x_row[None, :] + k[:, None], mask=live[None, :], other=0.0)
                w = tl.load(w_row + k[None, :])
            else:
                inside = k < K
                x = tl.load(
                    x_row[None, :] + k[:, None], mask=live[None, :] & inside[:, None], other=0.0
                )
                w = tl.load(w_row + k[None, :], mask=inside[None, :], other=0.0)
            if FORMAT == BLOCK:
                s_next = tl.load(s_row + tl.minimum(i + 1, last - 1))
                acc += tl.dot(_widen(w, x.dtype), _lifted(x, w)) * s[:, None].to(tl.float32)
                s = s_next
            else:
                acc = tl.dot(_widen(w, x.dtype), _lifted(x, w), acc)
            if LET_GO:
                let_go(i, last - LEFT // BK)
        if w_ptr.dtype.element_ty == tl.uint8:
            acc = meant(acc, x_ptr.dtype.element_ty, 27)
        if FORMAT == CHANNEL:
            acc *= scale
    return acc


@triton.jit
def _finish(acc, out_ptr, tile, T, N, ROWS: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr):
    """Apply the activation, if there is one, and store a finished tile [BN, ROWS]."""
    t = tl.arange(0, ROWS)[None, :]
    if EPILOGUE == PLAIN:
        n = tile * BN + tl.arange(0, BN)[:, None]
        out = acc
    else:
        half: tl.constexpr = BN // 2
        n = tile * half + tl.arange(0, half)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, half, ROWS)), (1, 2, 0)))
        if EPILOGUE == SILU:
            out = gate * tl.sigmoid(gate) * up
        else:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            out = gate * tl.sigmoid(2 * inner) * up  # (1 + tanh u)/2 = sigmoid 2u
    tl.store(out_ptr + t * N + n, out.to(out_ptr.dtype.element_ty), mask=(t < T) & (n < N))


@triton.jit
def depend(w_ptr, row, N, K, first_column, RUN: tl.constexpr, PDL: tl.constexpr):
    """Ask L2 for weights while the previous kernel still runs, then wait for what it wrote."""
    if PDL:
        prefetch(w_ptr, row, first_column, N, K, RUN)
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["T", "splits"])
def _linear_kernel(
    x_ptr, stride_x, w_ptr, scale_ptr, zero_ptr, out_ptr, scratch_ptr, arrivals_ptr,
    T, N, K, splits,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr,
    REDUCE: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BN rows of w and one share of K. N: columns of the output.

    REDUCE: the shares that the last program of a tile adds up, 0 if nothing is to be added.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    c = tl.arange(0, BN)
    if EPILOGUE >= SILU:  # half the tile from gate, half from up
        rows_of_w = 2 * N
        n = tl.minimum(tile * (BN // 2) + c % (BN // 2), N - 1)
        row = n + c // (BN // 2) * N
        block_row = n // 128 + c // (BN // 2) * tl.cdiv(N, 128)
    else:
        rows_of_w = N
        row = tl.minimum(tile * BN + c, N - 1)
        block_row = row // 128
    chunks = tl.cdiv(K, BK)
    first = chunks * split // splits
    depend(w_ptr, row, rows_of_w, K, first * BK, RUN, PDL)
    LET_GO: tl.constexpr = PDL and EPILOGUE >= SILU
    if PDL and not LET_GO:
        tl.extra.cuda.gdc_launch_dependents()
    acc = accumulate(
        x_ptr, stride_x, w_ptr, scale_ptr, zero_ptr, row, block_row, T, rows_of_w, K,
        first, chunks * (split + 1) // splits, ROWS, BN, BK, EVEN_K, FORMAT, RUN, STAGES,
        ALONE, LET_GO,
    )  # fmt: skip
    if LET_GO:  # a GEMM follows, whose programs are to find free room
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.arange(0, ROWS)[None, :]
    if EPILOGUE == PARTIALS:
        n = tile * BN + c[:, None]
        tl.store(out_ptr + (split * T + t) * N + n, acc, mask=(t < T) & (n < N))
    elif REDUCE == 0:
        _finish(acc, out_ptr, tile, T, N, ROWS, BN, EPILOGUE)
    else:
        at = scratch_ptr + tile * REDUCE * (ROWS * BN) + c[:, None] * ROWS + t
        tl.store(at + split * (ROWS * BN), acc)
        tl.debug_barrier()  # the arrival below vouches for every thread's part of the share
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == REDUCE - 1:
            total = tl.zeros([BN, ROWS], tl.float32)
            for s in tl.static_range(REDUCE):  # all loads in flight at once
                total += tl.load(at + s * (ROWS * BN), cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
            _finish(total, out_ptr, tile, T, N, ROWS, BN, EPILOGUE)


def partials(
    x: Tensor, w: Weight, *, dtype: torch.dtype = torch.float32, config: Config | None = None,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """[T, K] → [S, T, N], whose sum over S is x wᵀ. Shares rounded to bf16 cost about what rounding
    their sum would, since each is smaller, unless they cancel each other.
    """
    n, k = shape(w)
    config = config or tuned.linear(kind(w), n, k)
    out = torch.empty(config.splits, x.shape[0], n, dtype=dtype, device=x.device)
    _launch(x, w, out, n, PARTIALS, config, pdl)
    return out


def matmul(x: Tensor, w: Weight, *, config: Config | None = None, pdl: bool = False) -> Tensor:
    """[T, K] → [T, N] in x's dtype."""
    n, k = shape(w)
    config = config or tuned.linear(kind(w), n, k)
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    _launch(x, w, out, n, PLAIN, config, pdl)
    return out


def gated(
    x: Tensor, w: Weight, activation: str, *, config: Config | None = None, pdl: bool = False
) -> Tensor:
    """act(x gateᵀ)·(x upᵀ) of a fused [2I, K] weight: [T, K] → [T, I]. "silu" or "gelu_tanh"."""
    n, k = shape(w)
    assert n % 2 == 0, f"{n} rows"
    assert activation in ("silu", "gelu_tanh"), activation
    config = config or tuned.gated(kind(w), n, k)
    out = torch.empty(x.shape[0], n // 2, dtype=x.dtype, device=x.device)
    _launch(x, w, out, n // 2, SILU if activation == "silu" else GELU, config, pdl)
    return out


def _launch(
    x: Tensor, w: Weight, out: Tensor, n: int, epilogue: tl.constexpr, config: Config, pdl: bool
) -> None:
    check(x, w)
    rows, k = x.shape
    assert 1 <= config.splits <= triton.cdiv(k, config.bk), f"{config} on K = {k}"
    alone = config.alone if rows == 1 and isinstance(w, Int4) and w.zero is None else None
    if alone is not None:
        config = config._replace(bn=alone.bn, warps=alone.warps, stages=alone.stages)
    gate_up = epilogue in (SILU, GELU)
    tiles = triton.cdiv(n, config.bn // 2 if gate_up else config.bn)
    splits = config.splits
    reduce = 0 if epilogue == PARTIALS or splits == 1 else splits
    scratch = arrivals = None
    if reduce:
        assert tiles <= MAX_TILES, f"{tiles} tiles"
        size = tiles * splits * _padded(rows, w) * config.bn
        scratch = torch.empty(size, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device)
    _linear_kernel[(tiles, splits)](
        x, x.stride(0), *operands(w), out, scratch, arrivals, rows, n, k, splits, EPILOGUE=epilogue,
        REDUCE=reduce, ALONE=alone is not None, **shape_options(rows, w, config, pdl),
    )  # fmt: skip


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    """How many shares of each tile have arrived. The last one to arrive sets its count to 0.

    One for all calls, which therefore may not run side by side, and made before any capture.
    """
    assert device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "not warmed up"
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def check(x: Tensor, w: Weight) -> None:
    n, k = shape(w)
    assert 1 <= x.shape[0] <= MAX_ROWS, f"{x.shape[0]} rows"
    assert x.shape[1] == k, f"x {tuple(x.shape)}, w [{n}, {k}]"
    assert x.stride(1) == 1, f"x {x.stride()}"
    for part in (w,) if isinstance(w, Tensor) else w:
        assert part is None or part.is_contiguous(), f"{tuple(part.shape)} {part.stride()}"


def operands(w: Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, scales and zeros."""
    if isinstance(w, Int4):
        zero = None if w.zero is None else w.zero.view(torch.int32)
        return w.words, w.scale.view(torch.int32), zero  # four bytes can be asked for ahead of use
    if isinstance(w, Fp8):
        return w.weight.view(torch.uint8), w.scale, None
    if isinstance(w, Int8):
        return w.weight, w.scale, None
    return w, None, None


def _padded(rows: int, w: Weight) -> int:
    """Rows of a tile. Eight of bf16 would take other instructions, so other sums, than sixteen."""
    return max(16 if isinstance(w, Tensor) else 8, int(triton.next_power_of_2(rows)))


def shape_options(rows: int, w: Weight, config: Config, pdl: bool) -> dict[str, Any]:
    """What a kernel is compiled for, and how it is launched."""
    k = shape(w)[1]
    form, run = DENSE, 0
    if isinstance(w, Fp8):
        form = CHANNEL if w.scale.dim() == 1 else BLOCK
        assert form == CHANNEL or config.bk == 128, f"{config} with blocks of 128 columns"
    elif isinstance(w, Int8):
        form = CHANNEL
    elif isinstance(w, Int4):
        form, run = INT4, w.words.shape[-1]
        assert config.bk % (4 * run) == 0, f"{config} with runs of {run}"
        # Four warps would get wgmma, with which `int4_block` has not been tried.
        assert config.warps < 4, f"{config} with int4"
    return {
        "ROWS": _padded(rows, w), "BN": config.bn, "BK": config.bk, "EVEN_K": k % config.bk == 0,
        "FORMAT": form, "RUN": run, "STAGES": config.stages, "PDL": pdl,
        "num_warps": config.warps, "num_stages": config.stages, **overlapping(pdl),
    }  # fmt: skip


def overlapping(pdl: bool) -> dict[str, bool]:
    """Launch while the previous kernel still runs, if asked to."""
    return {"launch_pdl": True} if pdl else {}
