"""The target's head as the options want it.

    fp8       e4m3 with a scale per row, in the place of the file's: may choose other tokens
    screened  the file's, with an int8 copy beside it that says which rows can win: half the bytes
              for the same token (`kernels/screen.py`). Only where our kernels read a dense one

Knows a loaded target; does not know what drafts are read off.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dflash_chat.errors import UsageError
from dflash_chat.runtime import kernels
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import rounded


class Headed(Protocol):
    """An architecture (see `models/`). `screen` is a copy of `lm_head`, or None."""

    lm_head: Packed
    screen: Packed | None


def refuse_screening(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError if somebody asks for what no kernel does here. Of a plan's choice it takes
    no notice: `settle` leaves that out.
    """
    if options.head == "screened" and not kernels.serve(device, dtype):
        raise UsageError(
            "head=screened needs our CUDA kernels, which do not run here",
            "leave it out: the answers are the same",
        )


def settle(
    target: Headed, options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> None:
    """Round the head of a loaded target, or put the copy beside it that it is screened by."""
    head = target.lm_head
    if options.head == "fp8":
        target.lm_head = rounded(head.dequantize(dtype)).to(device, dtype)
    elif options.head != "screened" or not isinstance(head, DenseWeight):
        return  # what is quantised has few bytes anyway
    elif kernels.serve(device, dtype):
        from dflash_chat.runtime.quant import kernel_weights

        target.screen = kernel_weights.int8(head)
