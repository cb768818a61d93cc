"""The chat in lines: what goes to stdout, what to stderr, and that no escape sequence is needed."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dflash_chat import plain, terminals
from dflash_chat.chat import Conversation
from dflash_chat.keeper import Keeper
from dflash_chat.plain import LineChat
from dflash_chat.record import Record
from dflash_chat.runtime.api import (
    Event,
    Finished,
    Generate,
    Message,
    ModelInfo,
    Prefill,
    SamplingParams,
    Spec,
    Timing,
    Tokens,
    Usage,
)
from dflash_chat.store import Store

INFO = ModelInfo("pair", "t", "d", "CPU", "fp32", "k", 8192, 8, 7, 0, 0, 0, 0.0)


class Scripted:
    """Says `text` word by word; a first word "wait" waits to be cancelled after it."""

    def __init__(self, text: str = "The answer.") -> None:
        self.info, self.text = INFO, text
        self.asked: list[Generate] = []

    @classmethod
    def load(cls, *_: object) -> Scripted:
        return cls("wait for it")

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.asked.append(request)
        yield Prefill(request.id, 0, 5, 5)
        reason = "stop"
        for word in self.text.split(" "):
            yield Tokens(request.id, word + " ", 1)
            if word == "wait" and not request.continue_last:
                deadline = time.monotonic() + 20
                while not cancelled() and time.monotonic() < deadline:
                    time.sleep(0.01)
            if cancelled():
                reason = "cancelled"
                break
        yield Finished(request.id, reason, Usage(5, 0, 2), Spec(), Timing())


@pytest.fixture
def chat() -> LineChat:
    return LineChat(Scripted(), SamplingParams())


def asked(chat: LineChat) -> list[Generate]:
    assert isinstance(chat.session, Scripted)
    return chat.session.asked


def test_only_the_answer_goes_to_stdout(chat: LineChat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.obey("Hi?")
    chat.obey("/stats")
    chat.obey("And?")
    out, err = capsys.readouterr()

    assert out == "The answer. \nThe answer. \n"
    assert "tok/s" in err
    assert asked(chat)[-1].messages == (
        Message("user", "Hi?"), Message("assistant", "The answer. "), Message("user", "And?"),
    )  # fmt: skip


def test_thoughts_are_kept_out(capsys: pytest.CaptureFixture[str]) -> None:
    chat = LineChat(Scripted("<think> hm </think> Yes."), SamplingParams())
    chat.obey("Hi?")

    assert capsys.readouterr().out == "Yes. \n"
    assert chat.chat.turns[-1].thinking == " hm "


def test_commands_change_the_next_answer(chat: LineChat) -> None:
    for line in ("/system Be brief.", "/set temperature=0.5", "/draft 3", "Hi?"):
        assert not chat.obey(line)

    request = asked(chat)[-1]
    assert request.messages[0] == Message("system", "Be brief.")
    assert (request.params.temperature, request.draft, request.draft_tokens) == (0.5, True, 3)
    chat.obey("/draft off")
    chat.obey("/regen")
    assert not asked(chat)[-1].draft
    assert asked(chat)[-1].messages == request.messages


def test_undo_clear_and_quit(chat: LineChat) -> None:
    chat.obey("One?")
    chat.obey("Two?")
    chat.obey("/undo")
    assert [turn.content for turn in chat.chat.turns] == ["One?", "The answer. "]
    chat.obey("/clear")
    assert chat.chat.turns == []
    assert chat.obey("/quit")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/hepl", "did you mean /help"),
        ("/draft 9", "from 1 to 7"),
        ("/set warmth=1", "there is no option"),
        ("/continue", "nothing to do"),
        ("/help", "/continue"),
    ],
)
def test_what_is_not_understood_says_why(
    chat: LineChat, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    chat.obey(line)
    out, err = capsys.readouterr()

    assert out == ""
    assert words in err
    assert asked(chat) == []


def test_a_file_goes_along(chat: LineChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("remember")
    chat.obey("See @notes.txt")

    assert "remember" in asked(chat)[-1].messages[-1].content


@pytest.mark.parametrize(
    ("term", "lines"), [("dumb", True), ("", True), ("xterm-256color", False), ("nobody-x", False)]
)
def test_a_terminal_without_a_cursor_gets_lines(term: str, lines: bool) -> None:
    assert terminals.only_lines({"TERM": term}) is lines


def test_what_is_said_in_lines_is_saved_with_its_steps(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    chat = LineChat(Scripted(), SamplingParams(), Record(Conversation("Be brief."), keeper))
    chat.obey("Hi?")
    chat.obey("/regen")
    keeper.close()

    with Store(tmp_path) as store:
        again = store.load(store.latest())
        assert [turn.content for turn in again.turns] == ["Hi?", "The answer. "]
        assert (again.system, again.pair) == ("Be brief.", "pair")
        last = again.turns[-1]
        assert len(again.branches(last.id)) == 2
        assert [type(event) for event in store.trace(last.id)] == [Prefill, Tokens, Tokens]
        assert last.figures is not None


PROGRAM = """
import sys, types
import tests.test_plain as script
module = types.ModuleType("dflash_chat.runtime.session")
module.Session = script.Scripted
sys.modules["dflash_chat.runtime.session"] = module
from dflash_chat import cli, hub
hub.ensure = lambda *_: None
sys.exit(cli.main(["--stats"]))
"""


def test_a_dumb_terminal_chats_stops_and_continues_without_escape_sequences(
    own_folders: Path,
) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.chdir(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    seen = b""

    def until(words: bytes, since: int = 0) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen[since:]:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096)

    until(b"> ")
    os.write(terminal, b"Hi?\n")
    until(b"wait ")
    os.write(terminal, b"\x03")
    until(b"/continue goes on")
    os.write(terminal, b"/continue\n")
    until(b"for it", len(seen))
    until(b"> ", len(seen) - 2)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)

    assert os.waitstatus_to_exitcode(status) == 0
    assert b"\x1b" not in seen
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_lines_asked_before_can_be_recalled() -> None:
    readline = pytest.importorskip("readline")
    plain._with_line_editing(["one line", "two\nlines"])

    assert readline.get_history_item(readline.get_current_history_length()) == "one line"
