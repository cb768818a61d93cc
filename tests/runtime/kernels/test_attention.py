"""Block attention against plain torch and fp64: windows, rings, shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import attention
from dflash_chat.runtime.kernels.attention import Config
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

CONFIGS = {  # small tiles, so that a few rows already span shares and tiles, whole and partial
    "3 shares": Config(16, 16, 3, 4, 2),
    "2 shares": Config(16, 32, 2, 4, 2),
}


def ints(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


def block(rows: int, heads: int, groups: int, dim: int, slots: int, end: int) -> list[Tensor]:
    """q, keys, values; slots that no position below `end` reached hold what must not matter."""
    q = torch.randn(rows, heads, dim, device=DEVICE)
    keys, values = torch.randn(2, groups, slots, dim, device=DEVICE)
    keys[:, end:], values[:, end:] = 100.0, 100.0
    return [x.to(LOW) for x in (q, keys, values)]


def check(
    x: list[Tensor], length: int, window: int, causal: bool, scale: float, config: Config | None
) -> None:
    q, keys, values = x
    out = attention.block_attention(
        q, keys, values, ints(length), window=window, causal=causal, scale=scale, config=config
    )
    plain = attention.reference(q, keys, values, length, window, causal, scale)
    truth = attention.reference(q.double(), keys, values, length, window, causal, scale)
    assert_as_good(out, plain, truth)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 17])
def test_rows_of_a_block(rows: int, causal: bool, config: str) -> None:
    x = block(rows, heads=4, groups=2, dim=32, slots=96, end=50 + rows)
    check(x, 50, 0, causal, 0.2, CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 32, 79])
def test_lengths_from_empty_to_full(length: int, config: str) -> None:
    x = block(7, heads=2, groups=1, dim=16, slots=86, end=length + 7)
    check(x, length, 0, True, 0.25, CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("share", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_query_heads_share_a_kv_head(groups: int, share: int, config: str) -> None:
    x = block(5, share * groups, groups, dim=16, slots=64, end=45)
    check(x, 40, 0, True, 0.25, CONFIGS[config])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "length"),
    [(40, 0), (40, 39), (40, 40), (40, 41), (40, 60), (40, 200), (8, 57), (3, 5), (1, 64)],
)
def test_a_window_looks_back_its_own_width_through_a_ring(
    window: int, length: int, causal: bool
) -> None:
    rows = 9
    x = block(rows, heads=4, groups=2, dim=16, slots=window + rows + 3, end=length + rows)
    check(x, length, window, causal, 0.25, CONFIGS["3 shares"])


@pytest.mark.parametrize(
    ("rows", "dim", "window"), [(1, 16, 0), (16, 16, 0), (1, 32, 24), (17, 32, 24)]
)
def test_default_config(rows: int, dim: int, window: int) -> None:
    x = block(rows, heads=6, groups=2, dim=dim, slots=90, end=70 + rows)
    check(x, 70, window, True, 1.0, None)


def test_large_logits_stay_finite() -> None:
    q, keys, values = block(4, heads=2, groups=1, dim=16, slots=64, end=44)
    check([q * 50, keys, values], 40, 0, True, 1.0, CONFIGS["3 shares"])


HOPPER = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90"
)
SHAPES = {  # heads, kv heads, head dim, window, causal, scale
    "gemma sliding": (16, 8, 256, 1024, True, 1.0),
    "gemma full": (16, 2, 512, 0, True, 1.0),
    "qwen3": (32, 8, 128, 0, True, 128**-0.5),
    "drafter": (32, 8, 128, 2048, True, 128**-0.5),
    "drafter full": (32, 8, 128, 0, False, 128**-0.5),
    "smollm2": (9, 3, 64, 0, True, 64**-0.5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, pytest.param(True, marks=HOPPER)])
@pytest.mark.parametrize("rows", [1, 4, 16, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_follows_length(shape: str, rows: int, pdl: bool) -> None:
    heads, groups, dim, window, causal, scale = SHAPES[shape]
    slots = window + 32 if window else 9000
    x = block(rows, heads, groups, dim, slots, end=slots)
    length = ints(0)

    def step() -> Tensor:
        return attention.block_attention(
            *x, length, window=window, causal=causal, scale=scale / 4, pdl=pdl
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for at in (0, 1, 500, 1023, 2048, 8192, 700):
        length.fill_(at)
        graph.replay()
        plain = attention.reference(*x, at, window, causal, scale / 4)
        truth = attention.reference(x[0].double(), *x[1:], at, window, causal, scale / 4)
        assert_as_good(out, plain, truth)
        assert torch.equal(out, step())
