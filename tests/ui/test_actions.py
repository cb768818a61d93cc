"""Every key and every command of the table does what it says."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from textual.app import App
from textual.command import CommandPalette
from textual.widgets import OptionList

from dflash_chat.export import from_json
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import Bench, Message, Tokens
from dflash_chat.ui import actions, clipboard, editor
from dflash_chat.ui.actions import ACTIONS, BY_ID, COMMANDS
from dflash_chat.ui.answer import AnswerTurn
from dflash_chat.ui.compare_screen import CompareScreen
from dflash_chat.ui.help_screen import HelpScreen
from dflash_chat.ui.models_screen import ModelsScreen
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.sessions_screen import SessionsScreen
from dflash_chat.ui.transcript import Transcript
from dflash_chat.ui.xray import XrayScreen
from tests.ui.test_chat_flow import Chat, open_chat

CODE = "Two blocks:\n\n```python\none = 1\n```\n\n- in a list\n\n  ```\n  two\n  ```\n"
LONG = "\n\n".join(f"Paragraph {n}" for n in range(60))


@pytest.fixture
async def chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Chat]:
    monkeypatch.setattr(clipboard, "ways", lambda environ: [])
    keeper = Keeper(tmp_path)
    async with open_chat((100, 30), keeper=keeper) as chat:
        await chat.load()
        yield chat
    keeper.close()


async def answered(chat: Chat, text: str = "An answer.", reason: str = "stop") -> None:
    await chat.type("One?")
    chat.client.answer(text, reason=reason)
    await chat.settle()


async def press(chat: Chat, action: str) -> None:
    """Press the action's first key."""
    await chat.pilot.press(BY_ID[action].keys.split(",")[0])
    await chat.settle()


def prompt(chat: Chat) -> Prompt:
    return chat.screen.query_one(Prompt)


def transcript(chat: Chat) -> Transcript:
    return chat.screen.query_one(Transcript)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


async def send(chat: Chat) -> None:
    await chat.pilot.press("h", "i")
    await press(chat, "send")
    assert chat.client.asked[-1].messages == (Message("user", "hi"),)


async def newline(chat: Chat) -> None:
    await chat.pilot.press("a")
    await press(chat, "newline")
    assert prompt(chat).text == "a\n"


async def editor_(chat: Chat) -> None:
    prompt(chat).put("draft")
    chat.app.suspend = nullcontext  # type: ignore[method-assign]
    before, editor.edit = editor.edit, lambda text: text + ", written elsewhere"
    try:
        await press(chat, "editor")
    finally:
        editor.edit = before
    assert prompt(chat).text == "draft, written elsewhere"
    await chat.pilot.press("ctrl+z")
    assert prompt(chat).text == "draft"


async def stop(chat: Chat) -> None:
    await chat.type("One?")
    await press(chat, "stop")
    assert chat.client.cancelled == [1]


async def again(chat: Chat) -> None:
    await answered(chat)
    await press(chat, "again")
    assert chat.client.asked[-1].messages == (Message("user", "One?"),)
    assert len(chat.screen.query(AnswerTurn)) == 1


async def compare(chat: Chat) -> None:
    await answered(chat)
    await press(chat, "compare")
    assert isinstance(chat.app.screen, CompareScreen)


async def plan_and_models(chat: Chat) -> None:
    for action, screen in (("plan", PlanScreen), ("models", ModelsScreen)):
        await press(chat, action)
        assert isinstance(chat.app.screen, screen)
        await press(chat, action)  # closes it
        assert chat.app.screen is chat.screen


async def xray(chat: Chat) -> None:
    await answered(chat, "The first answer.")
    await answered(chat, "The second.")
    await press(chat, "xray")
    assert xrayed(chat) == "The second."
    await press(chat, "xray")
    for _ in range(3):
        await press(chat, "turn_up")
    await press(chat, "xray")
    assert xrayed(chat) == "The first answer."


def xrayed(chat: Chat) -> str:
    """What X-ray shows, without its marks."""
    assert isinstance(chat.app.screen, XrayScreen)
    blocks = chat.app.screen.trace.blocks
    return "".join(piece.text for block in blocks for piece in block.pieces)


