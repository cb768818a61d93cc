"""The models screen against a hub on 127.0.0.1: real pulls and removals of a tiny pair."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from textual import events
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from dflash_chat import gpu, hub, listing, pairs
from dflash_chat.access import Access, State
from dflash_chat.gpu import Gpu, Survey
from dflash_chat.progress import Step
from dflash_chat.runtime.api import EngineOptions, Load
from dflash_chat.ui import (
    browser,
    clipboard,
    fetching,
    gate,
    models_screen,
    models_table,
    watching,
)
from dflash_chat.ui.fetching import Pull
from dflash_chat.ui.models_screen import ModelsScreen
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.text_screen import TextScreen
from tests import hub_server
from tests.hub_pairs import environment, write_catalogue
from tests.hub_pairs import hub as tiny_hub
from tests.hub_server import Hub, serve
from tests.ui.test_chat_flow import Chat, open_chat

GB = 1 << 30
CARD = Gpu(0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 * GB, 23 * GB, capability=(8, 9))
PAGE = "https://huggingface.co/me/gguf"


@pytest.fixture(autouse=True)
def here(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card, nothing installed, two tiny pairs beside the catalogue's."""
    write_catalogue(own_folders)
    monkeypatch.setattr(gpu, "survey", lambda: Survey((CARD,)))
    monkeypatch.setattr(clipboard, "ways", lambda environ: [])
    monkeypatch.setattr(models_screen, "SETTLE_S", 0.0)
    monkeypatch.setattr(models_screen, "LOOK_S", 0.1)
    monkeypatch.setattr(models_screen, "RECHECK_S", 0.1)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks the hub."""

    async def silent(*_: object) -> list[Access]:
        return [gate.unreached("nobody asks")]

    monkeypatch.setattr(gate, "ask", silent)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, known to the processes that the app starts."""
    with serve(tiny_hub()) as running:
        for name, value in environment(running).items():
            monkeypatch.setenv(name, value)
        yield running


@asynccontextmanager
async def opened(size: tuple[int, int] = (120, 40), pair: str = "") -> AsyncIterator[Chat]:
    """The chat with all pairs over it, the cursor on `pair`."""
    async with open_chat(size) as chat:
        await chat.load()
        await chat.pilot.press("f8")
        await until(chat, lambda: isinstance(chat.app.screen, ModelsScreen))
        await until(chat, lambda: models(chat).chosen)
        if pair:
            models(chat)._list.highlighted = list(rows(chat)).index(pair)
            await chat.pilot.pause()
        yield chat


def models(chat: Chat) -> ModelsScreen:
    screen = chat.app.screen_stack[1]
    assert isinstance(screen, ModelsScreen)
    return screen


async def until(chat: Chat, condition: Callable[[], object], seconds: float = 30) -> None:
    for _ in range(round(seconds / 0.02)):
        if condition():
            return
        await chat.pilot.pause(0.02)
    assert condition()


def rows(chat: Chat) -> dict[str, str]:
    """What stands in the row of every pair that is listed."""
    listed = models(chat)._list
    lines = [str(option.prompt) for option in listed.options]
    return {line[2:].split()[0]: line for line in lines}


def about(chat: Chat) -> str:
    return str(models(chat).query_one("#models-words").content)  # type: ignore[attr-defined]


def lines(widget: Widget) -> list[Strip]:
    return widget.render_lines(widget.size.region)


def told(chat: Chat) -> str:
    return "\n".join(note.message for note in chat.app._notifications)


# ── what is listed ──────────────────────────────────────────────────────────────────────────────


async def test_every_pair_has_its_size_fit_and_state(unasked: None) -> None:
    async with opened() as chat:
        listed = rows(chat)
        catalogue = pairs.load_catalogue(pairs.user_file())

        assert list(listed) == [pair.name for pair in catalogue]
        assert listed["smollm2-135m"].startswith("● ")
        assert listed["smollm2-135m"].endswith("loaded")
        assert "✓ fp8 K" in listed["qwen3-8b"]
        assert "32.8k" in listed["qwen3-8b"]
        assert "not read yet" in listed["gpt-oss-20b"]
        assert "✗ needs" in listed["muse-glimmer-30b"]
        assert "RTX 4090, 23." in str(models(chat).query_one("#models-title").content)  # type: ignore[attr-defined]
        assert "of disk free" in str(models(chat).query_one("#models-title").content)  # type: ignore[attr-defined]


