"""A safetensors header is read within bounds, and agrees with the library's own writer."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import safetensors_file

TENSORS = {
    "f32": torch.arange(6.0).view(2, 3),
    "f16": torch.arange(3.0).half(),
    "bf16": torch.arange(5.0).bfloat16(),
    "i8": torch.tensor([-1, 2, 3], dtype=torch.int8),
    "u8": torch.tensor([255], dtype=torch.uint8),
    "i32": torch.tensor([[-7]], dtype=torch.int32),
    "i64": torch.tensor([1 << 40]),
    "f8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
}


def entry(dtype: str, shape: object, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def content(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(path: Path, raw: bytes) -> safetensors_file.SafetensorsFile:
    path.write_bytes(raw)
    return safetensors_file.read(path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = safetensors_file.read(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read_back = file.tensor(name)
        assert read_back.dtype == tensor.dtype
        assert read_back.shape == tensor.shape
        assert torch.equal(read_back.float(), tensor.float())


def test_a_misaligned_tensor_is_read(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}
    file = read(tmp_path / "x", content(header, b"\x07" + struct.pack("<f", 1.5)))
    assert file.tensor("b").item() == 1.5


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            read(tmp_path / "x", whole[:length])


BROKEN = {
    "too short": b"1234",
    "which cannot be": struct.pack("<Q", 1 << 62) + bytes(64),
    "no valid JSON": content(b"{"),
    "no valid JSON (maximum recursion": content(b"[" * 100_000),
    "no valid JSON ('utf-8'": content(b"\xff\xff"),
    "no valid JSON (Exceeds the limit": content(b'{"a": ' + b"9" * 5000 + b"}"),
    "appears twice": content(b'{"a": 1, "a": 2}'),
    "not an object": content([1]),
    "not a map of strings": content({"__metadata__": {"a": 1}}),
    "not described by": content({"a": 1}),
    "unsupported dtype 'F4'": content({"a": entry("F4", [1], 0, 1)}, b"1"),
    "has the shape [-1]": content({"a": entry("U8", [-1], 0, 1)}, b"1"),
    "has the shape [True]": content({"a": entry("U8", [True], 0, 1)}, b"1"),
    "has the shape [1.0]": content({"a": entry("U8", [1.0], 0, 1)}, b"1"),
    "has the shape 7": content({"a": entry("U8", 7, 0, 1)}, b"1"),
    "has the offsets [-1, 0]": content({"a": entry("U8", [1], -1, 0)}, b"1"),
    "cannot have 2 bytes": content({"a": entry("U8", [1], 0, 2)}, b"12"),
    "cannot have -1 bytes": content({"a": entry("U8", [1], 1, 0)}, b"12"),
    "does not begin": content({"a": entry("U8", [1], 1, 2)}, b"12"),
    "'b' does not begin": content({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"1"),
    "the file at": content({"a": entry("U8", [1], 0, 1)}, b"12"),
    "tensors end at byte": content({"a": entry("U8", [4], 0, 4)}, b"12"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, message: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path / "x", BROKEN[message])
    assert message in refused.value.message
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 6))
@settings(
    max_examples=600, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_damage_never_escapes(tmp_path: Path, seed: int, flips: int) -> None:
    header = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}
    damaged = bytearray(content(header, bytes(22)))
    rng = random.Random(seed)
    for _ in range(flips):
        damaged[rng.randrange(len(damaged))] = rng.choice([*b'0123456789[]{}",:-eE', 255])
    try:
        file = read(tmp_path / "x", bytes(damaged))
    except CheckpointError:
        return
    assert all(file.tensor(name).nbytes == info.nbytes for name, info in file.tensors.items())


def write_shards(folder: Path, weight_map: dict[str, Any]) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "1.safetensors")
    save_file({"c": torch.ones(4)}, folder / "2.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / safetensors_file.INDEX_NAME).write_text(json.dumps(index))


SHARDED = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


def test_shards_are_streamed_once_each(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    folder = safetensors_file.read_folder(tmp_path)
    assert {name: t.numel() for name, t in folder.stream()} == {"a": 2, "b": 3, "c": 4}
    assert folder.tensor("c").numel() == 4
    assert folder.tensors.keys() == {"a", "b", "c"}
    with pytest.raises(KeyError):
        folder.tensor("d")


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(safetensors_file.read_folder(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize(
    "weight_map",
    [
        {**SHARDED, "d": "2.safetensors"},
        {"a": "1.safetensors", "c": "2.safetensors"},
        {**SHARDED, "a": "2.safetensors"},
        {**SHARDED, "a": "../1.safetensors"},
        {**SHARDED, "a": "3.safetensors"},
        {**SHARDED, "a": 5},
        {**SHARDED, "a": "1.bin"},
        {},
    ],
)
def test_an_index_that_disagrees_is_refused(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError):
        safetensors_file.read_folder(tmp_path)
