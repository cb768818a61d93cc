"""The keeper: what is told to it is in the file soon, and no disk holds up the chat."""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dflash_chat import keeper as keeper_module
from dflash_chat.chat import Conversation
from dflash_chat.keeper import ASK_S, SAVE_S, Keeper
from dflash_chat.record import Record
from dflash_chat.runtime.api import Load, Prefill, SamplingParams, Tokens
from dflash_chat.store import FILE, Store
from tests.saved import step
from tests.test_store import integrity


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(tmp_path)
    yield keeper
    keeper.close()


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked(keeper: Keeper) -> Record:
    record = Record(Conversation("Be brief."), keeper)
    record.chat.ask("Hi")
    answer = record.chat.begin_answer()
    record.begin(answer, Load("smollm2-135m"), None, SamplingParams(), True)
    return record


def say(record: Record, text: str) -> None:
    """What the dialogue does with a piece of an answer."""
    assert record.writing is not None
    record.writing.content += text
    record.take(Tokens(1, text, 1, step()))


def stop(record: Record) -> None:
    record.chat.end_answer("stopped")
    record.end(None)


def saved(folder: Path, record: Record) -> str:
    with Store(folder) as store:
        return store.load(record.chat.id).turns[-1].content


def test_a_question_is_saved_before_it_is_sent(tmp_path: Path, keeper: Keeper) -> None:
    record = asked(keeper)

    assert saved(tmp_path, record) == "Hi"


def test_an_answer_is_saved_while_it_is_written_and_not_for_every_token(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    save = Store.save
    monkeypatch.setattr(Store, "save", lambda *args: (saves.append(time.monotonic()), save(*args)))
    record = asked(keeper)
    began = time.monotonic()
    record.take(Prefill(1, 0, 4, 4))
    number = 0
    while time.monotonic() < began + 3 * SAVE_S:
        say(record, f"{number} ")
        number += 1
        time.sleep(0.001)

    soon(lambda: len(saves) >= 3)
    assert len(saves) <= 4 + (time.monotonic() - began) / SAVE_S < number / 10
    assert saved(tmp_path, record).startswith("0 1 2 3 ")


def test_the_end_of_an_answer_is_saved_at_once_with_every_step(
    tmp_path: Path, keeper: Keeper
) -> None:
    record = asked(keeper)
    turn = record.writing
    assert turn is not None
    for number in range(100):
        say(record, f"{number} ")
    stop(record)
    keeper.close()

    with Store(tmp_path) as store:
        again = store.load(record.chat.id).turns[-1]
        assert (again.content, again.state) == (turn.content, "stopped")
        assert store.trace(turn.id) == turn.trace
        assert len(turn.trace) == 100


def test_the_trace_is_whole_while_half_of_it_is_saved(tmp_path: Path, keeper: Keeper) -> None:
    record = asked(keeper)
    turn = record.writing
    assert turn is not None
    for number in range(50):
        say(record, f"{number} ")
    keeper.keep_now(record.chat, turn)
    for number in range(50, 70):
        say(record, f"{number} ")

    assert keeper.trace(turn) == turn.trace


def test_a_busy_file_delays_a_question_only_so_long_and_is_said(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.1)
    asked(keeper)
    holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    record = asked(keeper)
    assert time.monotonic() - began < ASK_S + 1
    holder.execute("ROLLBACK")
    holder.close()

    soon(lambda: not keeper.problem)
    soon(lambda: record.chat.id in [entry.id for entry in Store(tmp_path).chats()])


def test_what_could_not_be_saved_is_saved_once_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.05)
    folder = tmp_path / "data"
    folder.write_text("a file where the folder should be")
    keeper = Keeper(folder)
    record = asked(keeper)
    say(record, "Hello")
    stop(record)
    assert "file exists" in record.problem

    folder.unlink()
    soon(lambda: not keeper.problem)
    keeper.close()
    assert saved(folder, record) == "Hello"


def test_a_file_that_may_not_grow_is_said_and_made_good_for_later(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.05)
    record = asked(keeper)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))  # as a quota or a full disk
    try:
        say(record, "words " * 200_000)
        keeper.keep_now(record.chat)
        soon(lambda: bool(record.problem))
        assert record.problem == "the disk is full or failing"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    soon(lambda: not record.problem)

    assert len(saved(tmp_path, record)) == 1_200_000
    integrity(tmp_path / FILE)


def test_a_removed_chat_does_not_come_back(tmp_path: Path, keeper: Keeper) -> None:
    record = asked(keeper)
    say(record, "Hello")
    keeper.remove(record.chat.id)
    keeper.close()

    with Store(tmp_path) as store:
        assert store.chats() == []


def test_a_save_takes_little(tmp_path: Path) -> None:
    """Not in the way of anything: a save of a long answer against writing its bytes to a file."""
    chat = Conversation()
    chat.ask("Hi")
    turn = chat.begin_answer()
    turn.content = "words of an answer " * 2000
    events = [Tokens(1, "words of an answer", 4, step()) for _ in range(100)]
    best_s = 1.0
    with Store(tmp_path) as store:
        store.save(chat)
        for _ in range(20):
            began = time.perf_counter()
            store.save(chat, [turn])
            store.add_trace(turn.id, events)
            best_s = min(best_s, time.perf_counter() - began)
    assert best_s < SAVE_S / 10
