"""The kernel lane: Triton's interpreter without a GPU, the real thing in bf16 with one.

The interpreter computes bf16 arithmetic silently wrong, so it gets fp16 and fp32. Whatever
`torch.empty` hands out is poisoned with NaN: an output element that no kernel wrote shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any import

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` full of NaN (integers: the smallest value)."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = make(*args, **kwargs)
        if made.dtype == torch.uint8 or made.dtype == torch.bool:
            return made
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(torch.iinfo(made.dtype).min)

    return poisoned
