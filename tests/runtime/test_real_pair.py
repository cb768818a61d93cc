"""The default pair with its real weights, end to end below the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dflash_chat import hub, pairs
from dflash_chat.bench import read_prompts
from dflash_chat.runtime import flash, weights
from dflash_chat.runtime.api import (
    EngineOptions,
    Finished,
    Generate,
    Message,
    Prefill,
    SamplingParams,
    Spec,
    Tokens,
)
from dflash_chat.runtime.controller import Controller
from dflash_chat.runtime.costs import Costs, CostTable
from dflash_chat.runtime.draft_head import INT8_SHARE, TEXT_ROWS
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.models import llama
from dflash_chat.runtime.quant import cpu
from dflash_chat.runtime.session import Session
from dflash_chat.ui.origins import Trace

pytestmark = [pytest.mark.weights, pytest.mark.slow]

TAPS = (1, 8, 14, 20, 27)


NEAR_TIE = 0.25  # of logits that span some twenty: what bf16 can turn around


def _load(gguf: Path, dtype: str, device: str = "cpu", **chosen: str | int) -> Session:
    pair = pairs.find("smollm2-135m")
    installed = hub.Installed(
        pair, pair.builds[0], gguf, pair.drafter.path, bytes=gguf.stat().st_size
    )
    options = EngineOptions(device, dtype, context_tokens=2048, draft_tokens=7, **chosen)  # type: ignore[arg-type]
    return Session.load(installed, options, lambda _: None)


@pytest.fixture(scope="module")
def exact(smollm2_gguf: Path) -> Session:
    return _load(smollm2_gguf, "fp32")


@pytest.fixture(scope="module")
def quick(smollm2_gguf: Path) -> Session:
    return _load(smollm2_gguf, "auto")


def _answer(
    session: Session, *messages: Message, draft: bool = True, params: SamplingParams
) -> tuple[str, Finished, Prefill]:
    pieces: list[str] = []
    prefill = None
    for event in session.generate(Generate(1, messages, params, draft), lambda: False):
        if isinstance(event, Prefill):
            prefill = prefill or event
        elif isinstance(event, Tokens):
            pieces.append(event.text)
        elif isinstance(event, Finished):
            assert prefill is not None
            return "".join(pieces), event, prefill
    raise AssertionError("no Finished event")


def _ask(prompt: str) -> Message:
    return Message("user", prompt)


def test_logits_and_tapped_features_equal_transformers(smollm2_gguf: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    raw, tensors = weights.load_dequantized(smollm2_gguf, torch.float32)
    reference = LlamaForCausalLM(LlamaConfig(**raw)).eval()
    loaded = reference.load_state_dict(tensors, strict=False)
    assert not loaded.unexpected_keys
    checkpoint = weights.open_checkpoint(smollm2_gguf)
    config = llama.Config.from_hf(checkpoint.config)
    packed = weights.load_packed(checkpoint, config.tensor_shapes())
    target = llama.Target(config, packed, 256, torch.float32, torch.device("cpu"))
    ids = torch.randint(20, 49000, (96,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        truth = reference(ids[None], output_hidden_states=True)
        hidden, features = target.forward(ids, target.new_cache(256), TAPS)
        ours = [target.logits(hidden), *features.chunk(len(TAPS), -1)]
    theirs = [truth.logits[0], *(truth.hidden_states[tap + 1][0] for tap in TAPS)]
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3


def test_a_cpu_drafts_in_int8(quick: Session) -> None:
    target, drafter = quick.engine.target, quick.engine.drafter
    assert isinstance(target, llama.Target)
    assert isinstance(drafter, Drafter)
    rounded = cpu.int8_serves(target.dtype)
    vocab, hidden = target.lm_head.shape
    rows = vocab // INT8_SHARE  # with the special tokens, which have the lowest ids
    assert (f"int8 drafter, int8 draft head of {rows} rows" in quick.info.kernels) == rounded
    assert drafter.head.nbytes == rounded * (rows * (hidden + 12) + TEXT_ROWS * hidden * 2)
    assert (drafter.layers[0].qkv.kernel == "int8") == rounded


def test_paris(quick: Session) -> None:
    text, finished, _ = _answer(
        quick, _ask("What is the capital of France?"), params=SamplingParams(max_tokens=64)
    )
    assert "Paris" in text
    assert finished.reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("prompt", read_prompts(None)[1:3])
@pytest.mark.parametrize("dtype", ["exact", "quick"])
def test_answers_are_identical_with_and_without_drafting(
    dtype: str, prompt: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    """In bf16, too: a row computes the same bits whatever stands behind it."""
    if dtype == "quick" and torch.cpu._is_amx_tile_supported():
        pytest.skip("what AMX adds up in which order is not known")
    session: Session = request.getfixturevalue(dtype)
    params = SamplingParams(max_tokens=32, temperature=temperature, seed=3)
    drafted, with_draft, _ = _answer(session, _ask(prompt), params=params)
    plain, without, again = _answer(session, _ask(prompt), draft=False, params=params)
    assert again.cached == with_draft.usage.prompt - 1
    assert drafted == plain
    assert with_draft.usage.completion == without.usage.completion
    assert with_draft.spec.steps < without.spec.steps


def test_coarse_drafting_changes_no_answer_and_its_costs_are_told(
    exact: Session, smollm2_gguf: Path
) -> None:
    coarse = _load(smollm2_gguf, "fp32", drafter="fp8", draft_head="fp8", draft_rows=24000)
    prompt, params = _ask(read_prompts(None)[2]), SamplingParams(max_tokens=32)
    drafted, with_draft, _ = _answer(coarse, prompt, params=params)
    assert drafted == _answer(exact, prompt, draft=False, params=params)[0]
    assert with_draft.spec.tau > 1.5
    added = {i for i in coarse.tokenizer.added_ids if i >= 24000}
    words = f"fp8 drafter, fp8 draft head of {24000 + len(added)} rows"
    assert coarse.info.kernels == f"{exact.info.kernels}, {words}"
    assert coarse.info.target_bytes == exact.info.target_bytes


def test_what_computes_is_told_and_a_rounded_target_head_still_drafts_losslessly(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "words", lambda cache, heads: f"long prompts with {heads} heads")
    session = _load(smollm2_gguf, "fp32", head="fp8", draft_head="fp8")
    assert session.info.kernels.endswith(", long prompts with 9 heads, fp8 target head")
    prompt, params = _ask(read_prompts(None)[3]), SamplingParams(max_tokens=24)
    drafted, _, _ = _answer(session, prompt, params=params)
    assert drafted == _answer(session, prompt, draft=False, params=params)[0]


def test_every_emitted_token_is_the_argmax_of_its_verify_row(
    quick: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the target's own choice is ever emitted."""
    target = quick.engine.target
    rows: list[Tensor] = []
    original = target.logits

    def recorded(hidden: Tensor) -> Tensor:
        rows.append(original(hidden))
        return rows[-1]

    monkeypatch.setattr(target, "logits", recorded)
    prompt = quick.tokenizer.render((_ask("List the planets of the solar system."),))
    emitted = 0
    for step in quick.engine.generate(prompt, SamplingParams(max_tokens=96)):
        tokens = getattr(step, "tokens", ())
        if tokens:
            assert list(tokens) == rows[-1].argmax(-1)[: len(tokens)].tolist()
            emitted += len(tokens)
    assert emitted == 96


