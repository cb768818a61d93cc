"""What drafts are read off: the target's own head, or a cheaper copy of it.

    own      the target's, lent by reference; of a screened head the copy that it is screened by
    int8     with a scale per row, for fbgemm on a CPU: half the bytes of bf16
    fp8      e4m3 with a scale per row: half the bytes of bf16
    trimmed  the rows of some tokens only: the N lowest ids, which a vocabulary in the order of its
             merges emits most, and those added beside the merges, so that every end can be drafted

Drafted tokens are verified, so no copy changes an answer; a poorer one is accepted less often.
Knows heads and token ids; knows neither drafters nor how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.errors import UsageError
from dflash_chat.runtime import layers
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import rounded


@dataclass(frozen=True)
class DraftHead:
    """`weight` [N, C]: row i is token `ids[i]`, int64 [N] ascending, or token i without `ids`.

    `vocab` is V; `copied` says that the weight is not the target's own; `softcap` bounds logits as
    the drafter was trained with, 0 leaves them.
    """

    weight: Packed
    vocab: int
    ids: Tensor | None = None
    copied: bool = False
    softcap: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the target's own head."""
        return self.weight.nbytes if self.copied else 0

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of normed states [T, C]; -inf for tokens without a row."""
        logits = self.weight.matmul(hidden)
        return self.spread(layers.softcap(logits, self.softcap) if self.softcap else logits)

    def spread(self, logits: Tensor) -> Tensor:
        """The rows' logits [T, N], at their tokens' places [T, V]."""
        if self.ids is None:
            return logits
        whole = logits.new_full((len(logits), self.vocab), float("-inf"))
        return whole.index_copy_(1, self.ids, logits)


def kept(rows: int, added: Iterable[int], vocab: int) -> list[int]:
    """The tokens of a trimmed head, ascending."""
    return sorted({*range(rows), *(i for i in added if i < vocab)})


def of(
    head: Packed,
    options: EngineOptions,
    added: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    softcap: float = 0.0,
    screen: Packed | None = None,
) -> DraftHead:
    """The draft head that the options ask for; `added` are the ids beside the merges, `screen` is
    the copy that `head` is screened by.

    Raises UsageError if the head has no more rows than are to be kept.
    """
    fp8, rows, vocab = options.draft_head == "fp8", options.draft_rows, head.shape[0]
    unchosen = not options.copies_head and options.draft_head == "auto"
    if unchosen and device.type == "cpu" and cpu.int8_serves(dtype):
        return DraftHead(cpu.Int8Copy.of(head), vocab, copied=True, softcap=softcap)
    if not options.copies_head:
        lent = head if screen is None or options.draft_head == "own" else screen
        return DraftHead(lent, vocab, softcap=softcap)
    if rows >= vocab:
        raise UsageError(
            f"draft_head keeps {rows} rows, and this target's head has {vocab}",
            "take fewer, or draft_head=fp8 for a copy of them all",
        )
    ids = None
    if rows:
        ids = torch.tensor(kept(rows, added, vocab), device=device)
    dense = head.dequantize(dtype) if ids is None else head.rows(ids)
    copy = rounded(dense) if fp8 else DenseWeight(dense)
    return DraftHead(copy.to(device, dtype), vocab, ids, copied=True, softcap=softcap)
