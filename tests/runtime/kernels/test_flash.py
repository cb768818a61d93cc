"""flash-attn as an option: found, tried against our kernel, timed, used or not, and told of.

The packages are written by the tests: real attention in plain torch, or what may be wrong with one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.geometry import Geometry
from dflash_chat.runtime import flash, kernels, layers
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.kernels import attention, prefill
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good, relative_error

PACKAGES = {"tiny-flash-4": "tiny_flash.cute", "tiny-flash": "tiny_flash"}
FULL, SLIDING = Geometry(2, 64), Geometry(2, 64, window=12)

RIGHT = """
import torch

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    rows, seen, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x[0].float().repeat_interleave(share, 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q[0].float(), k) * softmax_scale
    behind = torch.arange(rows)[:, None] + seen - rows - torch.arange(seen)
    hidden = behind < 0 if causal else torch.zeros(rows, seen, dtype=torch.bool)
    if window_size[0] >= 0:
        hidden = hidden | (behind > window_size[0])
    weights = scores.masked_fill(hidden.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, v).to(q.dtype)[None]
"""
WITH_SUMS = (
    f"{RIGHT}\nonly = flash_attn_func\nflash_attn_func = lambda *a, **k: (only(*a, **k), None)"
)
TOP_LEFT = RIGHT.replace(" + seen - rows", "")
NEVER = f"{RIGHT}\nflash_attn_func = lambda q, *a, **k: torch.full_like(q, float('nan'))"
NO_CARD = "def flash_attn_func(*_, **__): raise RuntimeError('no kernel image\\nfor this device')"

Install = Callable[..., None]
Tried = tuple[float, dict[str, float | str]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package's source and version where pip would; real packages are not seen."""
    forget = flash.choice.cache_clear
    forget()
    monkeypatch.setattr(flash, "CALLS", 1)
    monkeypatch.setattr(flash, "PACKAGES", PACKAGES)

    def put(source: str, name: str = "tiny-flash", version: str = "2.8.3") -> None:
        module = tmp_path.joinpath(*PACKAGES[name].split("."))
        module.mkdir(parents=True, exist_ok=True)
        (module / "__init__.py").write_text(source)
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    forget()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_flash"]:
        del sys.modules[name]


def tried(geometry: Geometry = FULL) -> dict[str, float | str]:
    return flash.measured(DEVICE, LOW, 4, geometry, rows=24, keys=[24, 40])[1]


# ── finding and trying ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("geometry", [FULL, SLIDING], ids=["full", "sliding"])
def test_both_packages_are_timed_if_they_compute_what_ours_does(
    install: Install, geometry: Geometry
) -> None:
    install(RIGHT)
    install(WITH_SUMS, "tiny-flash-4", "4.0.0b36")
    ms = tried(geometry)
    assert list(ms) == ["tiny-flash-4 4.0.0b36", "tiny-flash 2.8.3"]
    assert all(isinstance(x, float) and x > 0 for x in ms.values()), ms


def test_version_4_is_found_without_version_2(install: Install) -> None:
    install(RIGHT, "tiny-flash-4", "4.0.0b36")
    assert isinstance(tried()["tiny-flash-4 4.0.0b36"], float)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise ImportError('libcudart.so.12: not found')", "ImportError: libcudart.so.12: not"),
        ("other_name = 1", "AttributeError"),
        (NO_CARD, "RuntimeError: no kernel image"),
        (TOP_LEFT, "differs by"),
        (NEVER, "differs by nan"),
    ],
    ids=["import", "no entry", "no kernel", "other alignment", "no number"],
)
def test_what_cannot_be_used_is_told_with_its_reason(
    install: Install, caplog: pytest.LogCaptureFixture, source: str, why: str
) -> None:
    install(source)
    with caplog.at_level(logging.WARNING):
        said = tried()["tiny-flash 2.8.3"]
    assert isinstance(said, str)
    assert said.startswith(why)
    assert "\n" not in said
    assert len(said) <= 80
    assert len(caplog.records) == 1


