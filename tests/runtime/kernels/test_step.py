"""The step from our kernels against the architectures' own plain forward, tiny and seeded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.kernels import accept
from dflash_chat.runtime.kernels.accept import State
from dflash_chat.runtime.kernels.forms import Int8
from dflash_chat.runtime.quant import cpu, kernel_weights
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.random_weights import RandomWeights
from dflash_chat.runtime.step import Step, TargetParts
from tests.runtime.kernels import pairs
from tests.runtime.kernels.conftest import DEVICE
from tests.runtime.kernels.pairs import BLOCK, TAPS, VOCAB
from tests.runtime.kernels.truth import assert_as_good, relative_error

CAPACITY, PROMPT = 128, 40
HEADS = {
    "fp8": EngineOptions(drafter="fp8", draft_head="fp8"),
    "trimmed": EngineOptions(draft_rows=30),
    "screened": EngineOptions(head="screened"),
    "trimmed in fp8": EngineOptions(draft_head="fp8", draft_rows=30),
}


TOLERANCE = 1e-2 if DEVICE.type == "cuda" else 1e-5  # tf32 or fp32


def agree(tokens: Tensor, logits: Tensor) -> None:
    """Every token is its row's likeliest, or as good as that."""
    lead = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    assert float(lead.max()) <= TOLERANCE * float(logits[logits.isfinite()].abs().max())


class Pair:
    """A tiny target and drafter that have read a prompt, and the step over the same caches."""

    def __init__(self, kind: str, options: EngineOptions, steps: int = 2) -> None:
        self.steps = steps
        self.target, self.cache, self.drafter = pairs.tiny(kind, CAPACITY, options)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, VOCAB, (PROMPT,), generator=generator).to(DEVICE)
        hidden, features = self.target.forward(self.prompt, self.cache, TAPS)
        self.cache.commit(PROMPT)
        self.drafter.observe(features)
        self.drafter.flush()
        self.step = Step(TargetParts.of(self.target), self.cache, self.drafter, TAPS)
        self.step.state.length.fill_(PROMPT)
        self.step.state.start.fill_(PROMPT)
        anchor = int(self.target.logits(hidden[-1:]).argmax())
        self.step.state.ids[0] = self.step.state.block[0] = anchor


