"""What drafts are read off: the target's own head, or a cheaper copy of it.

    own      the target's, lent by reference; of a screened head the copy that it is screened by
    int8     with a scale per row, for fbgemm on a CPU: half the bytes of bf16
    fp8      e4m3 with a scale per row: half the bytes of bf16
    trimmed  the rows of some tokens only: the N lowest ids, which a vocabulary in the order of its
             merges emits most, and those added beside the merges, so that every end can be drafted;
             on a CPU also of what the text has brought, since rare tokens come again (`TextRows`)

Drafted tokens are verified, so no copy changes an answer; a poorer one is accepted less often.
Unless somebody chooses, a CPU drafts from a quarter of the rows in int8.
Knows heads and token ids; knows neither drafters nor how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.errors import UsageError
from dflash_chat.runtime import layers
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import rounded

INT8_SHARE = 4  # a CPU's copy in int8 has one row in so many
TEXT_ROWS = 1024  # of tokens that the text has brought, at most …
_GRAIN = 256  # … multiplied in whole grains: oneDNN compiles for every number of rows


class TextRows:
    """A head's rows of the tokens that a text has brought lately and `common` does not hold."""

    def __init__(self, head: Packed, common: Collection[int], dtype: torch.dtype) -> None:
        self._head, self._common = head, common
        self._places: dict[int, int] = {}  # by token, oldest first
        self._rows = torch.zeros(TEXT_ROWS, head.shape[1], dtype=dtype)
        self._ids = torch.zeros(TEXT_ROWS, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows there may be."""
        return self._rows.nbytes

    def read(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`; of more tokens than there is room for the latest stay."""
        places = self._places
        new = [i for i in dict.fromkeys(ids) if i not in self._common and i not in places]
        if not new:
            return
        new = new[-TEXT_ROWS:]
        for token in new:
            full = len(places) == TEXT_ROWS
            places[token] = places.pop(next(iter(places))) if full else len(places)
        at, tokens = torch.tensor([places[token] for token in new]), torch.tensor(new)
        self._ids[at] = tokens
        self._rows[at] = self._head.rows(tokens).to(self._rows.dtype)

    def candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, N] of states [T, C], and the tokens, int64 [N]."""
        used = len(self._places)
        grains = -(-used // _GRAIN) * _GRAIN
        return F.linear(hidden, self._rows[:grains])[:, :used], self._ids[:used]


@dataclass(frozen=True)
class DraftHead:
    """`weight` [N, C]: row i is token `ids[i]`, int64 [N] ascending, or token i without `ids`.

    `vocab` is V; `copied` says that the weight is not the target's own; `softcap` bounds logits as
    the drafter was trained with, 0 leaves them; `text` has rows besides, which come and go.
    """

    weight: Packed
    vocab: int
    ids: Tensor | None = None
    copied: bool = False
    softcap: float = 0.0
    text: TextRows | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the target's own head."""
        return (self.weight.nbytes if self.copied else 0) + (self.text.nbytes if self.text else 0)

    def read(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`."""
        if self.text is not None:
            self.text.read(ids)

    def candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [T, N] of normed states [T, C], and which token each is of, int64 [N], none of
        them twice; None: every token in order.
        """
        logits, ids = self.weight.matmul(hidden), self.ids
        if self.text is not None and ids is not None:
            more, tokens = self.text.candidates(hidden)
            logits, ids = torch.cat([logits, more], 1), torch.cat([ids, tokens])
        return layers.softcap(logits, self.softcap) if self.softcap else logits, ids

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of normed states [T, C]; -inf for tokens without a row."""
        return self.spread(*self.candidates(hidden))

    def spread(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        """Logits [T, N] of tokens `ids` at their places [T, V]; None: those are all."""
        if ids is None:
            return logits
        whole = logits.new_full((len(logits), self.vocab), float("-inf"))
        return whole.index_copy_(1, ids, logits)


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
    on_cpu = device.type == "cpu"
    int8 = options.draft_head == "auto" and not rows and on_cpu and cpu.int8_serves(dtype)
    if int8:
        rows = vocab // INT8_SHARE
    elif not options.copies_head:
        lent = head if screen is None or options.draft_head == "own" else screen
        return DraftHead(lent, vocab, softcap=softcap)
    if rows >= vocab:
        raise UsageError(
            f"draft_head keeps {rows} rows, and this target's head has {vocab}",
            "take fewer, or draft_head=fp8 for a copy of them all",
        )
    ids = text = None
    if rows:
        common = kept(rows, added, vocab)
        ids = torch.tensor(common, device=device)
        text = TextRows(head, frozenset(common), dtype) if on_cpu else None
    dense = head.dequantize(dtype) if ids is None else head.rows(ids)
    if int8:
        copy: Packed = cpu.Int8Copy.of(DenseWeight(dense))
    else:
        copy = (rounded(dense) if fp8 else DenseWeight(dense)).to(device, dtype)
    return DraftHead(copy, vocab, ids, copied=True, softcap=softcap, text=text)
