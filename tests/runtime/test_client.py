"""The client with real engine processes, up to and including sudden deaths on either side."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dflash_chat.runtime.api import (
    Cancel,
    Event,
    Finished,
    Generate,
    Hello,
    Load,
    Message,
    Ready,
    Tokens,
)
from dflash_chat.runtime.client import SHUTDOWN_S, EngineClient, EngineDied, exit_reason

SCRIPT = Path(__file__).with_name("scripted_worker.py")
COMMAND = (sys.executable, str(SCRIPT))

PARENT = """
import asyncio, sys
from dflash_chat.runtime.api import Generate, Load, Message
from dflash_chat.runtime.client import EngineClient

async def main():
    client = EngineClient(sys.argv[1:])
    await client.start()
    client.send(Load("pair"))
    client.send(Generate(1, (Message("user", "PROMPT"),)))
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "dflash-chat"
    folder.mkdir()
    return folder


@pytest_asyncio.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(COMMAND)
    await client.start()
    yield client
    await client.close()


async def until(
    client: EngineClient, kind: type, timeout_s: float = 10
) -> list[Event | EngineDied]:
    """Events up to the first batch that holds one of `kind`."""
    seen: list[Event | EngineDied] = []
    async with asyncio.timeout(timeout_s):
        while not any(isinstance(event, kind) for event in seen):
            await asyncio.sleep(0.01)
            seen += client.drain()
    return seen


def ask(client: EngineClient, generation: int, prompt: str) -> None:
    client.send(Generate(generation, (Message("user", prompt),)))


def is_gone(pid: int) -> bool:
    """True once `pid` is no running process (a zombie nobody has waited for counts as gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_events_arrive_in_order(client: EngineClient) -> None:
    client.send(Load("pair"))
    ask(client, 1, "count")

    seen = await until(client, Finished)

    assert isinstance(seen[0], Hello)
    assert seen[0].pid == client.pid
    assert "".join(e.text for e in seen if isinstance(e, Tokens)) == "0 1 2 3 4 5 "


async def test_close_ends_the_process_in_the_middle_of_an_answer(client: EngineClient) -> None:
    client.send(Load("pair"))
    ask(client, 1, "forever")
    await until(client, Tokens)
    pid = client.pid
    assert pid is not None

    started = time.monotonic()
    await client.close()

    assert time.monotonic() - started < SHUTDOWN_S, "it had to be terminated"
    assert is_gone(pid)
    assert not any(isinstance(event, EngineDied) for event in client.drain())


async def test_close_ends_a_process_that_ignores_everything(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n"
    )
    client = EngineClient((sys.executable, str(deaf)))
    await client.start()
    pid = client.pid
    assert pid is not None
    await asyncio.sleep(0.3)

    await client.close()

    assert is_gone(pid)


async def test_cancel_is_heard_while_events_stream(client: EngineClient) -> None:
    client.send(Load("pair"))
    ask(client, 1, "forever")
    await until(client, Tokens)
    client.send(Cancel(1))

    finished = (await until(client, Finished))[-1]

    assert isinstance(finished, Finished)
    assert finished.reason == "cancelled"


async def test_kill_of_the_engine_is_reported_in_words(client: EngineClient) -> None:
    client.send(Load("pair"))
    await until(client, Ready)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)

    died = (await until(client, EngineDied, 2))[-1]

    assert isinstance(died, EngineDied)
    assert "SIGKILL" in died.reason
    assert client.pid is None


async def test_a_crash_shows_the_last_lines_of_the_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such card')\n")
    client = EngineClient((sys.executable, str(broken)))
    await client.start()

    died = (await until(client, EngineDied))[-1]

    assert isinstance(died, EngineDied)
    assert died.reason == "it ended with exit code 1"
    assert died.log_lines[-1] == "RuntimeError: no such card"


async def test_restart_after_a_crash_serves_again(client: EngineClient) -> None:
    client.send(Load("pair"))
    ask(client, 1, "kill")
    await until(client, EngineDied)

    await client.restart()
    client.send(Load("pair"))
    ask(client, 2, "count")

    assert any(isinstance(event, Finished) for event in await until(client, Finished))


async def test_what_the_engine_before_a_restart_said_is_nobodys(client: EngineClient) -> None:
    client.send(Load("pair"))
    ask(client, 1, "count")
    client.send(Load("pair"))  # still unanswered when the restart begins
    await asyncio.sleep(0.05)

    before = client.pid
    await client.restart()
    events = await until(client, Hello)

    assert [event.pid for event in events if isinstance(event, Hello)] == [client.pid]
    assert client.pid != before
    assert not [event for event in events if not isinstance(event, Hello)]


async def test_the_engine_before_is_gone_with_all_it_held_before_the_next_one_starts(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.send(Load("pair"))
    ask(client, 1, "forever")
    await until(client, Tokens)
    before, start, gone = client.pid, client.start, []
    assert before is not None

    async def start_later() -> None:
        gone.append(not Path(f"/proc/{before}").exists())  # reaped, too
        await start()

    monkeypatch.setattr(client, "start", start_later)
    await client.restart()
    assert gone == [True]


async def test_a_command_that_cannot_start_is_a_death_too() -> None:
    client = EngineClient(("/no/such/program",))
    await client.start()

    died = client.drain()[-1]

    assert isinstance(died, EngineDied)
    assert "could not be started" in died.reason


async def test_a_line_that_is_no_event_ends_the_engine(tmp_path: Path) -> None:
    babbling = tmp_path / "babbling.py"
    babbling.write_text(
        "import os, sys, time\nos.write(int(sys.argv[1]), b'hi\\n')\ntime.sleep(60)\n"
    )
    client = EngineClient((sys.executable, str(babbling)))
    await client.start()

    died = (await until(client, EngineDied))[-1]

    assert isinstance(died, EngineDied)
    assert "not a protocol line" in died.reason


async def test_a_large_log_is_moved_aside(state_folder: Path) -> None:
    (state_folder / "engine.log").write_bytes(b"x" * (2 << 20))
    client = EngineClient(COMMAND)
    await client.start()
    await client.close()

    assert (state_folder / "engine.log.1").stat().st_size == 2 << 20
    assert (state_folder / "engine.log").stat().st_size < 1 << 20


@pytest.mark.parametrize("prompt", ["forever", "hang"])
def test_kill_of_the_parent_takes_the_engine_along(prompt: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("PROMPT", prompt), *COMMAND],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    time.sleep(0.5)
    assert not is_gone(engine)

    parent.kill()
    parent.wait()
    parent.stdout.close()

    deadline = time.monotonic() + 2
    while not is_gone(engine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_gone(engine)


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (-11, "SIGSEGV"), (-9, "memory"), (-2, "SIGINT")]
)
def test_exit_codes_are_put_into_words(code: int, words: str) -> None:
    assert words in exit_reason(code)
