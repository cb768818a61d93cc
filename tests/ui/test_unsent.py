"""What was typed and not sent: in the file soon, in the prompt again after a crash, and never there
once it was sent. What the file says at a moment is what a `kill -9` at that moment would leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from textual.events import Paste

from dflash_chat.chat import Conversation
from dflash_chat.store import Store
from dflash_chat.ui.prompt import Prompt
from tests.saved import branched
from tests.test_presence import Elsewhere
from tests.ui import test_saved_chats
from tests.ui.test_saved_chats import Saved, stored

opened = partial(test_saved_chats.opened, size=(60, 16))
LONG = "".join(f"line {n} of something long\n" for n in range(214))


def prompt(chat: Saved) -> Prompt:
    return chat.screen.query_one(Prompt)


def waiting(folder: Path) -> list[str]:
    """What waits in the chat written last."""
    with Store(folder) as store:
        return [*store.load(store.latest()).waiting.values()] if store.chats() else []


async def until(chat: Saved, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        await chat.pilot.pause(0.02)


async def test_what_is_typed_is_saved_by_itself_and_stands_in_the_prompt_again(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as chat:
        prompt(chat).put_in("Hello")
        await until(chat, lambda: waiting(tmp_path) == ["Hello"])
        prompt(chat).put_in(" there")
        await until(chat, lambda: waiting(tmp_path) == ["Hello there"])
        assert stored(tmp_path).title == "Hello there"
        left = stored(tmp_path)

    async with opened(tmp_path, left) as chat:
        assert prompt(chat).text == "Hello there"
        await chat.pilot.press("!")
        await chat.until_saved()
        assert waiting(tmp_path) == ["Hello there!"]
        await chat.pilot.press("ctrl+u")
        await chat.until_saved()
        with Store(tmp_path) as store:
            assert store.chats() == []  # of a chat with nothing in it, nothing is kept


async def test_no_save_has_a_text_twice_or_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompt, waiting, asked, taken back: always in one place, whenever the chat dies."""
    found: list[list[str]] = []
    save = Store.save

    def saved(store: Store, chat: Conversation, *turns: object) -> None:
        save(store, chat, *turns)  # type: ignore[arg-type]
        with Store(tmp_path) as reader:
            if not reader.chats():
                return
            again = reader.load(reader.latest())
        asked = [turn.content for turn in again.tree.values() if turn.role == "user"]
        found.append([*asked, *again.waiting.values()])

    monkeypatch.setattr(Store, "save", saved)
    async with opened(tmp_path) as chat:
        for text in ("One?", "Two?", "Three?"):
            prompt(chat).text = text
            await chat.until_saved()
            assert found[-1][-1] == text
            prompt(chat).action_send()
            chat.screen.show_numbers()
            chat.keeper.keep_now(chat.current)  # on its way from the prompt to the screen
            await chat.pilot.press("n", "ctrl+u")
            await chat.until_saved()
        chat.client.answer("First.")
        await chat.settle()
        chat.screen.action_stop()
        chat.screen.action_stop()  # takes it back
        chat.screen.dialogue.next()
        chat.keeper.keep_now(chat.current)
        assert prompt(chat).text == "Three?"

    known: set[str] = set()
    for texts in found:
        said = [text for text in texts if text.endswith("?")]
        assert len(said) == len(set(said))
        assert known <= set(said)
        known |= set(said)
    assert known == {"One?", "Two?", "Three?"}


async def test_a_folded_paste_comes_back_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        prompt(chat).put_in("See ")
        chat.app.post_message(Paste(LONG))
        await chat.settle()
        assert prompt(chat).text == "See [pasted 214 lines]"
        await chat.until_saved()
        assert waiting(tmp_path) == ["See " + LONG]

    async with opened(tmp_path, stored(tmp_path)) as chat:
        assert len(prompt(chat).text) < 60
        await chat.pilot.press("enter")
        await chat.settle()
        assert chat.client.asked[-1].messages[-1].content == "See " + LONG


