"""The router chooses, weighs and lists like plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import router
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

EXPERTS = 16


def inputs(rows: int, experts: int = EXPERTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """logits and per_expert_scale."""
    generator = torch.Generator().manual_seed(rows + 100 * seed)
    logits = torch.randn(rows, experts, generator=generator)
    scale = torch.rand(experts, generator=generator) + 0.5
    return logits.to(DEVICE), scale.to(DEVICE, LOW)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 17])
@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_select_chooses_and_weighs_like_plain_torch(rows: int, top_k: int) -> None:
    logits, scale = inputs(rows)
    out = router.select(logits, scale, top_k=top_k)
    slots, weights = router.reference(logits.double(), scale.double(), top_k)
    assert torch.equal(out.slots, slots.int())
    _, plain = router.reference(logits, scale, top_k)
    assert_as_good(out.weights, plain, weights)


@pytest.mark.parametrize("rows", [1, 8, 17])
def test_the_list_holds_each_chosen_expert_once_in_order(rows: int) -> None:
    out = router.select(*inputs(rows), top_k=2)
    distinct = out.slots.unique()
    assert out.experts.shape == (min(EXPERTS, 2 * rows),)
    assert torch.equal(out.experts[: int(out.active)], distinct)


def test_ties_go_to_the_lower_expert() -> None:
    logits, scale = inputs(2)
    out = router.select(torch.zeros_like(logits), scale, top_k=4)
    assert out.slots.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(out.weights, (scale[:4].float() / 4).expand(2, 4))


def test_one_expert_may_take_all_rows() -> None:
    logits, scale = inputs(1)
    out = router.select(logits.repeat(16, 1), scale, top_k=1)
    assert int(out.active) == 1
    assert (out.slots == out.experts[0]).all()
    torch.testing.assert_close(out.weights[:, 0], scale[out.slots[:, 0].long()].float())


def test_extreme_logits_stay_finite() -> None:
    logits, scale = inputs(2)
    out = router.select(logits * 1000, scale)
    assert out.weights.isfinite().all()
    assert (out.slots.sort().values.diff() > 0).all()


def test_strided_rows_are_refused() -> None:
    logits, scale = inputs(4, 32)
    with pytest.raises(AssertionError):
        router.select(logits[:, ::2], scale[:16])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 17])
def test_replay_follows_its_inputs_at_the_real_shape(rows: int) -> None:
    logits, scale = inputs(rows, 128)
    router.select(logits, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router.select(logits, scale)
    for seed in range(20):
        logits.copy_(inputs(rows, 128, seed)[0])
        graph.replay()
        eager = router.select(logits, scale)
        count = int(eager.active)
        assert int(captured.active) == count
        assert torch.equal(captured.experts[:count], eager.experts[:count])
        assert torch.equal(captured.slots, eager.slots)
        assert torch.equal(captured.weights, eager.weights)
        _, truth = router.reference(logits.double(), scale.double())
        _, plain = router.reference(logits, scale)
        assert_as_good(captured.weights, plain, truth)
