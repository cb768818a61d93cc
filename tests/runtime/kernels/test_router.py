"""The router chooses, weighs and lists like plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import router
from dflash_chat.runtime.kernels.router import RouteConfig
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

EXPERTS = 16
SMALL = RouteConfig(bn=16, bk=32, warps=4)


def inputs(rows: int, width: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """h_router, proj and per_expert_scale."""
    generator = torch.Generator().manual_seed(rows * width)
    h = torch.randn(rows, width, generator=generator) / width**0.5
    proj = torch.randn(experts, width, generator=generator)
    scale = torch.rand(experts, generator=generator) + 0.5
    return h.to(DEVICE, LOW), proj.to(DEVICE, LOW), scale.to(DEVICE, LOW)


def counter() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 17])
@pytest.mark.parametrize(("width", "top_k"), [(64, 2), (80, 3), (96, 8)])
def test_route_chooses_and_weighs_like_plain_torch(rows: int, width: int, top_k: int) -> None:
    h, proj, scale = inputs(rows, width)
    out = router.route(h, proj, scale, counter(), top_k=top_k, config=SMALL)
    slots, weights = router.reference(h.double(), proj.double(), scale.double(), top_k)
    assert torch.equal(out.slots, slots.int())
    _, plain = router.reference(h, proj, scale, top_k)
    assert_as_good(out.weights, plain, weights)


@pytest.mark.parametrize("rows", [1, 8, 17])
def test_the_list_holds_each_chosen_expert_once_in_order(rows: int) -> None:
    h, proj, scale = inputs(rows, 64)
    out = router.route(h, proj, scale, counter(), top_k=2, config=SMALL)
    distinct = out.slots.unique()
    assert out.experts.shape == (min(EXPERTS, 2 * rows),)
    assert torch.equal(out.experts[: int(out.active)], distinct)


def test_ties_go_to_the_lower_expert() -> None:
    h, proj, scale = inputs(2, 64)
    out = router.route(h, torch.zeros_like(proj), scale, counter(), top_k=4, config=SMALL)
    assert out.slots.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(out.weights, (scale[:4].float() / 4).expand(2, 4))


def test_one_expert_may_take_all_rows() -> None:
    h, proj, scale = inputs(16, 64)
    out = router.route(h[:1].repeat(16, 1), proj, scale, counter(), top_k=1, config=SMALL)
    assert int(out.active) == 1
    assert (out.slots == out.experts[0]).all()
    torch.testing.assert_close(out.weights[:, 0], scale[out.slots[:, 0].long()].float())


def test_extreme_logits_stay_finite() -> None:
    h, proj, scale = inputs(2, 64)
    out = router.route(h * 1000, proj, scale, counter(), config=SMALL)
    assert out.weights.isfinite().all()
    assert (out.slots.sort().values.diff() > 0).all()


def test_the_counter_is_ready_for_the_next_launch() -> None:
    h, proj, scale = inputs(3, 96)
    arrivals = counter()
    first = router.route(h, proj, scale, arrivals, config=SMALL)
    second = router.route(h, proj, scale, arrivals, config=SMALL)
    assert int(arrivals) == 0
    for one, other in zip(first[1:], second[1:], strict=True):
        assert torch.equal(one, other)


def test_strided_rows_are_refused() -> None:
    h, proj, scale = inputs(4, 128)
    with pytest.raises(AssertionError):
        router.route(h[:, ::2], proj[:, :64].contiguous(), scale, counter(), config=SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 17])
def test_replay_follows_its_inputs_at_the_real_shape(rows: int) -> None:
    h, proj, scale = inputs(rows, 2816, 128)
    arrivals = counter()
    router.route(h, proj, scale, arrivals)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router.route(h, proj, scale, arrivals)
    for seed in range(20):
        h.copy_(torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)) / 2816**0.5)
        graph.replay()
        eager = router.route(h, proj, scale, arrivals)
        count = int(eager.active)
        assert int(captured.active) == count
        assert torch.equal(captured.experts[:count], eager.experts[:count])
        assert torch.equal(captured.slots, eager.slots)
        assert torch.equal(captured.weights, eager.weights)
        _, truth = router.reference(h.double(), proj.double(), scale.double())
        _, plain = router.reference(h, proj, scale)
        assert_as_good(captured.weights, plain, truth)