def test_an_answer_that_copies_the_prompt_is_the_same_without_a_draft(
    exact: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = _ask("Repeat word for word: Elm Street 17, Oak Street 18, Ash Street 19, Fir Street 20.")
    widths = tuple(range(1, 9))
    table = CostTable(widths, (64,), (10.0,), tuple((20.0 + n,) for n in widths))
    for temperature in (0.0, 0.3):
        params = SamplingParams(max_tokens=48, temperature=temperature, seed=3)
        same, drafted, _ = _answer(exact, ask, params=params)
        with monkeypatch.context() as chosen:  # widths, at times that are not a busy moment's
            chosen.setattr(exact.engine, "_pinned", None)
            chosen.setattr(exact.engine, "controller", Controller(Costs(table), 7, late=False))
            text, finished, _ = _answer(exact, ask, params=params)
        assert text == same
        assert finished.spec.copied > finished.spec.lookups > 0
        assert drafted.spec.lookups == 0, "its width is pinned"


def test_the_drafter_earns_its_keep(quick: Session) -> None:
    spec = Spec()
    for prompt in read_prompts(None)[1:7]:
        _, finished, _ = _answer(quick, _ask(prompt), params=SamplingParams(max_tokens=48))
        spec = spec.merge(finished.spec)
    assert spec.tau > 2.0


def test_a_second_turn_reads_only_what_is_new(quick: Session) -> None:
    params = SamplingParams(max_tokens=40)
    question = _ask("Name three colours.")
    text, first, _ = _answer(quick, question, params=params)
    follow = (question, Message("assistant", text), _ask("And three more?"))
    _, second, prefill = _answer(quick, *follow, params=params)
    assert prefill.cached == second.usage.cached >= first.usage.prompt
    assert second.usage.prompt - second.usage.cached < 40


def test_the_pieces_by_token_add_up_to_the_answer_and_plain_passes_to_a_speed_up(
    quick: Session,
) -> None:
    trace = Trace()
    ask = _ask("Say this once more, exactly: naïve café, 日本語, 😀😃, schöne Grüße.")
    shown, finished = "", None
    for event in quick.generate(Generate(1, (ask,), SamplingParams(max_tokens=60)), lambda: False):
        if isinstance(event, Tokens):
            assert sum(event.lengths) == len(event.text)
            trace.take(event)
            shown += event.text
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None
    assert "".join(piece.text for block in trace.blocks for piece in block.pieces) == shown
    assert sum(len(block.pieces) for block in trace.blocks) == finished.usage.completion
    assert trace.spec == finished.spec
    assert finished.timing.speedup == finished.timing.tok_s / finished.timing.ar_tok_s
    assert 0 < finished.timing.prefill_s < finished.timing.ttft_s


def test_a_stopped_answer_is_continued_with_the_ids_that_wrote_it(exact: Session) -> None:
    question = _ask("Explain in three sentences why the sky is blue.")
    params = SamplingParams(temperature=0.7, seed=11, max_tokens=60)
    whole, _, _ = _answer(exact, question, params=params)
    part, first, _ = _answer(exact, question, params=replace(params, max_tokens=23))
    request = Generate(
        2, (question, Message("assistant", part)), replace(params, max_tokens=37),
        continue_last=True,
    )  # fmt: skip
    *events, second = exact.generate(request, lambda: False)
    assert isinstance(second, Finished)
    assert part + "".join(event.text for event in events if isinstance(event, Tokens)) == whole
    # The whole prefix was there but its last token, which a prompt always reads.
    assert second.usage.prompt == first.usage.prompt + 23
    assert second.usage.cached == second.usage.prompt - 1


def test_a_seed_fixes_the_answer(quick: Session) -> None:
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=40)
    one, _, _ = _answer(quick, _ask("Tell me a joke."), params=params)
    two, _, _ = _answer(quick, _ask("Tell me a joke."), params=params)
    assert one == two


