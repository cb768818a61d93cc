"""A GGUF header is read within bounds: damage is a CheckpointError, never a crash or a hang."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import gguf
from tests.runtime.gguf_writer import Typed, gguf_bytes, string, tensor_info, value, write_gguf

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "a.count": 3,
    "a.number": 0.5,
    "a.flag": True,
    "a.i64": Typed(11, -5),
    "a.f64": Typed(12, 0.1),
    "a.strings": ["x", "Ġy", "日本"],
    "a.ints": [1, 2, 3],
    "a.nested": [[1, 2], [3]],
}
TENSORS = {
    "one": ("F32", (2, 3), bytes(range(24))),
    "two": ("Q4_1", (1, 32), bytes(range(20))),
}


def read(path: Path, content: bytes) -> gguf.GGUF:
    path.write_bytes(content)
    return gguf.read(path)


@pytest.mark.parametrize("version", [2, 3])
def test_what_was_written_is_read(tmp_path: Path, version: int) -> None:
    file = gguf.read(write_gguf(tmp_path / "x.gguf", METADATA, TENSORS, version))
    assert file.version == version
    assert file.metadata["a.strings"] == ["x", "Ġy", "日本"]
    assert file.metadata["a.nested"] == [[1, 2], [3]]
    assert file.metadata["a.i64"] == -5
    assert file.metadata["a.f64"] == 0.1
    assert file.metadata["a.flag"] is True
    assert file.tensors["one"].shape == (2, 3)
    assert file.tensors["two"].nbytes == 20
    assert file.raw("two").tolist() == list(range(20))
    assert file.raw("one").view(torch.float32).shape == (6,)


def test_views_outlive_the_reader(tmp_path: Path) -> None:
    raw = gguf.read(write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)).raw("one")
    assert raw.tolist() == list(range(24))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    needed = len(whole) - 12  # the last tensor's padding is not needed
    for length in range(needed):
        with pytest.raises(CheckpointError):
            read(tmp_path / "x.gguf", whole[:length])
    read(tmp_path / "x.gguf", whole[:needed])


HUGE = (1 << 63, (1 << 64) - 1, 1 << 40, 1 << 25)


def preamble(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def absurd(huge: int) -> dict[str, bytes]:
    """Headers that claim `huge` of something, followed by plenty of zeros."""
    length, one = struct.pack("<Q", huge), preamble(0, 1)
    dims = struct.pack("<I", 2) + length + length + struct.pack("<IQ", 0, 0)
    return {
        "tensors": preamble(huge, 0),
        "keys": preamble(0, huge),
        "key length": one + length,
        "string length": one + string("k") + struct.pack("<I", 8) + length,
        "numbers": one + string("k") + struct.pack("<II", 9, 4) + length,
        "strings": one + string("k") + struct.pack("<II", 9, 8) + length,
        "arrays": one + string("k") + struct.pack("<II", 9, 9) + length,
        "name length": preamble(1, 0) + length,
        "dimensions": preamble(1, 0) + string("t") + dims,
        "offset": preamble(1, 0) + tensor_info("t", (1,), 0, huge & ~31),
    }


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("what", absurd(1))
def test_absurd_counts_are_refused_without_allocating(tmp_path: Path, what: str, huge: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(absurd(huge)[what] + bytes(4096))
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        gguf.read(path)
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def one_key(item: object) -> bytes:
    return preamble(0, 1) + string("k") + value(item)


def deep_array(depth: int) -> bytes:
    nested = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 1) + struct.pack("<I", 7)
    return preamble(0, 1) + string("k") + struct.pack("<I", 9) + nested


def one_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return preamble(1, 0) + tensor_info(name, shape, kind, offset) + bytes(256)


def two_tensors(second: str, offset: int) -> bytes:
    infos = tensor_info("t", (16,), 0, 0) + tensor_info(second, (16,), 0, offset)
    return preamble(2, 0) + infos + bytes(512)


BROKEN = {
    "not a GGUF file": b"GGML" + bytes(64),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "not UTF-8": preamble(0, 1) + struct.pack("<Q", 3) + b"\xff\xfe\xfd" + bytes(64),
    "value type 13": one_key(1)[:-8] + struct.pack("<II", 13, 0) + bytes(64),
    "neither 0 nor 1": one_key(Typed(7, 2)),
    "appears twice": preamble(0, 2) + (string("k") + value(1)) * 2,
    "nests arrays": deep_array(5000),
    "alignment 0": preamble(0, 1) + string("general.alignment") + value(0),
    "alignment 'x'": preamble(0, 1) + string("general.alignment") + value("x"),
    "has 0 dimensions": one_tensor("t", (), 0) + bytes(64),
    "has 5 dimensions": one_tensor("t", (1,) * 5, 0),
    "type Q6_K": one_tensor("t", (256,), 14),
    "type number 77": one_tensor("t", (256,), 77),
    "cannot have shape": one_tensor("t", (2, 33), 2),
    "cannot have shape (0,)": one_tensor("t", (0,), 0),
    "not aligned": one_tensor("t", (1,), 0, 16),
    "ends beyond": one_tensor("t", (1 << 20,), 0),
    "overlaps": two_tensors("u", 32),
    "'t' appears twice": two_tensors("t", 64),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path / "x.gguf", BROKEN[message])
    assert message in refused.value.message
    assert refused.value.hint


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [empty, Path.mkdir, os.mkfifo, lambda path: None])
def test_what_is_not_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError):
        gguf.read(tmp_path / "x.gguf")


@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 8))
@settings(
    max_examples=600, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_damage_never_escapes(tmp_path: Path, seed: int, flips: int) -> None:
    content = bytearray(gguf_bytes(METADATA, TENSORS))
    rng = random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(len(content))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    try:
        file = read(tmp_path / "x.gguf", bytes(content))
    except CheckpointError:
        return
    assert all(file.raw(name).numel() == info.nbytes for name, info in file.tensors.items())


@pytest.mark.weights
def test_the_real_file_is_what_it_says(smollm2_gguf: Path) -> None:
    file = gguf.read(smollm2_gguf)
    kinds = [info.type for info in file.tensors.values()]
    assert (len(kinds), kinds.count("Q4_1"), kinds.count("F32")) == (272, 210, 61)
    assert file.tensors["token_embd.weight"].offset == 1_785_664
    assert file.tensors["token_embd.weight"].type == "Q8_0"
