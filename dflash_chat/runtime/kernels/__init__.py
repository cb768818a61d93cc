"""Triton kernels, one file per family: formula, layouts, plain reference, kernel, public function.

Its files are imported only where a CUDA device is used (or Triton's interpreter in tests): a CPU
build of torch comes without Triton.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger(__name__)


def serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations of `dtype` on `device` go through these kernels."""
    return device.type == "cuda" and dtype == torch.bfloat16 and not missing(device)


def overlapping(device: torch.device) -> bool:
    """Whether a kernel may be launched while its predecessor still runs (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def missing(device: torch.device) -> str:
    """Why these kernels cannot run on a GPU, or "". A small one is tried: a compiler may be what is
    not there.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0"
    from dflash_chat.runtime.kernels import norms

    try:
        row = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
        norms.rms_norm(row, row[0], 1e-6)
        torch.cuda.synchronize(device)
    except Exception as error:  # of a compiler or a driver: plain torch is right, only slower
        log.exception("no Triton kernel can be run")
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
