"""The chat in lines: what goes to stdout, what to stderr, and that no escape sequence is needed."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dflash_chat import plain, terminals
from dflash_chat.chat import Conversation
from dflash_chat.errors import EXIT_OTHER, UsageError
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
        return cls(os.environ.get("SCRIPTED", "wait for it"))

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.asked.append(request)
        if "too long" in request.messages[-1].content:
            raise UsageError("the prompt is too long")
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


def test_a_message_may_begin_with_a_path(chat: LineChat) -> None:
    chat.obey("/etc/hosts is for what?")

    assert asked(chat)[-1].messages == (Message("user", "/etc/hosts is for what?"),)


def test_a_question_that_is_refused_does_not_spoil_the_next(chat: LineChat) -> None:
    chat.obey("far too long")
    chat.obey("Short?")

    assert asked(chat)[-1].messages == (Message("user", "Short?"),)


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
    ("environ", "why"),
    [({"TERM": "dumb"}, "TERM is dumb"), ({}, "TERM is not set"), ({"TERM": "xterm"}, ""),
     ({"TERM": "nobody-x"}, "")],
)  # fmt: skip
def test_a_terminal_without_a_cursor_gets_lines(environ: dict[str, str], why: str) -> None:
    assert terminals.only_lines(environ) == why


def test_a_message_may_have_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(['"""One', "", 'two"""', '"""', "three", '"""', '"""four"""', "five"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    assert [plain._ask() for _ in range(4)] == ["One\n\ntwo", "three", "four", "five"]


def test_what_a_model_writes_is_no_order_to_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    LineChat(Scripted("\x1b[2J\x9b1m Hi\tyou"), SamplingParams()).obey("Hi?")
    assert capsys.readouterr().out == "\ufffd[2J\ufffd1m Hi\tyou \n"


def test_thoughts_are_announced_once_and_figures_take_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = LineChat(Scripted("<think> a b c </think> Yes."), SamplingParams())
    chat.obey("Hi?")
    assert capsys.readouterr().err == "thinking …\ncached 0 · read 5 · ttft 0 ms · 0 tok/s\n"


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
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("term", "keys", "code"), [("dumb", b"\x04", 0), (None, b"\x03", 130)])
def test_a_dumb_terminal_chats_stops_and_continues_without_escape_sequences(
    own_folders: Path, term: str | None, keys: bytes, code: int
) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("TERM", None)
        os.environ.update({"TERM": term} if term else {})
        os.chdir(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, "--stats"])
    seen = b""

    def until(words: bytes, since: int = 0, pressing: bytes = b"") -> None:
        """Read until `words` come. A key that meets Python between its prompt and its waiting is
        seen with the next one only, so it is pressed again, as a person would."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen[since:]:
            assert time.monotonic() < deadline, seen
            os.write(terminal, pressing)
            if select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 4096)

    until(b"> ")
    os.write(terminal, b"Hi?\n")
    until(b"wait ")
    os.write(terminal, b"\x03")
    until(b"/continue goes on")
    stopped = len(seen)
    os.write(terminal, b"/continue\n")
    until(b"for it", stopped)
    until(b"\n> ", seen.index(b"for it", stopped))
    if code:
        until(b"Ctrl+C again leaves", pressing=keys)
    ended, status, deadline = 0, 0, time.monotonic() + 60
    while not ended:
        assert time.monotonic() < deadline, seen
        os.write(terminal, keys)
        time.sleep(0.5)
        ended, status = os.waitpid(pid, os.WNOHANG)
    os.close(terminal)

    assert os.waitstatus_to_exitcode(status) == code
    assert seen.count(b"so the chat goes line by line") == 1
    assert b"\x1b" not in seen
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_lines_asked_before_can_be_recalled() -> None:
    readline = pytest.importorskip("readline")
    plain._with_line_editing(["one line", "two\nlines"])

    assert readline.get_history_item(readline.get_current_history_length()) == "one line"


def piped(*, stderr: int = subprocess.PIPE, **environ: str) -> subprocess.Popen[bytes]:
    """The chat in lines, between pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--plain"], cwd=Path(__file__).parents[1],
        env={**os.environ, "SCRIPTED": "The answer.", **environ},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
    )  # fmt: skip


def test_a_whole_chat_goes_through_pipes(own_folders: Path) -> None:
    asked = 'Hi?\n"""Two\nlines?"""\n/help\n/regen\n'
    out, err = piped().communicate(asked.encode(), 60)
    assert out == b"The answer. \n" * 3
    assert b"> " not in err
    assert b"/continue" in err
    assert err.count(b"tok/s") == 3


def test_a_reader_that_leaves_ends_the_chat_quietly(own_folders: Path) -> None:
    chat = piped(stderr=subprocess.STDOUT)
    assert chat.stdin is not None
    assert chat.stdout is not None
    assert b"/help lists commands" in chat.stdout.readline()
    chat.stdout.close()
    chat.stdin.write(b"Hi?\n")
    chat.stdin.close()
    assert chat.wait(60) == EXIT_OTHER


def test_letters_that_the_locale_does_not_have_are_no_error(own_folders: Path) -> None:
    poor = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    chat = piped(SCRIPTED="Größe ✓", **poor)
    out, err = chat.communicate("Grüße?\n".encode() + b"\xff\n", 60)
    assert out == b"Gr??e ? \n" * 2
    assert chat.returncode == 0, err
