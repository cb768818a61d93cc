"""Chunk attention against plain torch and fp64: the diagonal, windows, rings."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import attention, prefill
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

SMALL = prefill.Config(16, 16, 4, 2)


def check(
    rows: int, heads: int, groups: int, dim: int, slots: int, length: int, window: int,
    config: prefill.Config | None,
) -> None:  # fmt: skip
    q = torch.randn(rows, heads, dim, device=DEVICE).to(LOW)
    keys, values = torch.randn(2, groups, slots, dim, device=DEVICE).to(LOW)
    keys[:, length + rows :], values[:, length + rows :] = 100.0, 100.0
    scale = dim**-0.5

    out = prefill.chunk_attention(
        q, keys, values, length, window=window, scale=scale, config=config
    )

    plain = attention.reference(q, keys, values, length, window, True, scale)
    truth = attention.reference(q.double(), keys, values, length, window, True, scale)
    assert_as_good(out, plain, truth)


@pytest.mark.parametrize("length", [0, 1, 16, 33])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_a_chunk_sees_the_past_and_itself(rows: int, length: int) -> None:
    check(rows, 4, 2, 32, 96, length, 0, SMALL)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 2), (8, 1), (3, 1)])
def test_query_heads_share_a_kv_head(heads: int, groups: int) -> None:
    check(23, heads, groups, 16, 64, 20, 0, SMALL)


@pytest.mark.parametrize("length", [0, 11, 12, 13, 50, 190])
@pytest.mark.parametrize("window", [1, 12, 24])
def test_a_window_through_a_ring(window: int, length: int) -> None:
    rows = 37
    check(rows, 2, 1, 16, window + rows + 5, length, window, SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "length"), [(2048, 0), (100, 3000), (2048, 6000)])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "window"),
    [(16, 8, 256, 1024), (16, 2, 512, 0), (32, 8, 128, 0), (32, 8, 128, 2048), (9, 3, 64, 0)],
)
def test_real_shapes(
    heads: int, groups: int, dim: int, window: int, rows: int, length: int
) -> None:
    check(rows, heads, groups, dim, window + 2048 if window else 9000, length, window, None)
