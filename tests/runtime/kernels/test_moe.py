"""Both feed-forward launches against plain torch, in every weight format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import moe, router
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import pack_int4
from dflash_chat.runtime.kernels.moe import MoeConfig
from dflash_chat.runtime.kernels.router import Routing
from dflash_chat.runtime.quant import float_quantized, kernel_weights
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.routes import members, slots_of
from tests.runtime.kernels.truth import assert_as_good, relative_error

EXPERTS = 16
FORMATS = ("plain", "fp8", "int4", "int4 with zeros", "int4 in groups of 64")
WIDTHS = [(1, 8), (2, 2), (7, 3), (8, 8), (16, 4), (17, 8)]  # rows of the block, experts of a row
SMALL = MoeConfig(bn=16, bk=64, warps=4, stages=2)


def rounded(w: Tensor) -> MoeWeight:
    """In fp8, a scale per output channel."""
    packed = float_quantized.rounded(w)
    return kernel_weights.experts(kernel_weights.fp8(packed.weight, packed.scale))


def weight(format_name: str, *shape: int) -> MoeWeight:
    """Random, of the order of 1/√K."""
    generator = torch.Generator().manual_seed(sum(shape))
    dense = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE)
    if format_name == "plain":
        return MoeWeight(dense.to(LOW))
    if format_name == "fp8":
        return rounded(dense)
    groups = (*shape[:-1], shape[-1] // (64 if "64" in format_name else 32))
    q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8).to(DEVICE)
    scale = (torch.rand(groups, generator=generator) / (4 * shape[-1] ** 0.5)).to(DEVICE)
    zeros = "zeros" in format_name
    return MoeWeight(*pack_int4(q, scale, 3 * scale.flip(-1) if zeros else None))


def routing_of(slots: Tensor, experts_w: MoeWeight) -> Routing:
    """The router's answer for given slots [T, k]; behind its end the list points nowhere."""
    rows, top_k = slots.shape
    logits = torch.zeros(rows, EXPERTS)
    logits.scatter_(1, slots, 100 - torch.arange(top_k).float().expand(rows, top_k))
    scale = torch.ones(EXPERTS, device=DEVICE, dtype=LOW)
    at_once = moe.at_once(experts_w, rows)
    routing = router.select(logits.to(DEVICE), scale, top_k=top_k, at_once=at_once)
    assert torch.equal(slots_of(routing), slots)
    routing.experts[int(routing.active) :] = 2**30
    return routing


def random_slots(rows: int, top_k: int, experts: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)])


def activations(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, LOW)


def by_rank(expert_act: Tensor, routing: Routing) -> Tensor:
    """[places, T, I] -> [T, k, I]."""
    out = torch.empty(*routing.weights.shape, expert_act.shape[-1]).to(expert_act)
    for place, _, row, rank in members(routing):
        out[row, rank] = expert_act[place, row]
    return out


