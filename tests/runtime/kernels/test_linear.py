"""Skinny GEMMs: every form of w, against fp64 and plain torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import heads, linear, tuned
from dflash_chat.runtime.kernels.forms import Fp8, Int4, Weight, dequantize, pack_int4, unpack_int4
from dflash_chat.runtime.kernels.tuned import Config
from tests.runtime.kernels.conftest import DEVICE, LOW
from tests.runtime.kernels.truth import assert_as_good

ROWS = [1, 2, 7, 8, 16, 17]
FORMS = ["bf16", "channel", "block", "int4-32", "int4-64", "int4-128", "zero-32"]


def weight(form: str, n: int, k: int, halves: int = 1) -> Weight:
    """A random [n, k] weight of about unit rows."""
    draw = torch.Generator().manual_seed(n * k)
    dense = torch.randn(n, k, generator=draw) / k**0.5
    if form == "bf16":
        return dense.to(DEVICE, LOW)
    if form in ("channel", "block"):
        blocks = (halves * -(-n // halves // 128), -(-k // 128))
        scale = torch.rand(*((n,) if form == "channel" else blocks), generator=draw) + 0.5
        return Fp8((dense * 8).to(torch.float8_e4m3fn).to(DEVICE), scale.to(DEVICE))
    group = int(form.split("-")[1])
    q = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=draw) + 0.5) / (4 * k**0.5)
    zero = torch.randint(-7, 9, (n, k // group), generator=draw) * scale
    return pack_int4(
        q.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE) if form.startswith("zero") else None
    )


def small(w: Weight, splits: int) -> Config:
    """Tiles smaller than a test's weight."""
    blocks = isinstance(w, Fp8) and w.scale.dim() == 2
    runs = isinstance(w, Int4) and w.words.shape[-1] == 32
    return Config(32, 128 if blocks or runs else 64, 2, 3, splits)


