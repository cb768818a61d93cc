"""Weight formats: what a packed weight can do, and how a format is found by its name.

Each format is one file here with `pack(parts) -> Packed`: `dense`, `q4_0`, `q4_1`, `q8_0`,
`pack_quantized`, `float_quantized`. Knows the contract; does not know any format, nor where the
parts come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError

Parts = dict[str, Tensor]


class Held(Protocol):
    """Numbers in memory, whatever they are used for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), (N,) or (E, N, K)."""

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""

    @property
    def nbytes(self) -> int:
        """Bytes held now, copies made for matmul included."""


class Packed(Held, Protocol):
    """A weight in memory. `shape` is (N, K) for a matmul, (N,) for a norm's scale.

    Stacked experts have (E, N, K) and are not multiplied by as a whole: see `Experts`.
    """

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32: the truth for tests and the fallback of everything."""

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K], an embedding's rows: in `to`'s dtype, before it in fp32."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """The same weight ready for activations of `dtype` on `device`."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> x·Wᵀ [T, N] in x's dtype, which must be `to`'s."""

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """One weight with the rows of all, or None if they are not of one kind."""


@runtime_checkable
class Experts(Held, Protocol):
    """E weights in one tensor. `shape` is (E, N, K)."""

    def expert(self, e: int) -> Packed:
        """Expert e's weight [N, K], a view."""


class Format(Protocol):
    """A module of this package."""

    def pack(self, parts: Parts) -> Packed:
        """A weight from the checkpoint's tensors. The parts may be views of a mapped file."""


def load_format(name: str) -> Format:
    """The module `quant/<name>.py`. ModuleNotFoundError if there is none."""
    return cast(Format, import_module(f"{__name__}.{name}"))


@dataclass(frozen=True)
class Ready:
    """The packed weights whose names begin with `at`, handed out ready for a device and a dtype."""

    packed: Mapping[str, Packed]
    device: torch.device
    dtype: torch.dtype
    at: str = ""

    def below(self, name: str) -> Ready:
        """The weights of one module."""
        return replace(self, at=f"{self.at}{name}.")

    def linear(self, *names: str) -> Packed:
        """The projection `name`.weight; of several names, one with the rows of all."""
        return cat([self.packed[f"{self.at}{name}.weight"] for name in names]).to(
            self.device, self.dtype
        )

    def vector(self, name: str) -> Tensor:
        """A plain tensor of one dimension, by its whole name."""
        return self.packed[self.at + name].dequantize(self.dtype).flatten().to(self.device)

    def experts(self, name: str) -> Experts:
        """Stacked expert weights, by their whole name."""
        ready = self.packed[self.at + name].to(self.device, self.dtype)
        if not isinstance(ready, Experts):
            raise CheckpointError(f"{self.at}{name}: experts of this format are not supported")
        return ready


def cat(weights: Sequence[Packed]) -> Packed:
    """One weight with the rows of all, which share K: a fused projection.

    Weights of one format become one matmul; of several formats they stay apart behind one face.
    Join before `to`.
    """
    from dflash_chat.runtime.quant.stacked import StackedWeight

    first, *others = weights
    return (first.joined(others) if others else first) or StackedWeight(tuple(weights))
