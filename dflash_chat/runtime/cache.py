"""Keys and values of committed tokens, and of the block that is not decided yet.

The one contract: a block is provisional until `commit(n)`. `write` puts rows at [length, length+T);
`commit(n)` keeps the first n of them by moving `length`, and rows beyond it are overwritten by the
next block. There is no rollback. `truncate` serves prefix reuse across turns.

The row of position p lies in slot p % slots of its layer. A full-attention layer has a slot for
every position of the capacity. A sliding-window layer is a ring of window + largest block: what a
block overwrites has left the window of every row that is still to come, however few of the
block's rows are committed.

Knows layouts and lengths; knows neither models nor sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_chat.budget import CUDA_PREFILL_CHUNK
from dflash_chat.geometry import Geometry, slots

__all__ = ["CUDA_PREFILL_CHUNK", "PREFILL_CHUNK", "Geometry", "KVCache", "prefill_chunk"]

PREFILL_CHUNK = 512  # rows per prefill forward: bounds activations and the wait for a cancel


def prefill_chunk(device: torch.device) -> int:
    """Rows per prefill forward on `device`."""
    return CUDA_PREFILL_CHUNK if device.type == "cuda" else PREFILL_CHUNK


def barred(query: Tensor, key: Tensor, window: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """−inf where rows at positions `query` [T, 1] may not see `key` [1, S], else 0: [T, S]."""
    hidden = key > query if causal else torch.zeros_like(key > query)
    if window:
        hidden = hidden | (key <= query - window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=key.device)
    return mask.masked_fill_(hidden, float("-inf"))


class KVCache:
    """Keys and values of all layers of one sequence, allocated once.

    `keys[i]` and `values[i]` are layer i's [G, slots, D]. `largest_block` is the most rows that one
    `write` may bring, by default a prefill chunk.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        largest_block: int | None = None,
    ) -> None:
        self.geometries = tuple(geometries)
        self.capacity, self.largest_block = capacity, largest_block or prefill_chunk(device)
        self.dtype, self.device = dtype, device
        shapes = [(g.kv_heads, self.slots(g.window), g.head_dim) for g in geometries]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = 0  # committed rows
        self.provisional = 0  # rows written after `length`
        self._reached = 0  # positions below it have been written since the cache was empty

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def slots(self, window: int) -> int:
        """Rows kept by every layer of this window."""
        return slots(window, self.capacity, self.largest_block)

    def reserve(self, rows: int) -> int:
        """Announce a block of `rows` behind the committed rows; returns the position of its end."""
        end = self.length + rows
        assert end <= self.capacity, f"cache of {self.capacity} rows cannot take row {end}"
        assert rows <= self.largest_block, f"block of {rows} rows, at most {self.largest_block}"
        self.provisional = rows
        self._reached = max(self._reached, end)
        return end

    def write(self, layer: int, k: Tensor, v: Tensor, shown: int = 0) -> tuple[Tensor, Tensor]:
        """Put a block's rows behind the committed ones and return what its rows may see.

        k, v: [G, T, D]. Returns two [G, min(length+T, slots), D] views in slot order, which is the
        order of positions until a ring wraps, or of the first `shown` slots; `mask` says what each
        row may see of the former. All layers of one forward must write the same T.
        """
        rows = k.shape[1]
        end = self.reserve(rows)
        keys, values = self.keys[layer], self.values[layer]  # [G, slots, D] each
        slots = keys.shape[1]
        begin = self.length % slots
        before = min(rows, slots - begin)  # rows before the ring's end; a full layer takes all
        keys[:, begin : begin + before] = k[:, :before]
        values[:, begin : begin + before] = v[:, :before]
        if before < rows:
            keys[:, : rows - before] = k[:, before:]
            values[:, : rows - before] = v[:, before:]
        seen = shown or min(end, slots)
        return keys[:, :seen], values[:, :seen]

    def seen(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """What a block of `rows` that was just written may see, oldest first, its own rows last:
        two [G, S, D], views of the cache unless a ring's end lies between.
        """
        window, slots = self.geometries[layer].window, self.keys[layer].shape[1]
        first = max(0, self.length - window + 1) if window else 0
        begin = first % slots
        end = begin + self.length + rows - first
        if end <= slots:
            return self.keys[layer][:, begin:end], self.values[layer][:, begin:end]
        keys, values = (
            torch.cat([x[:, begin:], x[:, : end - slots]], 1)
            for x in (self.keys[layer], self.values[layer])
        )
        return keys, values

    def mask(self, rows: int, window: int, causal: bool, share: int) -> Tensor | None:
        """What the rows of a block may not see of what `write` returns: 0 or −inf, to be added.

        [share·T, min(length+T, slots)], or None when every row sees everything. A row at position p
        sees positions above p − window, all of them if `window` is 0, and with `causal` none after
        p. `share` is the number of query heads per kv head, which `layers.attention` stacks as
        rows.
        """
        end = self.length + rows
        if (rows == 1 or not causal) and (window == 0 or end <= window):
            return None
        slots = self.slots(window)
        key = torch.arange(min(end, slots), device=self.device)[None]
        if end > slots:
            key = end - 1 - (end - 1 - key) % slots  # the last position written to each slot
        query = torch.arange(self.length, end, device=self.device)[:, None]
        return barred(query, key, window, causal, self.dtype).repeat(share, 1)

    def commit(self, n: int) -> None:
        """Keep the first n rows of the provisional block and forget the others."""
        assert 0 <= n <= self.provisional, f"commit {n} of {self.provisional} rows"
        self.length += n
        self.provisional = 0

    def advance(self, rows: int, n: int) -> None:
        """A block of `rows` was written by somebody else; keep the first n."""
        self.reserve(rows)
        self.commit(n)

    def rewindable(self, n: int) -> int:
        """The longest prefix of at most n rows that `truncate` can cut back to: n or nothing.

        A ring holds the last `slots` positions it was given; the row after a cut at n sees back to
        n − window + 1.
        """
        for window in {g.window for g in self.geometries if g.window}:
            lost = self._reached - self.slots(window)  # positions below it are overwritten
            if lost > 0 and n - window + 1 < lost:
                return 0
        return n

    def truncate(self, n: int) -> None:
        """Forget everything from row n on; n must be `rewindable`."""
        assert 0 <= n <= self.length, f"truncate {self.length} rows to {n}"
        assert self.rewindable(n) == n, f"row {n}'s window is overwritten"
        self.length = n
        self.provisional = 0
        if n == 0:
            self._reached = 0
