"""What a loaded pair takes of a GPU by the law of `budget.py`, and what the device says of it.

Knows weights as they are loaded, or outlines of them on the meta device; needs no device but for
`available`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from dflash_chat.budget import LEAST, STEP, Demand, TargetShape, rounded_bytes
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.kernels import forms
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight

__all__ = ["LEAST", "META", "STEP", "Pair", "available", "ran_out"]

META = torch.device("meta")

_OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class Pair(Demand):
    """A pair's demand, by its weights."""

    @classmethod
    def of(
        cls, target: TargetShape, weights: Mapping[str, Packed], drafter: DrafterConfig,
        drafter_weights: Mapping[str, Packed], dtype: torch.dtype, draft_tokens: int,
        added: Collection[int] = (),
    ) -> Pair:  # fmt: skip
        """From weights as they are loaded, or on the meta device."""
        sizes, quantised = {}, False
        for name, weight in weights.items():
            quantised |= isinstance(weight, Int4GroupWeight | Float8Weight)
            sizes[name] = _resident(weight, dtype)
        # the drafter's keys and values have two homes: in qkv, and in the context's projection
        drafted = [
            (1 + name.endswith(("k_proj.weight", "v_proj.weight")), weight)
            for name, weight in drafter_weights.items()
        ]
        return cls(
            target, drafter, dtype.itemsize, draft_tokens, frozenset(added), sum(sizes.values()),
            sizes.get("lm_head.weight", 0), quantised,
            sum(homes * _resident(weight, dtype) for homes, weight in drafted),
            sum(homes * rounded_bytes(weight.shape, dtype.itemsize) for homes, weight in drafted),
        )  # fmt: skip


def available() -> int:
    """Free bytes of the current device, once what nobody refers to any more is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def ran_out(error: BaseException) -> bool:
    """Whether a device's memory did not suffice, whoever says so: torch, CUDA, cuBLAS or Triton.

    An error that ends a graph's capture hides the one before it.
    """
    return any(
        isinstance(cause, torch.OutOfMemoryError)
        or (isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause)) is not None)
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _resident(weight: Packed, dtype: torch.dtype) -> int:
    """Bytes of a weight in the kernels' layout; block formats become dense."""
    if isinstance(weight, Int4GroupWeight):
        scales = weight.scale.nbytes
        if forms.int4_fits(weight.shape[-1], weight.group):
            scales = prod(weight.shape) // forms.GROUP * 2
        return weight.packed.nbytes + scales * (1 if weight.zero is None else 2)
    if isinstance(weight, Float8Weight):
        per_row = weight.block == (1, weight.shape[-1])
        if per_row:
            return rounded_bytes(weight.shape, dtype.itemsize)
        return weight.nbytes
    return prod(weight.shape) * dtype.itemsize
