"""The chat screen with a scripted engine: sending, streaming, stopping, crashing, every key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from textual.geometry import Offset
from textual.pilot import Pilot
from textual.selection import SELECT_ALL, Selection

from dflash_chat.errors import EXIT_ENGINE_CRASHED, EXIT_USAGE
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import (
    EngineOptions,
    Failed,
    Finished,
    Generate,
    Load,
    Message,
    ModelInfo,
    Progress,
    SamplingParams,
    Tokens,
)
from dflash_chat.ui import answer as answer_module
from dflash_chat.ui.answer import AnswerTurn, Block
from dflash_chat.ui.app import ChatApp
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.help_screen import HelpScreen
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.side_panel import SidePanel, StatusLine
from dflash_chat.ui.transcript import Card, Transcript, UserTurn
from tests.ui.fake_client import INFO, FakeClient


class Chat:
    """The app, its scripted engine and the pilot, with the words tests need."""

    def __init__(self, app: ChatApp, client: FakeClient, pilot: Pilot[None]) -> None:
        self.app, self.client, self.pilot = app, client, pilot

    @property
    def screen(self) -> ChatScreen:
        screen = self.app.screen_stack[0]
        assert isinstance(screen, ChatScreen)
        return screen

    async def settle(self) -> None:
        """Wait until all that has arrived is drawn, numbers included."""
        for _ in range(200):
            await self.pilot.pause(0.03)
            if not self.client.waiting and not any(a.behind for a in self.screen.query(AnswerTurn)):
                break
        self.screen.show_numbers()
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        self.screen.query_one(Prompt).text = text
        await self.pilot.press("enter")
        await self.settle()

    async def load(self, info: ModelInfo = INFO) -> None:
        self.client.ready(info)
        await self.settle()

    @property
    def block(self) -> Block:
        """The first piece of an answer."""
        return next(block for block in self.screen.query(Block) if block.size.height)

    @property
    def text(self) -> str:
        """Everything in the transcript, as one would read it."""
        strips = self.screen.query_one(Transcript)
        lines = []
        for widget in strips.query("UserTurn, Block, .numbers, Card"):
            if widget.display and widget.size.height:
                lines += [
                    strip.text.rstrip() for strip in widget.render_lines(widget.outer_size.region)
                ]
                if isinstance(widget, Card):
                    lines.append(str(widget.border_title))
        return "\n".join(lines)

    def shown(self, selector: str) -> str:
        widget = self.screen.query_one(selector)
        return "\n".join(strip.text for strip in widget.render_lines(widget.outer_size.region))


@asynccontextmanager
async def open_chat(
    size: tuple[int, int] = (120, 40),
    system: str = "",
    draft: bool = True,
    keymap: Mapping[str, str] | None = None,
    keeper: Keeper | None = None,
) -> AsyncIterator[Chat]:
    client = FakeClient()
    load = Load("smollm2-135m", "", EngineOptions())
    screen = ChatScreen(client, load, SamplingParams(), system, draft, keymap, keeper)
    app = ChatApp(client, screen)
    async with app.run_test(size=size) as pilot:
        chat = Chat(app, client, pilot)
        await chat.settle()
        yield chat


@pytest.fixture
async def chat() -> AsyncIterator[Chat]:
    async with open_chat() as chat:
        yield chat


@pytest.fixture
async def loaded(chat: Chat) -> Chat:
    await chat.load()
    return chat


# ── asking and answering ────────────────────────────────────────────────────────────────────────


async def test_the_engine_is_told_to_load_at_once(chat: Chat) -> None:
    assert chat.client.sent == [Load("smollm2-135m")]


async def test_an_answer_streams_in_and_gets_its_line_of_numbers(loaded: Chat) -> None:
    await loaded.type("Hello?")
    loaded.client.answer("Hello **there**, how are you today?", cached=4812, prompt=4873)
    await loaded.settle()

    assert "Hello?" in loaded.text
    assert "Hello there, how are you today?" in loaded.text
    assert "cached 4812 · read 61 · ttft 84 ms · " in loaded.text
    assert " tok/s · tau 2." in loaded.text


async def test_text_shows_before_the_answer_is_complete(loaded: Chat) -> None:
    await loaded.type("Hello?")
    loaded.client.stream("Half an answer")
    await loaded.settle()

    assert "Half an answer" in loaded.text
    assert "answering" in loaded.shown("#state")


async def test_the_second_turn_sends_the_whole_conversation(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("First answer.")
    await loaded.settle()
    await loaded.type("Two?")

    assert loaded.client.asked[-1].messages == (
        Message("user", "One?"),
        Message("assistant", "First answer."),
        Message("user", "Two?"),
    )
    assert [request.id for request in loaded.client.asked] == [1, 2]


async def test_the_system_prompt_goes_first() -> None:
    async with open_chat(system="Be brief.") as chat:
        await chat.load()
        await chat.type("Hi")

        assert chat.client.asked[0].messages[0] == Message("system", "Be brief.")


async def test_a_message_typed_while_loading_waits_and_then_goes_out(chat: Chat) -> None:
    await chat.type("Early bird")
    assert chat.client.asked == []
    assert "waits for the engine" in chat.text

    await chat.load()

    assert chat.client.asked[0].messages == (Message("user", "Early bird"),)
    assert "waits for the engine" not in chat.text


async def test_messages_sent_while_answering_wait_their_turn(loaded: Chat) -> None:
    await loaded.type("One?")
    await loaded.type("Two?")
    assert len(loaded.client.asked) == 1

    loaded.client.answer("First.")
    await loaded.settle()
    loaded.client.answer("Second.")
    await loaded.settle()

    assert len(loaded.client.asked) == 2
    order = [loaded.text.index(words) for words in ("One?", "First.", "Two?", "Second.")]
    assert order == sorted(order)


async def test_progress_of_loading_is_shown(chat: Chat) -> None:
    chat.client.emit(Progress("fetching weights", 41_000_000, 98_000_000))
    await chat.settle()

    assert "fetching weights" in chat.shown("#hint")
    assert "42% · 41 of 98 MB" in chat.shown("#hint")


async def test_control_sequences_of_a_model_never_reach_the_terminal(loaded: Chat) -> None:
    await loaded.type("Beep")
    loaded.client.answer("a\x1b[2Jb\x07c\x9bd")
    await loaded.settle()

    assert "a\ufffd[2Jb\ufffdc\ufffdd" in loaded.text


async def test_markup_in_a_message_is_text(loaded: Chat) -> None:
    await loaded.type("[bold]x[/bold] [/nothing]")

    assert "[bold]x[/bold] [/nothing]" in loaded.text


# ── stopping ────────────────────────────────────────────────────────────────────────────────────


async def test_escape_stops_and_keeps_the_partial_answer(loaded: Chat) -> None:
    await loaded.type("Count")
    spec = loaded.client.stream("One, two, three")
    await loaded.settle()
    await loaded.pilot.press("escape")
    assert loaded.client.cancelled == [1]

    loaded.client.finish(spec, reason="cancelled")
    await loaded.settle()
    assert "One, two, three" in loaded.text
    assert "stopped · cached 0" in loaded.text

    await loaded.type("Go on")
    assert loaded.client.asked[-1].messages[1] == Message("assistant", "One, two, three")


async def test_escape_takes_a_waiting_message_back_into_the_prompt(chat: Chat) -> None:
    await chat.type("Not yet")
    await chat.pilot.press("escape")
    await chat.settle()

    assert chat.screen.query_one(Prompt).text == "Not yet"
    assert not chat.screen.query(UserTurn)


async def test_undo_asks_what_waits_behind_the_question(loaded: Chat) -> None:
    await loaded.type("One?")
    await loaded.type("Two?")
    await loaded.type("/undo")

    assert loaded.screen.query_one(Prompt).text == "One?"
    assert loaded.client.asked[-1].messages == (Message("user", "Two?"),)


async def test_escape_twice_stops_and_takes_the_waiting_message_back(loaded: Chat) -> None:
    await loaded.type("Count")
    await loaded.type("And then?")
    await loaded.pilot.press("escape", "escape", "escape")
    loaded.client.finish(loaded.client.stream("One, two"), reason="cancelled")
    await loaded.settle()

    assert loaded.client.cancelled == [1]
    assert loaded.screen.query_one(Prompt).text == "And then?"
    assert len(loaded.client.asked) == 1


@pytest.mark.parametrize(
    ("reason", "words"), [("length", "cut at max_tokens"), ("context", "context is full")]
)
async def test_an_answer_says_why_it_ended(loaded: Chat, reason: str, words: str) -> None:
    await loaded.type("Write")
    loaded.client.answer("Some text", reason=reason)
    await loaded.settle()

    assert words in loaded.text


# ── failures ────────────────────────────────────────────────────────────────────────────────────


async def test_a_crash_shows_a_card_restarts_and_answers_the_next_prompt(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.stream("Half an ans")
    await loaded.settle()
    loaded.client.die("it was killed (SIGKILL)", ["last words of the log"])
    await loaded.settle()

    assert "it was killed (SIGKILL)" in loaded.text
    assert "last words of the log" in loaded.text
    assert "Half an ans" in loaded.text
    assert loaded.client.starts == 2
    assert loaded.client.sent[-1] == Load("smollm2-135m")

    await loaded.load()
    await loaded.type("Two?")
    loaded.client.answer("An answer.")
    await loaded.settle()

    assert loaded.client.asked[-1].messages[0] == Message("user", "One?")
    assert "An answer." in loaded.text


async def test_after_a_crash_ctrl_r_asks_the_same_again(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.stream("Half")
    await loaded.settle()
    loaded.client.die()
    await loaded.settle()
    await loaded.pilot.press("ctrl+r")  # before the engine is back: waits
    await loaded.load()

    assert loaded.client.asked[-1].messages == (Message("user", "One?"),)
    loaded.client.answer("Whole")
    await loaded.settle()
    assert "Whole" in loaded.text


async def test_a_crash_between_answers_needs_no_retry(loaded: Chat) -> None:
    loaded.client.die()
    await loaded.settle()

    assert loaded.client.starts == 2
    assert "asks the last question again" not in loaded.text


async def test_a_crash_while_loading_does_not_loop(chat: Chat) -> None:
    chat.client.die("it ended with exit code 1", ["ImportError: no torch"])
    await chat.settle()

    assert chat.client.starts == 1
    assert "ImportError: no torch" in chat.text
    assert chat.screen.exit_code == EXIT_ENGINE_CRASHED
    assert "Ctrl+R" in chat.shown("#hint")

    await chat.pilot.press("ctrl+r")
    await chat.settle()
    assert chat.client.starts == 2


async def test_a_message_waits_through_a_crash(chat: Chat) -> None:
    await chat.type("Early bird")
    chat.client.die()
    await chat.settle()
    await chat.pilot.press("ctrl+r")
    await chat.load()

    assert chat.client.asked[0].messages == (Message("user", "Early bird"),)


async def test_a_refused_load_shows_the_hint_and_sets_the_exit_code(chat: Chat) -> None:
    chat.client.emit(Failed(0, "This pair is gated.", "Accept its licence first.", 3))
    await chat.settle()

    assert "This pair is gated." in chat.text
    assert "Accept its licence first." in chat.text
    assert chat.screen.exit_code == 3


async def test_a_failed_answer_shows_why_and_can_be_retried(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.emit(Failed(1, "The prompt is too long.", "Start a new chat.", 1))
    await loaded.settle()
    assert "The prompt is too long." in loaded.text

    await loaded.pilot.press("ctrl+r")
    await loaded.settle()
    assert loaded.client.asked[-1] == Generate(2, (Message("user", "One?"),))


async def test_a_question_that_is_refused_does_not_spoil_the_next(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("Yes.")
    await loaded.settle()
    await loaded.type("far too long")
    loaded.client.emit(Failed(2, "The prompt is too long.", "Shorten it.", EXIT_USAGE))
    await loaded.settle()
    assert "The chat goes on without it." in loaded.text

    said = (Message("user", "One?"), Message("assistant", "Yes."))
    await loaded.type("Two?")
    assert loaded.client.asked[-1].messages == (*said, Message("user", "Two?"))
    loaded.client.answer("No.")
    await loaded.settle()
    loaded.screen.edit_question(loaded.screen.dialogue.questions[1])
    await loaded.type("short")
    assert loaded.client.asked[-1].messages == (*said, Message("user", "short"))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


async def test_ctrl_j_and_shift_enter_break_the_line(loaded: Chat) -> None:
    await loaded.pilot.press("a", "ctrl+j", "b", "shift+enter", "c")

    assert loaded.screen.query_one(Prompt).text == "a\nb\nc"
    assert loaded.client.asked == []


async def test_a_paste_never_sends(loaded: Chat) -> None:
    from textual.events import Paste

    loaded.app.post_message(Paste("one\ntwo\n"))
    await loaded.settle()

    assert loaded.screen.query_one(Prompt).text == "one\ntwo\n"
    assert loaded.client.asked == []


async def test_the_prompt_grows_to_ten_lines(loaded: Chat) -> None:
    prompt = loaded.screen.query_one(Prompt)
    prompt.text = "\n".join("line" for _ in range(30))
    await loaded.settle()

    assert prompt.content_size.height == 10


async def test_a_blank_prompt_sends_nothing(loaded: Chat) -> None:
    await loaded.type("  \n ")

    assert loaded.client.asked == []


async def test_f2_hides_and_shows_the_panel(loaded: Chat) -> None:
    panel = loaded.screen.query_one(SidePanel)
    assert panel.region.width > 0

    await loaded.pilot.press("f2")
    assert not panel.display

    await loaded.pilot.press("f2")
    assert panel.display


async def test_f1_shows_help_and_escape_closes_it(loaded: Chat) -> None:
    await loaded.pilot.press("f1")
    assert isinstance(loaded.app.screen, HelpScreen)

    await loaded.pilot.press("escape")
    assert not isinstance(loaded.app.screen, HelpScreen)


async def test_ctrl_n_starts_a_new_chat_and_old_tokens_go_nowhere(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.stream("Half an answer")
    await loaded.settle()
    await loaded.pilot.press("ctrl+n")
    await loaded.settle()
    loaded.client.emit(Tokens(1, "late", 1))
    await loaded.settle()
    assert loaded.text.strip() == ""
    assert loaded.client.cancelled == [1]

    await loaded.type("Two?")
    assert loaded.client.asked[-1].messages == (Message("user", "Two?"),)
    loaded.client.answer("New.")
    await loaded.settle()
    assert "New." in loaded.text


async def test_ctrl_c_without_a_selection_stops_the_answer(loaded: Chat) -> None:
    await loaded.type("One?")
    await loaded.pilot.press("ctrl+c")

    assert loaded.client.cancelled == [1]


async def test_ctrl_c_copies_what_is_selected(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("Selected text\n")
    await loaded.settle()
    block = loaded.block
    loaded.screen.selections = {block: SELECT_ALL}
    await loaded.pilot.press("ctrl+c")

    assert loaded.app.clipboard == "Selected text"


async def test_ctrl_q_quits_and_takes_the_engine_along() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("ctrl+q")
        client = chat.client

    assert client.closed


async def test_page_keys_scroll_the_chat_and_end_follows_again(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("\n\n".join(f"Paragraph {n}" for n in range(100)))
    await loaded.settle()
    transcript = loaded.screen.query_one(Transcript)
    assert transcript.following

    await loaded.pilot.press("pageup")
    await loaded.settle()
    assert not transcript.following

    await loaded.pilot.press("end")
    await loaded.settle()
    assert transcript.following


async def test_new_text_does_not_move_a_view_that_was_scrolled_up(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.stream("\n\n".join(f"Paragraph {n}" for n in range(100)))
    await loaded.settle()
    await loaded.pilot.press("pageup")
    await loaded.settle()
    transcript = loaded.screen.query_one(Transcript)
    before = transcript.scroll_y
    loaded.client.emit(Tokens(1, "\n\nmore\n\n" * 20, 40))
    await loaded.settle()

    assert transcript.scroll_y == before
    assert "↓ 40 new · End" in loaded.shown("#hint")


async def test_end_moves_the_cursor_while_it_is_inside_a_line(loaded: Chat) -> None:
    prompt = loaded.screen.query_one(Prompt)
    prompt.text = "abc"
    prompt.move_cursor((0, 0))
    await loaded.pilot.press("end")

    assert prompt.cursor_location == (0, 3)


# ── commands ────────────────────────────────────────────────────────────────────────────────────


async def test_help_command_opens_help(loaded: Chat) -> None:
    await loaded.type("/help")

    assert isinstance(loaded.app.screen, HelpScreen)


async def test_clear_command_starts_a_new_chat(loaded: Chat) -> None:
    await loaded.type("One?")
    await loaded.type("/clear")

    assert loaded.text.strip() == ""


async def test_system_command_changes_the_system_prompt(loaded: Chat) -> None:
    await loaded.type("/system Be brief.")
    await loaded.type("Hi")

    assert loaded.client.asked[-1].messages[0] == Message("system", "Be brief.")


async def test_draft_command_switches_drafting(loaded: Chat) -> None:
    await loaded.type("/draft off")
    await loaded.type("Hi")
    await loaded.settle()

    assert not loaded.client.asked[-1].draft
    assert "draft OFF: switched off" in loaded.shown("#engine")


async def test_set_command_changes_the_next_answer(loaded: Chat) -> None:
    await loaded.type("/set max_tokens=99")
    await loaded.type("/set temperature=0.7")
    await loaded.type("Hi")

    assert loaded.client.asked[-1].params == SamplingParams(temperature=0.7, max_tokens=99)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/hepl", "Did you mean /help?"),
        ("/nonsense", "/help lists them."),
        ("/draft maybe", "/draft is on, off, auto or a number from 1 to 7."),
        ("/draft 8", "a number from 1 to 7"),
        ("/theme darkish", "did you mean"),
        ("/file nowhere.txt", "There is no file nowhere.txt."),
        ("/clear now", "/clear takes nothing behind it."),
        ("/copy that", "Type /copy or /copy code"),
        ("/set temperature", "/set needs a key and a value."),
        ("/set warmth=1", "there is no option"),
        ("/set device=cuda", "fixed while a pair is loaded"),
    ],
)
async def test_what_is_not_understood_gets_a_hint(loaded: Chat, line: str, words: str) -> None:
    await loaded.type("One?")
    loaded.client.answer("Yes.")
    await loaded.settle()
    await loaded.type(line)

    assert words in loaded.text
    assert len(loaded.client.asked) == 1


async def test_a_message_may_begin_with_a_path(loaded: Chat) -> None:
    await loaded.type("/etc/hosts is for what?")

    assert loaded.client.asked[-1].messages == (Message("user", "/etc/hosts is for what?"),)


async def test_quit_command_quits() -> None:
    async with open_chat() as chat:
        await chat.type("/quit")
        client = chat.client

    assert client.closed


# ── layouts and numbers ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "panel"), [((120, 40), True), ((80, 24), False), ((60, 20), False)]
)
async def test_the_panel_folds_to_one_line_on_narrow_terminals(
    size: tuple[int, int], panel: bool
) -> None:
    async with open_chat(size) as chat:
        await chat.load()
        await chat.type("One?")
        chat.client.answer("Words and more words.")
        await chat.settle()

        assert bool(chat.screen.query_one(SidePanel).region.width) is panel
        assert bool(chat.screen.query_one(StatusLine).region.width) is not panel
        assert "tau" in chat.shown("#acceptance" if panel else "StatusLine")


async def test_the_panel_shows_every_number(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("Words and more words. " * 20, prompt=4096)
    await loaded.settle()

    assert "tok/s  answer" in loaded.shown("#speed")
    assert "tau 2.5 = 1.5 drafted + 1" in loaded.shown("#acceptance")
    assert "BLOCK  35.1 ms" in loaded.shown("#block")
    assert "of 8 192" in loaded.shown("#context")
    assert "draft ON k≤7" in loaded.shown("#engine")


async def test_a_pair_without_a_drafter_says_so() -> None:
    from dataclasses import replace

    async with open_chat() as chat:
        await chat.load(replace(INFO, drafter=""))
        await chat.settle()

        assert "draft OFF: no drafter" in chat.shown("#engine")


async def test_the_title_names_pair_dtype_and_device(loaded: Chat) -> None:
    await loaded.settle()

    assert "smollm2-135m · fp32 · cpu" in loaded.shown("#title")


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────

LONG = {
    "list": "".join(f"- item {n} of a long list with **bold** words\n" for n in range(600)),
    "table": "| a | b |\n|---|---|\n" + "".join(f"| {n} | some cell |\n" for n in range(400)),
    "code": "```python\n" + "".join(f"value_{n} = compute({n})\n" for n in range(600)) + "```\n",
    "prose": "word " * 6000,
}


@pytest.mark.parametrize("kind", LONG)
async def test_long_answers_need_few_widgets(loaded: Chat, kind: str) -> None:
    await loaded.type("Long, please")
    loaded.client.answer(LONG[kind])
    answer = loaded.screen.query_one(AnswerTurn)
    await loaded.settle()

    assert not answer.behind
    assert len(answer.query("*")) < len(LONG[kind]) / 200


@pytest.mark.parametrize("kind", LONG)
async def test_a_frame_takes_a_bounded_piece_once_its_time_is_over(
    loaded: Chat, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "FRAME_S", 0.0)
    await loaded.type("Long, please")
    answer = loaded.screen.query_one(AnswerTurn)
    answer.go_on(LONG[kind])
    answer.draw()

    assert answer.undrawn == len(LONG[kind]) - answer_module.PIECE_CHARS


async def test_a_wrapped_line_is_copied_as_one_line(loaded: Chat) -> None:
    words = " ".join(f"word{n}" for n in range(60))
    await loaded.type("Long, please")
    loaded.client.answer(f"- {words}\n- second\n")
    await loaded.settle()
    block = loaded.block
    assert block.size.height > 2

    assert block.get_selection(SELECT_ALL) == (f"• {words}\n• second", "\n")
    part = block.get_selection(Selection(Offset(2, 0), Offset(7, 1)))
    assert part is not None
    assert part[0] in words


async def test_text_is_selected_with_the_mouse_and_copied(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("Select these words, please.\n\n- and these")
    await loaded.settle()
    block = loaded.block
    await loaded.pilot.mouse_down(block, offset=(7, 0))
    await loaded.pilot.hover(block, offset=(4, 2))
    ground = loaded.screen.get_component_styles("screen--selection").rich_style.bgcolor
    marked = [s.text for s in block.render_line(0) if s.style and s.style.bgcolor == ground]
    assert "".join(marked) == "these words, please."
    await loaded.pilot.mouse_up(block, offset=(4, 2))
    await loaded.pilot.press("ctrl+c")

    assert loaded.app.clipboard == "these words, please.\n\n• and"


async def test_finished_reports_of_an_older_answer_change_nothing(loaded: Chat) -> None:
    await loaded.type("One?")
    loaded.client.answer("First.")
    await loaded.settle()
    last = loaded.client.asked[-1]
    await loaded.type("Two?")
    from dflash_chat.runtime.api import Spec, Timing, Usage

    loaded.client.emit(Finished(last.id, "stop", Usage(1, 0, 1), Spec(), Timing()))
    await loaded.settle()

    assert "answering" in loaded.shown("#state")
