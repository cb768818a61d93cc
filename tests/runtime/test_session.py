"""A session whose memory runs out in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch

from dflash_chat.errors import EXIT_DOES_NOT_FIT, DoesNotFitError
from dflash_chat.runtime.api import Finished, Generate, Message, ModelInfo, SamplingParams, Tokens
from dflash_chat.runtime.engine import Engine
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


@pytest.mark.parametrize("again", [False, True], ids=["first answer", "second answer"])
@pytest.mark.parametrize("part", ["forward", "logits", "observe", "draft"])
@pytest.mark.parametrize("at", [1, 3])
def test_after_memory_ran_out_the_next_answer_is_a_fresh_engines(
    part: str, at: int, again: bool
) -> None:
    fresh, _ = answer(session_of(engine()))
    session = session_of(engine())
    if again:
        answer(session)
    owner = session.engine.target if part in ("forward", "logits") else session.engine.drafter
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
