"""Weight formats: what a packed weight can do, and how a format is found by its name.

Each format is one file here with `pack(parts) -> Packed`. Knows the contract; does not know any
format, nor where the parts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Packed(Protocol):
    """A weight as it stays in memory. `shape` is (N, K) for a matmul, (N,) for a norm's scale."""

    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held now, copies made for matmul included."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32: the truth for tests and the fallback of everything."""

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> fp32 [T, K]: an embedding's rows."""


class Format(Protocol):
    """A module of this package."""

    def pack(self, parts: Parts) -> Packed:
        """A weight from the checkpoint's tensors. The parts may be views of a mapped file."""

    def cat(self, weights: Sequence[Packed]) -> Packed:
        """One weight of all rows; all weights are of this format and of one K."""


def load_format(name: str) -> Format:
    """The module `quant/<name>.py`. ModuleNotFoundError if there is none."""
    return cast(Format, import_module(f"{__name__}.{name}"))