def activations(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(DEVICE, LOW)


@pytest.mark.parametrize(
    ("form", "rows"),
    [(form, 7) for form in FORMS] + [(form, rows) for form in ("bf16", "int4-32") for rows in ROWS],
)
def test_partials_add_up_to_the_product(form: str, rows: int) -> None:
    w, x = weight(form, 72, 256), activations(rows, 256)
    config = small(w, 1 if form == "block" else 2)
    out = linear.partials(x, w, config=config)
    assert out.shape == (config.splits, rows, 72)
    truth = x.double() @ dequantize(w).double().T
    assert_as_good(out.sum(0), linear.reference(x, w), truth)


@pytest.mark.parametrize("form", ["int4-128", "zero-64"])
def test_a_tail_of_long_runs(form: str) -> None:
    w, x = weight(form, 72, 384), activations(7, 384)
    assert isinstance(w, Int4)
    assert w.words.shape == (3, 72, 32)
    truth = x.double() @ dequantize(w).double().T
    out = linear.matmul(x, w, config=Config(32, 256, 2, 3, 2))
    assert_as_good(out, linear.reference(x, w), truth)


@pytest.mark.parametrize(("k", "splits"), [(256, 1), (704, 2), (896, 3)])  # runs of 32, 16, 32
def test_one_row_of_int4_has_its_groups_side_by_side(k: int, splits: int) -> None:
    w, x = weight("int4-32", 72, k), activations(2, k)
    config = Config(64, 128, 2, 3, splits, tuned.Tile(32, 1, 3))
    truth = x.double() @ dequantize(w).double().T
    both = linear.partials(x, w, config=config)
    for row in range(2):
        alone = linear.partials(x[row : row + 1], w, config=config)
        plain = linear.reference(x[row : row + 1], w)
        assert_as_good(alone.sum(0), plain, truth[row : row + 1])
        # The same sums in the same order; the interpreter's products may round by their shape.
        assert torch.allclose(alone[:, 0], both[:, row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("form", ["bf16", "channel", "int4-64", "zero-32"])
def test_matmul_with_a_tail_along_k_and_n(form: str, splits: int) -> None:
    w, x = weight(form, 72, 192), activations(7, 192)
    config = Config(32, 64, 2, 3, splits)
    truth = x.double() @ dequantize(w).double().T
    for _ in range(2):  # the second call finds the arrivals as the first one left them
        assert_as_good(linear.matmul(x, w, config=config), linear.reference(x, w), truth)
    tail = Config(32, 128, 2, 3, 1)
    assert_as_good(linear.matmul(x, w, config=tail), linear.reference(x, w), truth)


def test_block_scales_change_along_both_axes() -> None:
    w, x = weight("block", 136, 192), activations(2, 192)
    truth = x.double() @ dequantize(w).double().T
    out = linear.matmul(x, w, config=Config(32, 128, 2, 3, 2))
    assert_as_good(out, linear.reference(x, w), truth)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("form", FORMS)
def test_gated_activates_the_gate(form: str, activation: str) -> None:
    w, x = weight(form, 2 * 40, 256, halves=2), activations(7, 256)
    config = small(w, 1 if form == "block" else 2)
    gate, up = (x.double() @ dequantize(w, 2).double().T).chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    plain = linear.gated_reference(x, w, activation)
    assert_as_good(linear.gated(x, w, activation, config=config), plain, act * up)


def test_gated_block_scales_start_again_at_up() -> None:
    w, x = weight("block", 2 * 136, 128, halves=2), activations(2, 128)
    gate, up = (x.double() @ dequantize(w, 2).double().T).chunk(2, -1)
    out = linear.gated(x, w, "silu", config=Config(64, 128, 2, 3, 1))
    assert_as_good(out, linear.gated_reference(x, w, "silu"), F.silu(gate) * up)


@pytest.mark.parametrize("form", ["channel", "int4-32", "zero-32"])
def test_every_quantised_weight_is_exact(form: str) -> None:
    """Rows of the identity pick columns of w: all e4m3 numbers, every nibble of a word."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # NaN
    numbers = codes.view(torch.float8_e4m3fn).view(16, 16).repeat(2, 8)  # [32, 128]
    w: Weight = weight(form, 32, 128)
    if isinstance(w, Fp8):
        w = Fp8(numbers.to(DEVICE), torch.ones(32, device=DEVICE))
    else:
        assert isinstance(w, Int4)
        zero = None if w.zero is None else w.zero.sign()
        w = w._replace(scale=torch.ones_like(w.scale), zero=zero)
    for start in range(0, 128, 32):
        x = torch.eye(128, device=DEVICE, dtype=LOW)[start : start + 32]
        out = linear.matmul(x, w, config=small(w, 1))
        assert torch.equal(out.float(), dequantize(w)[:, start : start + 32].T)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_pack_int4_keeps_what_dequantize_returns(group: int) -> None:
    q = torch.randint(0, 16, (3, 5, 384), dtype=torch.uint8)
    scale, zero = torch.rand(2, 3, 5, 384 // group).bfloat16()
    got = unpack_int4(pack_int4(q, scale, zero), torch.float64)
    wide_scale, wide_zero = (t.double().repeat_interleave(group, -1) for t in (scale, zero))
    assert torch.equal(got, (q.double() - 8) * wide_scale + wide_zero)


@pytest.mark.parametrize(("columns", "group"), [(128, 16), (256, 256), (96, 32)])
def test_pack_int4_refuses_other_groups(columns: int, group: int) -> None:
    with pytest.raises(AssertionError, match=f"groups of {group}"):
        pack_int4(torch.zeros(1, columns, dtype=torch.uint8), torch.ones(1, columns // group))


@pytest.mark.parametrize(
    ("form", "rows"), [("bf16", rows) for rows in ROWS] + [("channel", 2), ("int4-32", 16)]
)
def test_head_finds_the_largest_logit(form: str, rows: int) -> None:
    w, x = weight(form, 100, 128), activations(rows, 128)
    logits, best = heads.logits_and_argmax(x, w, softcap=30.0, config=small(w, 1))
    raw = x.double() @ dequantize(w).double().T
    plain = 30 * torch.tanh(linear.reference(x, w) / 30)
    assert_as_good(logits, plain, 30 * torch.tanh(raw / 30))
    assert torch.equal(best, raw.argmax(-1))
    config = small(w, 1)
    assert torch.equal(best, heads.argmax(x, w, config=config))
    for softcap, capped in ((30.0, plain), (0.0, linear.reference(x, w))):
        sure, probability = heads.confident(x, w, softcap=softcap, config=config)
        assert torch.equal(sure, best)
        want = capped.float().softmax(-1).amax(-1)
        torch.testing.assert_close(probability, want, rtol=2e-2, atol=1e-3)


def test_head_takes_the_first_of_equals_and_maps_it() -> None:
    w, x = weight("bf16", 96, 128), activations(3, 128)  # whole tiles: equals are equal in bits
    assert isinstance(w, Tensor)
    first = linear.reference(x, w).argmax(-1)
    ids = torch.arange(300, 0, -1, device=DEVICE)
    twice = torch.cat([w, w])
    config = Config(32, 64, 2, 3, 1)
    assert torch.equal(heads.argmax(x, twice, config=config), first)
    assert torch.equal(heads.argmax(x, twice, ids=ids, config=config), 300 - first)


def test_rows_may_be_strided_but_columns_may_not() -> None:
    w = weight("bf16", 32, 64)
    wide = activations(4, 128)
    out = linear.matmul(wide[:, 64:], w, config=Config(32, 64, 2, 3, 1))
    assert torch.equal(out, linear.matmul(wide[:, 64:].clone(), w, config=Config(32, 64, 2, 3, 1)))
    with pytest.raises(AssertionError):
        linear.matmul(wide[:, ::2], w)


@pytest.mark.parametrize(
    ("n", "k"), [(8192, 2816), (2816, 4096), (2816, 2112), (576, 576), (2816, 16896), (64, 64)]
)
@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_splits_are_even_and_never_empty(form: str, n: int, k: int) -> None:
    config = tuned.linear(form, n, k)
    chunks = -(-k // config.bk)
    assert 1 <= config.splits <= chunks
    if (form, n, k) != ("int4", 2816, 4096):  # six shares of 32 chunks, by time
        assert -(-chunks // config.splits) * config.splits <= tuned.WASTE * chunks


REAL = [
    ("bf16", 8192, 2816),
    ("bf16", 576, 1536),
    ("channel", 2816, 2112),
    ("block", 6144, 4096),
    ("int4-32", 9216, 2816),
    ("zero-32", 2816, 4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "n", "k"), REAL)
def test_real_shapes(form: str, n: int, k: int) -> None:
    w, x = weight(form, n, k), activations(16, k)
    truth = x.double() @ dequantize(w).double().T
    plain = linear.reference(x, w)
    assert_as_good(linear.partials(x, w).sum(0), plain, truth)
    assert_as_good(linear.matmul(x, w), plain, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_others(form: str) -> None:
    w, x = weight(form, 2048, 2816, halves=2), activations(17, 2816)
    all_rows = linear.partials(x, w), linear.gated(x, w, "silu")
    for rows in (1, 2, 8, 9, 16):
        assert torch.equal(linear.partials(x[:rows], w), all_rows[0][:, :rows])
        assert torch.equal(linear.gated(x[:rows], w, "silu"), all_rows[1][:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("k", [704, 2816])  # runs of 16 and of 32
def test_one_row_of_int4_has_the_bits_that_it_has_among_others(k: int) -> None:
    config = Config(64, 128, 2, 3, 2, tuned.Tile(32, 1, 3))
    w, x = weight("int4-32", 2048, k), activations(16, k)
    for rows in (x, F.gelu(x) * x.flip(0)):  # the second of very unlike sizes
        many = linear.partials(rows, w, config=config)
        for row in range(16):
            alone = linear.partials(rows[row : row + 1], w, config=config)
            assert torch.equal(alone[:, 0], many[:, row])


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_step_follows_its_input(pdl: bool) -> None:
    x = activations(16, 2816)
    gate_up, down = weight("bf16", 4224, 2816), weight("channel", 2816, 2112)
    head = weight("int4-32", 32768, 2816)

    def step() -> tuple[Tensor, ...]:
        inner = linear.gated(x, gate_up, "gelu_tanh", pdl=pdl)
        out = linear.matmul(inner, down, pdl=pdl)
        return inner, out, heads.argmax(out, head, pdl=pdl)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        x.copy_(activations(16 + seed, 2816)[:16])
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
