"""Continuing, branching and following; what the terminal is told; how text is copied."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dflash_chat.runtime.api import Finished, Message, Spec, Timing, Tokens, Usage
from dflash_chat.ui import clipboard, terminal
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.key_bar import KeyBar
from dflash_chat.ui.transcript import Transcript
from tests.ui.test_chat_flow import Chat, open_chat


async def stopped(chat: Chat, text: str) -> None:
    await chat.load()
    await chat.type("One?")
    chat.client.finish(chat.client.stream(text), reason="cancelled")
    await chat.settle()


async def test_c_continues_a_stopped_answer_where_it_was_cut() -> None:
    async with open_chat() as chat:
        await stopped(chat, "Half an ans")
        await chat.pilot.press("alt+up")
        chat.screen.show_numbers()
        assert "c continue" in chat.shown("KeyBar")
        await chat.pilot.press("c")
        await chat.settle()
        request = chat.client.asked[-1]
        assert request.continue_last
        assert request.messages == (Message("user", "One?"), Message("assistant", "Half an ans"))
        chat.client.emit(
            Tokens(request.id, "wer.", 1),
            Finished(request.id, "stop", Usage(66, 65, 1), Spec(), Timing()),
        )
        await chat.settle()

        assert "Half an answer." in chat.text
        assert "cached 65 · read 1" in chat.text
        assert len(chat.screen.query(AnswerTurn)) == 1
        assert [turn.content for turn in chat.screen.dialogue.chat.turns][-1] == "Half an answer."


@pytest.mark.parametrize(
    "begun", ["<think>half a tho", "<think>whole</think>half an ans", "<think>whole</thi"]
)
async def test_a_thought_is_continued_with_its_marks(begun: str) -> None:
    async with open_chat() as chat:
        await stopped(chat, begun)
        await chat.type("/continue")
        assert chat.client.asked[-1].messages[-1].content == begun
        end = {"tho": "ught</think>answer", "ans": "wer", "thi": "nk>answer"}[begun[-3:]]
        chat.client.emit(Tokens(2, end, 2))
        await chat.settle()
        turn = chat.screen.dialogue.chat.turns[-1]

        assert (turn.thinking, turn.content[-6:]) in (
            ("half a thought", "answer"), ("whole", "answer"),
        )  # fmt: skip
        assert "think>" not in chat.text


async def test_a_small_screen_says_what_can_be_done_with_a_turn() -> None:
    async with open_chat((50, 20)) as chat:
        await stopped(chat, "Half")
        await chat.pilot.press("alt+up")
        chat.screen.show_numbers()

        assert not chat.screen.query_one(KeyBar).display
        assert "y copy · c continue · e edit" in chat.shown("#hint")


async def test_an_answer_with_something_behind_it_is_not_continued() -> None:
    async with open_chat() as chat:
        await stopped(chat, "Half")
        await chat.type("Two?")
        chat.client.answer("Whole")
        await chat.settle()
        await chat.type("/continue")

        assert "/continue has nothing to do now" in chat.text


async def test_regenerating_while_others_wait_keeps_their_order() -> None:
    async with open_chat() as chat:
        await stopped(chat, "Half")
        await chat.type("Two?")
        await chat.type("Three?")
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "alt+up", "r")
        await chat.settle()
        assert chat.client.asked[-1].messages == (Message("user", "One?"),)
        chat.client.answer("Again.")
        await chat.settle()

        assert chat.client.asked[-1].messages[-1].content == "Three?"
        order = [chat.text.index(words) for words in ("One?", "Again.", "Three?")]
        assert order == sorted(order)


async def test_scrolling_up_counts_what_comes_and_end_forgets_it() -> None:
    async with open_chat() as chat:
        await chat.load()
        await chat.type("One?")
        chat.client.stream("\n\n".join(f"Paragraph {n}" for n in range(60)))
        await chat.settle()
        await chat.pilot.press("pageup")
        for tokens in (3, 4):
            chat.client.emit(Tokens(1, "more\n\n", tokens))
            await chat.settle()
        assert "↓ 7 new · End" in chat.shown("#hint")
        await chat.pilot.press("end")
        await chat.settle()

        assert chat.screen.query_one(Transcript).unseen_tokens == 0


# ── what the terminal is told ───────────────────────────────────────────────────────────────────


async def test_the_title_shows_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_chat() as chat:
        told: list[str] = []
        monkeypatch.setattr(chat.screen, "tell", told.append)
        await chat.load()
        await chat.type("One?")
        chat.client.answer("Yes.")
        await chat.settle()

        titles = [words for words in told if words.startswith("\x1b]2;")]
        states = [words.removeprefix("\x1b]2;● ").partition(" ")[0] for words in titles]
        assert states == ["ready", "answering", "ready"]
        assert all(words.endswith("smollm2-135m · dflash-chat\x07") for words in titles)


@pytest.mark.parametrize(
    ("seconds", "focused", "rings"), [(11, False, True), (11, True, False), (9, False, False)]
)
async def test_a_long_answer_calls_who_looks_elsewhere(
    monkeypatch: pytest.MonkeyPatch, seconds: int, focused: bool, rings: bool
) -> None:
    async with open_chat() as chat:
        told: list[str] = []
        monkeypatch.setattr(chat.screen, "tell", told.append)
        await chat.load()
        await chat.type("One?")
        chat.screen.dialogue.answer_began = time.monotonic() - seconds
        chat.app.app_focus = focused
        chat.client.answer("Yes.")
        await chat.settle()

        assert any("\x07\x1b]9;" in words for words in told) is rings


async def test_no_color_reaches_the_engine_and_editors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with open_chat() as chat:
        await stopped(chat, "Half")
        await chat.pilot.press("alt+up")

        assert os.environ["NO_COLOR"] == "1"
        assert chat.app.no_color
        assert chat.screen.query_one(AnswerTurn).styles.border_left[0] == "thick"


def test_a_title_cannot_end_its_sequence() -> None:
    assert terminal.title("a\x07\x1b]2;b\nc") == "\x1b]2;a\ufffd\ufffd]2;b c\x07"


# ── copying ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmux, wl-copy and xclip that write what they get into files."""
    for name in ("tmux", "wl-copy", "xclip"):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.args\ncat > {tmp_path}/{name}.got\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("TMUX", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "way"),
    [
        ({"TMUX": "x", "DISPLAY": ":0"}, "tmux"),
        ({"WAYLAND_DISPLAY": "w", "DISPLAY": ":0"}, "wl-copy"),
        ({"DISPLAY": ":0"}, "xclip"),
        ({"DISPLAY": ":0", "SSH_TTY": "/dev/pts/1"}, ""),
        ({}, ""),
    ],
)
async def test_text_goes_the_best_way_there_is(
    tools: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], way: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert await clipboard.copy("größer\n") == way
    assert [path.stem for path in tools.glob("*.got")] == [way] * bool(way)
    if way:
        assert (tools / f"{way}.got").read_text() == "größer\n"


async def test_a_tool_that_fails_leaves_it_to_the_next(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools / "tmux").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("TMUX", "x")
    monkeypatch.setenv("DISPLAY", ":0")

    assert await clipboard.copy("text") == "xclip"


async def test_the_toast_says_how_it_was_copied(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMUX", "x")
    async with open_chat() as chat:
        await stopped(chat, "Copy this.")
        said: list[str] = []
        monkeypatch.setattr(chat.app, "notify", lambda words, **_: said.append(words))
        await chat.type("/copy")
        await chat.app.workers.wait_for_complete()

        assert said == ["Copied the answer · tmux"]
        assert (tools / "tmux.args").read_text() == "load-buffer -w -\n"
        assert (tools / "tmux.got").read_text() == "Copy this."
