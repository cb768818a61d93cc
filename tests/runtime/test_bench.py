"""The bench within the engine: what it measures, what it leaves, and the chat it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from dflash_chat.runtime import bench
from dflash_chat.runtime.api import Bench, Benched, Generate, Message, SamplingParams, Tokens
from dflash_chat.runtime.costs import CostTable
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.session import Session
from dflash_chat.speed import Survival
from tests.runtime import tiny
from tests.runtime.test_session import answer, session_of

QUESTION = Message("user", "5 9 2 33 17 8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and answers that suit a tiny model."""
    prompts = ["1", "7 7 4", "40 41 42 43", "11 12"]
    monkeypatch.setattr(bench, "read_prompts", lambda path: prompts)
    monkeypatch.setattr(bench, "ANSWER_TOKENS", 12)


def engine(capacity: int = 256, pinned: bool = False) -> Engine:
    target = tiny.target(capacity=capacity)
    drafter = tiny.drafter(target, capacity=capacity, largest_block=64)
    made = Engine(target, target.new_cache(capacity), drafter, tiny.TAPS, 4, frozenset())
    made.measure(pinned, CostTable.even(range(1, 6)))
    return made


def states(
    session: Session, request: Bench, cancelled: Callable[[], bool] = lambda: False
) -> list[Benched]:
    return list(session.bench(request, cancelled))


def chatted(session: Session) -> tuple[Message, ...]:
    """A chat of one answer, which is in the cache."""
    text, _ = answer(session, (QUESTION,))
    return QUESTION, Message("assistant", text)


def test_every_way_takes_turns_and_whole_rounds_count() -> None:
    kept: list[Survival] = []
    session = session_of(engine())
    session.keep = lambda survival: not kept.append(survival)
    first, *between, last = states(session, Bench(3, seconds=60))

    assert (first.id, first.rounds, first.rates) == (3, 0, ())
    assert [way for way, _ in last.rates] == [0, 1, 3, 4, -1]  # five rows are the widest
    assert all(rate > 0 for _, rate in last.rates)
    assert len(between) == 3 * 5  # three prompts behind the first, which is too short
    assert [state.rounds for state in between] == [0] * 5 + [1] * 5 + [2] * 5
    assert (last.rounds, last.reason, last.kept) == (3, "done", True)
    assert kept[0].tokens == 3 * 11  # of the widest way, the prefill's token not counted
    assert len(kept[0].shares) == 4


def test_time_ends_it_after_a_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(next(clock)))
    assert states(session_of(engine()), Bench(1, seconds=7))[-1].rounds == 2  # of 5 answers each
    assert states(session_of(engine()), Bench(1, seconds=0))[-1].rounds == 1


def test_the_chat_stays_in_the_cache_and_goes_on_as_if_nothing_had_been() -> None:
    alone, benched = session_of(engine()), session_of(engine())
    chat = chatted(benched)
    assert chatted(alone) == chat
    controller = benched.engine.controller
    last = states(benched, Bench(2, chat, seconds=0))[-1]

    assert last.before > len(QUESTION.content.split()) + 20
    assert last.forgotten == 0
    assert benched.engine.controller is controller
    again = (*chat, Message("user", "3 3"))
    (text, finished), (expected, as_usual) = answer(benched, again), answer(alone, again)
    assert text == expected
    assert finished.usage.cached >= as_usual.usage.cached  # nothing more was read


def test_an_answer_that_was_cut_is_continued_with_its_own_tokens() -> None:
    session = session_of(engine())
    chat = chatted(session)
    states(session, Bench(2, chat, seconds=0))
    on = Generate(3, chat, SamplingParams(max_tokens=5), continue_last=True)
    whole = session_of(engine())
    asked = Generate(1, (QUESTION,), SamplingParams(max_tokens=35))

    def text(of: Session, request: Generate) -> str:
        events = of.generate(request, lambda: False)
        return "".join(event.text for event in events if isinstance(event, Tokens))

    assert chat[-1].content + text(session, on) == text(whole, asked)


def test_what_must_be_read_again_is_said() -> None:
    session = session_of(engine(capacity=50))  # has no room behind the chat
    chat = chatted(session)
    held = session.engine.reusable(session.tokenizer.render(chat))
    last = states(session, Bench(2, chat, seconds=0))[-1]
    assert (last.before, last.forgotten) == (0, held)


def test_a_chat_that_is_not_in_the_cache_is_not_read_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_MOST_READ", 10)
    session = session_of(engine())
    resumed = QUESTION, Message("assistant", "1 2 3 4 5 6 7 8 9")
    last = states(session, Bench(2, resumed, seconds=0))[-1]
    assert (last.before, last.forgotten) == (0, 0)


def test_a_question_without_an_answer_is_left_out() -> None:
    session = session_of(engine())
    chat = chatted(session)
    last = states(session, Bench(2, (*chat, Message("user", "6 6")), seconds=0))[-1]
    assert last.before > 0


def test_nothing_is_kept_of_a_bench_that_was_stopped() -> None:
    session = session_of(engine())
    session.keep = lambda survival: pytest.fail("kept")
    chat = chatted(session)
    controller = session.engine.controller
    looks = count()
    last = states(session, Bench(2, chat, seconds=60), lambda: next(looks) > 40)[-1]

    assert (last.reason, last.kept, last.forgotten) == ("cancelled", False, 0)
    assert session.engine.controller is controller


def test_a_width_that_the_load_named_is_no_choice_of_the_engines() -> None:
    last = states(session_of(engine(pinned=True)), Bench(1, seconds=0))[-1]
    assert [way for way, _ in last.rates] == [0, 1, 3, 4]