async def thoughts(chat: Chat) -> None:
    await answered(chat, "<think>Let me see.</think>Yes.")
    assert "Let me see." not in chat.text
    assert "▸ thought · 6 tokens · tau 2.0" in chat.shown(".thought-words")
    await press(chat, "thoughts")
    assert "Let me see." in chat.text
    await press(chat, "thoughts")
    assert "Let me see." not in chat.text


async def turn_up_and_down(chat: Chat) -> None:
    await answered(chat)
    await press(chat, "turn_up")
    assert isinstance(transcript(chat).cursor, AnswerTurn)
    await press(chat, "turn_up")
    assert transcript(chat).cursor is chat.screen.dialogue.questions[0]
    await press(chat, "turn_down")
    await press(chat, "turn_down")
    assert transcript(chat).cursor is None
    assert chat.app.focused is prompt(chat)


async def copy_turn(chat: Chat) -> None:
    await answered(chat, "An **answer**.")
    await press(chat, "turn_up")
    await press(chat, "copy_turn")
    assert chat.app.clipboard == "An **answer**."


async def code(chat: Chat) -> None:
    await answered(chat, CODE)
    await press(chat, "turn_up")
    assert "copy code" in chat.shown("KeyBar")
    for expected in ("one = 1\n", "two\n", "one = 1\n"):
        await press(chat, "code")
        assert chat.app.clipboard == expected
    assert len(chat.client.asked) == 1


async def edit(chat: Chat) -> None:
    await answered(chat)
    await chat.pilot.press("d", "r")
    await press(chat, "turn_up")
    await press(chat, "edit")
    assert prompt(chat).text == "One?"
    await chat.pilot.press("!", "enter")
    await chat.settle()
    assert chat.client.asked[-1].messages == (Message("user", "One?!"),)
    assert "An answer." not in chat.text
    assert "An answer." in [turn.content for turn in chat.screen.dialogue.chat.tree.values()]
    assert prompt(chat).text == "dr"


async def regenerate(chat: Chat) -> None:
    await answered(chat)
    await chat.type("Two?")
    chat.client.answer("Second.")
    await chat.settle()
    await chat.pilot.press("alt+up", "alt+up", "alt+up")
    await press(chat, "regenerate")
    assert chat.client.asked[-1].messages == (Message("user", "One?"),)
    assert "Two?" not in chat.text


async def xray_turn(chat: Chat) -> None:
    await answered(chat, "The first answer.")
    await chat.type("And?")
    await chat.pilot.press("alt+up", "alt+up", "alt+up", "alt+up")  # at the first question
    await press(chat, "xray_turn")
    assert xrayed(chat) == "The first answer."


async def delete(chat: Chat) -> None:
    await answered(chat, "First.")
    await answered(chat, "Second.")
    await chat.pilot.press("alt+up", "alt+up")
    await press(chat, "delete")
    assert "d again deletes this turn and 1 below it for good" in chat.shown("#hint")
    await chat.pilot.press("alt+up", "alt+down")  # whoever moves has thought better of it
    await press(chat, "delete")
    assert "Second." in chat.text
    await press(chat, "delete")
    assert "Second." not in chat.text
    assert [turn.content for turn in chat.screen.dialogue.chat.tree.values()] == ["One?", "First."]
    await chat.type("And?")
    assert [m.content for m in chat.client.asked[-1].messages] == ["One?", "First.", "And?"]


async def sessions(chat: Chat) -> None:
    await press(chat, "sessions")
    assert isinstance(chat.app.screen, SessionsScreen)


async def branches(chat: Chat) -> None:
    await answered(chat, "First.")
    await press(chat, "branch")  # nothing to go to: the answer stays
    assert "First." in chat.text
    await press(chat, "again")
    chat.client.answer("Second.")
    await chat.settle()
    await press(chat, "branch")
    assert "First." in chat.text
    assert "branch 1 of 2" in chat.text
    assert "Second." not in chat.text
    await press(chat, "branch_before")
    assert "Second." in chat.text
    await chat.type("And?")
    assert [m.content for m in chat.client.asked[-1].messages] == ["One?", "Second.", "And?"]


async def help_(chat: Chat) -> None:
    await press(chat, "help")
    assert isinstance(chat.app.screen, HelpScreen)


