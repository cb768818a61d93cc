"""The target's distribution, filters and penalties, and the coupling to drafted tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_chat.runtime import sampling
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.sampling import (
    Sampler,
    accepted,
    draw,
    draw_of_few,
    filtered,
    inverse_cdf,
    largest,
    mix,
    uniform,
)
from tests.runtime import tiny


def chi_square_ok(observed: dict[int, int], expected: Tensor, draws: int) -> bool:
    """Pearson's statistic below its 99.9 % quantile (Wilson–Hilferty approximation)."""
    cells = [(observed.get(i, 0), float(p) * draws) for i, p in enumerate(expected) if p > 0]
    statistic = sum((seen - want) ** 2 / want for seen, want in cells)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic < limit and all(i in range(len(expected)) for i in observed)


def test_inverse_cdf_follows_the_weights() -> None:
    weights = torch.tensor([[0.5, 0.0, 1.5, 3.0, 0.0, 1.0]])
    draws = 20000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids = inverse_cdf(weights.expand(draws, -1), uniforms).tolist()
    assert chi_square_ok(Counter(ids), weights[0] / weights.sum(), draws)
    assert inverse_cdf(weights, torch.tensor([1.0], dtype=torch.float64)).tolist() == [5]


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False], ids=["drafts that fit", "drafts that do not"])
def test_two_drafted_tokens_follow_the_targets_joint_distribution(right: bool) -> None:
    """16-token vocabulary: the pairs (y1, y2) that speculation emits against the exact product."""
    vocab, draws = 16, 1500
    target = tiny.target(seed=4, vocab=vocab)
    settings = SamplingParams(temperature=1.3, max_tokens=3)
    with torch.inference_mode():
        hidden, _ = target.forward(torch.tensor([1, 2]), target.new_cache(8))
        first = filtered(target.logits(hidden[-1:]), settings)[0]
        joint = torch.zeros(vocab, vocab)
        for y in range(vocab):
            hidden, _ = target.forward(torch.tensor([1, 2, y]), target.new_cache(8))
            joint[y] = first[y] * filtered(target.logits(hidden[-1:]), settings)[0]
    favourite = joint.argmax(-1)

    class Guess:
        length = 0

        def observe(self, features: Tensor) -> None:
            self.length += len(features)

        def flush(self) -> None: ...

        def rewindable(self, n: int) -> int:
            return n

        def truncate(self, n: int) -> None:
            self.length = n

        def read(self, ids: Sequence[int]) -> None: ...

        def candidates(self, hidden: Tensor) -> tuple[Tensor, None]:
            return hidden, None

        def forward(self, anchor: int, n: int) -> Tensor:
            best = favourite[anchor] if right else joint[anchor].argmin()
            return tiny.certain([int(best)] * n, vocab)

    engine = Engine(target, target.new_cache(16), Guess(), tiny.TAPS, 2, frozenset())
    seen: Counter[int] = Counter()
    accepted_drafts = 0
    for seed in range(draws):
        params = SamplingParams(temperature=1.3, max_tokens=3, seed=seed)
        steps = tiny.run(engine, [1, 2], params)
        a, b = tiny.tokens(steps)[:2]
        seen[a * vocab + b] += 1
        accepted_drafts += steps[1].stats.accepted > 0  # type: ignore[union-attr]
    assert (accepted_drafts > draws / 10) == right
    observed_first = Counter(
        {y: sum(seen[y * vocab + z] for z in range(vocab)) for y in range(vocab)}
    )
    observed_second = Counter(
        {z: sum(seen[y * vocab + z] for y in range(vocab)) for z in range(vocab)}
    )
    assert chi_square_ok(observed_first, first / first.sum(), draws)
    second = joint.sum(0)
    assert chi_square_ok(observed_second, second / second.sum(), draws)
    flat = joint.flatten() / joint.sum()
    common = flat > 5 / draws  # cells with enough expected counts, the rest pooled into one
    pooled = torch.cat([flat[common], flat[~common].sum()[None]])
    index = {int(cell): i for i, cell in enumerate(common.nonzero().flatten())}
    counts: Counter[int] = Counter()
    for cell, count in seen.items():
        counts[index.get(cell, len(index))] += count
    assert chi_square_ok(counts, pooled, draws)


def test_filters_keep_exactly_what_their_definitions_keep() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])
    logits = probabilities.log()

    def kept(**settings: float) -> list[int]:
        weights = filtered(logits, SamplingParams(temperature=1.0, **settings))  # type: ignore[arg-type]
        return weights[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.71) == [0, 1, 2]
    assert kept(top_p=0.01) == [0]
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.8) == [0, 1]  # 0.4 + 0.3 of 0.85 reaches 0.8 of the rest


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    logits = torch.zeros(1, 4096) + torch.arange(4096) * 1e-6
    weights = filtered(logits, SamplingParams(temperature=1.0, top_p=0.5))
    assert abs(int((weights > 0).sum()) - 2048) <= 16


