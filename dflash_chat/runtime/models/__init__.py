"""Architectures: one file each, named after the checkpoint's `model_type`, found by that name.

Each has `Config.from_hf(raw)`, `Target`, and `IGNORED`, the beginnings of tensor names that a
checkpoint may hold for something else than text.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from dflash_chat.errors import CheckpointError

_FILES = {  # model_type -> its file, where their names differ
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}


def find(model_type: str) -> ModuleType:
    """The module that runs targets of this type; CheckpointError if there is none."""
    name = f"{__name__}.{_FILES.get(model_type, model_type)}"
    if not model_type.isidentifier() or find_spec(name) is None:
        raise CheckpointError(f"targets of type {model_type!r} are not supported yet")
    return import_module(name)