@pytest.fixture(params=[*pairs.KINDS, *HEADS], scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    options = HEADS.get(request.param, EngineOptions())
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(cpu, "prepacking_serves", lambda *_: False)  # kernels read plain tensors
        patch.setattr(Float8Weight, "to", lambda w, *_: kernel_weights.fp8(w.weight, w.scale))
        if request.param in pairs.KINDS:
            return Pair(request.param, options)
        return Pair("llama", options, steps=1)


@pytest.mark.slow
def test_steps_equal_the_plain_target_and_drafter(pair: Pair) -> None:
    """Draft and verify; the plain side is told what was committed and must agree."""
    step, target, drafter, cache = pair.step, pair.target, pair.drafter, pair.cache
    with torch.inference_mode():
        for _ in range(pair.steps):
            anchor = int(step.state.ids[0])
            want = drafter.draft(anchor, BLOCK - 1)
            step.draft()
            sure = want.float().softmax(-1).amax(-1)
            torch.testing.assert_close(
                step.state.confidence[: BLOCK - 1], sure, rtol=0.02, atol=2e-3
            )
            ids = step.state.ids[:BLOCK].clone()
            agree(ids[1:], want)
            hidden, features = target.forward(ids, cache, TAPS)
            ours = step.forward(BLOCK)
            assert relative_error(ours, hidden) < TOLERANCE
            assert relative_error(step.features[:BLOCK], features) < TOLERANCE
            step.verify(BLOCK)
            choices = step.record[1 : 1 + BLOCK].long()
            agree(choices, target.logits(hidden))
            n = accept.reference(ids, choices)
            assert int(step.record[0]) == n
            assert int(step.state.ids[0]) == int(choices[n])
            cache.commit(n + 1)
            drafter.observe(features[: n + 1])
            assert int(step.state.length) == cache.length


def test_the_draft_heads_logits_equal_the_plain_ones(pair: Pair) -> None:
    assert pair.step.drafting is not None
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        ours = pair.step.drafting.draft_head.logits(hidden)
        plain = pair.drafter.head.logits(hidden)
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma4"]
)  # experts would be chosen by rounding
@pytest.mark.parametrize("rows", [1, BLOCK])
def test_bf16_errs_at_most_twice_as_plain_torch_does(kind: str, rows: int) -> None:
    made = pairs.tiny(kind, CAPACITY, dtype=torch.bfloat16)
    config = made.target.config
    narrow = RandomWeights(config.tensor_shapes(), "bf16", DEVICE, torch.bfloat16)
    true = type(made.target)(config, pairs.Widened(narrow), CAPACITY, torch.float32, DEVICE)
    ids = torch.arange(7, 7 + PROMPT + rows, device=DEVICE) % VOCAB
    with torch.inference_mode():
        read = [ids[:PROMPT], ids[PROMPT:]]
        found = []
        for target, cache in ((made.target, made.cache), (true, true.new_cache(CAPACITY))):
            target.forward(read[0], cache, TAPS)
            cache.commit(PROMPT)
            found.append(target.forward(read[1], cache, TAPS))
        (plain, plain_features), (truth, true_features) = found
        step = Step(TargetParts.of(made.target), made.cache, made.drafter, TAPS)
        step.state.length.fill_(PROMPT)
        step.state.ids[:rows] = read[1]
        ours = step.forward(rows)
        assert_as_good(ours, plain, truth)
        assert_as_good(step.features[:rows], plain_features, true_features)
        logits = [target.logits(hidden) for target, hidden in ((made.target, plain), (true, truth))]
        assert_as_good(step.logits(ours), *logits)


@pytest.mark.parametrize("right", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("scripted", [False, True])
def test_acceptance_moves_the_state(right: int, scripted: bool) -> None:
    def scalar(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=DEVICE)

    chosen = torch.arange(10, 18, device=DEVICE)
    ids = torch.zeros(17, dtype=torch.int64, device=DEVICE)
    ids[1:8] = chosen[:7]
    if right < 7:
        ids[1 + right] = 99
    state = State(ids, torch.zeros(8, dtype=torch.int64, device=DEVICE), scalar(30), scalar(0),
                  scalar(0), scalar(1), torch.arange(17, device=DEVICE) / 16)  # fmt: skip
    record = accept.new_record(DEVICE)
    script = torch.tensor([4, 12, 2], dtype=torch.int32, device=DEVICE) if scripted else None
    n = 7 if scripted else accept.reference(ids[:8], chosen)
    assert scripted or n == right
    accept.accept(state, chosen, record, script)
    assert record.tolist()[:9] == [n, *chosen.tolist()]
    confidence = [i / 16 for i in range(7)]
    assert accept.read(record.cpu(), 7) == (n, chosen.tolist()[: n + 1], confidence)
    assert [int(x) for x in (state.length, state.start, state.committed, state.step)] == [
        31 + n, 30, n + 1, 2,
    ]  # fmt: skip
    assert int(state.ids[0]) == int(state.block[0]) == 10 + n


def test_a_screened_step_chooses_and_drafts_by_the_copy() -> None:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(cpu, "prepacking_serves", lambda *_: False)
        plain, screened = (
            Pair("llama", EngineOptions(head=head)).step for head in ("own", "screened")
        )
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = plain.argmax(hidden)
        assert torch.equal(screened.argmax(hidden), want)
        assert torch.equal(screened.logits(hidden), plain.logits(hidden))
        assert isinstance(screened.screen, Int8)
        assert screened.drafting is not None
        assert screened.drafting.draft_head.weight is screened.screen
        screened.screen = screened.screen._replace(scale=-screened.screen.scale)
        assert not torch.equal(screened.argmax(hidden), want), "the copy must have been read"
