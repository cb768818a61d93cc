"""kill -9 at fifty random moments: the chat reopens with all but the last second, and whole.

Four times the real chat is killed in a pty, with its engine; 46 times a process that does with the
conversation and its keeper what the screen does, 23 at once on one file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflash_chat.chat import Conversation, new_id
from dflash_chat.keeper import Keeper
from dflash_chat.record import Record
from dflash_chat.runtime.api import Load, SamplingParams, StepStats, Tokens
from dflash_chat.store import FILE, Store
from tests.test_store import integrity
from tests.ui.pty_bench import in_pty

SEED = 7
ROUNDS, AT_ONCE = 2, 23
LOST_S = 1.0  # what the last save may lack
Process = subprocess.Popen[bytes]
STEP = StepStats(7, 0, 1, 0.5, 4.0, 0.2, 0.1, 100)


def counted(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def check(text: str, trace: str, log: list[str], killed: float, queued: float = 0.0) -> None:
    """`text` was saved of an answer that counts; `log` says what had been said when. The longest
    time that a busy machine let its writer wait is not held against it, nor are the `queued`
    seconds that its reader did."""
    numbers = counted(text)
    assert numbers == list(range(len(numbers)))
    assert trace.startswith(text) or text.startswith(trace)
    said = [(float(at), int(n)) for at, n in map(str.split, log)]
    times = [*(at for at, _ in said), killed]
    waited = max((after - at for at, after in itertools.pairwise(times)), default=0.0)
    due = [n for at, n in said if at < killed - LOST_S - waited - queued]
    assert len(numbers) > max(due, default=-1), (len(numbers), due[-1])


def traced(store: Store, turn: str) -> str:
    return "".join(event.text for event in store.trace(turn) if isinstance(event, Tokens))


# ── the store and its keeper, 46 times ──────────────────────────────────────────────────────────


def write_for_ever(folder: Path, log: int) -> None:
    """Ask and count, as fast as it goes, in a process that will be killed."""
    record = Record(Conversation(), Keeper(folder))
    while True:
        asked, id_ = f"question {len(record.chat.tree)}", new_id()
        record.wait({id_: asked})
        os.write(log, f"asks {asked}\n".encode())
        record.chat.ask(asked, id_)
        turn = record.chat.begin_answer()
        record.begin(turn, Load("pair"), None, SamplingParams(), True)
        record.wait({})
        os.write(log, f"chat {record.chat.id}\n".encode())
        for number in range(random.randrange(20, 600)):
            turn.content += f"{number} "
            record.take(Tokens(1, f"{number} ", 1, STEP))
            os.write(log, f"{time.monotonic()} {number}\n".encode())
            time.sleep(0.003)
        record.chat.end_answer()
        record.end(None)
        if random.random() < 0.3:
            record.chat.retract_answer()


def forked(folder: Path, seed: int) -> tuple[int, int]:
    """Such a process: its id, and the pipe with what it has done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            random.seed(seed)
            write_for_ever(folder, writer)
        os._exit(1)
    os.close(writer)
    return pid, reader


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_writers_lose_at_most_the_last_second(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    for _round in range(ROUNDS):
        writers = [forked(tmp_path, dice.randrange(1 << 30)) for _ in range(AT_ONCE)]
        ends = {pid: time.monotonic() + dice.uniform(0.02, 1.6) for pid, _ in writers}
        said = dict.fromkeys(dict(writers), b"")
        killed: dict[int, float] = {}
        while len(killed) < AT_ONCE:
            time.sleep(0.005)
            for pid, reader in writers:
                while pid not in killed and select.select([reader], [], [], 0)[0]:
                    said[pid] += os.read(reader, 1 << 16)
                if pid not in killed and time.monotonic() > ends[pid]:
                    os.kill(pid, signal.SIGKILL)
                    killed[pid] = time.monotonic()
        for pid, reader in writers:
            os.waitpid(pid, 0)
            with os.fdopen(reader, "rb") as rest:
                said[pid] += rest.read()
        integrity(tmp_path / FILE)
        with Store(tmp_path) as store:
            for pid, _ in writers:
                reopened(store, said[pid].decode(), killed[pid])


def reopened(store: Store, said: str, killed: float) -> None:
    """Everything a killed writer had asked, and what it had counted up to the last second."""
    *complete, _ = said.split("\n")  # the last line may be half a line
    asks = [line[5:] for line in complete if line.startswith("asks ")]
    ids = {line[5:] for line in complete if line.startswith("chat ")}
    if not ids:
        return  # it was killed before its first question was saved, hence before it was sent
    chat = store.load(ids.pop())
    questions = [turn.content for turn in chat.tree.values() if turn.role == "user"]
    sent = sum(line.startswith("chat ") for line in complete)
    assert questions in (asks[:sent], asks[: sent + 1])
    all_said = [*questions, *chat.waiting.values()]  # each waits or was asked, never both
    assert all_said[: len(asks)] == asks
    assert len(all_said) <= len(asks) + 1
    last = said.rpartition("\nchat ")[2].split("\n")[1:-1]
    last = [line for line in last if not line.startswith("asks ")]
    answers = [turn for turn in chat.tree.values() if turn.role == "assistant"]
    if len(answers) == sent:
        check(answers[-1].content, traced(store, answers[-1].id), last, killed)
    else:
        check("", "", last, killed)
    for turn in chat.tree.values():
        assert turn.state in ("complete", "stopped", "failed")


# ── the real chat, four times ───────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def real_chat(folder: Path, log: Path) -> Iterator[tuple[Process, int]]:
    os.environ["DFLASH_CHAT_DATA"] = str(folder)
    process, master = in_pty([sys.executable, "-m", "tests.ui.scripted_chat", str(log)])
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def queued_s(process: Process) -> float:
    """Seconds that a process's threads were ready to run and had to wait for a core."""
    waits = 0
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            waits += int((thread / "schedstat").read_text().split()[1])
    return waits / 1e9


def swallow(master: int) -> None:
    """Read what is drawn, so that drawing never blocks."""
    while select.select([master], [], [], 0)[0]:
        with contextlib.suppress(OSError):
            os.read(master, 1 << 16)
            continue
        return


def engines_of(folder: Path) -> list[int]:
    """Processes that have `folder` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_killed_chat_reopens_and_leaves_no_engine(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFLASH_CHAT_DATA", "set by each chat")
    dice = random.Random(SEED)
    with contextlib.ExitStack() as stack:
        chats = []
        for name in "abcd":
            folder, log = tmp_path / name, tmp_path / f"{name}.log"
            process, master = stack.enter_context(real_chat(folder, log))
            chats.append((folder, log, process, master))
        wait_until_all_answer(chats)
        wait_until_all_keep(chats, "and then?")
        before = {process: queued_s(process) for *_, process, _ in chats}
        for folder, log, process, _ in chats:
            until = time.monotonic() + dice.uniform(0, 1)
            while time.monotonic() < until:
                time.sleep(0.02)
                for *_, other in chats:
                    swallow(other)
            killed, queued = time.monotonic(), queued_s(process) - before[process]
            process.kill()
            process.wait()
            with Store(folder) as store:
                chat = store.load(store.latest())
                assert chat.turns[0].content == "Count, please."
                assert [*chat.waiting.values()] == ["and then?"]
                turn = chat.turns[-1]
                text = turn.content if turn.role == "assistant" else ""
                check(text, traced(store, turn.id), log.read_text().splitlines(), killed, queued)
            integrity(folder / FILE)
    deadline = time.monotonic() + 10
    while any(engines_of(folder) for folder, *_ in chats):
        assert time.monotonic() < deadline, "an engine outlived its chat"
        time.sleep(0.02)


def wait_until_all_answer(chats: list[tuple[Path, Path, Process, int]]) -> None:
    deadline = time.monotonic() + 60
    while not all(log.exists() and log.stat().st_size for _, log, *_ in chats):
        assert time.monotonic() < deadline, "the chats did not start"
        time.sleep(0.02)
        for *_, master in chats:
            swallow(master)


def wait_until_all_keep(chats: list[tuple[Path, Path, Process, int]], typed: str) -> None:
    """Type a text, and wait until each of them has it in its file."""
    for *_, master in chats:
        os.write(master, typed.encode())
    deadline, left = time.monotonic() + 60, [folder for folder, *_ in chats]
    while left:
        assert time.monotonic() < deadline, "what is typed was not saved"
        time.sleep(0.02)
        for *_, master in chats:
            swallow(master)
        with Store(left[0]) as store:
            if typed in store.load(store.latest()).waiting.values():
                del left[0]
