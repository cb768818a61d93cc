"""Chats on screen that are saved, reopened, looked through, and replayed."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual import events
from textual.widgets import Input, OptionList

from dflash_chat import export
from dflash_chat import store as store_module
from dflash_chat.chat import Conversation
from dflash_chat.keeper import Keeper
from dflash_chat.replay import Answer, Recording, ReplayClient
from dflash_chat.runtime.api import Load, Message, SamplingParams
from dflash_chat.store import FILE, Store
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.app import ChatApp
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.past import PAGE_TURNS, Past
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.replay_screen import ReplayScreen
from dflash_chat.ui.sessions_screen import SessionsScreen
from dflash_chat.ui.transcript import Card, Transcript, UserTurn
from dflash_chat.ui.words import Words
from dflash_chat.ui.xray import XrayScreen
from tests.saved import branched, essence, recorded
from tests.ui.fake_client import INFO, FakeClient
from tests.ui.test_chat_flow import Chat

LOAD = Load("smollm2-135m")


class Saved(Chat):
    """The chat with its keeper."""

    keeper: Keeper

    @property
    def current(self) -> Conversation:
        return self.screen.dialogue.chat

    async def until_saved(self) -> None:
        """Wait for all that was to be saved so far."""
        await self.pilot.pause()
        self.screen.show_numbers()
        self.keeper.keep_now(self.current)

    @property
    def turns(self) -> list[str]:
        """The words of the turns that are mounted."""
        children = self.screen.query_one(Transcript).query("UserTurn, AnswerTurn")
        return [
            child.turn.content
            for child in children
            if isinstance(child, UserTurn | AnswerTurn) and child.turn
        ]

    async def sessions(self) -> SessionsScreen:
        await self.pilot.press("ctrl+o")
        await self.pilot.pause()
        assert isinstance(self.app.screen, SessionsScreen)
        return self.app.screen


@asynccontextmanager
async def opened(
    folder: Path, chat: Conversation | None = None, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[Saved]:
    client, keeper = FakeClient(), Keeper(folder)
    screen = ChatScreen(client, LOAD, SamplingParams(), keeper=keeper, chat=chat)
    app = ChatApp(client, screen)
    try:
        async with app.run_test(size=size) as pilot:
            saved = Saved(app, client, pilot)
            saved.keeper = keeper
            await saved.load()
            yield saved
    finally:
        keeper.close()


def stored(folder: Path) -> Conversation:
    with Store(folder) as store:
        return store.load(store.latest())


def long_chat(turns: int, words: str = "some words of an answer, " * 30) -> Conversation:
    chat = Conversation(pair="smollm2-135m")
    for number in range(turns // 2):
        chat.ask(f"Question {number}?")
        recorded(chat, f"Answer {number}: {words}")
    return chat


# ── saving ──────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_said_is_there_again_with_its_figures(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        assert [turn.content for turn in stored(tmp_path).turns] == ["Hello?"]  # before any answer
        chat.client.answer("Hello **there**, how are you?", cached=4812, prompt=4873)
        await chat.settle()
        before = chat.text

    async with opened(tmp_path, stored(tmp_path)) as chat:
        assert chat.text == before
        assert "cached 4812 · read 61 · ttft 84 ms" in before
        await chat.type("And you?")
        assert [message.content for message in chat.client.asked[-1].messages] == [
            "Hello?", "Hello **there**, how are you?", "And you?",
        ]  # fmt: skip


async def test_the_steps_of_an_answer_are_there_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        chat.client.answer("Words and more words, and so on.")
        await chat.settle()

    turn = stored(tmp_path).turns[-1]
    with Store(tmp_path) as store:
        trace = store.trace(turn.id)
    assert "".join(getattr(event, "text", "") for event in trace) == turn.content
    assert turn.figures is not None
    assert sum(1 for event in trace if getattr(event, "stats", None)) == turn.figures.spec.steps


async def test_x_ray_shows_a_reopened_answer_and_what_is_written_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        chat.client.answer("Words and more words, and so", reason="cancelled")
        await chat.settle()
        await chat.pilot.press("f3")
        seen = blocks(chat)

    async with opened(tmp_path, stored(tmp_path)) as chat:
        await chat.pilot.press("f3")
        assert blocks(chat) == seen
        assert seen[0] == ["Word"]
        assert "".join(map("".join, seen)) == "Words and more words, and so"
        await chat.pilot.press("f3", "alt+up", "c")
        await chat.settle()
        await chat.pilot.press("f3")
        assert blocks(chat) == seen
        chat.client.answer(" on, and on.")
        await chat.settle()
        assert blocks(chat)[: len(seen)] == seen
        assert "".join(map("".join, blocks(chat))) == "Words and more words, and so on, and on."
        assert xray(chat).trace.spec.steps == len(blocks(chat)) - 2  # a token of each prefill


def xray(chat: Saved) -> XrayScreen:
    assert isinstance(chat.app.screen, XrayScreen)
    return chat.app.screen


def blocks(chat: Saved) -> list[list[str]]:
    return [[piece.text for piece in block.pieces] for block in xray(chat).trace.blocks]


async def test_a_thought_is_there_again_with_its_figures_and_is_gone_on_with(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        chat.client.answer("<think>Let me see, slowly.</think>Well, th", reason="cancelled")
        await chat.settle()
        before = chat.shown(".thought-words")
        assert "▸ thought · 11 tokens · tau 2.2" in before

    async with opened(tmp_path, stored(tmp_path)) as chat:
        assert chat.shown(".thought-words") == before
        assert "Let me see" not in chat.text
        await chat.type("/continue")
        asked = chat.client.asked[-1]
        assert asked.continue_last
        assert asked.messages[-1].content == "<think>Let me see, slowly.</think>Well, th"
        chat.client.answer("en.")
        await chat.settle()

    turn = stored(tmp_path).turns[-1]
    assert (turn.thinking, turn.content) == ("Let me see, slowly.", "Well, then.")


async def test_an_answer_left_for_a_new_chat_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        chat.client.stream("Half an answer")
        await chat.settle()
        await chat.pilot.press("ctrl+n")
        await chat.settle()
        assert chat.turns == []

    turn = stored(tmp_path).turns[-1]
    assert (turn.content, turn.state) == ("Half an answer", "stopped")


async def test_a_chat_that_cannot_be_saved_goes_on_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    async with opened(tmp_path / "data") as chat:
        await chat.type("Hello?")
        chat.client.answer("Hello there.")
        await chat.settle()

        assert "Hello there." in chat.text
        assert "not saved" in chat.shown("#hint")
        assert "file exists" in chat.shown("#hint")


# ── what waits ──────────────────────────────────────────────────────────────────────────────────


async def test_what_waits_is_saved_and_comes_back_in_the_prompt(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("One?")
        for text in ("Two?", "Three?"):
            await chat.type(text)
            assert text in stored(tmp_path).waiting.values()  # already now
        chat.client.answer("First.")
        await chat.settle()
        await chat.until_saved()
        assert [turn.content for turn in stored(tmp_path).turns][:3] == ["One?", "First.", "Two?"]
        assert list(stored(tmp_path).waiting.values()) == ["Three?"]

    async with opened(tmp_path, stored(tmp_path)) as chat:
        prompt = chat.screen.query_one(Prompt)
        assert prompt.text == "Three?"
        assert chat.client.asked == []  # nobody is asked unasked
        assert list(stored(tmp_path).waiting.values()) == ["Three?"]
        await chat.pilot.press("enter")
        await chat.settle()
        await chat.until_saved()
        assert stored(tmp_path).waiting == {}
    assert [turn.content for turn in stored(tmp_path).turns].count("Three?") == 1


async def test_what_waited_and_was_thrown_away_stays_away(tmp_path: Path) -> None:
    waited = Conversation()
    waited.wait({"0123456789": "Hello?"})
    with Store(tmp_path) as store:
        store.save(waited)
    async with opened(tmp_path, waited) as chat:
        assert chat.screen.query_one(Prompt).text == "Hello?"
        await chat.pilot.press("ctrl+u")
        await chat.until_saved()
        assert waited.waiting == {}
    with Store(tmp_path) as store:
        assert store.chats() == []  # of a chat with nothing in it, nothing is kept


async def test_what_is_taken_back_waits_no_more_and_what_is_left_behind_does(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("One?")
        await chat.type("Two?")
        prompt, left = chat.screen.query_one(Prompt), chat.current.id
        await chat.pilot.press("escape", "escape")
        await chat.until_saved()
        assert prompt.text == "Two?"
        assert list(stored(tmp_path).waiting.values()) == ["Two?"]  # as what is typed
        await chat.pilot.press("enter", "ctrl+n")
        await chat.type(f"/resume {left}")

        assert prompt.text == "Two?"


# ── deleting ────────────────────────────────────────────────────────────────────────────────────


async def test_a_deleted_branch_gives_way_to_the_one_beside_it(tmp_path: Path) -> None:
    async with opened(tmp_path, branched()) as chat:
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "d", "d")  # the second first answer
        await chat.settle()
        assert chat.turns == ["Why is the sky blue?", "Rayleigh scattering of sunlight."]
        await chat.until_saved()
        assert len(stored(tmp_path).tree) == 2
        await chat.pilot.press("alt+up", "alt+up", "d", "d")
        await chat.until_saved()
        assert chat.turns == []
        with Store(tmp_path) as store:
            assert store.chats() == []
        chat.current.ask("Afresh?")
        assert chat.current.title == "Afresh?"


async def test_the_answer_being_written_is_deleted_and_stays_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("One?")
        chat.client.stream("Half an answer")
        await chat.settle()
        await chat.pilot.press("alt+up", "d", "d")
        chat.client.stream("and the rest of it")  # of the request that was given up
        await chat.settle()
        await chat.until_saved()

        assert chat.client.cancelled == [1]
        assert chat.turns == ["One?"]
        assert [turn.content for turn in stored(tmp_path).tree.values()] == ["One?"]


async def test_nothing_is_deleted_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, branched()) as chat:
        await chat.until_saved()
        monkeypatch.setattr(store_module, "BUSY_S", 0.05)
        said: list[str] = []
        monkeypatch.setattr(chat.screen, "notify", lambda words, **_: said.append(words))
        holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        await chat.pilot.press("alt+up", "d", "d")
        holder.close()

        assert said == ["Not deleted: another program holds it"]
        assert chat.turns[-1] == "Chloro"


# ── reopening ───────────────────────────────────────────────────────────────────────────────────


async def test_a_long_chat_opens_at_its_end_and_brings_the_rest_when_scrolled_to(
    tmp_path: Path,
) -> None:
    long = long_chat(30, "line\n\n" * 6)
    async with opened(tmp_path, long) as chat:
        everything = [turn.content for turn in long.turns]
        transcript = chat.screen.query_one(Transcript)
        assert chat.turns == everything[-PAGE_TURNS:]
        assert f"↑ {30 - PAGE_TURNS} earlier turns" in chat.shown("Past")
        assert transcript.following
        for _ in range(40):
            if chat.turns == everything and transcript.scroll_y == 0:
                break
            before, mounted = transcript.scroll_y, len(chat.turns)
            await chat.pilot.press("pageup")
            await chat.settle()
            assert len(chat.turns) > mounted or transcript.scroll_y < before
        assert chat.turns == everything
        assert not chat.screen.query_one(Past).display


async def test_what_is_in_view_stays_in_view_while_earlier_turns_arrive(tmp_path: Path) -> None:
    async with opened(tmp_path, long_chat(60, "line\n\n" * 6)) as chat:
        transcript = chat.screen.query_one(Transcript)
        first = next(iter(chat.screen.query(UserTurn)))
        transcript.scroll_to(y=0, animate=False, immediate=True)
        await chat.settle()

        assert len(chat.turns) > PAGE_TURNS
        row = first.region.y - transcript.region.y
        assert 0 <= row <= 6


async def test_opening_a_long_chat_costs_no_more_than_its_last_page(tmp_path: Path) -> None:
    async def first_paint(turns: int) -> float:
        chat = long_chat(turns)
        client = FakeClient()
        app = ChatApp(client, ChatScreen(client, LOAD, SamplingParams(), chat=chat))
        began = time.process_time()
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause()
            took = time.process_time() - began
            assert app.screen_stack[0].query(AnswerTurn)
            assert len(app.screen_stack[0].query(AnswerTurn)) <= PAGE_TURNS / 2
        return took

    page = 20  # more turns than the first page has
    await first_paint(page)
    page_s = min([await first_paint(page) for _ in range(2)])
    long_s = min([await first_paint(200) for _ in range(2)])
    assert long_s < 1.5 * page_s + 0.05


async def test_a_failed_answer_is_asked_again_beside_the_old_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as chat:
        await chat.type("Hello?")
        chat.client.stream("Half an answer")
        await chat.settle()
        chat.client.die()
        await chat.settle()
        chat.client.ready()
        await chat.settle()
        await chat.pilot.press("ctrl+r")
        await chat.settle()
        chat.client.answer("A whole answer.")
        await chat.settle()

    again = stored(tmp_path)
    assert [turn.content for turn in again.turns] == ["Hello?", "A whole answer."]
    assert [turn.content for turn in again.branches(again.turns[-1].id)] == [
        "Half an answer", "A whole answer.",
    ]  # fmt: skip


async def test_branches_are_gone_through_and_the_chosen_one_lasts(tmp_path: Path) -> None:
    async with opened(tmp_path, branched()) as chat:
        path = [
            "Why is the sky blue?",
            "Because **air** scatters blue.",
            "And the grass?",
            "Chloro",
        ]
        assert chat.turns == path
        assert "branch 2 of 2" in chat.text
        await chat.pilot.press("alt+right")  # of the last turn that has branches
        await chat.settle()
        assert chat.turns == [*path[:2], "And the sea?", "It mirrors the sky, mostly."]
        await chat.pilot.press("alt+left")
        await chat.settle()
        assert chat.turns == path
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "alt+left")  # of that at the cursor
        await chat.settle()
        assert chat.turns == [path[0], "Rayleigh scattering of sunlight."]
        await chat.type("/branch")
        assert chat.turns[:2] == path[:2]
        chosen = chat.turns
    assert [turn.content for turn in stored(tmp_path).turns] == chosen


# ── the list of chats ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(tmp_path: Path) -> list[Conversation]:
    """Three saved chats, the last of them the latest."""
    chats = [branched(), long_chat(4), branched()]
    chats[2].title = "Branches"
    with Store(tmp_path) as store:
        for chat in chats:
            store.save(chat)
            for turn in chat.tree.values():
                store.add_trace(turn.id, turn.trace)
    return chats


async def test_the_palette_finds_what_was_said(tmp_path: Path, three: list[Conversation]) -> None:
    async with opened(tmp_path) as chat:
        with Store(tmp_path) as store:
            store.rename(three[1].id, "[b]old[/i] [PAIR]")
        await chat.pilot.press("ctrl+p", *"question 1")
        found = chat.app.screen.query_one(OptionList)
        for _ in range(100):
            if found.option_count and found.highlighted is not None:
                break
            await chat.pilot.pause(0.05)
        shown = str(found.get_option_at_index(0).prompt)
        assert shown.startswith("[b]old[/i] [PAIR]\nchat · Question 1?")
        await chat.pilot.press("enter")
        await chat.settle()

        assert chat.current.id == three[1].id


def rows(screen: SessionsScreen) -> list[str]:
    options = screen.query_one(OptionList).options
    return [str(option.prompt)[2:].split("  ")[0] for option in options]


async def test_a_chat_is_found_and_opened(tmp_path: Path, three: list[Conversation]) -> None:
    async with opened(tmp_path) as chat:
        screen = await chat.sessions()
        assert rows(screen) == ["Branches", "Question 0?", "Why is the sky blue?"]
        await chat.pilot.press("slash", *"answer 1")
        await chat.pilot.pause()
        assert rows(screen) == ["Question 0?"]
        await chat.pilot.press("enter", "enter")
        await chat.settle()

        assert chat.current.id == three[1].id
        assert chat.turns == [turn.content for turn in three[1].turns]
        await chat.type("More?")
        assert chat.client.asked[-1].messages[-1] == Message("user", "More?")
        assert len(chat.client.asked[-1].messages) == 5
    assert stored(tmp_path).id == three[1].id


async def test_two_enters_at_once_open_one_chat(tmp_path: Path, three: list[Conversation]) -> None:
    async with opened(tmp_path) as chat:
        await chat.sessions()
        for _ in range(2):
            chat.app.post_message(events.Key("enter", None))
        await chat.settle()
        assert chat.app.screen is chat.screen
        assert chat.current.id in [each.id for each in three]


async def test_a_chat_brings_its_settings_and_says_who_answers_now(tmp_path: Path) -> None:
    other = branched()
    other.pair = "gemma-4-26b-a4b"
    with Store(tmp_path) as store:
        store.save(other)
    async with opened(tmp_path) as chat:
        await chat.type(f"/resume {other.id[:6]}")
        assert "gemma-4-26b-a4b answered so far, smollm2-135m does now" in chat.text
        await chat.type("More?")

        asked = chat.client.asked[-1]
        assert asked.params == other.params
        assert not asked.draft
        assert asked.messages[0] == Message("system", "Be brief.")
        await chat.type("/resume nothing")
        assert "there is no chat 'nothing'" in chat.text


async def test_a_chat_is_renamed_also_while_it_is_on_screen(
    tmp_path: Path, three: list[Conversation]
) -> None:
    async with opened(tmp_path, stored(tmp_path)) as chat:
        screen = await chat.sessions()
        await chat.pilot.press("n")
        assert screen.query_one("#session-title", Input).value == "Branches"
        await chat.pilot.press("ctrl+u", *"Trees", "enter")
        await chat.pilot.pause()
        assert rows(screen)[0] == "Trees"
        await chat.pilot.press("escape")
        await chat.type("More?")

    again = stored(tmp_path)
    assert (again.title, again.turns[-1].content) == ("Trees", "More?")


async def test_a_chat_is_deleted_on_the_second_x(tmp_path: Path, three: list[Conversation]) -> None:
    async with opened(tmp_path) as chat:
        screen = await chat.sessions()
        await chat.pilot.press("x")
        await chat.pilot.press("down", "up", "x")  # moving takes the first one back
        assert len(rows(screen)) == 3
        await chat.pilot.press("x")
        await chat.pilot.pause()
        assert rows(screen) == ["Question 0?", "Why is the sky blue?"]
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, ChatScreen)


async def test_deleting_the_chat_on_screen_starts_another(
    tmp_path: Path, three: list[Conversation]
) -> None:
    async with opened(tmp_path, stored(tmp_path)) as chat:
        await chat.type("More?")
        chat.client.stream("Half")
        await chat.settle()
        await chat.sessions()
        await chat.pilot.press("x", "x", "escape")
        await chat.settle()
        assert chat.turns == []
        await chat.type("New?")

    with Store(tmp_path) as store:
        titles = [entry.title for entry in store.chats()]
    assert titles == ["New?", "Question 0?", "Why is the sky blue?"]


async def test_a_chat_is_exported_beside_what_is_there(
    tmp_path: Path, three: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with opened(tmp_path) as chat:
        await chat.sessions()
        await chat.pilot.press("e", "e", "j")

    names = ("branches.md", "branches-1.md", "branches.json")
    first, second, data = ((tmp_path / name).read_text() for name in names)
    assert first == second
    assert "Chloro" in first
    assert essence(export.from_json(data)) == essence(three[2])


async def test_a_damaged_file_is_said_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "chats.db").write_text("no database" * 100)
    async with opened(tmp_path) as chat:
        screen = await chat.sessions()
        assert rows(screen) == []
        assert any("it is damaged" in str(note.message) for note in chat.app._notifications)


# ── replay ──────────────────────────────────────────────────────────────────────────────────────


QUESTIONS = ["/quit", "Two? @README.md"]  # neither a command nor a file when they are replayed


def recording(ms: float) -> Recording:
    chat = Conversation()
    answers = []
    for question in QUESTIONS:
        chat.ask(question)
        turn = recorded(chat, f"an answer to {question} in ten words, or a few", ms)
        assert turn.figures is not None
        answers.append(Answer(question, tuple(turn.trace), turn.figures))
    return Recording(INFO, "", True, tuple(answers))


async def until(holds: Callable[[], bool]) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() < began + 20
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def test_a_recording_plays_by_itself_at_the_speed_it_had() -> None:
    played = recording(ms=80)  # ten passes each
    client = ReplayClient(played)
    screen = ReplayScreen(played, client)
    async with ChatApp(client, screen).run_test(size=(120, 40)) as pilot:

        def heard() -> str:
            return "".join(turn.content for turn in screen.dialogue.chat.turns[1::2])

        await until(lambda: "an" in heard())
        first_s = await until(lambda: "a few" in heard())
        assert 0.5 < first_s < 4  # frames come five times a second where cores are few
        await until(lambda: heard().count("a few") == 2)
        assert [turn.content for turn in screen.dialogue.chat.turns[::2]] == QUESTIONS
        await until(lambda: bool(screen.dialogue.last_finished))
        assert "tau 3.0" in str(screen.query_one("#acceptance", Words).render())
        screen.query_one(Prompt).text = "And mine?"
        await pilot.press("enter")
        await until(lambda: bool(screen.query("Card")))
        assert "This is a recording" in str(screen.query("Card").last(Card).render())