async def palette(chat: Chat) -> None:
    await press(chat, "palette")
    assert isinstance(chat.app.screen, CommandPalette)


async def new(chat: Chat) -> None:
    await answered(chat)
    await press(chat, "new")
    assert chat.text.strip() == ""


async def panel(chat: Chat) -> None:
    await press(chat, "panel")
    assert not chat.screen.query_one("SidePanel").display


async def copy(chat: Chat) -> None:
    prompt(chat).put("to be copied")
    prompt(chat).select_all()
    await press(chat, "copy")
    assert chat.app.clipboard == "to be copied"


async def scrolling(chat: Chat) -> None:
    await answered(chat, LONG)
    view = transcript(chat)
    for up, down in (("page_up", "page_down"), ("line_up", "line_down")):
        end = view.scroll_y
        await press(chat, up)
        assert view.scroll_y < end
        await press(chat, down)
        assert view.scroll_y == end


async def answer_start_and_follow(chat: Chat) -> None:
    await chat.type("One?")
    chat.client.stream(LONG)
    await chat.settle()
    await press(chat, "answer_start")
    top = transcript(chat).scroll_y
    assert chat.screen.query_one(AnswerTurn).region.y <= transcript(chat).region.y
    chat.client.emit(Tokens(1, "\n\nmore", 7))
    await chat.settle()
    assert "↓ 7 new · End" in chat.shown("#hint")
    assert transcript(chat).scroll_y == top
    await press(chat, "follow")
    assert transcript(chat).following
    assert "new" not in chat.shown("#hint")


async def quit_(chat: Chat) -> None:
    await press(chat, "quit")
    assert not chat.app.is_running


KEYS: dict[Callable[[Chat], Awaitable[None]], tuple[str, ...]] = {
    send: ("send",), newline: ("newline",), editor_: ("editor",), stop: ("stop",),
    again: ("again",), compare: ("compare",), xray: ("xray",),
    plan_and_models: ("plan", "models"), thoughts: ("thoughts",),
    turn_up_and_down: ("turn_up", "turn_down"), copy_turn: ("copy_turn",), code: ("code",),
    edit: ("edit",), regenerate: ("regenerate",), help_: ("help",), palette: ("palette",),
    xray_turn: ("xray_turn",), delete: ("delete",),
    sessions: ("sessions",), branches: ("branch", "branch_before"),
    new: ("new",), panel: ("panel",), copy: ("copy",),
    scrolling: ("page_up", "page_down", "line_up", "line_down"),
    answer_start_and_follow: ("answer_start", "follow"), quit_: ("quit",),
}  # fmt: skip


def test_every_key_of_the_table_is_tried() -> None:
    tried = {name for names in KEYS.values() for name in names}
    assert tried == {action.id for action in ACTIONS if action.keys}


@pytest.mark.parametrize("does", KEYS, ids=lambda does: does.__name__)
async def test_a_key(chat: Chat, does: Callable[[Chat], Awaitable[None]]) -> None:
    await does(chat)


# ── commands ────────────────────────────────────────────────────────────────────────────────────


async def settings(chat: Chat) -> None:
    await chat.type("/system Be brief.")
    await chat.type("/set seed=7")
    await chat.type("/draft 4")
    await chat.type("Hi")
    request = chat.client.asked[-1]
    assert request.messages[0] == Message("system", "Be brief.")
    assert (request.params.seed, request.draft, request.draft_tokens) == (7, True, 4)
    assert "draft ON k≤4" in chat.shown("#engine")
    chat.client.answer("Hello")
    await chat.settle()
    await chat.type("/draft auto")
    await chat.type("/stats")
    assert "verify passes" in chat.text
    await chat.type("Hi again")
    assert (chat.client.asked[-1].draft, chat.client.asked[-1].draft_tokens) == (True, 0)


async def answers(chat: Chat) -> None:
    await answered(chat, CODE, reason="length")
    await chat.type("/copy")
    assert chat.app.clipboard == CODE
    await chat.type("/copy code")
    assert chat.app.clipboard == "two\n"
    await chat.type("/continue")
    assert chat.client.asked[-1].continue_last
    chat.client.answer("the end")
    await chat.settle()
    await chat.type("/regen")
    assert chat.client.asked[-1].messages == (Message("user", "One?"),)
    chat.client.answer("Shorter.")
    await chat.settle()
    await chat.type("/undo")
    assert prompt(chat).text == "One?"
    assert not chat.screen.query(AnswerTurn)


