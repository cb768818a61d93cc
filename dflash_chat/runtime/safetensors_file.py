"""Reads safetensors files, one or a sharded folder, without the library: bounded and zero-copy.

Source: the safetensors format, huggingface.co/docs/safetensors ("Format"): u64 header length, JSON
header, data. Knows the layout and every bound a damaged file could break. Does not know what the
tensors are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.mapped_file import DOWNLOAD_AGAIN, map_file, read_whole

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMS = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `offset` counts from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A mapped file. `data`: uint8 [file_bytes]; tensors that view it keep the mapping alive."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data: Tensor

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, a view of the file if it is aligned there. KeyError if there is none."""
        info = self.tensors[name]
        raw = self.data[info.offset : info.offset + info.nbytes]
        if info.offset % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)


@dataclass(frozen=True)
class SafetensorsFolder:
    """The shards of one checkpoint, and in which of them each tensor is."""

    path: Path
    shards: dict[str, SafetensorsFile]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all shards by name."""
        return {name: info for file in self.shards.values() for name, info in file.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` from its shard. KeyError if there is none."""
        for file in self.shards.values():
            if name in file.tensors:
                return file.tensor(name)
        raise KeyError(name)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, shard by shard, in file order."""
        for file in self.shards.values():
            for name in file.tensors:
                yield name, file.tensor(name)


def read(path: Path) -> SafetensorsFile:
    """Map `path` and check its whole header.

    Raises CheckpointError for a truncated file, a header that is not the format's JSON, unknown
    dtypes, sizes that contradict shapes, and data with gaps, overlaps or left-overs.
    """
    data = map_file(path)
    header, start = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "__metadata__ is not a map of strings")
    infos = [_tensor_info(path, name, entry, start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_contiguous(path, infos, start, data.numel())
    return SafetensorsFile(path, metadata, {info.name: info for info in infos}, data)


def read_folder(path: Path) -> SafetensorsFolder:
    """Open the shards that `model.safetensors.index.json` names, or the one `model.safetensors`.

    Raises CheckpointError as `read` does, and when the index and the shards disagree.
    """
    if not (path / INDEX_NAME).exists():
        return SafetensorsFolder(path, {SINGLE_NAME: read(path / SINGLE_NAME)})
    placed = _weight_map(path / INDEX_NAME)
    shards = {name: read(path / name) for name in sorted(set(placed.values()))}
    held = [(name, shard) for shard, file in shards.items() for name in file.tensors]
    wrong = set(placed.items()) ^ set(held)
    if wrong:
        names = ", ".join(sorted({name for name, _ in wrong})[:8])
        _refuse(path / INDEX_NAME, f"index and shards disagree about {names}")
    return SafetensorsFolder(path, shards)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises CheckpointError for anything else."""
    return _json_object(path, read_whole(path, MAX_HEADER_BYTES))


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path.name}: {why}.", DOWNLOAD_AGAIN)


def _header(path: Path, data: Tensor) -> tuple[dict[str, Any], int]:
    """The JSON header and the position of the first data byte."""
    if data.numel() < 8:
        _refuse(path, "too short for a safetensors file")
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, data.numel() - 8):
        _refuse(path, f"claims a header of {length} bytes, which cannot be")
    return _json_object(path, data[8 : 8 + length].numpy().tobytes()), 8 + length


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"no valid JSON ({str(error)[:80]})")
    if not isinstance(parsed, dict):
        _refuse(path, "the JSON is not an object")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("a name appears twice")
    return parsed


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:  # noqa: ANN401
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name!r:.80} is not described by dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        _refuse(path, f"tensor {name!r:.80} has the unsupported dtype {dtype_name!r:.40}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        _refuse(path, f"tensor {name!r:.80} has the shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"tensor {name!r:.80} has the offsets {offsets!r:.80}")
    dtype, nbytes = DTYPES[dtype_name], offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        _refuse(path, f"tensor {name!r:.80} of shape {shape!r:.80} cannot have {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:  # noqa: ANN401
    """A list of integers from 0 to 2⁶³ - 1; JSON's true is not one."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_contiguous(path: Path, infos: list[TensorInfo], start: int, file_bytes: int) -> None:
    end = start
    for info in infos:
        if info.offset != end:
            _refuse(path, f"tensor {info.name!r:.80} does not begin where the one before ends")
        end += info.nbytes
    if end != file_bytes:
        _refuse(path, f"tensors end at byte {end}, the file at {file_bytes}")


def _weight_map(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        _refuse(path, "has no weight_map")
    for shard in placed.values():
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or not shard.endswith(".safetensors"):
            _refuse(path, f"names the shard {shard!r:.80}")
    return placed
