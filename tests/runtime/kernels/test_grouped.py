"""Routed experts of many rows against one row and expert after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import grouped
from dflash_chat.runtime.kernels.grouped import GroupedConfig
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.test_moe import FORMATS, activations, random_slots, weight
from tests.runtime.kernels.truth import assert_as_good

EXPERTS, WIDTH, INNER = 16, 128, 64
SMALL = GroupedConfig(16, 32, 64, 4, 2)


def check(
    slots: Tensor, format_name: str, configs: tuple[GroupedConfig, GroupedConfig] | None,
    width: int = WIDTH, inner: int = INNER, experts: int = EXPERTS,
) -> None:  # fmt: skip
    x = activations(len(slots), width)
    shares = torch.rand(slots.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gate_up = weight(format_name, experts, 2 * inner, width)
    down = weight(format_name, experts, width, inner)

    out = grouped.routed_experts(x, slots.to(DEVICE), shares, gate_up, down, configs=configs)

    def expect(dtype: torch.dtype) -> Tensor:
        weights = gate_up.dequantize(dtype), down.dequantize(dtype)
        return grouped.reference(x.to(dtype), slots, shares.to(dtype), *weights)

    assert_as_good(out, expect(LOW), expect(torch.float64))


@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (1, 4), (16, 1), (17, 2), (33, 8)])
def test_rows_of_any_number_and_rank(rows: int, top_k: int) -> None:
    check(random_slots(rows, top_k), "plain", (SMALL, SMALL))


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format(format_name: str) -> None:
    check(random_slots(19, 4), format_name, (SMALL, SMALL))


def test_columns_that_fill_no_tile() -> None:
    check(random_slots(19, 2), "plain", (SMALL, SMALL), width=72, inner=40)


@pytest.mark.parametrize("rows", [15, 16, 17, 48])
def test_one_expert_may_take_all_rows(rows: int) -> None:
    check(torch.full((rows, 1), EXPERTS - 1), "plain", (SMALL, SMALL))


@pytest.mark.parametrize("bm", [16, 64])
@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (3, 5), (40, 8)])
def test_tiles_cover_every_place_once(rows: int, top_k: int, bm: int) -> None:
    slots = random_slots(rows, top_k).to(DEVICE)
    order, ends, expert, first = grouped.group(slots, EXPERTS, bm)
    seen = []
    for e, begin in zip(expert.tolist(), first.tolist(), strict=True):
        if e < EXPERTS:
            places = order[begin : min(begin + bm, int(ends[e]))]
            assert len(places) > 0
            assert (slots.flatten()[places] == e).all()
            seen += places.tolist()
    assert sorted(seen) == list(range(slots.numel()))


def test_a_row_does_not_depend_on_the_others() -> None:
    slots, x = random_slots(40, 4).to(DEVICE), activations(40, WIDTH)
    shares = torch.rand(slots.shape).to(DEVICE)
    weights = weight("plain", EXPERTS, 2 * INNER, WIDTH), weight("plain", EXPERTS, WIDTH, INNER)

    def run(n: int) -> Tensor:
        return grouped.routed_experts(
            x[:n], slots[:n], shares[:n], *weights, configs=(SMALL, SMALL)
        )

    assert torch.equal(run(40)[:7], run(7))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [18, 100, 2048])
@pytest.mark.parametrize("format_name", FORMATS)
def test_real_shapes(format_name: str, rows: int) -> None:
    check(random_slots(rows, 8), format_name, None, width=2816, inner=704)