async def files(chat: Chat) -> None:
    Path("notes.txt").write_text("remember the milk")
    await chat.type("/file notes.txt")
    assert prompt(chat).text == "@notes.txt "
    chat.screen.show_numbers()
    assert "includes notes.txt · 17 bytes ≈ 4 tokens" in chat.shown("#hint")
    await chat.pilot.press("?", "enter")
    await chat.settle()
    assert "remember the milk" in chat.client.asked[-1].messages[-1].content
    assert "remember the milk" not in chat.text
    assert "notes.txt · 17 bytes" in chat.text
    chat.client.answer("Yes.")
    await chat.settle()
    await chat.type("/export chat.md")
    assert "remember the milk" in Path("chat.md").read_text()
    await chat.type("/export chat.md")
    assert "is there already" in chat.text
    assert prompt(chat).text == "/export chat.md"


async def looks(chat: Chat) -> None:
    await chat.type("/theme textual-light")
    assert chat.app.theme == "textual-light"
    await chat.type("/theme ansi-dark")
    assert chat.app.theme == "ansi-dark"
    await chat.type("/think")
    assert chat.screen.dialogue.unfolded
    await chat.type("Hi")
    await chat.type("/clear")
    assert chat.text.strip() == ""
    await chat.type("/help")
    assert isinstance(chat.app.screen, HelpScreen)


async def by_origin(chat: Chat) -> None:
    await chat.type("/xray")
    assert "/xray has nothing to do now" in chat.text
    await chat.type("/clear")
    await answered(chat)
    await chat.type("/xray")
    assert isinstance(chat.app.screen, XrayScreen)


async def side_by_side(chat: Chat) -> None:
    await chat.type("/ab")
    assert "/ab has nothing to do now" in chat.text
    assert prompt(chat).text == ""
    await chat.type("/clear")
    await answered(chat)
    await chat.type("/ab")
    assert isinstance(chat.app.screen, CompareScreen)


async def other_models(chat: Chat) -> None:
    await chat.type("/model")
    assert "target   SmolLM2-135M-Instruct" in chat.text
    await chat.type("/model qwen3-8b")
    assert "qwen3-8b is not installed" in chat.text
    await chat.type("/model gpt-oss-20b")
    assert "gpt_oss is not read yet" in chat.text
    for command, screen in (("/plan", PlanScreen), ("/models", ModelsScreen)):
        await chat.type("/clear")
        await chat.type(command)
        assert isinstance(chat.app.screen, screen)
        await chat.pilot.press("escape")
    await chat.type("/clear")
    await chat.type("/bench")
    while not isinstance(chat.client.sent[-1], Bench):  # once the plan is made
        await chat.pilot.pause(0.01)
    assert isinstance(chat.app.screen, PlanScreen)


async def saved(chat: Chat) -> None:
    await answered(chat, "First.")
    await chat.type("/regen")
    chat.client.answer("Second.")
    await chat.settle()
    await chat.type("/branch")
    assert "First." in chat.text
    await chat.type("/export chat.json")
    assert len(from_json(Path("chat.json").read_text()).tree) == 3
    first = chat.screen.dialogue.chat.id
    await chat.type("/clear")
    await chat.type("Another?")
    await chat.type(f"/resume {first[:5]}")
    assert "First." in chat.text
    await chat.type("/resume")
    assert isinstance(chat.app.screen, SessionsScreen)


async def leaving(chat: Chat) -> None:
    await chat.type("/quit")
    assert not chat.app.is_running


SAID: dict[Callable[[Chat], Awaitable[None]], set[str]] = {
    settings: {"/system", "/set", "/draft", "/stats"},
    answers: {"/copy", "/continue", "/regen", "/undo"},
    files: {"/file", "/export"},
    looks: {"/theme", "/think", "/clear", "/help"},
    side_by_side: {"/ab"},
    by_origin: {"/xray"},
    other_models: {"/model", "/plan", "/models", "/bench"},
    saved: {"/branch", "/resume"},
    leaving: {"/quit"},
}