def check_gate_up(
    dense_w: MoeWeight, experts_w: MoeWeight, slots: Tensor, config: MoeConfig | None
) -> None:
    routing, rows, width = routing_of(slots, experts_w), len(slots), dense_w.shape[1]
    h_dense, h_moe = activations(rows, width), activations(rows + 1, width)[1:]
    dense, routed = moe.gate_up(h_dense, dense_w, h_moe, experts_w, routing, config=config)

    def expect(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return moe.reference_gate_up(
            h_dense.to(dtype), dense_w.dequantize(dtype),
            h_moe.to(dtype), experts_w.dequantize(dtype), slots,
        )  # fmt: skip

    ours = (dense, by_rank(routed, routing))
    for out, plain, truth in zip(ours, expect(LOW), expect(torch.float64), strict=True):
        assert_as_good(out, plain, truth)


def check_down(
    dense_w: MoeWeight, experts_w: MoeWeight, slots: Tensor, config: MoeConfig | None
) -> None:
    routing, rows, inner = routing_of(slots, experts_w), len(slots), experts_w.shape[2]
    dense_act = activations(rows, dense_w.shape[1])
    expert_act = activations(routing.experts.numel(), rows, inner)
    dense, routed = moe.down(dense_act, dense_w, expert_act, experts_w, routing, config=config)

    def expect(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return moe.reference_down(
            dense_act.to(dtype), dense_w.dequantize(dtype),
            by_rank(expert_act, routing).to(dtype), experts_w.dequantize(dtype), slots,
        )  # fmt: skip

    for out, plain, truth in zip(
        (dense.sum(0), routed), expect(LOW), expect(torch.float64), strict=True
    ):
        assert_as_good(out, plain, truth)


@pytest.mark.parametrize(("rows", "top_k"), WIDTHS)
def test_gate_up_at_every_block_width(rows: int, top_k: int) -> None:
    slots = random_slots(rows, top_k)
    check_gate_up(weight("plain", 208, 80), weight("plain", EXPERTS, 96, 80), slots, SMALL)


@pytest.mark.parametrize(("rows", "top_k"), WIDTHS)
def test_down_at_every_block_width(rows: int, top_k: int) -> None:
    slots = random_slots(rows, top_k)
    check_down(weight("plain", 72, 104), weight("plain", EXPERTS, 72, 48), slots, SMALL)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("bk", [64, 128])
def test_gate_up_in_every_format(format_name: str, bk: int) -> None:
    dense_w, experts_w = weight(format_name, 80, 192), weight(format_name, EXPERTS, 48, 192)
    for rows in (3, 16):
        slots = random_slots(rows, 4)
        check_gate_up(dense_w, experts_w, slots, SMALL._replace(bk=bk))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("bk", [64, 128])
def test_down_in_every_format(format_name: str, bk: int) -> None:
    dense_w, experts_w = weight(format_name, 40, 192), weight(format_name, EXPERTS, 40, 128)
    for rows in (3, 16):
        slots = random_slots(rows, 4)
        check_down(dense_w, experts_w, slots, SMALL._replace(bk=bk))


@pytest.mark.parametrize("format_name", ["int4", "int4 with zeros"])
def test_runs_of_32_columns_and_of_16(format_name: str) -> None:
    """The dense projection down is cut where its runs end, also where experts' are shorter."""
    slots = random_slots(3, 4)
    config = SMALL._replace(bk=256)
    dense_w, experts_w = weight(format_name, 48, 384), weight(format_name, EXPERTS, 32, 384)
    assert dense_w.run == experts_w.run == 32
    check_gate_up(dense_w, experts_w, slots, config)
    dense_w, experts_w = weight(format_name, 24, 384), weight(format_name, EXPERTS, 24, 192)
    assert (dense_w.run, experts_w.run) == (32, 16)
    check_down(dense_w, experts_w, slots, config)


def test_the_dense_mlp_may_have_another_format() -> None:
    slots = random_slots(2, 4)
    check_gate_up(weight("plain", 96, 64), weight("int4", EXPERTS, 96, 64), slots, SMALL)
    check_down(weight("plain", 72, 64), weight("int4", EXPERTS, 72, 64), slots, SMALL)
    check_gate_up(weight("int4", 96, 64), weight("plain", EXPERTS, 96, 64), slots, SMALL)
    check_down(weight("int4", 72, 64), weight("plain", EXPERTS, 72, 64), slots, SMALL)


@pytest.mark.parametrize("rows", [1, 9, 16, 17])
@pytest.mark.parametrize("format_name", ["plain", "fp8", "int4"])
def test_one_expert_may_take_all_rows(format_name: str, rows: int) -> None:
    slots = torch.full((rows, 1), EXPERTS - 1)
    shapes = [(96, 64), (EXPERTS, 96, 64), (72, 128), (EXPERTS, 72, 64)]
    weights = [weight(format_name, *shape) for shape in shapes]
    check_gate_up(*weights[:2], slots, SMALL)
    check_down(*weights[2:], slots, SMALL)


def dense_down(x: Tensor, dense_w: MoeWeight) -> Tensor:
    """x [T, K] · Wᵀ by the down launch's dense part."""
    experts_w = weight(dense_w.format, EXPERTS, dense_w.shape[0], 64)
    routing = routing_of(torch.zeros(x.shape[0], 1, dtype=torch.long), experts_w)
    expert_act = activations(routing.experts.numel(), x.shape[0], 64)
    out, _ = moe.down(x, dense_w, expert_act, experts_w, routing, config=SMALL)
    return out.sum(0)


@pytest.mark.parametrize("rows", [1, 16])
def test_every_fp8_code_is_widened_exactly(rows: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    values = codes.view(torch.float8_e4m3fn)
    dense_w = MoeWeight(values[:, None].repeat(1, 64).to(DEVICE), torch.ones(256, device=DEVICE))
    out = dense_down(torch.eye(rows, 64, dtype=LOW, device=DEVICE), dense_w)
    assert torch.equal(out.cpu(), values.float().expand(rows, 256))


@pytest.mark.parametrize("rows", [8, 16])
def test_every_int4_code_is_widened_exactly_at_every_place(rows: int) -> None:
    q = ((torch.arange(16)[:, None] + torch.arange(64)) % 16).to(torch.uint8)
    dense_w = MoeWeight(*pack_int4(q.to(DEVICE), torch.ones(16, 2, device=DEVICE)))
    for x in torch.eye(64, dtype=LOW, device=DEVICE).split(rows):
        out = dense_down(x, dense_w)
        assert torch.equal(out, x.float() @ (q.float() - 8).T.to(DEVICE))


def test_rows_that_go_elsewhere_are_not_written() -> None:
    experts_w = weight("plain", EXPERTS, 96, 64)
    routing = routing_of(torch.tensor([[0, 1], [2, 3]]), experts_w)
    _, routed = moe.gate_up(
        activations(2, 64), weight("plain", 96, 64), activations(2, 64), experts_w, routing,
        config=SMALL,
    )  # fmt: skip
    written = routed.isfinite().all(-1)
    assert written.tolist() == [[True, False]] * 2 + [[False, True]] * 2


def test_router_and_both_launches_make_the_whole_half() -> None:
    width, inner, dense, rows, top_k = 64, 48, 96, 5, 4
    h = [activations(rows, width) for _ in range(3)]
    proj, scale = activations(EXPERTS, width), torch.rand(EXPERTS).to(DEVICE, LOW)
    weights = [
        weight("plain", 2 * dense, width), weight("plain", EXPERTS, 2 * inner, width),
        weight("plain", width, dense), weight("plain", EXPERTS, width, inner),
    ]  # fmt: skip
    logits = h[2].float() @ proj.float().T
    routing = router.select(logits, scale, at_once=16, top_k=top_k)
    acts = moe.gate_up(h[0], weights[0], h[1], weights[1], routing, config=SMALL)
    dense_out, routed = moe.down(acts[0], weights[2], acts[1], weights[3], routing, config=SMALL)
    out = dense_out.sum(0) + (routing.weights.T[..., None] * routed).sum(0)

    def expect(dtype: torch.dtype) -> Tensor:
        w = [one.dequantize(dtype) for one in weights]
        slots, p = router.reference(h[2].to(dtype) @ proj.to(dtype).T, scale.to(dtype), top_k)
        act, expert_act = moe.reference_gate_up(h[0].to(dtype), w[0], h[1].to(dtype), w[1], slots)
        out, routed = moe.reference_down(act, w[2], expert_act, w[3], slots)
        return out + (p.T[..., None] * routed).sum(0)

    assert_as_good(out, expect(LOW), expect(torch.float64))


def check_choice(logits: Tensor, format_name: str, width: int, inner: int) -> None:
    """What gate_up chooses for a single row, against the router's own launch, to the bit."""
    experts, top_k = logits.shape[1], 8
    scale = (torch.rand(experts) + 0.5).to(DEVICE, LOW)
    dense_w, experts_w = (
        weight(format_name, 2 * inner, width), weight(format_name, experts, 2 * inner, width)
    )  # fmt: skip
    h = activations(1, width)
    config = None if width > 64 else SMALL
    at_once = moe.at_once(experts_w, 1)
    listed = router.select(logits, scale, at_once=at_once, top_k=top_k)
    want = moe.gate_up(h, dense_w, h, experts_w, listed, config=config)
    made = router.unmade(1, experts, top_k, DEVICE, at_once)
    choice = moe.Choice(logits, scale)
    got = moe.gate_up(h, dense_w, h, experts_w, made, choice=choice, config=config)
    assert [member.rank for member in members(made)] == list(range(top_k))
    assert torch.equal(slots_of(made), slots_of(listed))
    assert torch.equal(made.weights, listed.weights)
    assert torch.equal(got[0], want[0])
    assert torch.equal(by_rank(got[1], made), by_rank(want[1], listed))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("format_name", ["plain", "int4"])
def test_a_single_row_finds_its_experts_itself(format_name: str, ties: bool) -> None:
    logits = torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    check_choice(logits.round() if ties else logits, format_name, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", ["plain", "fp8", "int4"])
def test_a_single_row_finds_its_experts_at_the_real_shape(format_name: str) -> None:
    for seed in range(5):
        logits = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        check_choice(logits, format_name, 2816, 704)


def test_fp8_keeps_three_mantissa_bits() -> None:
    w = torch.randn(3, 5, 192)
    packed = rounded(w)
    assert packed.format == "fp8"
    assert relative_error(packed.dequantize(), w) < 2**-4


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 17])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_real_shapes_follow_their_routing_on_replay(format_name: str, rows: int) -> None:
    gate_up_w = weight(format_name, 4224, 2816), weight(format_name, EXPERTS, 1408, 2816)
    down_w = weight(format_name, 2816, 2112), weight(format_name, EXPERTS, 2816, 704)
    slots = random_slots(rows, 8)
    check_gate_up(*gate_up_w, slots, None)
    check_down(*down_w, slots, None)
    routing = routing_of(slots, gate_up_w[1])

    h = activations(rows, 2816)

    def half() -> tuple[Tensor, Tensor]:
        dense_act, expert_act = moe.gate_up(h, gate_up_w[0], h, gate_up_w[1], routing)
        return moe.down(dense_act, down_w[0], expert_act, down_w[1], routing)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = half()
    slots = slots.flip(0) * 7 % EXPERTS
    for static, fresh in zip(routing, routing_of(slots, gate_up_w[1]), strict=True):
        static.copy_(fresh)
    h.mul_(0.5)
    graph.replay()
    for replayed, eager in zip(captured, half(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("format_name", ["plain", "fp8", "int4"])
def test_dependent_launch_changes_no_bit(format_name: str, rows: int) -> None:
    gate_up_w = weight(format_name, 4224, 2816), weight(format_name, 128, 1408, 2816)
    down_w = weight(format_name, 2816, 2112), weight(format_name, 128, 2816, 704)
    h, logits = activations(rows, 2816), activations(rows, 128).float()
    scale = torch.ones(128, device=DEVICE, dtype=LOW)

    def run(pdl: bool) -> tuple[Tensor, Tensor]:
        routing = router.select(logits, scale, at_once=moe.at_once(gate_up_w[1], rows), pdl=pdl)
        dense, routed = moe.gate_up(h, gate_up_w[0], h, gate_up_w[1], routing, pdl=pdl)
        return moe.down(dense, down_w[0], routed, down_w[1], routing, pdl=pdl)

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", ["plain", "fp8", "int4"])
def test_a_row_computes_the_same_bits_alone_and_in_a_block(format_name: str) -> None:
    gate_up_w = weight(format_name, 4224, 2816), weight(format_name, EXPERTS, 1408, 2816)
    down_w = weight(format_name, 2816, 2112), weight(format_name, EXPERTS, 2816, 704)
    h, slots = activations(16, 2816), random_slots(16, 8)  # some experts of more than eight rows

    def run(first: int, last: int) -> tuple[Tensor, Tensor]:
        routing, part = routing_of(slots[first:last], gate_up_w[1]), h[first:last].contiguous()
        dense, routed = moe.gate_up(part, gate_up_w[0], part, gate_up_w[1], routing)
        return moe.down(dense, down_w[0], routed, down_w[1], routing)

    block = run(0, 16)
    for rows in (1, 3, 5, 8):
        for whole, alone in zip(block, run(4, 4 + rows), strict=True):
            assert torch.equal(whole[:, 4 : 4 + rows], alone)
