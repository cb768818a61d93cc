"""The router chooses, weighs and lists like plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import router
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.routes import members, slots_of
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
    out = router.select(logits, scale, top_k=top_k, at_once=8)
    slots, weights = router.reference(logits.double(), scale.double(), top_k)
    assert torch.equal(slots_of(out), slots.cpu())
    _, plain = router.reference(logits, scale, top_k)
    assert_as_good(out.weights, plain, weights)


@pytest.mark.parametrize("rows", [1, 8, 17, 32])
def test_an_expert_has_a_place_for_every_so_many_of_its_rows(rows: int) -> None:
    logits, scale = inputs(rows)
    logits[:, 3] = 100
    logits[:9, 7] = 50
    for at_once in (8, 16, 32):
        out = router.select(logits, scale, top_k=2, at_once=at_once)
        counts = slots_of(out).flatten().bincount(minlength=EXPERTS).tolist()
        want = [e for e in range(EXPERTS) for _ in range(-(-counts[e] // at_once))]
        assert (out.experts[: len(want)] % 2**16).tolist() == want
        assert int(out.active) == len(want) <= len(out.experts)
        assert [row for _, e, row, _ in members(out) if e == 3] == list(range(rows))


def test_ties_go_to_the_lower_expert() -> None:
    logits, scale = inputs(2)
    out = router.select(torch.zeros_like(logits), scale, top_k=4, at_once=8)
    assert slots_of(out).tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(out.weights, (scale[:4].float() / 4).expand(2, 4))


def test_one_expert_may_take_all_rows() -> None:
    logits, scale = inputs(1)
    out = router.select(logits.repeat(16, 1), scale, top_k=1, at_once=16)
    assert int(out.active) == 1
    slots = slots_of(out)
    assert (slots == out.experts[0].cpu() % 2**16).all()
    torch.testing.assert_close(out.weights[:, 0].cpu(), scale.cpu()[slots[:, 0]].float())


def test_extreme_logits_stay_finite() -> None:
    logits, scale = inputs(2)
    out = router.select(logits * 1000, scale, at_once=8)
    assert out.weights.isfinite().all()
    assert (slots_of(out).sort().values.diff() > 0).all()


def test_strided_rows_are_refused() -> None:
    logits, scale = inputs(4, 32)
    with pytest.raises(AssertionError):
        router.select(logits[:, ::2], scale[:16], at_once=8)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 17])
def test_replay_follows_its_inputs_at_the_real_shape(rows: int) -> None:
    logits, scale = inputs(rows, 128)
    router.select(logits, scale, at_once=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router.select(logits, scale, at_once=8)
    for seed in range(20):
        logits.copy_(inputs(rows, 128, seed)[0])
        graph.replay()
        eager = router.select(logits, scale, at_once=8)
        count = int(eager.active)
        assert int(captured.active) == count
        assert torch.equal(captured.experts[:count], eager.experts[:count])
        assert torch.equal(slots_of(captured), slots_of(eager))
        assert torch.equal(captured.weights, eager.weights)
        _, truth = router.reference(logits.double(), scale.double())
        _, plain = router.reference(logits, scale)
        assert_as_good(captured.weights, plain, truth)
