"""The kernel lane: Triton's interpreter without a GPU, the real thing in bf16 with one.

The interpreter computes bf16 arithmetic silently wrong, so it gets fp16 and fp32. Whatever
`torch.empty` hands out is poisoned with NaN: an output element that no kernel wrote shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any import

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def patched_once() -> None:
    """The interpreter puts its own operations into triton.language at every call of a function of
    ours, also where the caller already has, and spends two fifths of its time on that.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another version, which may not need this
        return
    modules = (interpreter.tl, interpreter.tl.core)
    there: set[int] = set()

    def unless_there(function: Callable[..., object]) -> Any:  # noqa: ANN401
        seen = {id(value) for value in function.__globals__.values() if value in modules}
        new = seen - there
        if seen and not new:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = patch(function)
        there.update(new)
        restore = scope.restore

        def leave() -> None:
            restore()
            there.difference_update(new)

        scope.restore = leave
        return scope

    interpreter._patch_lang = unless_there


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patched_once()


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