async def test_the_filter_and_the_way_out(unasked: None) -> None:
    async with opened() as chat:
        await chat.pilot.press("slash", *"ma 12")
        assert list(rows(chat)) == ["gemma-4-12b"]
        await chat.pilot.press("z")
        assert not rows(chat)
        await chat.pilot.press("enter", "d", "x", "i", "o", "c", "f4", "enter")  # on nothing
        await chat.pilot.press("escape")
        assert len(rows(chat)) > 10
        await chat.pilot.press("escape")
        assert chat.app.screen is chat.screen


async def test_what_is_typed_at_once_behind_the_slash_is_the_filters(unasked: None) -> None:
    async with opened() as chat:
        for character in "/du/o":
            key = "slash" if character == "/" else character
            chat.app.post_message(events.Key(key, character))
        await until(chat, lambda: models(chat).query_one(Input).value == "du/o")
        await chat.pilot.press("left", "backspace", "enter")
        assert list(rows(chat)) == ["duo"]
        assert not chat.app._notifications  # d was no dry run


async def test_what_cannot_run_is_not_fetched(
    unasked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(CARD, total=8 * GB, free=7 * GB)
    monkeypatch.setattr(gpu, "survey", lambda: Survey((small,)))
    async with opened(pair="gpt-oss-20b") as chat:
        await chat.pilot.press("enter")
        assert "gpt-oss-20b cannot be loaded yet: gpt_oss is not read yet" in told(chat)
        assert "it cannot be loaded yet" in about(chat)
        models(chat)._list.highlighted = list(rows(chat)).index("gemma-4-31b")
        await chat.pilot.press("enter")
        assert "gemma-4-31b does not fit" in told(chat)
        assert not chat.screen.pull.pair


async def test_details_plan_and_a_question_before_much_is_fetched(
    unasked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, str]] = []
    async with opened(pair="qwen3-8b") as chat:
        await chat.pilot.press("i")
        assert isinstance(chat.app.screen, TextScreen)
        assert "BUILD" in chat.app.screen.text
        await chat.pilot.press("escape", "f4")
        await until(chat, lambda: isinstance(chat.app.screen, PlanScreen))
        screen = chat.app.screen
        assert isinstance(screen, PlanScreen)
        await until(chat, lambda: screen.settled)
        assert screen.pair.name == "qwen3-8b"
        await chat.pilot.press("a")
        assert "fp8 is not installed; a again fetches it, 9.4 GB and its drafter" in told(chat)
        screen._fetch = lambda *told: begun.append(told) or "begun"  # type: ignore[func-returns-value]
        await chat.pilot.press("a")
        assert begun.pop() == ("qwen3-8b", "fp8")
        await chat.pilot.press("escape")
        assert chat.app.screen is models(chat)

        monkeypatch.setattr(models(chat), "_begin", lambda *told: begun.append(told))
        chosen = models(chat).chosen
        assert chosen is not None
        chosen.answers = [Access(State.OPEN, "open")]
        await chat.pilot.press("enter")
        assert "Enter again fetches qwen3-8b, " in told(chat)
        assert not begun
        await chat.pilot.press("enter")
        assert begun == [("qwen3-8b", "fp8")]


async def test_it_fits_a_small_screen(unasked: None) -> None:
    async with opened((50, 20)) as chat:
        await chat.pilot.pause()
        assert max(map(len, rows(chat).values())) <= 50
        assert models(chat)._list.size.height >= 4
        assert rows(chat)["smollm2-135m"].endswith("loaded")
        await chat.pilot.press("end")
        await chat.pilot.pause()
        assert "twin" in "\n".join(strip.text for strip in lines(models(chat)._list))


async def test_what_comes_while_it_is_taken_apart_is_nobodys(unasked: None) -> None:
    async with opened(pair="duo") as chat:
        screen = models(chat)
        for part in ("#models-words", "#models-list"):
            await screen.query_one(part).remove()
            screen._draw()
            screen._look()
            screen._ask_hub()
            workers = chat.app.workers
            await workers.wait_for_complete([each for each in workers if each.node is screen])
        assert chat.app.is_running


