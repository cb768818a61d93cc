"""Residual and norms in one launch, in every combination a model uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import norms
from dflash_chat.runtime.kernels.norms import Branch, Router
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

EPS = 1e-6
ROWS = [1, 2, 7, 8, 16, 17]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = LOW) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_weight(width: int, seed: int) -> Tensor:
    return 1 + normal(width, seed=seed) / 4


def check(x: Tensor, branches: list[Branch], weights: list[Tensor], **options: Tensor) -> None:
    """The kernel against `reference` in x's dtype, and that in fp64."""
    new, outs = norms.residual_norms(x, branches, weights, EPS, **options)
    plain_new, plain = norms.reference(x, branches, weights, EPS, **options)
    true_new, true = norms.reference(
        x.double(),
        [Branch(*(None if part is None else part.double() for part in b)) for b in branches],
        [weight.double() for weight in weights], EPS,
        **{name: option.double() for name, option in options.items()},
    )  # fmt: skip
    assert_as_good(new, plain_new, true_new)
    for got, expected, truth in zip(outs, plain, true, strict=True):
        assert_as_good(got, expected, truth)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [96, 127])
def test_llama_adds_the_partials(rows: int, width: int) -> None:
    branch = Branch(normal(3, rows, width, seed=1, dtype=torch.float32))
    check(normal(rows, width), [branch], [norm_weight(width, 2)])


@pytest.mark.parametrize("rows", ROWS)
def test_gemma_norms_the_attention_and_gives_three(rows: int) -> None:
    branch = Branch(normal(2, rows, 96, seed=1, dtype=torch.float32), None, norm_weight(96, 5))
    check(normal(rows, 96), [branch], [norm_weight(96, seed) for seed in (2, 3, 4)])


@pytest.mark.parametrize("rows", ROWS)
def test_gemma_joins_dense_and_experts(rows: int) -> None:
    dense = Branch(normal(2, rows, 96, seed=1, dtype=torch.float32), None, norm_weight(96, 5))
    chosen = normal(rows, 8, seed=6, dtype=torch.float32).softmax(-1)
    experts = Branch(normal(8, rows, 96, seed=2, dtype=torch.float32), chosen, norm_weight(96, 7))
    check(
        normal(rows, 96), [dense, experts], [norm_weight(96, 3)],
        post=norm_weight(96, 4), scale=torch.full((1,), 0.6, dtype=LOW, device=DEVICE),
    )  # fmt: skip


def check_logits(rows: int, width: int, experts: int) -> None:
    """The router's logits beside the norms, which they must not change, against plain torch."""
    x, branch = normal(rows, width), Branch(normal(2, rows, width, seed=1, dtype=torch.float32))
    weights = [norm_weight(width, 2), norm_weight(width, 3)]
    router = Router(norm_weight(width, 4) / width**0.5, normal(experts, width, seed=5))
    new, outs, logits = norms.residual_norms_and_logits(x, [branch], weights, EPS, router)
    alone, alike = norms.residual_norms(x, [branch], [*weights, router.norm], EPS)
    assert torch.equal(new, alone)
    ulp = torch.finfo(LOW).eps if DEVICE.type == "cuda" else 0  # where other warps add up squares
    for got, want in zip(outs, alike[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=ulp, atol=0)
    h, proj = alike[2], router.proj
    assert_as_good(logits, h @ proj.T, h.double() @ proj.double().T)
    told = normal(17, width, seed=6)
    router = router._replace(told=told)
    *_, logits = norms.residual_norms_and_logits(x, [branch], weights, EPS, router)
    assert_as_good(logits, told[:rows] @ proj.T, told[:rows].double() @ proj.double().T)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [96, 127])
def test_the_routers_logits_come_with_the_norms(rows: int, width: int) -> None:
    check_logits(rows, width, 16)


@pytest.mark.gpu
def test_a_rows_logits_do_not_depend_on_the_others() -> None:
    check_logits(16, 2816, 128)
    x, parts = normal(16, 2816), normal(4, 16, 2816, seed=1, dtype=torch.float32)
    router = Router(norm_weight(2816, 4), normal(128, 2816, seed=5))
    many = norms.residual_norms_and_logits(x, [Branch(parts)], [], EPS, router)[2]
    for row in range(16):
        part = Branch(parts[:, row : row + 1].contiguous())
        for pdl in (False, True):  # True: a program on every multiprocessor
            one = norms.residual_norms_and_logits(
                x[row : row + 1], [part], [], EPS, router, pdl=pdl
            )[2]
            assert torch.equal(one[0], many[row])


def test_two_plain_branches_and_no_norm() -> None:
    check(normal(7, 96), [Branch(normal(7, 96, seed=1)), Branch(normal(7, 96, seed=2))], [])


def test_tap_copies_the_new_residual_into_its_columns() -> None:
    features = torch.zeros(7, 3 * 96, dtype=LOW, device=DEVICE)
    branch = Branch(normal(7, 96, seed=1))
    new, _ = norms.residual_norms(
        normal(7, 96), [branch], [norm_weight(96, 2)], EPS, tap=features[:, 96:192]
    )
    assert torch.equal(features[:, 96:192], new)
    assert not features[:, :96].any()
    assert not features[:, 192:].any()


@pytest.mark.parametrize("width", [64, 127])
def test_rms_norm(width: int) -> None:
    x, weight = normal(7, width) * 30, norm_weight(width, 1)
    size = (width,)
    plain = torch.nn.functional.rms_norm(x, size, weight, EPS)
    truth = torch.nn.functional.rms_norm(x.double(), size, weight.double(), EPS)
    assert_as_good(norms.rms_norm(x, weight, EPS), plain, truth)


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 96, dtype=LOW, device=DEVICE)
    assert not norms.rms_norm(x, norm_weight(96, 1), EPS).any()


def test_embed_looks_up_scales_and_norms() -> None:
    table, weight = normal(50, 96), norm_weight(96, 1)
    ids = torch.tensor([3, 49, 0], device=DEVICE)
    new, out = norms.embed(ids, table, 9.75, weight, EPS)
    assert torch.equal(new, table[ids] * 9.75)
    assert_as_good(
        out,
        torch.nn.functional.rms_norm(new, (96,), weight, EPS),
        torch.nn.functional.rms_norm(new.double(), (96,), weight.double(), EPS),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 2816, 4096, 5376, 8192])
def test_real_widths(width: int) -> None:
    parts = Branch(normal(6, 16, width, seed=1, dtype=torch.float32), None, norm_weight(width, 5))
    chosen = normal(16, 8, seed=6, dtype=torch.float32).softmax(-1)
    experts = Branch(normal(8, 16, width, seed=2, dtype=torch.float32), chosen)
    weights = [norm_weight(width, seed) for seed in (2, 3, 4)]
    check(normal(16, width), [parts, experts], weights, post=norm_weight(width, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_layer_follows_its_input(pdl: bool) -> None:
    x, weight = normal(16, 2816), norm_weight(2816, 1)
    parts = normal(4, 16, 2816, seed=2, dtype=torch.float32)

    def layer() -> tuple[Tensor, Tensor]:
        new, outs = norms.residual_norms(x, [Branch(parts)], [weight], EPS, pdl=pdl)
        new, outs = norms.residual_norms(new, [Branch(outs[0])], [weight], EPS, pdl=pdl)
        return new, outs[0]

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for seed in (3, 4):
        x.copy_(normal(16, 2816, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, layer(), strict=True):
            assert torch.equal(got, want)
