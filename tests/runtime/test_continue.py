"""An answer that was cut short goes on as if it had not been: the same ids, nothing re-read."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from dflash_chat.runtime.api import (
    Finished,
    Generate,
    Message,
    ModelInfo,
    SamplingParams,
    Tokens,
)
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.session import Session
from dflash_chat.runtime.text import Tokenizer
from tests.runtime import tiny
from tests.runtime.gguf_writer import tokenizer_metadata, vocabulary

ASK = (Message("user", "hello there"),)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TOKENS = 24
PARAMS = {
    "greedy": SamplingParams(max_tokens=TOKENS),
    "seeded": SamplingParams(temperature=1.0, seed=5, max_tokens=TOKENS),
    "penalised": SamplingParams(
        temperature=0.8, seed=6, max_tokens=TOKENS, repetition_penalty=1.3, frequency_penalty=0.5
    ),
}


@pytest.fixture(autouse=True)
def one_thread(deterministic: None) -> None:
    """A tiny model is quicker on one."""
    torch.set_num_threads(1)


def session(template: str = "") -> Session:
    metadata = tokenizer_metadata()
    if template:
        metadata["tokenizer.chat_template"] = template
    tokenizer = Tokenizer.from_gguf(metadata)  # type: ignore[arg-type]
    target = tiny.target(vocab=len(vocabulary()))
    engine = Engine(target, target.new_cache(256), tiny.drafter(target), tiny.TAPS, 4, frozenset())
    info = ModelInfo("pair", "", "", "", "", "", 0, 0, 0, 0, 0, 0, 0.0)
    return Session(engine, tokenizer, info)


def answer(
    of: Session,
    params: SamplingParams,
    begun: str | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    draft: bool = True,
) -> tuple[str, Finished]:
    """The text of an answer from `begun` on, or from its beginning."""
    messages = ASK if begun is None else (*ASK, Message("assistant", begun))
    request = Generate(1, messages, params, draft, continue_last=begun is not None)
    *events, finished = of.generate(request, cancelled)
    assert isinstance(finished, Finished)
    return "".join(event.text for event in events if isinstance(event, Tokens)), finished


def after(events: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= events


@pytest.mark.parametrize(
    ("params", "draft"),
    [*((params, True) for params in PARAMS.values()), (PARAMS["greedy"], False)],
    ids=[*PARAMS, "plain"],
)
def test_a_stopped_answer_goes_on_as_if_it_had_not_been_stopped(
    params: SamplingParams, draft: bool
) -> None:
    whole, _ = answer(session(), params, draft=draft)
    loaded = session()
    for events in (4, 7):
        part, stopped = answer(loaded, params, cancelled=after(events), draft=draft)
        assert stopped.reason == "cancelled"
        left = params.max_tokens - stopped.usage.completion
        rest, finished = answer(
            loaded, SamplingParams(**{**vars(params), "max_tokens": left}), part, draft=draft
        )

        assert part + rest == whole
        assert part
        assert rest
        assert finished.usage.prompt == stopped.usage.prompt + stopped.usage.completion
        # All that had been read is kept; the one token read now was chosen, but never read before.
        assert finished.usage.cached == finished.usage.prompt - 1


def test_an_answer_cut_by_its_budget_goes_on_too() -> None:
    whole, _ = answer(session(), PARAMS["greedy"])
    loaded, text = session(), ""
    for _ in range(4):
        begun = text or None
        rest, finished = answer(loaded, SamplingParams(max_tokens=TOKENS // 4), begun)
        text += rest
        assert finished.reason == "length"
        assert finished.usage.completion == TOKENS // 4

    assert text == whole


def test_a_text_the_engine_did_not_write_is_read_and_continued() -> None:
    loaded = session()
    _, finished = answer(loaded, PARAMS["greedy"], "your string")
    prompt = loaded.tokenizer.render(ASK)

    assert finished.usage.prompt == len(prompt) + len(loaded.tokenizer.encode("your string"))


def test_an_answer_is_never_cut_inside_a_character() -> None:
    whole, _ = answer(session(), PARAMS["seeded"])
    loaded = session()
    for tokens in range(1, TOKENS, 5):
        part, _ = answer(loaded, SamplingParams(temperature=1.0, seed=5, max_tokens=tokens))
        assert whole.startswith(part)


def test_a_stop_string_may_span_the_cut() -> None:
    whole, _ = answer(session(), PARAMS["greedy"])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    params = SamplingParams(max_tokens=TOKENS, stop=(stop,))
    expected, _ = answer(session(), params)
    for tokens in range(5, TOKENS, 4):
        loaded = session()
        part, cut = answer(loaded, SamplingParams(max_tokens=tokens, stop=(stop,)))
        if cut.reason == "stop":
            break
        rest, _ = answer(loaded, params, part)
        assert (part + rest)[: len(expected)] == expected
        assert stop not in part + rest


def test_a_prompt_that_opens_a_thought_says_so_in_the_answer() -> None:
    whole, _ = answer(session(THINKING), PARAMS["greedy"])
    loaded = session(THINKING)
    part, stopped = answer(loaded, PARAMS["greedy"], cancelled=after(6))
    left = TOKENS - stopped.usage.completion
    rest, finished = answer(loaded, SamplingParams(max_tokens=left), part)

    assert part.startswith("<think>\n")
    assert part + rest == whole
    assert finished.usage.cached == finished.usage.prompt - 1


@pytest.mark.parametrize("pinned", [1, 2, 3, 9])
def test_a_request_may_pin_how_many_are_drafted(pinned: int) -> None:
    loaded = session()
    request = Generate(1, ASK, PARAMS["greedy"], draft_tokens=pinned)
    stats = [e.stats for e in loaded.generate(request, lambda: False) if isinstance(e, Tokens)]

    assert {each.drafted for each in stats if each} == {min(pinned, 4)}
