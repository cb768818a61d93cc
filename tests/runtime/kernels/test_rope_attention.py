"""Attention straight from the projection against what its two halves do one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import attention, rope, rope_attention
from dflash_chat.runtime.kernels.attention import Config
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.test_rope import EPS, STYLES, ints, tables
from tests.runtime.kernels.truth import assert_as_good

DIM = 32
CONFIGS = {  # keys a share: one tile or several
    "one tile": Config(16, 32, 4, 4, 2),
    "many tiles": Config(16, 16, 2, 4, 2),
}


def check(
    style: str, rows: int, heads: int, groups: int, dim: int, slots: int, length: int, window: int,
    causal: bool, config: Config | None, splits: int = 2,
) -> None:  # fmt: skip
    norms, v_norm, k_eq_v = STYLES[style]
    width = (heads + groups * (1 if k_eq_v else 2)) * dim
    qkv = torch.randn(splits, rows, width, device=DEVICE)
    q_norm, k_norm = (torch.rand(dim, device=DEVICE).to(LOW) + 0.5 for _ in range(2))
    weights = (q_norm, k_norm) if norms else (None, None)
    cos, sin = tables(length + rows, dim)  # none behind the block
    old = torch.randn(2, groups, slots, dim, device=DEVICE).to(LOW)
    if not window:
        old[:, :, length:] = 100.0  # what no position below has reached must not matter

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = old.to(dtype)
        w = [None if one is None else one.to(dtype) for one in weights]
        x = qkv.double().sum(0).to(dtype)
        q = rope.reference(x, *w, cos, sin, keys, values, length, EPS, v_norm, k_eq_v)
        return attention.reference(q, keys, values, length, window, causal, 0.3), keys, values

    keys, values = old.clone()
    out = rope_attention.rope_attention(
        qkv, *weights, cos, sin, keys, values, ints(length), eps=EPS, window=window, causal=causal,
        scale=0.3, v_norm=v_norm, k_eq_v=k_eq_v, config=config,
    )  # fmt: skip
    ours, theirs, truth = (out, keys, values), plain(LOW), plain(torch.float64)
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        assert_as_good(one, other, exact)
    new = torch.arange(length, length + rows) % slots
    kept = torch.ones(slots, dtype=torch.bool)
    kept[new] = False
    assert torch.equal(keys[:, kept], old[0][:, kept])
    assert torch.equal(values[:, kept], old[1][:, kept])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("rows", "length"), [(1, 50), (1, 0), (2, 33), (3, 16), (8, 5), (4, 90)])
def test_one_launch_equals_two(style: str, rows: int, length: int, config: str) -> None:
    check(style, rows, 4, 2, DIM, 100, length, 0, True, CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "length"), [(1, 7), (1, 40), (1, 1000), (3, 31), (8, 75)])
def test_rings_and_windows(rows: int, length: int, config: str) -> None:
    check("gemma sliding", rows, 4, 2, DIM, 40, length, 32, True, CONFIGS[config])


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_block_see_each_other_or_only_back(causal: bool) -> None:
    check("qwen3", 5, 2, 1, DIM, 64, 20, 0, causal, CONFIGS["one tile"])


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (8, 1), (16, 1), (6, 3)])
def test_query_heads_share_a_kv_head(heads: int, groups: int) -> None:
    check("qwen3", 1, heads, groups, DIM, 64, 41, 0, True, CONFIGS["many tiles"])


def test_what_does_not_fit() -> None:
    assert rope_attention.fits(8, 16, 8, 256)
    assert not rope_attention.fits(9, 16, 8, 256)  # 32 rows of queries
    assert not rope_attention.fits(1, 9, 3, 64)  # three heads a kv head
    assert not rope_attention.fits(1, 8, 8, 16)
    assert not rope_attention.fits(1, 16, 2, 512)


@pytest.mark.parametrize("rows", [1, 4])
def test_tiles_are_those_of_the_card_at_hand(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def card(device: torch.device) -> attention.Card:
        assert device.type == torch.device(DEVICE).type
        return attention.Card(84, roomy=False)  # an RTX 3090

    monkeypatch.setattr(attention, "card", card)
    config = rope_attention._config(rows, 16, torch.empty(8, 2048, 256, device=DEVICE), 1024)
    assert config.splits == 10  # eight kv heads on 84 multiprocessors
    assert config.stages == 2


REAL = {  # style, heads, groups, dim, slots, window
    "gemma sliding": ("gemma sliding", 16, 8, 256, 1152, 1024),
    "values are keys": ("gemma full", 8, 2, 256, 4096, 0),
    "qwen3": ("qwen3", 32, 8, 128, 4096, 0),
    "llama": ("llama", 32, 8, 64, 4096, 0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 1000, 2048, 4000])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", REAL)
def test_real_shapes(name: str, rows: int, length: int) -> None:
    style, heads, groups, dim, slots, window = REAL[name]
    if not rope_attention.fits(rows, heads, groups, dim):
        pytest.skip("more than 16 rows of queries a kv head")
    check(style, rows, heads, groups, dim, slots, length, window, True, None, splits=4)
