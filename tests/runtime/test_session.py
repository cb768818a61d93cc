"""What a session tells of an answer, and what becomes of it when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch

from dflash_chat.errors import EXIT_DOES_NOT_FIT, DoesNotFitError, UsageError
from dflash_chat.runtime.api import (
    Event,
    Finished,
    Generate,
    Message,
    ModelInfo,
    SamplingParams,
    Tokens,
)
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.loading import refuse_more_than_cores
from dflash_chat.runtime.session import Session
from tests.runtime import tiny

HINT = "try -o ctx=128"
CHAT = (Message("user", "5 9 2 33 17 8"),)


class Spoken:
    """Token ids as words."""

    stop_ids: frozenset[int] = frozenset()

    def render(self, messages: Iterable[Message]) -> list[int]:
        return [int(word) for message in messages for word in message.content.split()]

    def opening(self, prompt: Iterable[int]) -> str:
        return ""

    def decode_stream(self) -> Spoken:
        return self

    def push(self, ids: Iterable[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def finish(self) -> str:
        return ""


class Short:
    """Calls `run`, and once, at call number `at`, finds too little memory behind it."""

    def __init__(self, run: Callable[..., Any], at: int, error: Exception) -> None:
        self.run, self.left, self.error = run, at, error

    def __call__(self, *args: object) -> Any:  # noqa: ANN401
        result = self.run(*args)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return result


def session_of(engine: Engine) -> Session:
    info = ModelInfo("pair", "", "", "", "", "", 0, 0, 0, 0, 0, 0, 0.0)
    return Session(engine, cast(Any, Spoken()), info, HINT)


def answer(session: Session, chat: tuple[Message, ...] = CHAT) -> tuple[str, Finished]:
    events = session.generate(Generate(1, chat, SamplingParams(max_tokens=30)), lambda: False)
    *before, finished = events
    assert isinstance(finished, Finished)
    return "".join(event.text for event in before if isinstance(event, Tokens)), finished


def refused(session: Session) -> None:
    """An answer that finds too little memory, and says so."""
    with pytest.raises(DoesNotFitError) as caught:
        answer(session)
    assert (caught.value.exit_code, caught.value.hint) == (EXIT_DOES_NOT_FIT, HINT)
    assert "memory ran out" in caught.value.message


def engine() -> Engine:
    target = tiny.target()
    drafter = tiny.drafter(target, window=8)
    return Engine(target, target.new_cache(256), drafter, tiny.TAPS, 4, frozenset())


def tokens_of(
    session: Session, stop: tuple[str, ...] = (), draft: bool = True
) -> tuple[list[Tokens], Finished]:
    request = Generate(1, CHAT, SamplingParams(max_tokens=30, stop=stop), draft)
    events: list[Event] = list(session.generate(request, lambda: False))
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Tokens)], events[-1]


def test_every_token_is_told_its_own_text() -> None:
    tokens, _ = tokens_of(session_of(engine()))
    ids = iter(engine_ids())
    for event in tokens:
        assert len(event.lengths) == event.tokens
        at = 0
        for length in event.lengths:
            assert event.text[at : at + length] == f"{next(ids)} "
            at += length
        assert at == len(event.text)


def engine_ids() -> list[int]:
    prompt = [int(word) for word in CHAT[0].content.split()]
    return tiny.tokens(tiny.run(engine(), prompt, SamplingParams(max_tokens=30)))


def test_held_back_text_comes_with_the_tokens_it_is_of() -> None:
    ids = engine_ids()
    almost = f"{ids[3]} {ids[4]} {ids[5]} never"
    tokens, finished = tokens_of(session_of(engine()), (almost,))
    assert "".join(event.text for event in tokens) == "".join(f"{i} " for i in ids)
    assert any(len(event.lengths) > event.tokens for event in tokens), "nothing was held"
    assert all(sum(event.lengths) == len(event.text) for event in tokens)
    assert sum(event.tokens for event in tokens) == finished.usage.completion == 30


def test_the_first_token_brings_the_prompts_timing_and_the_end_the_speed_up() -> None:
    session = session_of(engine())
    session.engine.measure()
    (first, *rest), finished = tokens_of(session)
    assert first.timing is not None
    assert 0 < first.timing.prefill_s <= first.timing.ttft_s == finished.timing.ttft_s
    assert all(event.timing is None for event in rest)
    assert finished.timing.prefill_s == first.timing.prefill_s
    assert session.engine.plain is not None
    assert finished.timing.ar_tok_s == session.engine.plain.tok_s
    assert finished.timing.speedup == finished.timing.tok_s / finished.timing.ar_tok_s
    live = session.engine.controller.baseline
    assert live is not None
    assert finished.timing.ar_age_s == live.age_ms / 1000
    assert finished.timing.ar_context_tokens == live.measured_context_tokens
    assert finished.why == session.engine.controller.reason
    told = [e.stats.figures for e in rest if e.stats]
    assert told[0]
    assert not any(told[1:50])


def test_a_baseline_of_loading_has_no_age() -> None:
    session = session_of(engine())
    session.engine.measure()
    params = SamplingParams(max_tokens=8)
    *_, finished = session.generate(Generate(1, CHAT, params, True, 4), lambda: False)
    assert isinstance(finished, Finished)
    assert finished.timing.ar_age_s is None
    assert finished.timing.ar_tok_s > 0
    assert finished.timing.ar_context_tokens == session.engine.controller.costs.table.contexts[0]


def test_a_plain_answer_measures_plain_decoding_and_an_unmeasured_one_claims_nothing() -> None:
    session = session_of(engine())
    assert tokens_of(session)[1].timing.speedup == 0
    session.engine.measure()
    timing = tokens_of(session, draft=False)[1].timing
    assert timing.ar_tok_s > 1
    assert timing.speedup == timing.tok_s / timing.ar_tok_s


@pytest.mark.parametrize("again", [False, True], ids=["first answer", "second answer"])
@pytest.mark.parametrize(
    ("model", "part"),
    [
        *(("target", part) for part in ("forward", "logits")),
        *(("drafter", part) for part in ("forward", "candidates", "observe")),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_after_memory_ran_out_the_next_answer_is_a_fresh_engines(
    model: str, part: str, at: int, again: bool
) -> None:
    fresh, _ = answer(session_of(engine()))
    session = session_of(engine())
    if again:
        answer(session)
    owner = getattr(session.engine, model)
    setattr(owner, part, Short(getattr(owner, part), at, torch.OutOfMemoryError("CUDA")))

    refused(session)
    assert (session.engine.log, session.engine.cache.length) == ([], 0)

    text, finished = answer(session)
    assert text == fresh
    assert finished.usage.cached == 0
    assert session.engine.log[:6] == [5, 9, 2, 33, 17, 8]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_other_libraries_run_out_of_memory_too(error: RuntimeError) -> None:
    session = session_of(engine())
    session.engine.target.forward = Short(session.engine.target.forward, 2, error)  # type: ignore[method-assign]
    refused(session)


def test_another_error_stays_what_it_is() -> None:
    session = session_of(engine())
    bug = Short(session.engine.target.forward, 2, RuntimeError("shapes do not match"))
    session.engine.target.forward = bug  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes"):
        answer(session)


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    refuse_more_than_cores(4)
    with pytest.raises(UsageError, match="4 cores for 5 threads"):
        refuse_more_than_cores(5)