def test_one_that_is_broken_does_not_hinder_the_other(install: Install) -> None:
    install(RIGHT)
    install("raise ImportError('cutlass')", "tiny-flash-4", "4.0.0b36")
    found = tried()
    assert found["tiny-flash-4 4.0.0b36"] == "ImportError: cutlass"
    assert isinstance(found["tiny-flash 2.8.3"], float)


def test_a_small_block_tells_doctor_what_can_be_used(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(RIGHT)
    install(NO_CARD, "tiny-flash-4", "4.0.0b36")
    monkeypatch.setattr(flash, "measured", partial(_in_low, flash.measured))
    assert flash.trial(DEVICE) == {
        "tiny-flash-4 4.0.0b36": "RuntimeError: no kernel image", "tiny-flash 2.8.3": "",
    }  # fmt: skip


def _in_low(
    measured: Callable[..., Tried],
    device: torch.device,
    _: torch.dtype,
    *shape: object,
    **n: object,
) -> Tried:
    """The interpreter has no bf16."""
    return measured(device, LOW, *shape, **n)


# ── choosing ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tried", "name", "words"),
    [
        ({"tiny-flash 2.8.3": 0.8}, "tiny-flash 2.8.3", "tiny-flash 2.8.3 (1.25× our kernel)"),
        ({"tiny-flash 2.8.3": 2.0}, "", "own kernel (tiny-flash 2.8.3: 0.50×)"),
        ({"tiny-flash 2.8.3": 0.97}, "", "own kernel (tiny-flash 2.8.3: 1.03×)"),
        ({"flash-attn-4 4": 0.5, "flash-attn 2": 0.8}, "flash-attn-4 4", "flash-attn-4 4 (2.00×"),
        ({"flash-attn-4 4": 0.9, "flash-attn 2": 0.8}, "flash-attn 2", "flash-attn 2 (1.25×"),
        ({"flash-attn-4 4": "OSError: x", "flash-attn 2": 0.8}, "flash-attn 2", "flash-attn 2 (1"),
        ({"flash-attn 2": "OSError: x"}, "", "own kernel (flash-attn 2: OSError: x)"),
    ],
)
def test_the_quickest_is_used_and_a_tie_is_ours(
    tried: dict[str, float | str], name: str, words: str
) -> None:
    chosen, said = flash.decide(1.0, tried)
    assert chosen == name
    assert said.startswith(words)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the interpreter is through with soon."""
    monkeypatch.setattr(flash, "measured", partial(flash.measured, rows=24, keys=[24, 40]))
    monkeypatch.setattr(flash, "MIN_ROWS", 24)
    monkeypatch.setattr(kernels, "serve", lambda *_: True)


def test_a_choice_stands_whatever_a_second_measurement_would_say(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    install(RIGHT)
    monkeypatch.setattr(flash, "MARGIN", 0.0)
    first = flash.choice(DEVICE, LOW, 4, FULL)
    assert isinstance(first.attention, partial)
    assert first.attention.args == (sys.modules["tiny_flash"].flash_attn_func,)
    monkeypatch.setattr(flash, "MARGIN", float("inf"))
    assert flash.choice(DEVICE, LOW, 4, FULL) is first
    assert flash.choice(DEVICE, LOW, 4, SLIDING).attention is flash.by_our_kernel


@pytest.mark.usefixtures("install")
def test_without_a_package_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(flash, "measured")
    none = flash.choice(DEVICE, LOW, 4, FULL)
    assert none == (flash.by_our_kernel, "own kernel (no flash-attn)")


def test_the_line_about_kernels_says_what_reads_long_prompts(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*kinds: Geometry, largest: int = 24) -> str:
        return flash.words(KVCache(kinds, 64, LOW, DEVICE, largest), 4)

    assert said(FULL) == ""  # torch attends
    small(monkeypatch)
    ours = "long prompts by own kernel (no flash-attn)"
    assert said(FULL, FULL) == ours
    assert said(FULL, Geometry(1, 512)) == f"{ours} at head dim 64"
    assert said(Geometry(1, 512)) == ""
    assert said(FULL, largest=23) == ""
    install(RIGHT)
    flash.choice.cache_clear()
    monkeypatch.setattr(flash, "MARGIN", 0.0)
    assert said(FULL).startswith("long prompts by tiny-flash 2.8.3 (")


# ── reading chunks ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("geometry", [FULL, SLIDING], ids=["full", "sliding"])
def test_chunks_are_read_alike_by_either(
    install: Install, monkeypatch: pytest.MonkeyPatch, geometry: Geometry
) -> None:
    small(monkeypatch)
    install(RIGHT)
    monkeypatch.setattr(flash, "MARGIN", 0.0)
    theirs, used = flash.choice(DEVICE, LOW, 4, geometry).attention, []
    assert theirs is not flash.by_our_kernel

    def read(attention: flash.Attention) -> list[Tensor]:
        def counted(q: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401
            used.append(len(q))
            return attention(q, *rest)

        monkeypatch.setattr(flash, "choice", lambda *_: flash.Choice(counted, ""))
        torch.manual_seed(1)
        cache, outs = KVCache([geometry], 200, LOW, DEVICE, 24), []
        for rows in (24, 24, 7, 24, 24, 24):  # a ring has 36 slots, so most go round its end
            qkv = torch.randn(rows, 8, 64, device=DEVICE).to(LOW)
            attend = layers.Causal(cache, rows, 4, scale=0.2)
            outs.append(attend(0, qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]))
            cache.commit(rows)
        return outs

    monkeypatch.setattr(prefill, "MIN_ROWS", 1)
    outs, wanted = read(theirs), read(flash.by_our_kernel)
    assert used == [24] * 10  # the short chunks go to our kernel without a choice
    for out, own in zip(outs, wanted, strict=True):
        assert relative_error(out, own) < flash.AGREES


@pytest.mark.gpu
@pytest.mark.parametrize("module", flash.PACKAGES.values())
@pytest.mark.parametrize(("rows", "seen"), [(2048, 2048), (2048, 6144), (1500, 3000)])
@pytest.mark.parametrize(
    ("heads", "geometry"),
    [
        (32, Geometry(8, 128)),  # Qwen3-8B, Llama-3.1-8B
        (9, Geometry(3, 64)),  # SmolLM2-135M
        (16, Geometry(8, 256, 1024)),  # Gemma-4-26B-A4B's sliding layers
    ],
)
def test_the_real_packages_at_real_shapes(
    module: str, heads: int, geometry: Geometry, rows: int, seen: int
) -> None:
    package = pytest.importorskip(module, exc_type=ImportError)
    function = getattr(package, "flash_attn_func", None)
    if function is None:  # 2.x and 4 share the name flash_attn, and only one of them is there
        pytest.skip(f"no {module}.flash_attn_func")
    dim, window, scale = geometry.head_dim, geometry.window, geometry.head_dim**-0.5
    cache = KVCache([geometry], 9000, LOW, DEVICE, 2048)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache.length = seen - rows
    q = torch.randn(rows, heads + geometry.kv_heads, dim, device=DEVICE, dtype=LOW)[:, :heads]

    out = flash.by_flash_attn(function, q, cache, 0, scale)

    keys, values, length = cache.keys[0], cache.values[0], cache.length
    plain = attention.reference(q, keys, values, length, window, True, scale)
    truth = attention.reference(q.double(), keys, values, length, window, True, scale)
    assert_as_good(out, plain, truth)
    assert_as_good(flash.by_our_kernel(q, cache, 0, scale), plain, truth)


@pytest.mark.gpu
@pytest.mark.skipif(not flash.installed(), reason="no flash-attn is installed")
def test_the_real_packages_are_timed_and_agree() -> None:
    ours_ms, tried = flash.measured(DEVICE, LOW, 32, Geometry(8, 128))
    assert ours_ms > 0
    assert tried
    assert not any(isinstance(why, str) for why in tried.values()), tried
