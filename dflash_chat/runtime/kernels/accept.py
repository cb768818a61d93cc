"""Acceptance: how many drafted tokens the target's own choices confirm, and where that leaves us.

    n = length of the longest prefix with ids[1 + i] == chosen[i]

    ids    int64 [T]: the anchor and T − 1 drafted tokens       chosen  int64 [T]: one per row
    length int32 [1] += n + 1        start, committed int32 [1]: the rows just committed
    ids[0], block[0] = chosen[n]: the next anchor
    record int32 [1 + 2·17] = n, chosen, and from 18 on the bits of the block's confidence, fp32

One program; bound by its launch. `script`, int32 [steps], dictates n instead (at most T − 1) for a
benchmark whose weights are random; `step` int32 [1] counts the launches.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime.width import MAX_ROWS


class State(NamedTuple):
    """What a step needs to know of all steps before it, on the device."""

    ids: Tensor  # int64 [17]
    block: Tensor  # int64 [B], the anchor and mask tokens
    length: Tensor  # int32 [1], committed rows
    start: Tensor  # int32 [1], position of the first row committed last
    committed: Tensor  # int32 [1], rows committed last
    step: Tensor  # int32 [1]
    confidence: Tensor  # fp32 [17], of the drafted tokens


def reference(ids: Tensor, chosen: Tensor) -> int:
    """n, in plain Python."""
    drafted, own = ids.tolist()[1:], chosen.tolist()
    n = 0
    while n < len(drafted) and drafted[n] == own[n]:
        n += 1
    return n


@triton.jit
def _accept_kernel(
    ids_ptr, block_ptr, length_ptr, start_ptr, committed_ptr, step_ptr, chosen_ptr, record_ptr,
    script_ptr, confidence_ptr,
    STEPS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)
    chosen = tl.load(chosen_ptr + i, mask=i < T, other=-1)
    drafted = tl.load(ids_ptr + 1 + i, mask=i < T - 1, other=-2)
    length = tl.load(length_ptr)
    step = tl.load(step_ptr)
    n = tl.min(tl.where(chosen == drafted, ROWS, i), axis=0)
    if script_ptr is not None:
        n = tl.minimum(tl.load(script_ptr + step % STEPS), T - 1)
    anchor = tl.sum(tl.where(i == n, chosen, 0), axis=0)
    tl.debug_barrier()
    tl.store(ids_ptr, anchor)
    tl.store(block_ptr, anchor)
    tl.store(start_ptr, length)
    tl.store(committed_ptr, n + 1)
    tl.store(length_ptr, length + n + 1)
    tl.store(step_ptr, step + 1)
    tl.store(record_ptr, n)
    tl.store(record_ptr + 1 + i, chosen.to(tl.int32), mask=i < T)
    confidence = tl.load(confidence_ptr + i, mask=i < MOST, other=0.0)
    tl.store(record_ptr + 1 + MOST + i, confidence.to(tl.int32, bitcast=True), mask=i < MOST)


def new_record(device: torch.device) -> Tensor:
    """Room for what `accept` tells the host."""
    return torch.zeros(1 + 2 * MAX_ROWS, dtype=torch.int32, device=device)


def read(record: Tensor, drafted: int) -> tuple[int, list[int], list[float]]:
    """Of a record on the host: n, the n + 1 tokens committed, and the confidence of the block's
    `drafted` tokens.
    """
    n, *chosen = record[: 1 + MAX_ROWS].tolist()
    confidence = record[1 + MAX_ROWS :].view(torch.float32)
    return n, chosen[: n + 1], confidence[:drafted].tolist()


def accept(state: State, chosen: Tensor, record: Tensor, script: Tensor | None = None) -> None:
    """Judge the drafted tokens by `chosen` [T] and move `state` on."""
    rows = len(chosen)
    assert rows <= MAX_ROWS, f"{rows} rows"
    assert chosen.dtype == state.ids.dtype == torch.int64, f"{chosen.dtype}, {state.ids.dtype}"
    _accept_kernel[(1,)](
        state.ids, state.block, state.length, state.start, state.committed, state.step, chosen,
        record, script, state.confidence,
        STEPS=1 if script is None else len(script), T=rows, ROWS=32, MOST=MAX_ROWS, num_warps=1,
    )  # fmt: skip
