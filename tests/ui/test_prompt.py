"""The prompt: history, folded pastes, the menu; and that no text is ever lost by them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from textual.events import Key, Paste

from dflash_chat.chat import Conversation
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import Message
from dflash_chat.store import Store
from dflash_chat.ui.completion import complete
from dflash_chat.ui.menu import Menu
from dflash_chat.ui.prompt import FOLD_CHARS, Prompt
from tests.ui.terminal import Terminal
from tests.ui.test_chat_flow import Chat, open_chat

LONG = "".join(f"line {n} of something long\n" for n in range(214))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")


@pytest.fixture
async def chat() -> AsyncIterator[Chat]:
    async with open_chat((80, 24)) as chat:
        await chat.load()
        yield chat


def prompt(chat: Chat) -> Prompt:
    return chat.screen.query_one(Prompt)


async def paste(chat: Chat, text: str) -> None:
    chat.app.post_message(Paste(text))
    await chat.settle()


async def ask(chat: Chat, text: str) -> None:
    await chat.type(text)
    chat.client.answer("Yes.")
    await chat.settle()


async def test_enter_never_overtakes_what_was_typed_before_it(chat: Chat) -> None:
    for key in (*"hello", "enter", *"bye"):  # all at once, as a terminal may deliver them
        chat.app.post_message(Key(key, key if len(key) == 1 else None))
    await chat.settle()

    assert chat.client.asked[-1].messages == (Message("user", "hello"),)
    assert prompt(chat).text == "bye"


# ── history ─────────────────────────────────────────────────────────────────────────────────────


async def test_up_and_down_recall_what_was_sent_and_keep_the_draft(chat: Chat) -> None:
    for text in ("one", "two\nlines"):
        await ask(chat, text)
    prompt(chat).put("draft")
    seen = []
    for key in ("up", "up", "up", "up", "down", "down", "down", "down"):
        await chat.pilot.press(key)
        seen.append(prompt(chat).text)

    # Up inside "two\nlines" moves the cursor first.
    assert seen == [
        "two\nlines",
        "two\nlines",
        "one",
        "one",
        "two\nlines",
        "draft",
        "draft",
        "draft",
    ]
    await chat.pilot.press("ctrl+z")
    assert prompt(chat).text == "two\nlines"


async def test_up_in_an_empty_prompt_edits_the_last_message(chat: Chat) -> None:
    await ask(chat, "one")
    await ask(chat, "two")
    await chat.pilot.press("up")
    assert prompt(chat).text == "two"
    assert "editing" in str(prompt(chat).border_title)
    await chat.pilot.press("!", "enter")
    await chat.settle()

    assert [m.content for m in chat.client.asked[-1].messages] == ["one", "Yes.", "two!"]
    assert prompt(chat).border_title == ""


async def test_escape_leaves_the_edited_message_as_it_was(chat: Chat) -> None:
    await ask(chat, "one")
    await chat.pilot.press("up", "x", "escape")
    assert prompt(chat).text == ""
    await chat.type("two")

    assert [m.content for m in chat.client.asked[-1].messages] == ["one", "Yes.", "two"]


async def test_recalling_while_editing_sends_a_new_message(chat: Chat) -> None:
    await ask(chat, "one")
    await ask(chat, "two")
    await chat.pilot.press("up", "up", "enter")  # "two" stands there already
    await chat.settle()

    assert [m.content for m in chat.client.asked[-1].messages][-3:] == ["two", "Yes.", "one"]


async def test_what_was_sent_before_this_session_is_recalled(tmp_path: Path) -> None:
    saved = Conversation()
    for text in ("see @notes.txt\n\nnotes.txt:\n```\nx\n```", "two", "two", f"Why?\n{LONG}"):
        saved.ask(text)
        saved.answer("Yes.")
    with Store(tmp_path) as store:
        store.save(saved)
    keeper = Keeper(tmp_path)
    async with open_chat((80, 24), keeper=keeper) as chat:
        await chat.load()
        seen = []
        for key in ("up", "home", "up", "up", "up", "down"):
            await chat.pilot.press(key)
            seen.append(prompt(chat).text)
        long = "Why?\n[pasted 214 lines]"
        assert seen == [long, long, long, "two", "see @notes.txt", "two"]
        await chat.pilot.press("down", "enter")
        await chat.settle()
        assert chat.client.asked[-1].messages == (Message("user", f"Why?\n{LONG}"),)
    keeper.close()


# ── folded pastes ───────────────────────────────────────────────────────────────────────────────


async def test_a_long_paste_folds_and_unfolds_when_sent(chat: Chat) -> None:
    await chat.pilot.press("a", "space")
    await paste(chat, LONG)
    await paste(chat, LONG.upper())
    assert prompt(chat).text == "a [pasted 214 lines][pasted 214 lines #2]"
    await chat.pilot.press("enter")
    await chat.settle()

    assert chat.client.asked[-1].messages == (Message("user", f"a {LONG}{LONG.upper()}"),)
    assert "[pasted 214 lines]" in chat.text


async def test_a_folded_paste_is_edited_as_one_character_would_be(chat: Chat) -> None:
    await paste(chat, "x" * (FOLD_CHARS + 1))
    label = f"[pasted {FOLD_CHARS + 1} characters]"
    await chat.pilot.press("left", "left", "b")  # from inside: behind it
    assert prompt(chat).text == label + "b"
    await chat.pilot.press("backspace", "backspace")
    assert prompt(chat).text == ""
    await chat.pilot.press("ctrl+z")
    await chat.pilot.press("ctrl+z")
    assert label in prompt(chat).text
    await chat.pilot.press("enter")
    await chat.settle()
    assert "x" * (FOLD_CHARS + 1) in chat.client.asked[-1].messages[-1].content


async def test_a_folded_paste_is_recalled_with_its_text(chat: Chat) -> None:
    await paste(chat, LONG)
    await chat.pilot.press("enter")
    await chat.settle()
    chat.client.answer("Yes.")
    await chat.settle()
    await chat.pilot.press("up", "enter")
    await chat.settle()

    assert chat.client.asked[-1].messages == (Message("user", LONG),)


async def test_control_characters_are_not_pasted(chat: Chat) -> None:
    await paste(chat, "a\x1b[2Jb\r\nc\td")

    assert prompt(chat).text == "a\ufffd[2Jb\nc\td"


def test_bytes_that_are_no_text_do_not_end_the_chat() -> None:
    code = (
        "from dflash_chat.ui.app import *; from tests.ui.fake_client import FakeClient as Client;"
        "ChatApp(Client(), ChatScreen(Client(), Load('pair'), SamplingParams())).run()"
    )
    with Terminal([sys.executable, "-c", code], 80, 24) as terminal:
        terminal.wait_for("Ask something")
        terminal.press("caf\udce9 \udcff", "x")
        terminal.wait_for("caf\ufffd \ufffdx")


async def test_what_is_refused_comes_back(chat: Chat) -> None:
    Path("large").write_bytes(b"x" * 300_000)
    await chat.type("see @large please")

    assert "300 kB" in chat.text
    assert prompt(chat).text == "see @large please"
    assert chat.client.asked == []


async def test_typing_and_pasting_at_a_turn_go_to_the_prompt(chat: Chat) -> None:
    await ask(chat, "one")
    await chat.pilot.press("alt+up", "h")
    await chat.pilot.press("alt+up")
    await paste(chat, "ello")

    assert prompt(chat).text == "hello"
    assert chat.app.focused is prompt(chat)


# ── the menu ────────────────────────────────────────────────────────────────────────────────────


async def test_tab_and_enter_take_what_the_menu_offers(chat: Chat) -> None:
    await chat.pilot.press("/", "t", "h")
    assert chat.screen.query_one(Menu).display
    assert "/theme" in chat.shown("Menu")
    await chat.pilot.press("down", "enter")
    assert prompt(chat).text == "/theme "
    await chat.pilot.press(*"nor", "tab")
    assert prompt(chat).text == "/theme nord"
    chat.screen.show_numbers()
    assert "/theme NAME" in chat.shown("#hint")
    await chat.pilot.press("enter")
    await chat.settle()
    assert chat.app.theme == "nord"


async def test_escape_closes_the_menu_until_something_is_typed(chat: Chat) -> None:
    await chat.pilot.press("/", "s", "escape")
    assert not chat.screen.query_one(Menu).display
    await chat.pilot.press("e")
    assert chat.screen.query_one(Menu).display


async def test_a_file_is_completed_behind_an_at_sign(chat: Chat) -> None:
    await chat.pilot.press(*"see @no")
    assert "notes.txt" in chat.shown("Menu")
    await chat.pilot.press("tab")
    assert prompt(chat).text == "see @notes.txt"
    assert not chat.screen.query_one(Menu).display


@pytest.mark.parametrize(
    ("before", "start", "texts", "whole"),
    [
        ("/dr", 0, ["/draft "], False),
        ("/draft o", 7, ["on", "off"], False),
        ("/draft on", 7, ["on"], True),
        ("/set top", 5, ["top_k=", "top_p="], False),
        ("/export no", 8, ["notes.txt"], True),
        ("/quit", 0, ["/quit"], True),
        ("/nothing", 0, [], False),
        ("/system no", 10, [], True),
        ("mail a@no", 9, [], True),
        ("@no", 0, ["@notes.txt"], False),
        ('@"no', 0, ["@notes.txt"], False),
        ("@no more", 8, [], True),
    ],
)
def test_completions(
    before: str,
    start: int,
    texts: list[str],
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    completion = complete(before, first_line=True)

    assert [choice.text for choice in completion.choices] == texts
    assert completion.start == start
    assert completion.whole is whole or not texts