# ── fetching, loading, removing ─────────────────────────────────────────────────────────────────


async def test_a_pair_is_fetched_loaded_and_removed(server: Hub) -> None:
    server.pauses = 0.2
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "Enter fetches it" in about(chat))
        assert " open " in rows(chat)["duo"]
        await chat.pilot.press("enter", "enter", "x")
        assert "duo is being fetched; one at a time" in told(chat)
        assert "duo is not installed" in told(chat)
        await until(chat, lambda: "%" in rows(chat)["duo"])
        assert "files done, safe to stop" in about(chat)
        assert "Enter fetches it" not in about(chat)
        assert "not fetched" not in about(chat)
        await until(chat, lambda: rows(chat)["duo"].endswith("installed"))
        found = hub.installed(pairs.find("duo"))
        assert found is not None
        assert "duo is installed" in about(chat)
        assert "duo is installed" in told(chat)

        await chat.pilot.press("enter")
        await until(chat, lambda: chat.client.starts == 2)
        await chat.settle()
        assert chat.client.sent[-1] == Load("duo", found.build.name, EngineOptions())
        assert f"Loading duo@{found.build.name}" in chat.text

        chat.screen.dialogue.load = Load("smollm2-135m")
        await chat.pilot.press("f8")
        await until(chat, lambda: models(chat).chosen)
        models(chat)._list.highlighted = list(rows(chat)).index("duo")
        await chat.pilot.press("x")
        assert "x again deletes duo, 350 kB" in told(chat)
        await chat.pilot.press("x")
        await until(chat, lambda: "duo: 35" in about(chat) and "freed" in about(chat))
        assert hub.installed(pairs.find("duo")) is None
        await until(chat, lambda: rows(chat)["duo"].endswith("–"))


async def test_a_dry_run_fetches_nothing_and_a_stopped_pull_says_what_stays(
    server: Hub, own_folders: Path
) -> None:
    server.seconds, server.pauses = 0.4, 30
    server.fast = {"model.safetensors"}
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "Enter fetches it" in about(chat))
        await chat.pilot.press("d")
        await until(chat, lambda: isinstance(chat.app.screen, TextScreen))
        page = chat.app.screen
        assert isinstance(page, TextScreen)
        assert "me/gguf at eeeeeeeeeeee" in page.text
        assert "x.gguf" in page.text
        assert server.bodies() == 0

        await chat.pilot.press("escape", "enter")
        await until(chat, lambda: chat.screen.pull.step.restart_bytes)
        await chat.pilot.press("escape", "escape")  # it goes on behind the chat
        chat.screen.show_numbers()
        assert "fetching duo · " in chat.shown("#hint")
        await chat.pilot.press("f8")
        await until(chat, lambda: models(chat).chosen)
        await chat.pilot.press("s")
        await until(chat, lambda: not chat.screen.pull.pair)
        assert chat.screen.pull.step.stage == "interrupted"
        assert "files are complete and kept" in told(chat)
        assert not list(own_folders.rglob("*.incomplete"))


async def test_a_gate_is_explained_watched_and_passed(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[str] = []

    async def visit(url: str) -> bool:
        visited.append(url)
        return False

    monkeypatch.setattr(browser, "open_page", visit)
    repo = server.repos["me/gguf"]
    repo.gated, repo.refusal = "auto", hub_server.NOT_ASKED
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "terms are not accepted yet" in about(chat))
        assert "! accept" in rows(chat)["duo"]
        assert f"accept the terms at {PAGE} with the account of the token" in about(chat)
        await chat.pilot.press("o", "c", "enter")
        await until(chat, lambda: visited and chat.app.clipboard)
        assert (visited, chat.app.clipboard) == ([PAGE], PAGE)
        assert f"There is no browser here; open {PAGE}" in told(chat)
        assert "as soon as the gate is open" in about(chat)
        repo.refusal = ""  # accepted in a browser
        await until(chat, lambda: "duo is installed" in about(chat))


