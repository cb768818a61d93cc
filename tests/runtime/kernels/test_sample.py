"""The kernels draw what the torch path draws from the same logits, and follow the distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime import sampling
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.kernels import sample
from dflash_chat.runtime.kernels.sample import Config
from dflash_chat.runtime.sampling import Sampler, filtered
from tests.runtime.kernels.conftest import DEVICE
from tests.runtime.test_sampling import chi_square_ok

VOCAB, HEAD = 60, 8
ENOUGH = Config(tile=16, top=8, block=32)  # the candidates settle most thresholds
FEW = Config(tile=32, top=2, block=32)  # they settle none, not even the head
PLAIN = SamplingParams(temperature=0.9, seed=1)
SETTINGS = {
    "temperature": PLAIN,
    "cold": replace(PLAIN, temperature=0.02),
    "so cold that one token is left": replace(PLAIN, temperature=1e-3),
    "hot": replace(PLAIN, temperature=9.0),
    "top-k": replace(PLAIN, top_k=5),
    "top-k beyond the candidates": replace(PLAIN, top_k=50),
    "top-p": replace(PLAIN, top_p=0.7),
    "top-p of nearly all": replace(PLAIN, top_p=0.99),
    "top-p of nothing": replace(PLAIN, top_p=0.0),
    "min-p": replace(PLAIN, min_p=0.1),
    "all filters": replace(PLAIN, temperature=1.4, top_k=40, top_p=0.9, min_p=0.005),
}


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(sampling, "HEAD", HEAD)


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Rows from peaked to flat, fp32 [rows, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([4.0, 1.5, 0.3, 0.05]).repeat(rows)[:rows, None]
    return (torch.randn(rows, vocab, generator=generator) * spread).to(DEVICE)


def on_device(sampler: Sampler, first: int = 100) -> tuple[Tensor, Tensor]:
    """`length` and `params` of an answer that began at position `first`."""
    params = sample.new_params(DEVICE)
    sample.write(params, sampler, first)
    length = torch.tensor([first + sampler.length], dtype=torch.int32, device=DEVICE)
    return length, params


def wins_of_the_rest(logits: Tensor, tokens: Tensor) -> int:
    head = logits.topk(HEAD, -1).indices
    return int((head != tokens[:, None]).all(-1).sum())


@pytest.mark.parametrize("config", [ENOUGH, FEW], ids=["candidates", "the row again"])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_equal_the_torch_path(name: str, config: Config) -> None:
    sampler, logits = Sampler(SETTINGS[name], []), logits_of(4)
    out = sample.sample(logits, *on_device(sampler), config)
    assert out.tolist() == sample.reference(logits, sampler).tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_guesses_equal_the_torch_path(name: str) -> None:
    sampler, logits = Sampler(SETTINGS[name], []), logits_of(4, seed=1)
    for config in (ENOUGH, FEW):
        out, chances = sample.guess(logits, *on_device(sampler), config)
        tokens, expected = sampler.guess(logits)
        assert out.tolist() == tokens.tolist()
        torch.testing.assert_close(chances, expected, atol=1e-4, rtol=1e-4)


def test_a_row_whose_likely_tokens_are_neighbours_need_not_be_read_again() -> None:
    """Ten digits in a row left every tile's last candidate below the head's least."""
    logits = torch.randn(8, 49152, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for row, first in enumerate((32, 35, 1000, 1003, 20000, 30007, 40001, 49100)):
        logits[row, first : first + 10] += 9
    params = on_device(Sampler(PLAIN, []))[1]
    found = sample.candidates(logits, params, sample.default_config(49152))
    last = found.logits[:, -1].amax(-1)
    assert bool((last < logits.topk(65, -1).values[:, -1]).all())


def test_the_rest_wins_where_it_is_likely() -> None:
    logits = logits_of(8) / 10
    for config in (ENOUGH, FEW):
        sampler = Sampler(replace(PLAIN, top_p=0.95), [])
        out = sample.sample(logits, *on_device(sampler), config)
        assert out.tolist() == sample.reference(logits, sampler).tolist()
        assert wins_of_the_rest(logits, out) > 3


@pytest.mark.parametrize("vocab", [5, 7, 8, 9, 100])
def test_any_vocabulary(vocab: int) -> None:
    sampler, logits = Sampler(replace(PLAIN, top_p=0.9), []), logits_of(4, vocab)
    length, params = on_device(sampler)
    expected = sample.reference(logits, sampler).tolist()
    assert sample.sample(logits, length, params).tolist() == expected
    guessed, _ = sample.guess(logits, length, params)
    assert guessed.tolist() == sampler.guess(logits)[0].tolist()


@pytest.mark.parametrize("config", [ENOUGH, FEW], ids=["candidates", "the row again"])
@pytest.mark.parametrize(
    "params",
    [PLAIN, replace(PLAIN, top_k=10), replace(PLAIN, top_p=0.6), replace(PLAIN, min_p=0.5)],
    ids=["temperature", "top-k", "top-p", "min-p"],
)
def test_ties_share_one_fate(params: SamplingParams, config: Config) -> None:
    """Logits of few values: the ties at every threshold are kept, or not, together."""
    sampler, logits = Sampler(params, []), logits_of(4).round()
    out = sample.sample(logits, *on_device(sampler), config)
    assert out.tolist() == sample.reference(logits, sampler).tolist()


def test_a_forbidden_token_is_never_drawn() -> None:
    sampler = Sampler(replace(PLAIN, temperature=50.0), [])
    logits = logits_of(4)
    logits[:, 10:] = float("-inf")
    for config in (ENOUGH, FEW):
        out = sample.sample(logits, *on_device(sampler), config)
        assert (out < 10).all()
        assert out.tolist() == sample.reference(logits, sampler).tolist()


def test_the_noise_is_the_positions_and_the_seeds() -> None:
    logits = logits_of(1).expand(6, -1).contiguous()
    sampler = Sampler(PLAIN, [])
    whole = sample.sample(logits, *on_device(sampler), ENOUGH).tolist()
    sampler.accept([0] * 3)
    assert sample.sample(logits[3:], *on_device(sampler, 7), ENOUGH).tolist() == whole[3:]
    other = Sampler(replace(PLAIN, seed=2**40 + 3), [])
    drawn = sample.sample(logits, *on_device(other), ENOUGH).tolist()
    assert drawn == sample.reference(logits, other).tolist()
    assert drawn != whole


@pytest.mark.slow
def test_draws_follow_the_distribution() -> None:
    draws, vocab = 20000 if DEVICE.type == "cuda" else 300, 20
    params = SamplingParams(temperature=1.3, min_p=0.02, seed=3)
    logits = torch.linspace(-3, 3, vocab, device=DEVICE)
    length, request = on_device(Sampler(params, []))
    out = sample.sample(logits.repeat(draws, 1), length, request, Config(tile=32, top=12, block=32))
    weights = filtered(logits[None], params)[0].cpu()
    seen = dict(enumerate(torch.bincount(out.cpu(), minlength=vocab).tolist()))
    assert chi_square_ok(seen, weights / weights.sum(), draws)


def test_strided_rows_are_refused() -> None:
    with pytest.raises(AssertionError):
        sample.sample(logits_of(2)[:, ::2], *on_device(Sampler(PLAIN, [])))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49152, 262144])
def test_replay_follows_request_and_length_at_the_real_shape(vocab: int) -> None:
    logits = logits_of(16, vocab)
    length, params = on_device(Sampler(PLAIN, []))
    sample.sample(logits, length, params)
    sample.guess(logits, length, params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample.sample(logits, length, params)
        guessed, _ = sample.guess(logits, length, params)
    for i, request in enumerate(SETTINGS.values()):
        sampler = Sampler(replace(request, seed=i), [])
        sampler.accept([0] * i)
        sample.write(params, sampler, 100)
        length.fill_(100 + i)
        logits.copy_(logits_of(16, vocab, seed=i) + 2 * logits_of(16, vocab, seed=i) ** 3 / 100)
        graph.replay()
        truth = sample.reference(logits.double(), sampler)
        assert (drawn != truth).sum() <= 1, "more than the last bits of a flat row's sum"
        assert (guessed != sampler.guess(logits)[0]).sum() <= 1
