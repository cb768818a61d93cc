"""Opens a target's checkpoint, a `.gguf` file or a folder of safetensors, under one set of names.

Knows the two kinds of checkpoint and that loading is strict both ways: what a model expects is
there in the right shape, and what is there is expected. Does not know how a format stores its
numbers (`quant/`) nor what a model does with them (`models/`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import gguf, llama_gguf, quant, safetensors_file, stored_weights
from dflash_chat.runtime.gguf import GGUF
from dflash_chat.runtime.quant import Packed, dense
from dflash_chat.runtime.safetensors_file import SafetensorsFolder
from dflash_chat.runtime.stored_weights import StoredWeight

Shape = tuple[int, ...]

HEAD = "lm_head.weight"


class Checkpoint(Protocol):
    """An opened checkpoint with the config keys and the tensor names of Hugging Face."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def config(self) -> dict[str, Any]:
        """Keys of config.json."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor by name."""

    def pack(self, name: str) -> Packed:
        """Tensor `name` in its own format: views of the mapped file where rows keep their order."""

    def outline(self, name: str) -> Packed:
        """The same without reading numbers, which may be on the meta device."""

    def close(self) -> None:
        """Let go of the file. Weights that view it keep the mapping alive."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file of architecture llama, or a folder with config.json and safetensors.

    Only headers are read, and the tensors that hold shapes. Raises CheckpointError if the path is
    neither, is damaged, or holds a format that is not supported.
    """
    if path.is_dir():
        return _open_folder(path)
    return _open_gguf(path)


def load_packed(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], ignored: tuple[str, ...] = ()
) -> dict[str, Packed]:
    """Every expected tensor, packed in its own format.

    A tied checkpoint may lack `lm_head.weight`; then the result lacks it too. Names that begin with
    one of `ignored` may be there for another purpose. Raises WeightsMismatchError with all missing,
    unexpected and wrongly shaped names.
    """
    return {name: checkpoint.pack(name) for name in _checked(checkpoint, expected, ignored)}


def outlines(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], ignored: tuple[str, ...] = ()
) -> dict[str, Packed]:
    """What `load_packed` would give, for its shapes and formats only."""
    return {name: checkpoint.outline(name) for name in _checked(checkpoint, expected, ignored)}


def _checked(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], ignored: tuple[str, ...]
) -> Iterable[str]:
    """The names to load."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    optional = {HEAD} if tied else set()
    found = {
        name: shape
        for name, shape in checkpoint.shapes.items()
        if name in expected or not (name in optional or name.startswith(ignored))
    }
    _check_names(checkpoint.path, found, expected, optional)
    return found


def load_dequantized(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and every tensor as a plain one of `dtype`, which the caller owns.

    Raises CheckpointError as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(path)
    tensors = {
        name: checkpoint.pack(name).dequantize().to(dtype, copy=True) for name in checkpoint.shapes
    }
    return checkpoint.config, tensors


def _check_names(
    path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], optional: set[str]
) -> None:
    missing = sorted(expected.keys() - found.keys() - optional)
    unexpected = sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    shapes = [
        f"{name} {found[name]} instead of {tuple(expected[name])}"
        for name in both
        if tuple(found[name]) != tuple(expected[name])
    ]
    groups = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes}
    faults = [f"{title}: {', '.join(names)}" for title, names in groups.items() if names]
    if faults:
        raise WeightsMismatchError(
            f"{path.name} does not fit its model; {'; '.join(faults)}.",
            "The checkpoint belongs to another model or is incomplete.",
        )


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _GGUFCheckpoint:
    path: Path
    config: dict[str, Any]
    shapes: dict[str, Shape]
    file: GGUF
    stored: dict[str, str]  # Hugging Face's name -> the file's

    def pack(self, name: str) -> Packed:
        info = self.file.tensors[self.stored[name]]
        raw = self.file.raw(info.name)
        if info.type in _GGUF_DENSE:
            rows = raw.view(_GGUF_DENSE[info.type]).view(info.shape)
            return dense.pack({"weight": llama_gguf.unpermute(name, rows, self.config)})
        rows = raw.view(info.shape[0], -1)  # [N, K / weights per block · bytes per block]
        blocks = llama_gguf.unpermute(name, rows, self.config)
        return quant.load_format(info.type.lower()).pack({"blocks": blocks})

    def outline(self, name: str) -> Packed:
        return self.pack(name)  # views of the file, and the few rows that change their order

    def close(self) -> None:
        del self.file


_GGUF_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    config = llama_gguf.hf_config(file)
    stored = {llama_gguf.hf_name(name): name for name in file.tensors}
    if len(stored) != len(file.tensors):
        raise CheckpointError(f"{path.name}: two tensors have one meaning.", "Choose another file.")
    for name in stored.values():
        info = file.tensors[name]
        if info.type not in _GGUF_DENSE and len(info.shape) != 2:
            raise CheckpointError(
                f"{path.name}: tensor {name!r} has packed blocks and shape {info.shape}.",
                "Only matrices can be packed; choose another file.",
            )
    shapes = {name: file.tensors[raw].shape for name, raw in stored.items()}
    llama_gguf.check_permuted(path, shapes, config)
    return _GGUFCheckpoint(path, config, shapes, file, stored)


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class _FolderCheckpoint:
    path: Path
    config: dict[str, Any]
    stored: dict[str, StoredWeight]
    files: SafetensorsFolder

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: weight.shape for name, weight in self.stored.items()}

    def pack(self, name: str) -> Packed:
        return self.stored[name].pack(self.files)

    def outline(self, name: str) -> Packed:
        return self.stored[name].outline(self.files)

    def close(self) -> None:
        del self.files


def _open_folder(path: Path) -> Checkpoint:
    config = safetensors_file.read_json(path / "config.json")
    files = safetensors_file.read_folder(path)
    return _FolderCheckpoint(path, config, stored_weights.read(files, config), files)