def test_penalties_of_row_k_count_the_answer_and_the_first_k_drafts() -> None:
    settings = SamplingParams(repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.2)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 8, generator=generator)
    sampler = Sampler(settings, prompt=[6])
    sampler.accept([1, 1, 2])
    batched = sampler._penalised(logits, torch.tensor([3, 1]))
    for row, extra in enumerate(([], [3], [3, 1])):
        answer = [1, 1, 2, *extra]
        for token in range(8):
            value = float(logits[row, token])
            if token in answer or token == 6:
                value = value / 1.5 if value > 0 else value * 1.5
            count = answer.count(token)
            value -= 0.2 * count + 0.7 * (count > 0)
            assert float(batched[row, token]) == pytest.approx(value, abs=1e-6)


def test_the_same_seed_gives_the_same_noise_whatever_the_block_widths() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    cpu = torch.device("cpu")
    one, many = Sampler(params, []), Sampler(params, [])
    narrow = []
    for _ in range(4):
        narrow += one.keys(1, cpu).tolist()
        one.accept([0])
    assert narrow == many.keys(4, cpu).tolist()
    assert narrow != Sampler(SamplingParams(temperature=1.0, seed=12), []).keys(4, cpu).tolist()


def test_noise_is_uniform_over_tokens_and_over_positions() -> None:
    tokens = uniform(torch.tensor([99]), torch.arange(40000))
    positions = uniform(mix(torch.arange(40000) * 0x9E3779B1), torch.tensor([7]))
    for numbers in (tokens, positions):
        counts = Counter((numbers * 50).long().tolist())
        assert chi_square_ok(counts, torch.full((50,), 1 / 50), 40000)
        neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
        assert abs(float(neighbours)) < 4 / 40000**0.5


@pytest.mark.parametrize("vocab", [6, 300], ids=["all have noise", "most compete as one"])
def test_draw_follows_the_weights(vocab: int) -> None:
    weights = torch.arange(vocab)[None].float() % 7
    draws = 30000
    ids = draw(weights.expand(draws, -1), mix(torch.arange(draws) * 0x9E3779B1)).tolist()
    assert chi_square_ok(Counter(ids), weights[0] / weights.sum(), draws)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_a_draw_is_the_same_whether_the_rest_are_weighed_or_not(
    sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(400, 16384, generator=generator) * sharpness).softmax(-1)
    rows[::3, 10:] = 0.0  # few tokens left, and nothing of the rest
    keys = mix(torch.arange(400) * 0x9E3779B1)
    at_once = torch.cat([draw(rows[i : i + 1], keys[i : i + 1]) for i in range(400)])
    monkeypatch.setattr(sampling, "_SUMS_ERR", math.inf)  # so nothing is known to lose unweighed
    assert torch.equal(at_once, draw(rows, keys))


@given(
    st.sampled_from([0.1, 0.7, 1.0, 3.0]), st.sampled_from([0, 1, 20, 64, 65, 400]),
    st.sampled_from([0.05, 0.9, 1.0]), st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.3, 3.0, 12.0]), st.sampled_from([16384, 500]), st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_a_draw_of_few_is_the_draw_of_all(
    temperature: float, top_k: int, top_p: float, min_p: float, spread: float, vocab: int, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator) * spread
    logits[0, 7 : 7 + seed % 40] = logits[0, 3]  # as likely as another
    key = mix(torch.tensor([seed]))
    weights = filtered(logits, params)
    few = draw_of_few(logits, params, key)
    sought = (top_k or top_p < 1.0 or min_p) and top_k <= 64
    assert (few is not None) == (sought and int((weights > 0).sum()) <= 64)
    assert few is None or few == int(draw(weights, key))


@given(
    st.integers(1, 3), st.integers(1, 64), st.sampled_from([64 * 130, 64 * 128, 64 * 20, 8321]),
    st.sampled_from([3, 10**6]), st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_largest_are_those_of_a_whole_row(
    rows: int, k: int, vocab: int, kinds: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (rows, vocab), generator=generator).float()
    x[:, ::7] = -math.inf
    values, ids = largest(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(values, x.gather(-1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())


def test_a_drafter_that_knows_the_target_is_always_right() -> None:
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * 3
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.0, top_k=9, top_p=0.8, min_p=0.05, seed=4),
    ):
        sampler = Sampler(params, [])
        tokens, chances = sampler.guess(logits[:3])
        assert sampler.choose(logits, tokens)[:3].tolist() == tokens.tolist()
        assert bool(((chances > 0) & (chances <= 1)).all())


def test_shared_noise_matches_more_often_than_the_likeliest_token() -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1500, 40, generator=generator) * 1.5
    drafter = target + torch.randn(1500, 40, generator=generator) * 0.3
    coupled = greedy = 0
    for seed in range(1500):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        row = target[seed : seed + 1]
        chosen = int(sampler.choose(row, torch.empty(0, dtype=torch.int64))[0])
        coupled += chosen == int(sampler.guess(drafter[seed : seed + 1])[0])
        greedy += chosen == int(row.argmax())
    assert coupled > 1.5 * greedy


def test_accepted_counts_the_confirmed_prefix() -> None:
    assert accepted([4, 5, 6], [4, 5, 6, 7]) == 3
    assert accepted([4, 5, 6], [4, 9, 6, 7]) == 1
    assert accepted([], [4]) == 0
