"""Keys and values of committed tokens, and of the block that is not decided yet.

The one contract: a block is provisional until `commit(n)`. `append` writes rows at [length,
length+T); `commit(n)` keeps the first n of them by moving `length`, and rows beyond it are
overwritten by the next block. There is no rollback. `truncate` serves prefix reuse across turns.

Knows layouts and lengths; knows neither models nor sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Contiguous keys and values of all layers of one sequence.

    `keys` and `values` are [L, G, S, D]: layers, kv heads, capacity, head dim. Allocated once.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.capacity = capacity
        self.length = 0  # committed rows
        self.provisional = 0  # rows written after `length`

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a block's rows behind the committed ones and return everything visible to its last
        row.

        k, v: [G, T, D]. Returns two [G, length+T, D] views. All layers of one forward must write
        the same T.
        """
        rows = k.shape[1]
        end = self.length + rows
        assert end <= self.capacity, f"cache of {self.capacity} rows cannot take row {end}"
        keys, values = self._layers[layer]  # [G, S, D] each
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        self.provisional = rows
        return keys[:, :end], values[:, :end]

    def commit(self, n: int) -> None:
        """Keep the first n rows of the provisional block and forget the others."""
        assert 0 <= n <= self.provisional, f"commit {n} of {self.provisional} rows"
        self.length += n
        self.provisional = 0

    def truncate(self, n: int) -> None:
        """Forget everything from row n on."""
        assert 0 <= n <= self.length, f"truncate {self.length} rows to {n}"
        self.length = n
        self.provisional = 0
