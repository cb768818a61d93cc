"""A recorded chat comes out of the replay as it went into the file, at the speed it had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dflash_chat import export, replay
from dflash_chat.chat import Conversation
from dflash_chat.errors import UserError
from dflash_chat.replay import PAUSE_S, Answer, Recording, ReplayClient, schedule
from dflash_chat.runtime.api import (
    Bench,
    Cancel,
    Failed,
    Finished,
    Generate,
    Load,
    Message,
    Prefill,
    Ready,
    Tokens,
)
from tests.saved import INFO, recorded


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def chat() -> Conversation:
    """Two answers of 5 and 3 verify passes of 20 ms."""
    made = Conversation("Be brief.", pair="smollm2-135m", info=INFO)
    made.ask("One?")
    recorded(made, "first answer of some six words", ms=20)
    made.ask("Two?")
    recorded(made, "the second one too", ms=20)
    return made


def written(folder: Path, form: str, made: Conversation) -> Path:
    path = folder / f"chat.{form}"
    if form == "json":
        path.write_text(json.dumps(export.to_json(made, lambda turn: turn.trace)))
    else:
        path.write_bytes(export.to_lines(made, lambda turn: turn.trace))
    return path


@pytest.fixture(params=["json", "jsonl"])
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Recording:
    return replay.read(written(tmp_path, request.param, chat()))


def texts(events: list[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def ask(client: ReplayClient, number: int, question: str) -> None:
    client.send(Generate(number, (Message("user", question),)))


def test_both_kinds_of_file_hold_the_same_recording(recording: Recording) -> None:
    assert recording.info == INFO
    assert recording.system == "Be brief."
    assert [answer.question for answer in recording.answers] == ["One?", "Two?"]
    assert texts(list(recording.answers[0].events)) == "first answer of some six words"
    assert [answer.finished.spec.steps for answer in recording.answers] == [5, 3]


def test_events_are_due_when_the_engine_had_them(recording: Recording) -> None:
    due = schedule(recording.answers[0])

    assert [round(at, 6) for at, _ in due] == [0.025, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15, 0.15]
    assert isinstance(due[0][1], Prefill)
    assert isinstance(due[-1][1], Finished)


def test_passes_are_stretched_to_the_time_that_was_measured_around_them() -> None:
    made = Conversation()
    made.ask("One?")
    turn = recorded(made, "a b c d e", ms=10)
    assert turn.figures is not None
    slow = Finished(
        1, "stop", turn.figures.usage, turn.figures.spec,
        type(turn.figures.timing)(ttft_s=1.0, decode_s=0.4),
    )  # fmt: skip

    assert schedule(Answer("One?", tuple(turn.trace), slow))[-1][0] == pytest.approx(1.4)


def test_an_answer_that_was_gone_on_with_takes_the_time_of_all_its_passes() -> None:
    made = Conversation()
    made.ask("One?")
    turn = recorded(made, "a b c", ms=10)
    turn.trace += turn.trace  # the figures are of the second half
    assert turn.figures is not None

    due = schedule(Answer("One?", tuple(turn.trace), turn.figures))
    assert due[-1][0] == pytest.approx(0.05 + 4 * 0.01)
    assert due == sorted(due, key=lambda pair: pair[0])


def test_the_client_gives_what_is_due_and_nothing_before(recording: Recording) -> None:
    clock = Clock()
    client = ReplayClient(recording, clock)
    client.send(Load("any"))
    assert client.drain() == [Ready(INFO)]
    assert client.next_question() is None
    clock.now += PAUSE_S
    assert client.next_question() == "One?"
    assert client.next_question() is None
    ask(client, 7, "One?")

    seen: list[object] = []
    for _ in range(20):
        clock.now += 0.01
        seen += client.drain()
        done = clock.now - 100 - PAUSE_S
        assert len(seen) == sum(at <= done + 1e-9 for at, _ in schedule(recording.answers[0]))
    assert texts(seen) == "first answer of some six words"
    assert {getattr(event, "id", None) for event in seen} == {7}
    clock.now += PAUSE_S
    assert client.next_question() == "Two?"


def test_a_replay_can_be_stopped(recording: Recording) -> None:
    clock = Clock()
    client = ReplayClient(recording, clock)
    ask(client, 1, "One?")
    clock.now += 0.1
    seen = client.drain()
    client.send(Cancel(1))
    clock.now += 60
    rest = client.drain()

    assert texts(seen) == "first answer of"
    (finished,) = rest
    assert isinstance(finished, Finished)
    assert (finished.id, finished.reason, finished.spec.steps) == (1, "cancelled", 2)


def test_a_recording_cannot_be_measured(recording: Recording) -> None:
    client = ReplayClient(recording, Clock())
    client.send(Bench(3))
    (failed,) = client.drain()
    assert isinstance(failed, Failed)
    assert (failed.id, failed.message) == (3, "This is a recording; there is no engine to measure.")


def test_a_question_of_ones_own_is_refused(recording: Recording) -> None:
    client = ReplayClient(recording, Clock())
    ask(client, 1, "What else?")
    (event,) = client.drain()

    assert isinstance(event, Failed)
    assert event.id == 1
    assert "recording" in event.message


def test_an_answer_that_was_cut_off_by_a_kill_plays_as_far_as_it_came(tmp_path: Path) -> None:
    made = chat()
    made.turns[-1].figures, made.turns[-1].state = None, "stopped"
    recording = replay.read(written(tmp_path, "json", made))

    finished = recording.answers[-1].finished
    assert (finished.spec.steps, finished.usage.completion) == (3, 10)
    assert finished.timing.decode_s == pytest.approx(0.06)
    assert schedule(recording.answers[-1])[-1][0] == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "it is no text"),
        (b"# Notes", "it is not JSON"),
        (b'{"type":"Ready"}', "line 1 of the trace is no event"),
        (b'{"type":"Prefill","id":0,"cached":0,"done":"x","total":1}', "line 1 of the trace has a"),
        (b'{"type":"Hello","version":"1","protocol":1,"pid":1}', "no recorded steps"),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{words}"):
        replay.read(path)


def test_a_chat_without_steps_cannot_be_played(tmp_path: Path) -> None:
    made = Conversation(info=INFO)
    made.ask("One?")
    made.answer("words")
    with pytest.raises(UserError, match="no recorded steps"):
        replay.read(written(tmp_path, "json", made))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        replay.read(tmp_path / "nothing")