async def test_logging_in_is_the_hubs_own_command(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = tmp_path / "hub-tool"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    command.chmod(0o755)
    monkeypatch.delenv("HF_TOKEN")
    server.repos["me/drafter"].gated = "auto"
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "! log in" in rows(chat)["duo"])
        await chat.pilot.press("l")  # headless: cannot be lent
        assert "run `hf auth login` in another" in told(chat)
        monkeypatch.setattr(models_screen, "_hf", lambda: str(command))
        monkeypatch.setattr(chat.app, "suspend", nullcontext)
        await chat.pilot.press("l")
        assert (tmp_path / "said").read_text() == "auth login\n"


async def test_a_gate_that_others_open_is_watched_and_told_in_the_chat_after_a_restart(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PERIOD_S", 0.1)
    repo = server.repos["me/gguf"]
    repo.gated, repo.refusal = "manual", hub_server.NOT_ASKED
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "! ask" in rows(chat)["duo"])
        assert "approve by hand, which may take days" in about(chat)
        await chat.pilot.press("enter")
        await until(chat, lambda: not models(chat)._wanted)  # asked again, and not for ever
        await chat.pilot.press("n")
        assert "watched since " in about(chat)
        await chat.pilot.press("n")
        assert "n watches it" in about(chat)
        repo.refusal = hub_server.PENDING
        await chat.pilot.press("n", "enter")
        await until(chat, lambda: "… pending" in rows(chat)["duo"])
    async with open_chat() as chat:
        await chat.load()
        repo.refusal = ""
        await until(chat, lambda: "duo@x may be fetched now" in chat.text)
        assert "duo@x may be fetched now" in told(chat)
        assert not chat.screen.gates.since
        assert watching.file().read_text() == "{}"
        watching.file().write_text("no list")
        chat.screen.gates.resume()
        assert not chat.screen.gates.since


async def test_a_token_that_is_wrong_or_may_too_little_says_what_to_do(server: Hub) -> None:
    repo = server.repos["me/gguf"]
    repo.gated, repo.refusal = "auto", hub_server.SCOPE
    async with opened(pair="duo") as chat:
        await until(chat, lambda: "! token" in rows(chat)["duo"])
        assert "'Read access to contents of all public gated repos you can access'" in about(chat)
        assert "tick it at https://huggingface.co/settings/tokens" in about(chat)
        assert "asked again every 5 s" in about(chat)
        await chat.pilot.press("n")
        assert "Nobody's approval is waited for" in told(chat)
        server.tokens.clear()  # it has expired
        await until(chat, lambda: "! log in" in rows(chat)["duo"])
        assert "the hub does not know the token from HF_TOKEN" in about(chat)
        assert "until dflash-chat is started without it" in about(chat)


# ── by name ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_pull_that_cannot_even_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    ended: list[tuple[str, Step]] = []
    pull = Pull(lambda pair, step: ended.append((pair, step)))
    code = "import sys; print('no room'); sys.exit(9)"
    monkeypatch.setattr(fetching, "COMMAND", (sys.executable, "-c", code))
    await pull.fetch("duo")
    assert ended == [("duo", Step("failed", note="no room", exit_code=9))]
    assert fetching.end_words("duo", pull.step) == "duo: no room"


async def test_the_hub_is_waited_for_only_so_long(server: Hub) -> None:
    duo = pairs.find("duo")
    (answer, *_) = await gate.ask(gate.sources(duo, duo.builds[0]), limit_s=0.01)
    assert answer.state is State.UNREACHABLE
    assert gate.word([answer]) == "? unreachable"
    assert not gate.waits([answer])


def test_what_both_repositories_answer_is_said_once(own_folders: Path) -> None:
    pair = pairs.find("qwen3-8b")
    row = next(row for row in listing.rows([pair]) if row["name"] == pair.name)
    lost = Access(State.UNREACHABLE, "the hub cannot be reached", "check the network")
    entry = models_table.Entry(pair, row, None, [lost, lost])
    _, *lines = models_table.about(entry, False, False, "")
    assert lines == ["! the hub cannot be reached", "  check the network"]


def test_another_pair_is_loaded_on_the_same_device_and_looks_up_as_before() -> None:
    before = EngineOptions("cpu", "fp32", 4096, 5, 2, "fp8", "fp8", 16000, "fp8", "off")
    load = models_screen.load_of("a-pair", "q4_1", before)
    assert load == Load("a-pair", "q4_1", EngineOptions("cpu", "fp32", threads=2, lookup="off"))
