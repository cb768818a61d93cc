"""Head norms, rotation and cache rows against plain torch and fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import rope
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

EPS = 1e-6
STYLES = {  # (head norms, v_norm, k_eq_v)
    "llama": (False, False, False),
    "qwen3": (True, False, False),
    "gemma sliding": (True, True, False),
    "gemma full": (True, True, True),
}


def tables(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D/2] where only the first quarter of the frequencies turns."""
    inv_freq = 100.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / dim)
    inv_freq[dim // 8 :] = 0
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inv_freq)
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def ints(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("rows", "length", "slots", "splits"),
    [(1, 0, 40, 1), (2, 5, 40, 3), (7, 38, 40, 2), (8, 0, 16, 1), (16, 75, 33, 4), (17, 3, 96, 2)],
)
def test_one_launch_equals_norm_rotate_write(
    style: str, rows: int, length: int, slots: int, splits: int
) -> None:
    norms, v_norm, k_eq_v = STYLES[style]
    heads, groups, dim = 6, 2, 32
    width = (heads + groups * (1 if k_eq_v else 2)) * dim
    qkv = torch.randn(splits, rows, width, device=DEVICE)
    q_norm, k_norm = (torch.rand(dim, device=DEVICE).to(LOW) + 0.5 for _ in range(2))
    weights = (q_norm, k_norm) if norms else (None, None)
    cos, sin = tables(128, dim)
    keys, values = (torch.full((groups, slots, dim), 7.0, dtype=LOW, device=DEVICE) for _ in "kv")

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (torch.full((groups, slots, dim), 7.0, dtype=dtype, device=DEVICE) for _ in "kv")
        w = [None if one is None else one.to(dtype) for one in weights]
        args = (qkv.double().sum(0).to(dtype), *w, cos, sin, k, v, length, EPS, v_norm, k_eq_v)
        return rope.reference(*args), k, v

    q = rope.qk_rope_write(
        qkv, *weights, cos, sin, keys, values, ints(length), eps=EPS, v_norm=v_norm, k_eq_v=k_eq_v
    )

    for out, low, truth in zip((q, keys, values), plain(LOW), plain(torch.float64), strict=True):
        assert_as_good(out, low, truth)
    written = (torch.arange(length, length + rows) % slots).tolist()
    others = [slot for slot in range(slots) if slot not in written]
    assert (keys[:, others] == 7).all()
    assert (values[:, others] == 7).all()


def test_the_projection_may_come_summed() -> None:
    cos, sin = tables(16, 16)
    qkv = torch.randn(4, 4 * 16, device=DEVICE).to(LOW)
    outs = []
    for form in (qkv, qkv.float()[None]):
        cache = torch.zeros(2, 1, 16, 16, dtype=LOW, device=DEVICE)
        q = rope.qk_rope_write(form, None, None, cos, sin, *cache, ints(2), eps=EPS)
        outs.append(torch.cat([q.flatten(), cache.flatten()]))
    assert torch.equal(*outs)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("splits", [1, 3])
def test_context_rows_reach_every_layer_and_stop_at_count(count: int, splits: int) -> None:
    rows, layers, groups, dim, length = 5, 3, 2, 16, 21
    slots = (24, 40, 23)  # the first and the last wrap
    kv = torch.randn(splits, rows, 2 * layers * groups * dim, device=DEVICE)
    k_norm = (torch.rand(layers, dim, device=DEVICE) + 0.5).to(LOW)
    cos, sin = tables(64, dim)
    caches = [
        tuple(torch.full((groups, s, dim), 7.0, dtype=LOW, device=DEVICE) for _ in "kv")
        for s in slots
    ]

    rope.context_write(kv, k_norm, cos, sin, caches, ints(length), ints(count), eps=EPS)

    projected = kv.double().sum(0).view(rows, 2, layers, groups, dim)
    at = torch.arange(length, length + rows, device=DEVICE)
    for i, (keys, values) in enumerate(caches):

        def key_rows(dtype: torch.dtype, i: int = i) -> Tensor:
            k = rope.rms_norm(projected[:, 0, i].to(dtype), k_norm[i].to(dtype), EPS)
            return rope.rotate(k, cos[at], sin[at])[:count].transpose(0, 1)

        written = (at[:count] % slots[i]).tolist()
        if count:
            assert_as_good(keys[:, written], key_rows(LOW), key_rows(torch.float64))
            truth = projected[:count, 1, i].transpose(0, 1)
            assert_as_good(values[:, written], truth.to(LOW), truth)
        others = [slot for slot in range(slots[i]) if slot not in written]
        assert (keys[:, others] == 7).all()
        assert (values[:, others] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "style"),
    [(16, 8, 256, "gemma sliding"), (16, 2, 512, "gemma full"), (32, 8, 128, "qwen3"),
     (9, 3, 64, "llama")],
)  # fmt: skip
def test_a_captured_graph_follows_length(heads: int, groups: int, dim: int, style: str) -> None:
    norms, v_norm, k_eq_v = STYLES[style]
    width = (heads + groups * (1 if k_eq_v else 2)) * dim
    qkv = torch.randn(4, 16, width, device=DEVICE)
    weight = torch.rand(dim, device=DEVICE).to(LOW) if norms else None
    cos, sin = tables(4096, dim)
    length = ints(0)

    def step(cache: Tensor) -> Tensor:
        return rope.qk_rope_write(
            qkv, weight, weight, cos, sin, *cache, length, eps=EPS, v_norm=v_norm, k_eq_v=k_eq_v
        )

    cache, expected = torch.zeros(2, 2, groups, 1040, dim, dtype=LOW, device=DEVICE)
    step(cache)
    cache.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = step(cache)
    for at in (0, 1030, 3000):
        length.fill_(at)
        qkv.normal_()
        graph.replay()
        assert torch.equal(q, step(expected))
        assert torch.equal(cache, expected)