def test_every_command_of_the_table_is_tried() -> None:
    assert set().union(*SAID.values()) == set(COMMANDS)


@pytest.mark.parametrize("does", SAID, ids=lambda does: does.__name__)
async def test_commands(
    chat: Chat,
    does: Callable[[Chat], Awaitable[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    await does(chat)


# ── the table ───────────────────────────────────────────────────────────────────────────────────


def test_ids_keys_and_commands_are_unique() -> None:
    keys = [key for action in ACTIONS for key in action.keys.split(",") if key]
    commands = [action.command for action in ACTIONS if action.command]
    assert len(BY_ID) == len(ACTIONS)
    assert len(set(keys)) == len(keys)
    assert len(set(commands)) == len(commands)


async def test_help_and_palette_have_all_of_them(chat: Chat) -> None:
    titles = {command.title for command in chat.app.get_system_commands(chat.screen)}
    shown = {action.name for action in ACTIONS if action.scope in (actions.CHAT, actions.APP)}
    assert shown - {"Commands"} <= titles
    await chat.pilot.press("ctrl+p")
    listed: list[str] = []
    for _ in range(100):
        listed = [str(option.prompt) for option in chat.app.screen.query_one(OptionList).options]
        if len(listed) >= len(shown):
            break
        await chat.pilot.pause(0.05)
    assert any("\n" in each and each.endswith("· /model [PAIR]") for each in listed)
    await chat.pilot.press("escape", "f1")
    parts = chat.app.screen.query("#help Static")
    page = " ".join(" ".join(str(part.content) for part in parts).split())
    for action in ACTIONS:
        assert action.does in page
        assert action.usage in page


async def test_the_palette_asks_for_an_argument_in_the_prompt(chat: Chat) -> None:
    await chat.screen.choose(BY_ID["theme"])
    assert prompt(chat).text == "/theme "
    await chat.screen.choose(BY_ID["continue"])  # nothing to do: says so, does not fail
    await chat.screen.choose(BY_ID["panel"])
    assert not chat.screen.query_one("SidePanel").display


async def test_keys_can_be_moved() -> None:
    moved = {"panel": "f5", "send": "ctrl+s", "copy_turn": "k", "quit": "f12"}
    async with open_chat(keymap=moved) as chat:
        await chat.load()
        await chat.pilot.press("f2")
        assert chat.screen.query_one("SidePanel").display
        await chat.pilot.press("f5")
        assert not chat.screen.query_one("SidePanel").display
        await chat.pilot.press("h", "i", "ctrl+s")
        chat.client.answer("Copied.")
        await chat.settle()
        await chat.pilot.press("alt+up", "k")
        assert chat.app.clipboard == "Copied."
        assert "F12 Quit" in chat.shown("KeyBar")
        await chat.pilot.press("f12")
        assert not chat.app.is_running


async def test_an_editor_that_fails_leaves_the_text(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt(chat).put("keep me")
    await press(chat, "editor")  # headless: cannot be suspended
    assert prompt(chat).text == "keep me"
    came_back: list[object] = []

    @contextmanager
    def lent(app: App[object]) -> Iterator[None]:
        """As Textual lends the terminal: what is raised meanwhile is the end of it."""
        yield
        came_back.append(app)

    monkeypatch.setattr(App, "suspend", lent)
    monkeypatch.setenv("VISUAL", "false")
    await press(chat, "editor")
    assert prompt(chat).text == "keep me"
    assert came_back == [chat.app]

    def full(text: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl+C reaches everybody at the terminal
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(editor, "edit", full)
    await press(chat, "editor")
    assert prompt(chat).text == "keep me"
    assert came_back == [chat.app, chat.app]


def test_an_editor_gets_and_gives_back_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "ed it.sh"
    script.write_text('#!/bin/sh\nsed -i "s/one/two/" "$2"\ntest "$1" = -w\n')
    script.chmod(0o755)
    monkeypatch.setenv("EDITOR", f"'{script}' -w")
    monkeypatch.delenv("VISUAL", raising=False)
    assert editor.edit("one\nthree") == "two\nthree"
    for bad in ("no-such-editor-here", "'unclosed"):
        monkeypatch.setenv("VISUAL", bad)
        with pytest.raises(editor.UserError):
            editor.edit("one")
