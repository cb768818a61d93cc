"""Copies of the head that only draft: which tokens they know, what they cost, what they change."""

from __future__ import annotations

import pytest
import torch

from dflash_chat.errors import UsageError
from dflash_chat.runtime import draft_head
from dflash_chat.runtime.api import EngineOptions, SamplingParams
from dflash_chat.runtime.draft_head import DraftHead
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import Float8Weight, rounded
from dflash_chat.runtime.sampling import Sampler
from tests.runtime import tiny

BF16 = torch.bfloat16
META = torch.device("meta")  # stands for any device that is not the CPU
V, C = 300, 32
ADDED = (250, 299, 400)  # the last one is not in this vocabulary
KEPT = [*range(100), 250, 299]
COPIES = {
    "fp8": EngineOptions(draft_head="fp8"),
    "trimmed": EngineOptions(draft_rows=20),
    "trimmed in fp8": EngineOptions(draft_head="fp8", draft_rows=20),
}


def head_weight() -> Packed:
    return DenseWeight(torch.randn(V, C, generator=torch.Generator().manual_seed(0)))


def make(options: EngineOptions, head: Packed | None = None) -> DraftHead:
    return draft_head.of(head or head_weight(), options, ADDED, tiny.CPU, torch.float32)


def hidden(rows: int = 50) -> torch.Tensor:
    return torch.randn(rows, C, generator=torch.Generator().manual_seed(1))


def test_without_options_the_targets_own_head_is_lent() -> None:
    own = head_weight()
    head = make(EngineOptions(), own)
    assert head.weight is own
    assert head.nbytes == 0


def test_a_cap_bounds_what_is_kept_and_drops_what_is_not() -> None:
    options = EngineOptions(draft_rows=100)
    head = draft_head.of(head_weight(), options, ADDED, tiny.CPU, torch.float32, 2.0)
    logits, wide = head.logits(hidden()), make(options).logits(hidden())
    torch.testing.assert_close(logits[:, KEPT], 2 * torch.tanh(wide[:, KEPT] / 2))
    assert torch.equal(logits.isfinite(), wide.isfinite())


def test_a_target_head_in_fp8_needs_no_fp8_copy() -> None:
    own = rounded(head_weight().dequantize())
    assert make(EngineOptions(head="fp8", draft_head="fp8"), own).weight is own


@pytest.mark.parametrize("prepacked", [False, True])
def test_a_trimmed_head_proposes_the_best_of_the_kept_tokens(
    monkeypatch: pytest.MonkeyPatch, prepacked: bool
) -> None:
    if not prepacked:
        monkeypatch.setattr(cpu, "prepacking_serves", lambda *_: False)
    own = head_weight()
    head = make(EngineOptions(draft_rows=100), own.to(tiny.CPU, torch.float32))
    truth = own.matmul(hidden())
    logits = head.logits(hidden())
    torch.testing.assert_close(logits[:, KEPT], truth[:, KEPT])
    dropped = sorted({*range(V)} - {*KEPT})
    assert (logits[:, dropped] == float("-inf")).all()
    best = truth[:, KEPT].argmax(-1)
    assert logits.argmax(-1).tolist() == [KEPT[i] for i in best.tolist()]
    assert {250, 299} & {*logits.argmax(-1).tolist()}, "an added token must have won somewhere"


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1.5, seed=3),
    SamplingParams(temperature=1.5, seed=3, top_k=150, top_p=0.99, min_p=0.001),
])  # fmt: skip
@pytest.mark.parametrize("rows", [5, 100])
def test_a_sampled_guess_is_a_kept_token_too(params: SamplingParams, rows: int) -> None:
    """5 rows are fewer than the guess looks at, 150 of top-k more than are kept."""
    head = make(EngineOptions(draft_rows=rows))
    tokens, chances = Sampler(params, []).guess(head.logits(hidden()))
    assert {*tokens.tolist()} <= {*range(rows), 250, 299}
    assert len({*tokens.tolist()}) > rows / 3
    assert ((chances > 0) & (chances <= 1)).all()


def test_the_guesss_noise_belongs_to_the_vocabularys_ids() -> None:
    """Flat logits leave the choice to the noise: among the kept, the one whose noise is largest."""
    params = SamplingParams(temperature=1.0, seed=11)
    flat = DenseWeight(torch.zeros(V, C))
    tokens, _ = Sampler(params, []).guess(make(EngineOptions(draft_rows=40), flat).logits(hidden()))
    only = torch.full((50, V), float("-inf"))
    only[:, [*range(40), 250, 299]] = 0
    assert torch.equal(tokens, Sampler(params, []).guess(only)[0])
    assert tokens.max() >= 250


def test_a_trimmed_head_knows_what_the_text_has_brought() -> None:
    own = head_weight()
    head = make(EngineOptions(draft_rows=20), own)
    truth = own.matmul(hidden())
    known = {*range(20), 250, 299}
    for ids in ([7, 120, 250, 120], [], [60, 120]):
        head.read(ids)
        known |= {*ids}
        logits, tokens = head.candidates(hidden())
        assert tokens is not None
        assert sorted(tokens.tolist()) == sorted(known)  # none of them twice
        torch.testing.assert_close(logits, truth[:, tokens])
        whole = head.logits(hidden())
        assert {*whole[0].isfinite().nonzero()[:, 0].tolist()} == known
        greedy, sampled = SamplingParams(temperature=0.0), SamplingParams(temperature=1.5, seed=3)
        for params in (greedy, sampled):
            sampler = Sampler(params, [])
            assert torch.equal(sampler.guess(logits, tokens)[0], sampler.guess(whole)[0])


