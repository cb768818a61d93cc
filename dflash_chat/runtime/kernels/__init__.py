"""Triton kernels, one file per family: formula, layouts, plain reference, kernel, public function.

Its files are imported only where a CUDA device is used (or Triton's interpreter in tests): a CPU
build of torch comes without Triton.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations of `dtype` on `device` go through these kernels."""
    return device.type == "cuda" and dtype == torch.bfloat16 and _triton_is_there()


def overlapping(device: torch.device) -> bool:
    """Whether a kernel may be launched while its predecessor still runs (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
