"""Ten thousand random keys and pastes: nothing crashes, no text is lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from textual import events

from dflash_chat.access import Access
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import Load
from dflash_chat.ui import browser, clipboard, fetching, gate, models_screen
from dflash_chat.ui.actions import ACTIONS, COMMANDS
from dflash_chat.ui.prompt import FOLD_CHARS, Prompt
from dflash_chat.ui.transcript import UserTurn
from tests.ui.test_chat_flow import Chat, open_chat

PRESSES = 10_000
BATCH = 250
SEED = 20261122
LEAVES = {"quit", "editor"}  # these end the app, or lend the terminal away
COVERS = [
    "f1",
    "f3",
    "f4",
    "f8",
    "f9",
    "ctrl+p",
    "ctrl+o",
]  # these cover the chat, and most keys are for it

SPECIAL = [
    key
    for action in ACTIONS
    if action.id not in LEAVES
    for key in action.keys.split(",")
    if key and key not in COVERS
] + [
    "up", "down", "left", "right", "home", "tab", "shift+tab", "backspace", "delete", "ctrl+z",
    "ctrl+y", "ctrl+w", "ctrl+u", "ctrl+k", "ctrl+x", "ctrl+v", "ctrl+a", "shift+left",
    "ctrl+left", "shift+home", "f6", "f7", "enter", "escape", "enter", "escape",
]  # fmt: skip
TYPED = "abc xyz /@.\"'[]{}<>#|`*-1é日😀"
PASTES = (
    "two\nlines", "x" * (FOLD_CHARS + 5), "line\n" * 600, "\x1b[2J\x07", "[pasted 600 lines]", "",
    "@notes.txt ", "/theme nord", "/draft 3", "<think>", "```python\n", "\r\n\r\n",
)  # fmt: skip
ANSWERS = ("Yes.", "<think>hm</think>\n\n- a\n- b\n", "```python\nx = 1\n```\n" * 3, "word " * 300)


def event(dice: random.Random) -> events.Event:
    """One key or paste."""
    roll = dice.random()
    if roll < 0.03:
        return events.Paste(dice.choice(PASTES))
    if roll < 0.04:
        return events.Paste(dice.choice([c for c in COMMANDS if c != "/quit"]))
    if roll < 0.05:
        return events.Key(dice.choice(COVERS), None)
    if roll < 0.15:
        return events.Key(dice.choice(["enter", "enter", "escape"]), None)
    if roll < 0.6:
        character = dice.choice(TYPED)
        return events.Key(character, character)
    key = dice.choice(SPECIAL)
    return events.Key(key, key if len(key) == 1 else None)


class Engine:
    """Loads when asked to, answers or is cancelled, now and then dies."""

    def __init__(self, chat: Chat, dice: random.Random) -> None:
        self.client, self.dice = chat.client, dice
        self.loaded = 0
        self.done: set[int] = set()

    def go_on(self) -> None:
        loads = sum(isinstance(request, Load) for request in self.client.sent)
        if loads > self.loaded:
            self.loaded = loads
            self.client.ready()
        last = self.client.asked[-1:]
        if not last or last[0].id in self.done or self.dice.random() < 0.2:
            return
        self.done.add(last[0].id)
        if self.dice.random() < 0.05:
            self.client.die()
        else:
            reason = "cancelled" if last[0].id in self.client.cancelled else "stop"
            self.client.answer(self.dice.choice(ANSWERS), reason=reason)


def watch_prompt(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever the program puts into the prompt can be undone; returns what was replaced so."""
    replaced: list[str] = []
    put = prompt.put

    def undone(text: str) -> None:
        before = prompt.text
        put(text)
        after = prompt.text
        assert after == text
        if before != after:
            replaced.append(before)
            prompt.undo()
            assert prompt.text == before
            prompt.redo()
            assert prompt.text == after

    monkeypatch.setattr(prompt, "put", undone)
    return replaced


@pytest.mark.slow
async def test_ten_thousand_keys_and_pastes(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clipboard, "ways", lambda environ: [])
    monkeypatch.setattr(gate, "ask", nobody)
    monkeypatch.setattr(fetching, "COMMAND", ("false",))  # nothing is fetched or removed
    monkeypatch.setattr(models_screen, "_hf", lambda: "")
    monkeypatch.setattr(browser, "ways", lambda environ: [])
    (tmp_path / "notes.txt").write_text("remember")
    dice = random.Random(SEED)
    keeper = Keeper(tmp_path)
    async with open_chat((90, 30), keeper=keeper) as chat:
        dialogue, prompt = chat.screen.dialogue, chat.screen.query_one(Prompt)
        asked: list[UserTurn] = []
        for name in ("ask", "ask_again"):
            monkeypatch.setattr(dialogue, name, recorded(getattr(dialogue, name), asked))
        replaced = watch_prompt(prompt, monkeypatch)
        engine = Engine(chat, dice)
        for _ in range(PRESSES // BATCH):
            for _ in range(BATCH):
                chat.app.post_message(event(dice))
            await chat.pilot.pause()
            engine.go_on()
            await chat.pilot.pause(0.03)
            roles = [message.role for message in dialogue.chat.messages()]
            assert all(a != b for a, b in itertools.pairwise(roles))

        assert len(asked) > 20
        assert len(replaced) > 20
        in_prompt = set(prompt.sent)
        for turn in asked:  # each was asked, waits, or can be recalled where it was taken back
            assert turn.turn or turn in dialogue.waiting or turn.shown in in_prompt
            assert turn.turn is None or turn.turn.content == turn.text

        while len(chat.app.screen_stack) > 1:
            await chat.app.pop_screen()
        for _ in range(3):
            engine.go_on()
            await chat.settle()
        await chat.pilot.press("ctrl+n")
        await chat.type("Still there?")
        for _ in range(50):  # the engine may have to be started again first
            engine.go_on()
            await chat.settle()
            if chat.client.asked[-1].messages[-1].content == "Still there?":
                break
        else:
            pytest.fail("the last question was not asked")


async def nobody(*_: object) -> list[Access]:
    """The hub is not asked."""
    return []


def recorded(does: Callable[..., None], asked: list[UserTurn]) -> Callable[..., None]:
    def call(turn: UserTurn, instead: UserTurn | None = None) -> None:
        asked.append(instead or turn)
        does(turn, instead) if instead else does(turn)

    return call