def test_of_more_tokens_than_there_is_room_for_the_latest_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_head, "TEXT_ROWS", 8)
    own = head_weight()
    head = make(EngineOptions(draft_rows=20), own)

    def text() -> list[int]:
        logits, tokens = head.candidates(hidden())
        assert tokens is not None
        torch.testing.assert_close(logits, own.matmul(hidden())[:, tokens])
        return sorted(set(tokens.tolist()) - {*range(20), 250, 299})

    head.read(range(100, 120))
    assert text() == [*range(112, 120)]
    head.read([200, 113, 201])
    assert text() == [*range(114, 120), 200, 201]


def test_on_a_device_no_rows_come_and_go() -> None:
    head = draft_head.of(head_weight(), EngineOptions(draft_rows=20), ADDED, META, torch.float32)
    assert head.text is None


@pytest.mark.parametrize("rows", [V, V + 1])
def test_more_rows_than_there_are_is_refused(rows: int) -> None:
    with pytest.raises(UsageError, match=f"keeps {rows} rows, and this target's head has {V}"):
        make(EngineOptions(draft_rows=rows))


def test_what_a_copy_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Float8Weight, "to", lambda self, *_: self)  # as on a device
    monkeypatch.setattr(cpu, "prepacking_serves", lambda *_: False)
    kept = len(KEPT)
    assert make(EngineOptions(draft_head="fp8")).nbytes == V * (C + 4)
    text = draft_head.TEXT_ROWS * C * 4
    assert make(EngineOptions(draft_rows=100)).nbytes == kept * C * 4 + text
    assert make(EngineOptions(draft_head="fp8", draft_rows=100)).nbytes == kept * (C + 4) + text


def test_a_drafter_counts_the_head_copied_for_it() -> None:
    target = tiny.target()
    lent, copied = tiny.drafter(target), tiny.drafter(target)
    copied.head = draft_head.of(
        target.lm_head, EngineOptions(draft_rows=20), (), tiny.CPU, torch.float32
    )
    assert copied.nbytes == lent.nbytes + copied.head.nbytes > lent.nbytes


@pytest.mark.skipif(not cpu.int8_serves(BF16), reason="no fbgemm for this CPU")
def test_nobodys_choice_on_a_cpu_is_a_quarter_of_the_rows_in_int8() -> None:
    def copied(options: EngineOptions, own: Packed, dtype: torch.dtype = BF16) -> bool:
        return draft_head.of(own, options, (), tiny.CPU, dtype).copied

    own = head_weight().to(tiny.CPU, BF16)
    head = draft_head.of(own, EngineOptions(), ADDED, tiny.CPU, BF16)
    assert head.weight.kernel == "int8"
    assert head.ids is not None
    assert head.ids.tolist() == [*range(V // 4), 250, 299]
    assert head.nbytes == (V // 4 + 2) * (C + 12) + draft_head.TEXT_ROWS * C * 2
    head.read([200, 3, 250])
    logits, ids = head.candidates(hidden().bfloat16())
    assert ids is not None
    assert ids.tolist() == [*range(V // 4), 250, 299, 200]
    exact = own.matmul(hidden().bfloat16())[:, ids].float()
    torch.testing.assert_close(logits.float(), exact, rtol=0.02, atol=0.4)
    torch.testing.assert_close(logits[:, -1].float(), exact[:, -1], rtol=0.01, atol=0.05)
    assert not copied(EngineOptions(draft_head="own"), own)
    assert not copied(EngineOptions(head="fp8", draft_head="fp8"), own)
    assert not copied(EngineOptions(), head_weight(), torch.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", COPIES)
def test_drafting_from_a_copy_equals_plain(name: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=40)
    prompt = [5, 9, 2, 33, 17, 8]
    target = tiny.target()
    plain = Engine(target, target.new_cache(256), None, (), 0, frozenset())
    drafter = tiny.drafter(target)
    drafter.head = draft_head.of(target.lm_head, COPIES[name], (50,), tiny.CPU, torch.float32)
    engine = Engine(target, target.new_cache(256), drafter, tiny.TAPS, 4, frozenset())
    answer = tiny.tokens(tiny.run(engine, prompt, params))
    assert answer == tiny.tokens(tiny.run(plain, prompt, params))


@pytest.mark.parametrize("shape", [(40, 96), (3, 5, 64), (8200, 4)])  # the last in two chunks
def test_rounding_keeps_three_mantissa_bits_of_every_row(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight *= torch.logspace(-6, 3, shape[-2])[:, None]  # rows of every size
    weight[..., 1, :] = 0
    packed = rounded(weight)
    assert packed.shape == shape
    assert packed.weight.dtype == torch.float8_e4m3fn
    step = torch.maximum(weight.abs() / 16, packed.scale * 2**-10)  # half a step, subnormals too
    assert ((packed.dequantize() - weight).abs() <= step * 1.001).all()
    assert (packed.weight.float().abs().amax(-1)[weight.abs().amax(-1) > 0] == 448).all()


def test_rounded_rows_stay_eight_bits_on_a_device() -> None:
    packed = rounded(torch.randn(40, 96)).to(META, torch.bfloat16)
    assert packed.nbytes == 40 * (96 + 4)
