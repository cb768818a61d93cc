"""Bench now: what is asked of the engine, shown while it runs, and used by the plan afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dflash_chat import calibration, pairs
from dflash_chat.calibration import Key
from dflash_chat.runtime.api import Bench, Benched, Failed
from dflash_chat.runtime.costs import CostTable
from dflash_chat.speed import Survival
from dflash_chat.ui.plan_screen import PlanScreen
from tests.ui.fake_client import INFO
from tests.ui.test_chat_flow import Chat, open_chat
from tests.ui.test_models_screen import told
from tests.ui.test_plan_screen import plan_screen, planned, shown, until

RATES = ((0, 40.0), (1, 48.0), (3, 60.0), (7, 52.0), (-1, 58.0))

pytestmark = pytest.mark.usefixtures("own_folders")


@asynccontextmanager
async def opened(command: str = "") -> AsyncIterator[Chat]:
    """The plan over a chat of one answer; by `command` instead of F4."""
    async with open_chat((120, 40)) as chat:
        await chat.load()
        await chat.type("One?")
        chat.client.answer("First.")
        await chat.settle()
        await (chat.type(command) if command else chat.pilot.press("f4"))
        await planned(chat)
        yield chat


def asked(chat: Chat) -> Bench:
    request = chat.client.sent[-1]
    assert isinstance(request, Bench)
    return request


async def begun(chat: Chat) -> Bench:
    await chat.pilot.press("b")
    return asked(chat)


async def test_it_shows_how_far_it_is_and_the_plan_goes_by_what_it_finds() -> None:
    async with opened() as chat:
        assert "drafted" not in shown(chat, "why")  # a processor that nobody measured
        request = await begun(chat)
        assert [m.content for m in request.messages] == ["One?", "First."]
        chat.client.emit(Benched(request.id, 1, 9.0, RATES, before=61))
        await until(chat, lambda: "9 of about 20 s · Esc stops it" in shown(chat, "bench"))
        await until(chat, lambda: "round 2" in shown(chat, "bench"))
        await until(
            chat,
            lambda: (
                "plain 40.0 tok/s · K1 1.20× · K3 1.50× · K7 1.30× · auto 1.45×"
                in shown(chat, "bench")
            ),
        )

        build = pairs.find(INFO.pair).builds[0].name
        key = Key("", "", INFO.pair, build)  # the engine's, on this processor
        verify = [[20.0], [20.5], [21.0], [22.0], [40.0], [41.0], [42.0], [43.0]]
        calibration.write(key, "rig", CostTable.measured(range(1, 9), (64,), [2.0], verify))
        calibration.write_survival(key, Survival((0.8, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1), 141))
        chat.client.emit(Benched(request.id, 2, 21.0, RATES, 61, "done", 0, True))
        await until(chat, lambda: "kept: plans go by it" in shown(chat, "bench"))
        await until(chat, lambda: "measured on 2 prompts" in shown(chat, "bench"))
        await until(chat, lambda: "behind 61 tokens of this chat" in shown(chat, "bench"))
        assert "read again" not in shown(chat, "bench")
        await until(chat, lambda: "3 drafted" in shown(chat, "why"))
        measured = "acceptance measured on 141 tokens here"
        await until(chat, lambda: measured in " ".join(shown(chat, "why").split()))
        await until(chat, lambda: "passes measured   1 row 20.0" in shown(chat, "figures"))
        assert not chat.screen.dialogue.busy


async def test_escape_stops_it_then_leaves() -> None:
    async with opened() as chat:
        request = await begun(chat)
        await chat.pilot.press("b", "a", "escape")
        assert isinstance(chat.app.screen, PlanScreen)
        assert "The bench is running; Esc stops it" in told(chat)
        assert chat.client.cancelled == [request.id]
        await until(chat, lambda: "stopping …" in shown(chat, "bench"))
        chat.client.emit(Benched(request.id, 0, 1.0, reason="cancelled", forgotten=1234))
        await until(chat, lambda: "nothing of it is kept" in shown(chat, "bench"))
        await until(
            chat, lambda: "1 234 tokens of this chat are read again" in shown(chat, "bench")
        )
        await chat.pilot.press("escape")
        assert chat.app.screen is chat.screen


async def test_questions_wait_for_it_and_it_waits_for_answers() -> None:
    async with opened("/bench") as chat:
        request = asked(chat)
        assert chat.screen.dialogue.busy
        chat.app.pop_screen()  # somebody closes it without asking
        await chat.settle()
        assert chat.client.cancelled[-1] == request.id
        await chat.type("Two?")
        assert chat.client.asked[-1].messages[-1].content == "Two?"
        await chat.type("/bench")
        await planned(chat)
        await until(chat, lambda: "! an answer is being written" in shown(chat, "bench"))
        assert not any(isinstance(sent, Bench) for sent in chat.client.sent[-2:])


@pytest.mark.parametrize(
    ("accident", "words"),
    [
        (Failed(0, "The memory ran out.", "Try less.", 1), "! The memory ran out. Try less."),
        (None, "! the engine stopped: it was killed (SIGKILL)"),
    ],
)
async def test_an_accident_is_said(accident: Failed | None, words: str) -> None:
    async with opened() as chat:
        request = await begun(chat)
        if accident is None:
            chat.client.die()
        else:
            chat.client.emit(Failed(request.id, accident.message, accident.hint, 1))
        await until(chat, lambda: words in shown(chat, "bench"))
        assert not chat.screen.dialogue.busy


async def test_only_what_is_loaded_can_be_measured(own_folders: Path) -> None:
    async with open_chat((120, 40)) as chat:
        await chat.pilot.press("f4")
        await until(chat, lambda: isinstance(chat.app.screen, PlanScreen))
        assert plan_screen(chat)
        await chat.pilot.press("b")
        await until(chat, lambda: "! nothing is loaded yet" in shown(chat, "bench"))
        assert not any(isinstance(sent, Bench) for sent in chat.client.sent)
