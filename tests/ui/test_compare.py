"""With and without drafting, side by side: two requests that differ in nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dflash_chat.runtime.api import Failed, SamplingParams
from dflash_chat.ui.compare_screen import CompareScreen, same_words
from dflash_chat.ui.words import Words
from tests.ui.test_chat_flow import Chat, open_chat


async def started(chat: Chat) -> CompareScreen:
    await chat.load()
    await chat.type("One?")
    chat.client.answer("First.")
    await chat.settle()
    await chat.pilot.press("f9")
    await chat.settle()
    assert isinstance(chat.app.screen, CompareScreen)
    return chat.app.screen


def verdict(screen: CompareScreen) -> str:
    return str(screen.query_one("#verdict", Words).content)


async def test_both_runs_ask_the_same_one_after_the_other() -> None:
    async with open_chat() as chat:
        chat.screen.dialogue.params = SamplingParams(temperature=0.7)
        screen = await started(chat)
        assert len(chat.client.asked) == 2
        chat.client.answer("<think>Well.</think>The same text both times.")
        await chat.settle()
        said = chat.client.stream("<think>Well.</think>The same text both times.", draft=False)
        chat.client.finish(said)
        await chat.settle()
        first, second = chat.client.asked[1:]

        assert first.params.seed is not None
        assert replace(second, draft=True, id=first.id) == first
        assert not second.draft
        assert first.messages == chat.client.asked[0].messages
        assert "the texts are identical" in verdict(screen)
        assert "× plain decoding" in verdict(screen)
        columns = [str(words.content) for words in screen.query(".run-words").results(Words)]
        assert "tau 2." in columns[0]
        assert "tau 1.0" in columns[1]
        thoughts = [str(words.content) for words in screen.query(".thought-words").results(Words)]
        assert [words[:9] for words in thoughts] == ["▸ thought"] * 2

        await chat.pilot.press("escape")
        await chat.type("Two?")
        assert [m.content for m in chat.client.asked[-1].messages] == ["One?", "First.", "Two?"]


async def test_leaving_early_ends_the_run_and_the_chat_goes_on() -> None:
    async with open_chat() as chat:
        await started(chat)
        chat.client.stream("Half")
        await chat.settle()
        await chat.pilot.press("escape")
        await chat.settle()
        assert chat.client.cancelled == [chat.client.asked[-1].id]
        chat.client.answer("too late")  # of the run that was left
        await chat.settle()
        await chat.type("Two?")

        assert "too late" not in chat.text
        assert chat.client.asked[-1].messages[-1].content == "Two?"


@pytest.mark.parametrize("ends", ["failed", "died"])
async def test_a_run_that_fails_says_so(ends: str) -> None:
    async with open_chat() as chat:
        screen = await started(chat)
        if ends == "failed":
            chat.client.emit(Failed(chat.client.asked[-1].id, "out of memory", "", 5))
        else:
            chat.client.die()
        await chat.settle()

        assert "it ended early" in verdict(screen)
        await chat.pilot.press("escape")
        await chat.load()
        await chat.type("Two?")
        assert chat.client.asked[-1].messages[-1].content == "Two?"


async def test_it_fits_a_small_screen() -> None:
    async with open_chat((50, 20)) as chat:
        screen = await started(chat)
        chat.client.answer("Text")
        await chat.settle()

        assert all(run.region.width >= 48 and run.region.height > 4 for run in screen.query("Run"))


def test_where_texts_part() -> None:
    assert same_words("abc", "abc") == "the texts are identical"
    assert same_words("abc", "abd") == "the texts differ from character 3 on"
    assert same_words("ab", "abc") == "the texts differ from character 3 on"
