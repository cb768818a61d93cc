"""The screened head: the very token of the dense one, whatever the copy of it lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.kernels import heads, screen
from dflash_chat.runtime.kernels.forms import Int8, dequantize, round_to_int8
from dflash_chat.runtime.kernels.tuned import Config
from tests.runtime.kernels.conftest import DEVICE, LOW

TILES = Config(32, 64, 2, 3, 1)
ULP = torch.finfo(LOW).eps


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head(n: int, k: int, seed: int = 0) -> Tensor:
    """Rows of many lengths, in which the largest logit may be any."""
    return (noise(n, k, seed=seed) * (1 + noise(n, 1, seed=seed + 1).abs())).to(DEVICE, LOW)


def states(rows: int, k: int, seed: int = 2) -> Tensor:
    return noise(rows, k, seed=seed).to(DEVICE, LOW)


def likeliest(x: Tensor, w: Tensor, copy: Int8 | None = None) -> list[int]:
    found: list[int] = screen.argmax(x, w, copy or round_to_int8(w), config=TILES).tolist()
    return found


def truth(x: Tensor, w: Tensor) -> Tensor:
    """Logits in fp64."""
    return x.double() @ w.double().T


# ── the copy ────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_is_half_a_step_away_and_says_how_far_in_all() -> None:
    w = head(4100, 24)  # in two chunks
    w[7] = 0
    w[9] *= ULP
    kept = w.clone()
    copy = round_to_int8(w)
    assert torch.equal(w, kept)
    away = w.double() - dequantize(copy).double()
    assert (away.abs() <= 0.5001 * copy.scale[:, None].double()).all()
    lost, length = away.norm(dim=-1), w.double().norm(dim=-1)
    assert (copy.error.double() >= lost + 24 * 2.0**-22 * length).all()
    assert (copy.error.double() <= 1.01 * (lost + 24 * 2.0**-22 * length)).all()
    assert (copy.weight.abs().amax(-1) == 127).sum() == 4099
    assert copy.weight[7].abs().max() == 0


@pytest.mark.parametrize("config", [TILES, Config(64, 256, 4, 3, 1)])
def test_every_int8_is_read_exactly(config: Config) -> None:
    """Rows of the identity pick columns of w, which hold all numbers at every place of a word."""
    q = (torch.arange(256)[:, None] + torch.arange(128)).to(torch.uint8).view(torch.int8)
    w = Int8(q.to(DEVICE), torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE))
    for start in range(0, 128, 32):
        x = torch.eye(128, device=DEVICE, dtype=LOW)[start : start + 32]
        logits, _ = heads.logits_and_argmax(x, w, config=config)
        assert torch.equal(logits, w.weight[:, start : start + 32].T.float())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("adverse", [False, True])
def test_no_state_moves_a_logit_by_more_than_the_error(seed: int, adverse: bool) -> None:
    w = head(16, 160, seed)
    copy = round_to_int8(w)
    lost = w.double() - dequantize(copy).double()
    h = lost.sign() if adverse else noise(16, 160, seed=seed + 3).double().to(DEVICE)
    h = h.to(LOW)
    near = (h.float() @ dequantize(copy).T).double()
    bound = h.double().norm(dim=-1, keepdim=True) * copy.error.double()
    assert ((truth(h, w) - near).abs() <= bound).all()


# ── the token ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(96, 128), (301, 72)])  # whole tiles; tails of both axes
def test_the_token_is_the_dense_heads(rows: int, n: int, k: int) -> None:
    for seed in range(3):
        w, x = head(n, k, seed), states(rows, k, seed + 9)
        want = truth(x, w).argmax(-1).tolist()
        assert likeliest(x, w) == want
        tokens, candidates = screen.reference(x, w, round_to_int8(w))
        assert tokens.tolist() == want
        assert 1 <= candidates.sum() / rows < n / 4, "the copy must have ruled most rows out"


def test_rows_longer_than_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "AT_ONCE", 64)
    w, x = head(96, 168), states(3, 168)
    assert likeliest(x, w) == truth(x, w).argmax(-1).tolist()


def test_fp32_too() -> None:
    w, x = noise(100, 72).to(DEVICE), noise(3, 72, seed=1).to(DEVICE)
    assert likeliest(x, w) == truth(x, w).argmax(-1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_one_bit_decides(seed: int) -> None:
    """Rows that differ in the last bit of one column, which no copy can tell apart."""
    w, x = head(128, 64, seed), states(4, 64, seed)
    best = truth(x, w).argmax(-1)
    for t, v in enumerate(best.tolist()):
        column = int(x[t].abs().argmax())
        twin = (v + 40 + t) % 128
        w[twin] = w[v]
        w[twin, column] += w[v, column].abs() * ULP * x[t, column].sign()
    assert likeliest(x, w) == truth(x, w).argmax(-1).tolist()


def test_of_equal_rows_the_first_is_taken() -> None:
    w, x = head(200, 64), states(5, 64)
    best = truth(x, w).argmax(-1)
    rows = w[best]
    w[150:155] = rows
    w[30:35] = rows
    assert likeliest(x, w) == [min(30 + t, v) for t, v in enumerate(best.tolist())]


def test_a_state_without_a_likeliest_token_gets_the_first() -> None:
    w, x = head(70, 64), states(3, 64)
    x[1] = 0
    assert likeliest(x, w)[1] == 0
    w[:] = w[33]
    assert likeliest(x, w) == [0, 0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
def test_a_state_that_is_not_finite_gets_some_token() -> None:
    w, x = head(70, 64), states(3, 64)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    found = likeliest(x, w)
    assert found[1] == int(truth(x, w)[1].argmax())
    assert all(0 <= v < 70 for v in found)


def test_a_token_does_not_depend_on_the_other_states() -> None:
    w, x = head(70, 96), states(17, 96)
    x[3] = 0
    copy = round_to_int8(w)
    together = likeliest(x, w, copy)
    assert [likeliest(x[t : t + 1], w, copy)[0] for t in range(6)] == together[:6]
    assert likeliest(x[2:11], w, copy) == together[2:11]


def test_states_may_be_strided() -> None:
    w, wide = head(70, 64), states(4, 128)
    assert likeliest(wide[:, 64:], w) == truth(wide[:, 64:], w).argmax(-1).tolist()


def test_half_the_error_would_be_too_little() -> None:
    """The state points to where row 50 was rounded from, and row 3, which rounding left alone, lies
    between what the copy makes of row 50 and what it is.
    """
    row = noise(1, 96, seed=5).to(DEVICE, LOW)
    rounded = dequantize(round_to_int8(row)).double()
    lost = (row.double() - rounded)[0]
    h = (lost / lost.norm()).to(LOW)
    w = (-2 * h).repeat(64, 1)
    w[50], w[3] = row[0], 0
    column = int(h.abs().argmax())
    w[3, column] = (rounded[0] @ h.double() + 0.75 * lost.norm()) / h[column].double()
    copy = round_to_int8(w)
    assert truth(h[None], w).argmax() == 50
    assert likeliest(h[None], w, copy) == [50]
    assert likeliest(h[None], w, copy._replace(error=copy.error / 2)) == [3]


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────

REAL = [(262144, 2816), (151936, 4096), (49152, 576)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), REAL)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_real_heads(n: int, k: int, rows: int) -> None:
    w = torch.randn(n, k, device=DEVICE).mul_(k**-0.5).to(LOW)
    copy = round_to_int8(w)
    for seed in range(4):
        x = states(rows, k, seed)
        ours, dense = screen.argmax(x, w, copy), heads.argmax(x, w)
        for t in (ours != dense).nonzero().flatten().tolist():  # a tie of what fp32 can tell
            a, b = (x[t].double() @ w[v[t]].double() for v in (ours, dense))
            assert abs(a - b) <= 2e-7 * k**0.5 * x[t].double().norm() * w[ours[t]].double().norm()
        alone = [int(screen.argmax(x[t : t + 1], w, copy)) for t in range(rows)]
        assert ours.tolist() == alone


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_screen_follows_its_input(pdl: bool) -> None:
    w, x = head(32768, 2816), states(16, 2816)
    copy = round_to_int8(w)

    def step() -> Tensor:
        return screen.argmax(x * 1, w, copy, pdl=pdl)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(5):
        x.copy_(states(16, 2816, seed))
        if seed == 3:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, step())
