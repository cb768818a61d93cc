"""Chats that are open in several programs: each knows, and none takes anything from another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflash_chat.chat import Conversation
from dflash_chat.keeper import Keeper
from dflash_chat.presence import FILE, Presence
from dflash_chat.record import Record
from dflash_chat.store import Store

ID = "0123456789"
OTHER = """
import sys
from pathlib import Path
from dflash_chat.presence import Presence
print(Presence(Path(sys.argv[1])).enter(sys.argv[2]), flush=True)
sys.stdin.read()
"""


class Elsewhere:
    """`with Elsewhere(folder, chat) as other:` another program has the chat open until it ends;
    `alone` says whether it was the only one."""

    def __init__(self, folder: Path, chat: str) -> None:
        command = [sys.executable, "-c", OTHER, str(folder), chat]
        pipe = subprocess.PIPE
        self._program = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._program.stdout is not None
        self.alone = self._program.stdout.readline() == "True\n"

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """It ends without a word."""
        self._program.kill()
        self._program.communicate()


@pytest.fixture
def presence(tmp_path: Path) -> Iterator[Presence]:
    presence = Presence(tmp_path)
    yield presence
    presence.close()


def test_a_chat_is_open_elsewhere_until_that_program_is_killed(
    tmp_path: Path, presence: Presence
) -> None:
    with Elsewhere(tmp_path, ID) as other:
        assert other.alone
        assert not presence.enter(ID)
        assert presence.enter("another one")
        other.kill()
        assert presence.alone(ID)


def test_a_third_program_knows_of_the_second_when_the_first_has_left(
    tmp_path: Path, presence: Presence
) -> None:
    assert presence.enter(ID)
    presence.leave(ID)
    with Elsewhere(tmp_path, ID) as first:
        assert first.alone
        assert not presence.enter(ID)
    with Elsewhere(tmp_path, ID) as third:
        assert not third.alone


def test_where_nothing_can_be_locked_everybody_is_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    presence = Presence(tmp_path)

    assert presence.enter(ID)
    assert presence.alone(ID)
    presence.leave(ID)
    presence.close()


def test_what_waits_in_an_open_chat_is_left_to_the_program_that_has_it_open(
    tmp_path: Path,
) -> None:
    theirs = Conversation(id=ID)
    theirs.wait({"aaaaaaaaaa": "Theirs?"})
    with Store(tmp_path) as store, Elsewhere(tmp_path, ID):
        store.save(theirs)
        mine = store.load(ID)
        keeper = Keeper(tmp_path)
        record = Record(mine, keeper)
        assert not record.enter()
        assert mine.waiting == {}
        record.wait({}, "Mine.")
        record.wait({}, "")
        record.wait({}, "Mine!")
        keeper.keep_now(mine)
        assert [*store.load(ID).waiting.values()] == ["Theirs?", "Mine!"]
        theirs.wait({})
        store.save(theirs)
        assert [*store.load(ID).waiting.values()] == ["Mine!"]
        record.wait({}, "")
        keeper.close()
        assert store.chats() == []


def test_what_was_typed_until_the_other_program_left_is_not_missed(
    tmp_path: Path,
) -> None:
    theirs = Conversation(id=ID)
    theirs.wait({"aaaaaaaaaa": "The"})
    with Store(tmp_path) as store:
        store.save(theirs)
        mine = store.load(ID)
        theirs.wait({"aaaaaaaaaa": "Theirs?"})
        store.save(theirs)
    keeper = Keeper(tmp_path)
    assert Record(mine, keeper).enter()
    keeper.close()

    assert mine.waiting == {"aaaaaaaaaa": "Theirs?"}
