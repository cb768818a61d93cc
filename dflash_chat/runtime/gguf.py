"""Reads the header of a GGUF file (versions 2 and 3, little-endian) and maps its tensors.

Source: the GGUF specification, ggml `docs/gguf.md`. Knows the layout, the sizes of the block
formats and every bound a damaged or hostile file could break. Does not know what keys or tensor
names mean, nor how blocks turn into numbers.

Layout: magic, version u32, tensor count u64, key count u64, keys, tensor infos, padding, tensors.
Each length is compared with the bytes that are left before anything is allocated for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.mapped_file import DOWNLOAD_AGAIN, map_file

Value: TypeAlias = "bool | int | float | str | list[Value]"

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 22  # array items, all keys together
MAX_DEPTH = 4  # arrays in arrays
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16
MIN_KEY_BYTES = 8 + 4 + 1  # length, type, smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length, dimension count, one dimension, type, offset

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", _BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

BLOCKS = {  # weights per block, bytes per block
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34),
}  # fmt: skip
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` outermost first (the file has it reversed), `offset` from byte 0."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """A mapped file. `data`: uint8 [file_bytes]; views of it keep the mapping alive."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    data: Tensor

    def raw(self, name: str) -> Tensor:
        """The bytes of tensor `name`, without a copy: uint8 [nbytes]. KeyError if there is none."""
        info = self.tensors[name]
        return self.data[info.offset : info.offset + info.nbytes]


def read(path: Path) -> GGUF:
    """Map `path` and check its whole header.

    Raises CheckpointError for anything that is not a complete GGUF file of supported types: wrong
    magic or version, counts and lengths beyond the file, unknown types, tensors that overlap or end
    outside the file.
    """
    data = map_file(path)
    header = _Header(path, data)
    version, tensor_count, key_count = header.preamble()
    metadata = header.keys(key_count)
    alignment = _alignment(header, metadata)
    infos = [header.tensor_info() for _ in range(tensor_count)]
    start = -(-header.position // alignment) * alignment
    tensors = _placed(header, infos, start, alignment)
    return GGUF(path, version, metadata, tensors, data)


class _Header:
    """A cursor over the mapped bytes that refuses to step beyond them."""

    def __init__(self, path: Path, data: Tensor) -> None:
        self.path = path
        self.view = memoryview(data.numpy().data)
        self.position = 0
        self.items = 0

    def refuse(self, why: str, hint: str = DOWNLOAD_AGAIN) -> NoReturn:
        raise CheckpointError(f"{self.path.name}: {why}.", hint)

    @property
    def left(self) -> int:
        return len(self.view) - self.position

    def take(self, nbytes: int, what: str) -> memoryview:
        if nbytes > self.left:
            self.refuse(f"{what} needs {nbytes} bytes, but only {self.left} are left in the file")
        start, self.position = self.position, self.position + nbytes
        return self.view[start : self.position]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.u64(what)
        if length > limit:
            self.refuse(f"{what} claims {length} bytes, at most {limit} are allowed")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")

    def preamble(self) -> tuple[int, int, int]:
        """Version, tensor count, key count."""
        if bytes(self.take(4, "the magic")) != b"GGUF":
            self.refuse("not a GGUF file", "Give a .gguf file or a folder of safetensors.")
        version = self.u32("the version")
        if version in (2 << 24, 3 << 24):
            self.refuse("big-endian GGUF is not supported", "Use a little-endian file.")
        if version not in (2, 3):
            self.refuse(f"GGUF version {version} is not supported, only 2 and 3 are")
        tensor_count, key_count = self.u64("the tensor count"), self.u64("the key count")
        if tensor_count > min(MAX_TENSORS, self.left // MIN_TENSOR_BYTES):
            self.refuse(f"{tensor_count} tensors cannot be in this file")
        if key_count > min(MAX_KEYS, self.left // MIN_KEY_BYTES):
            self.refuse(f"{key_count} metadata keys cannot be in this file")
        return version, tensor_count, key_count

    def keys(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self.string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                self.refuse(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.u32(key), key, depth=0)
        return metadata

    def value(self, kind: int, key: str, depth: int) -> Value:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        return self.scalars(kind, 1, key)[0]

    def scalars(self, kind: int, count: int, key: str) -> list[Value]:
        if kind not in _SCALARS:
            self.refuse(f"{key!r} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind == _BOOL:
            if bool((values > 1).any()):
                self.refuse(f"{key!r} holds a boolean that is neither 0 nor 1")
            values = values.astype(np.bool_)
        listed: list[Value] = values.tolist()
        return listed

    def array(self, key: str, depth: int) -> list[Value]:
        if depth > MAX_DEPTH:
            self.refuse(f"{key!r} nests arrays deeper than {MAX_DEPTH}")
        kind, count = self.u32(key), self.u64(key)
        self.items += count
        if self.items > MAX_ITEMS:
            self.refuse(f"{key!r} claims {count} items, too many")
        if kind in _SCALARS:
            return self.scalars(kind, count, key)
        smallest = 8 if kind == _STRING else 12  # a length; an item type and a count
        if count > self.left // smallest:
            self.refuse(f"{key!r} claims {count} items, more than the file can hold")
        return [self.value(kind, key, depth) for _ in range(count)]

    def tensor_info(self) -> TensorInfo:
        """One entry of the tensor table; `offset` is still relative to the data section."""
        name = self.string("a tensor name", MAX_NAME_BYTES)
        dims = self.u32(name)
        if not 1 <= dims <= MAX_DIMS:
            self.refuse(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self.u64(name) for _ in range(dims))[::-1]
        kind, offset = self.u32(name), self.u64(name)
        type_name = _TYPE_NAMES.get(kind, f"number {kind}")
        if type_name not in BLOCKS:
            known = ", ".join(BLOCKS)
            self.refuse(f"tensor {name!r} has type {type_name}", f"Supported types: {known}.")
        return TensorInfo(name, type_name, shape, offset, self.nbytes(name, type_name, shape))

    def nbytes(self, name: str, type_name: str, shape: tuple[int, ...]) -> int:
        weights, block_bytes = BLOCKS[type_name]
        if min(shape) < 1 or shape[-1] % weights:
            self.refuse(f"tensor {name!r} of type {type_name} cannot have shape {shape}")
        return math.prod(shape) // weights * block_bytes


def _alignment(header: _Header, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
        header.refuse(f"alignment {alignment!r:.40} is not a multiple of 8 up to {MAX_ALIGNMENT}")
    return alignment


def _placed(
    header: _Header, infos: list[TensorInfo], start: int, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors in file order with absolute offsets, checked to be aligned, inside and apart."""
    tensors: dict[str, TensorInfo] = {}
    end = start
    for info in sorted(infos, key=lambda info: info.offset):
        offset = start + info.offset
        if info.name in tensors:
            header.refuse(f"tensor {info.name!r} appears twice")
        if info.offset % alignment:
            header.refuse(f"tensor {info.name!r} is not aligned to {alignment} bytes")
        if offset + info.nbytes > len(header.view):
            header.refuse(f"tensor {info.name!r} ends beyond the file")
        if offset < end:
            header.refuse(f"tensor {info.name!r} overlaps another")
        end = offset + info.nbytes
        tensors[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.nbytes)
    return tensors