async def test_what_is_sent_or_obeyed_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        prompt(chat).text = "/set"
        await chat.until_saved()
        await chat.pilot.press("enter")
        await chat.until_saved()
        assert waiting(tmp_path) == []
        await chat.type("/no such thing")
        await chat.until_saved()
        assert waiting(tmp_path) == ["/no such thing"]  # given back
        prompt(chat).text = "/quit"
        await chat.until_saved()
        await chat.pilot.press("enter")
    with Store(tmp_path) as store:
        assert store.chats() == []


async def test_what_was_typed_last_before_leaving_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        chat.screen._numbers_due = time.monotonic() + 60  # it is not looked at by itself
        prompt(chat).put_in("Hel")
        await chat.pilot.press("ctrl+q")

    assert waiting(tmp_path) == ["Hel"]


async def test_a_recalled_message_is_no_draft_and_an_edited_question_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("One?")
        chat.client.answer("Yes.")
        await chat.settle()
        prompt(chat).put_in("draft")
        await chat.pilot.press("up")
        await chat.until_saved()
        assert prompt(chat).text == "One?"
        assert waiting(tmp_path) == ["draft"]
        await chat.pilot.press("down", "alt+up", "alt+up", "e")
        await chat.until_saved()
        assert prompt(chat).text == "One?"
        assert waiting(tmp_path) == ["draft"]
        await chat.pilot.press("end", "!")
        await chat.until_saved()
        assert waiting(tmp_path) == ["draft\nOne?!"]
        await chat.pilot.press("enter")
        await chat.until_saved()
        assert waiting(tmp_path) == ["draft"]
        assert stored(tmp_path).turns[-1].content == "One?!"


async def test_a_chat_that_is_open_elsewhere_opens_and_says_so(tmp_path: Path) -> None:
    there = branched()
    there.wait({"0123456789": "Theirs?"})
    with Store(tmp_path) as store:
        store.save(there)
    other = Elsewhere(tmp_path, there.id)
    async with opened(tmp_path, stored(tmp_path)) as chat:
        assert "Another dflash-chat has this chat open" in " ".join(chat.text.split())
        assert prompt(chat).text == ""
        prompt(chat).put_in("Mine.")
        await chat.until_saved()
        assert waiting(tmp_path) == ["Theirs?", "Mine."]
        await chat.pilot.press("ctrl+u")
        await chat.type("/continue")  # of an answer that might be written on there
        assert chat.client.asked == []
        assert "Not continued" in chat.text
        other.kill()
        await chat.type("/continue")
        assert chat.client.asked[-1].continue_last
        await chat.until_saved()
        assert waiting(tmp_path) == ["Theirs?"]  # until somebody opens it anew


async def test_what_is_typed_goes_along_to_another_chat_and_leaves_this_one(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("One?")
        chat.client.answer("Yes.")
        await chat.settle()
        first = chat.current.id
        chat.app.post_message(Paste(LONG))
        await chat.until_saved()
        assert waiting(tmp_path) == [LONG]
        await chat.pilot.press("ctrl+n")
        await chat.until_saved()
        second, folded = chat.current.id, prompt(chat).text
        assert folded == "[pasted 214 lines]"
        with Store(tmp_path) as store:
            assert store.load(first).waiting == {}
            assert [*store.load(second).waiting.values()] == [LONG]
        chat.screen.action_sessions(first)  # and back again
        assert (chat.current.id, prompt(chat).text) == (first, folded)
        chat.keeper.keep_now(chat.current)
        chat.screen.action_new_chat()
        prompt(chat).clear()
        chat.screen.action_sessions(first)
        assert (chat.current.id, prompt(chat).text) == (first, "")
        prompt(chat).undo()
        await chat.pilot.press("enter")
        await chat.until_saved()
        with Store(tmp_path) as store:
            assert store.load(first).turns[-1].content == LONG
            assert store.load(first).waiting == {}
            assert [entry.id for entry in store.chats()] == [first]  # the other was empty again