def test_a_stop_string_ends_the_answer_before_itself(quick: Session) -> None:
    whole, _, _ = _answer(quick, _ask("Count to ten."), params=SamplingParams(max_tokens=60))
    stop = whole[20:24]
    cut, finished, _ = _answer(
        quick, _ask("Count to ten."), params=SamplingParams(max_tokens=60, stop=(stop,))
    )
    assert cut == whole[: whole.index(stop)]
    assert finished.reason == "stop"


def test_cancel_keeps_what_was_committed_and_the_caches(quick: Session) -> None:
    request = Generate(3, (_ask("Write a long story."),), SamplingParams(max_tokens=400))
    seen: list[Tokens] = []
    finished = None
    for event in quick.generate(request, lambda: len(seen) >= 4):
        if isinstance(event, Tokens):
            seen.append(event)
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None
    assert finished.reason == "cancelled"
    assert finished.usage.completion == sum(event.tokens for event in seen)
    assert len(quick.engine.log) == quick.engine.cache.length


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_graphs_answer_the_same_with_and_without_drafting(
    smollm2_gguf: Path, temperature: float
) -> None:
    session = _load(smollm2_gguf, "auto", "cuda")
    assert session.engine.graphed is not None, session.engine.eager_because
    assert "long prompts by " in session.info.kernels
    params = SamplingParams(max_tokens=96, temperature=temperature, seed=3)
    for prompt in read_prompts(None)[:6]:
        drafted, with_draft, _ = _answer(session, _ask(prompt), params=params)
        plain, without, _ = _answer(session, _ask(prompt), draft=False, params=params)
        assert drafted == plain
        assert with_draft.spec.steps < without.spec.steps


@pytest.mark.gpu
def test_graphs_answer_as_the_cpu_does_up_to_near_ties(smollm2_gguf: Path, exact: Session) -> None:
    graphed = _load(smollm2_gguf, "auto", "cuda")
    params = SamplingParams(max_tokens=48)
    for prompt in read_prompts(None)[:6]:
        ids = graphed.tokenizer.render((_ask(prompt),))
        ours, theirs = (
            [t for s in e.engine.generate(ids, params) for t in getattr(s, "tokens", ())]
            for e in (graphed, exact)
        )
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        target = exact.engine.target
        cache = exact.engine.cache
        with torch.inference_mode():
            cache.truncate(0)
            exact.engine.log.clear()
            hidden, _ = target.forward(torch.tensor([*ids, *theirs[:at]]), cache)
            logits = target.logits(hidden[-1:])[0]
            cache.commit(0)
        assert float(logits[theirs[at]] - logits[ours[at]]) < NEAR_TIE, (prompt, at)
