"""Opens a target's checkpoint, a `.gguf` file or a folder of safetensors, under one set of names.

Knows the two kinds of checkpoint and that loading is strict both ways: what a model expects is
there in the right shape, and what is there is expected. Does not know how a format stores its
numbers (`quant/`) nor what a model does with them (`models/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import gguf, llama_gguf, quant, safetensors_file
from dflash_chat.runtime.gguf import GGUF
from dflash_chat.runtime.quant import Packed, Parts
from dflash_chat.runtime.safetensors_file import SafetensorsFolder

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

    def format(self, name: str) -> str:
        """The `quant/` module that packs tensor `name`."""

    def parts(self, name: str) -> Parts:
        """What that module's `pack` takes: views of the mapped file where rows keep their order."""

    def close(self) -> None:
        """Let go of the file. Weights that view it keep the mapping alive."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file of architecture llama, or a folder with config.json and safetensors.

    Nothing but headers is read. Raises CheckpointError if the path is neither or is damaged.
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
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    optional = {HEAD} if tied else set()
    found = {
        name: shape
        for name, shape in checkpoint.shapes.items()
        if name in expected or not (name in optional or name.startswith(ignored))
    }
    _check_names(checkpoint.path, found, expected, optional)
    return {name: _pack(checkpoint, name) for name in found}


def load_dequantized(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and every tensor as a plain one of `dtype`, which the caller owns.

    Raises CheckpointError as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(path)
    tensors = {
        name: _pack(checkpoint, name).dequantize().to(dtype, copy=True)
        for name in checkpoint.shapes
    }
    return checkpoint.config, tensors


def _pack(checkpoint: Checkpoint, name: str) -> Packed:
    return quant.load_format(checkpoint.format(name)).pack(checkpoint.parts(name))


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

    def format(self, name: str) -> str:
        type_name = self.file.tensors[self.stored[name]].type
        return "dense" if type_name in _GGUF_DENSE else type_name.lower()

    def parts(self, name: str) -> Parts:
        info = self.file.tensors[self.stored[name]]
        raw = self.file.raw(info.name)
        if info.type in _GGUF_DENSE:
            rows = raw.view(_GGUF_DENSE[info.type]).view(info.shape)
            return {"weight": llama_gguf.unpermute(name, rows, self.config)}
        rows = raw.view(info.shape[0], -1)  # [N, K / weights per block · bytes per block]
        return {"blocks": llama_gguf.unpermute(name, rows, self.config)}

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
    shapes: dict[str, Shape]
    files: SafetensorsFolder

    def format(self, name: str) -> str:
        return "dense"

    def parts(self, name: str) -> Parts:
        return {"weight": self.files.tensor(name)}

    def close(self) -> None:
        del self.files


def _open_folder(path: Path) -> Checkpoint:
    config = safetensors_file.read_json(path / "config.json")
    if "quantization_config" in config:
        method = str(config["quantization_config"])[:80]
        raise CheckpointError(
            f"{path.name} is quantised in a way that is not supported: {method}.",
            "Use the unquantised checkpoint or a GGUF file.",
        )
    files = safetensors_file.read_folder(path)
    for name, info in files.tensors.items():
        if info.dtype not in _GGUF_DENSE.values():
            raise CheckpointError(
                f"{path.name}: tensor {name!r} has dtype {info.dtype}.",
                "Weights may be float32, float16 or bfloat16.",
            )
    shapes = {name: info.shape for name, info in files.tensors.items()}
    return _FolderCheckpoint(path, config, shapes, files)
