"""The file of chats: what is written comes back, whatever the disk or another program does."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from dflash_chat import store as store_module
from dflash_chat.chat import Conversation
from dflash_chat.errors import EXIT_DISK, EXIT_UNKNOWN_MODEL, UsageError
from dflash_chat.store import MIGRATIONS, Store, StoreError, UnknownChatError
from tests.saved import branched, conversations, essence, recorded


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def integrity(path: Path) -> None:
    """Raise unless tables and index are whole and agree."""
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not db.execute("PRAGMA foreign_key_check").fetchall()
    db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 0)")
    indexed = db.execute("SELECT count(*) FROM words_docsize").fetchone()
    final = db.execute("SELECT count(*) FROM messages WHERE state <> 'streaming'").fetchone()
    assert indexed == final
    db.close()


# ── what is written comes back ──────────────────────────────────────────────────────────────────


def test_a_chat_comes_back_with_all_branches_figures_and_steps(store: Store) -> None:
    chat = branched()
    store.save(chat)
    for turn in chat.tree.values():
        store.add_trace(turn.id, turn.trace)

    again = store.load(chat.id)

    assert again.id == chat.id
    assert essence(again) == essence(chat)
    assert [turn.id for turn in again.turns] == [turn.id for turn in chat.turns]
    for turn in chat.tree.values():
        assert store.trace(turn.id) == turn.trace


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chat=conversations())
def test_any_tree_comes_back(store: Store, chat: Conversation) -> None:
    store.save(chat)

    assert essence(store.load(chat.id)) == essence(chat)


def test_text_that_utf8_cannot_hold_is_saved_with_a_question_mark(store: Store) -> None:
    chat = Conversation()
    chat.ask("a lone \ud800 surrogate, and a \0 byte")
    store.save(chat)

    assert store.load(chat.id).turns[0].content == "a lone ? surrogate, and a \0 byte"


def test_an_answer_that_grows_keeps_one_row_and_its_steps_in_order(store: Store) -> None:
    chat = Conversation()
    chat.ask("Hi")
    turn = recorded(chat, "one two three four")
    store.save(chat)
    store.add_trace(turn.id, turn.trace[:2])
    store.add_trace(turn.id, ())
    store.add_trace(turn.id, turn.trace[2:])
    turn.content += " five"
    store.save(chat, [turn])

    assert store.load(chat.id).turns[-1].content == "one two three four five"
    assert store.trace(turn.id) == turn.trace


def test_what_hangs_below_a_removed_turn_goes_with_it(store: Store) -> None:
    chat, other = branched(), branched()
    for each in (chat, other):
        store.save(each)
        for turn in each.tree.values():
            store.add_trace(turn.id, turn.trace)
    second = chat.turns[1]
    below = [turn.id for turn in chat.below(second.id)]
    chat.delete(second.id)
    store.remove_turn(chat.id, second.id, below)
    store.save(chat)

    assert essence(store.load(chat.id)) == essence(chat)
    assert store.trace(second.id) == []
    assert essence(store.load(other.id)) == essence(other)
    integrity(store.path)


def test_what_is_said_below_a_turn_another_program_deleted_is_kept(store: Store) -> None:
    chat = Conversation()
    chat.ask("Hi")
    store.save(chat)
    store.remove_turn(chat.id, chat.turns[0].id, ())
    chat.answer("Hello")
    store.save(chat, chat.turns[-1:])

    assert essence(store.load(chat.id)) == essence(chat)


def test_what_waits_comes_back_until_it_was_asked(store: Store) -> None:
    chat = Conversation()
    chat.wait({"0123456789": "Hi", "9876543210": "And a lone \ud800"})
    store.save(chat)
    assert store.chats()[0].title == "Hi"
    chat.ask("Hi", "0123456789")
    store.save(chat, chat.turns)

    assert store.load(chat.id).waiting == {"9876543210": "And a lone ?"}


def test_a_chat_with_nothing_in_it_is_not_kept(store: Store) -> None:
    chat = Conversation()
    chat.wait({"0123456789": "Hi"})
    store.save(chat)
    chat.wait({})
    store.save(chat)

    assert store.chats() == []


def test_a_chat_in_which_nothing_was_asked_is_named_by_what_waits(store: Store) -> None:
    chat = Conversation()
    for typed in ("H", "Hello", "Hello there"):
        chat.wait({"0123456789": typed})
        store.save(chat)
        assert store.chats()[0].title == typed
    store.save(chat, [chat.ask("Hello there, you", "0123456789")])
    assert store.chats()[0].title == "Hello there, you"
    store.rename(chat.id, "Greetings")
    store.save(chat)
    assert store.chats()[0].title == "Greetings"


def test_what_was_asked_waits_no_more_even_if_that_was_not_saved(store: Store) -> None:
    chat = Conversation()
    chat.wait({"0123456789": "Hi", "9876543210": "Ho"})
    store.save(chat)
    store.save(chat, [chat.ask("Hi", "0123456789")])  # killed here

    again = store.load(chat.id)
    assert again.waiting == {"9876543210": "Ho"}
    store.save(again)
    assert store._db.execute("SELECT content FROM waiting").fetchall() == [("Ho",)]


def test_questions_of_all_chats_come_back_once_each(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "RECALLED", 4)
    monkeypatch.setattr(store_module, "RECALLED_CHARS", 10)
    for texts in (("old", "one", "two"), ("one", "x" * 11, "three")):
        chat = Conversation()
        for text in texts:
            chat.ask(text)
            chat.answer("Yes.")
        store.save(chat)

    assert store.questions() == ["two", "one", "three"]


def test_nobody_else_reads_the_chats(store: Store) -> None:
    store.save(branched())

    files = [*store.path.parent.iterdir()]
    assert len(files) == 3  # with its log and what programs share of it
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_the_chat_written_last_is_the_latest(store: Store) -> None:
    first, second = Conversation(), Conversation()
    for chat in (first, second):
        chat.ask("Hi")
        store.save(chat)
    assert store.latest() == second.id
    store.save(first)
    assert store.latest() == first.id
    assert [entry.id for entry in store.chats()] == [first.id, second.id]


def test_a_new_title_stays(store: Store) -> None:
    chat = branched()
    store.save(chat)
    store.rename(chat.id, "Colours")

    assert store.load(chat.id).title == store.chats()[0].title == "Colours"


def test_a_removed_chat_leaves_nothing_behind(store: Store) -> None:
    chat = branched()
    store.save(chat)
    for turn in chat.tree.values():
        store.add_trace(turn.id, turn.trace)
    store.remove(chat.id)

    assert store.chats() == store.search("sky") == []
    db = sqlite3.connect(store.path)
    for table in ("conversations", "messages", "traces", "words_docsize"):
        assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    integrity(store.path)


def test_a_chat_removed_by_another_program_is_written_whole_with_the_next_turn(
    store: Store,
) -> None:
    chat = branched()
    store.save(chat)
    store.remove(chat.id)
    store.save(chat, [chat.ask("Still there?")])

    assert essence(store.load(chat.id)) == essence(chat)


def test_what_another_version_wrote_of_the_engine_never_keeps_a_chat_from_opening(
    store: Store,
) -> None:
    chat = branched()
    store.save(chat)
    answer = chat.turns[1]
    store.add_trace(answer.id, answer.trace)
    newer = json.loads(store._db.execute("SELECT settings FROM conversations").fetchone()[0])
    newer["params"]["warmth"] = newer["info"]["colour"] = 1
    store._db.execute("UPDATE conversations SET settings = ?", (json.dumps(newer),))
    line = json.dumps({"type": "Finished", "id": 1, "mood": "good"})
    store._db.execute("UPDATE messages SET figures = ? WHERE id = ?", (line, answer.id))
    unreadable = zlib.compress(b'{"type":"Thought"}\n')
    store._db.execute("INSERT INTO traces VALUES (?, 9, ?)", (answer.id, unreadable))

    again = store.load(chat.id)
    assert (again.params, again.info) == (chat.params, chat.info)
    assert [turn.content for turn in again.turns] == [turn.content for turn in chat.turns]
    assert again.turns[1].figures is None
    assert store.trace(answer.id) == answer.trace

    del newer["info"]["pair"]
    store._db.execute("UPDATE conversations SET settings = ?", (json.dumps(newer),))
    assert store.load(chat.id).info is None
    store._db.execute("UPDATE traces SET events = x'00'")
    with pytest.raises(StoreError, match="it is damaged"):
        store.trace(answer.id)


# ── finding ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rayleigh", True),
        ("scatter", True),  # the beginning of a word
        ("sunlight rayleigh", True),
        ("rayleigh grass", False),  # not in one message
        ("Überraschung", False),
        ("uberraschung", False),
        ('" OR "*', False),
        ("chloro", True),  # in a stopped answer, on another branch than the first
        ("", True),
        ("cattering", True),  # inside a word, where nothing else is found
        ("天空", False),
    ],
)
def test_search_finds_messages_by_their_words(store: Store, text: str, found: bool) -> None:
    chat = branched()
    store.save(chat)

    assert bool(store.search(text)) is found


def test_search_finds_words_without_spaces_or_accents_around_them(store: Store) -> None:
    chat = Conversation()
    chat.ask("为什么天空是蓝色的？ Eine Überraschung!")
    store.save(chat)

    assert [entry.id for entry in store.search("天空")] == [chat.id]
    assert [entry.id for entry in store.search("uberraschung")] == [chat.id]


def test_search_shows_the_place_and_each_chat_once(store: Store) -> None:
    chat = Conversation()
    chat.ask("first")
    chat.answer("padding " * 100 + "the needle is here" + " padding" * 100)
    chat.ask("needle again?")
    store.save(chat)

    (entry,) = store.search("needle")
    assert "needle" in entry.found
    assert len(entry.found) < 200


def test_what_is_being_written_is_found_once_it_is_written(store: Store) -> None:
    chat = Conversation()
    chat.ask("Hi")
    turn = chat.begin_answer()
    for turn.content in ("Ray", "Rayleigh", "Rayleigh scattering"):
        store.save(chat, [turn])
    chat.end_answer()
    store.save(chat, [turn])
    store.save(chat, [turn])

    assert len(store.search("rayleigh")) == 1
    integrity(store.path)


def test_ids_are_found_by_how_they_begin(store: Store) -> None:
    for id_ in ("abc1230000", "abd4560000", "fff0000000"):
        chat = Conversation(id=id_)
        chat.ask("Hi")
        store.save(chat)

    assert store.find("abc") == "abc1230000"
    assert store.find("FFF0") == "fff0000000"
    with pytest.raises(UsageError, match="2 chats begin with ab"):
        store.find("ab")
    with pytest.raises(UnknownChatError) as unknown:
        store.find("fff0000001")
    assert unknown.value.exit_code == EXIT_UNKNOWN_MODEL
    assert unknown.value.hint == "did you mean fff0000000?"
    with pytest.raises(UnknownChatError):
        store.find("")


def test_without_chats_there_is_none_to_continue(store: Store) -> None:
    with pytest.raises(UnknownChatError, match="no chat to continue"):
        store.latest()


# ── versions ────────────────────────────────────────────────────────────────────────────────────

NEXT = (*MIGRATIONS, "ALTER TABLE messages ADD COLUMN stars INTEGER NOT NULL DEFAULT 0;")


def version(path: Path) -> int:
    return int(sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0])


def test_an_older_file_is_brought_up_and_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = branched()
    store.save(chat)
    assert version(store.path) == len(MIGRATIONS)
    monkeypatch.setattr(store_module, "MIGRATIONS", NEXT)

    newer = Store(store.path.parent)

    assert version(store.path) == len(NEXT)
    assert essence(newer.load(chat.id)) == essence(chat)
    assert newer._db.execute("SELECT sum(stars) FROM messages").fetchone() == (0,)


def test_what_waited_in_the_first_versions_file_waits_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:1])
    chat = branched()
    settings = {"params": {"stop": []}, "draft": True, "info": None}
    settings["waiting"] = {chat.turns[0].id: "asked", "0123456789": "One?", "9876543210": "Two?"}
    with Store(tmp_path) as old:
        old._db.execute(
            "INSERT INTO conversations VALUES (?, '', 0, 0, '', '', '', ?, NULL)",
            (chat.id, json.dumps(settings)),
        )
        old._db.execute(
            "INSERT INTO messages VALUES (1, ?, ?, NULL, 'user', '', '', 'complete', 0, 0, NULL)",
            (chat.turns[0].id, chat.id),
        )
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS)

    with Store(tmp_path) as store:
        assert list(store.load(chat.id).waiting.values()) == ["One?", "Two?"]


def test_a_migration_that_fails_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (*NEXT, "CREATE TABLE half (a); INSERT INTO no_such_table VALUES (1);")
    monkeypatch.setattr(store_module, "MIGRATIONS", broken)
    with pytest.raises(StoreError):
        Store(store.path.parent)

    assert version(store.path) == len(MIGRATIONS)
    columns = sqlite3.connect(store.path).execute("PRAGMA table_info(messages)").fetchall()
    assert "stars" not in [column[1] for column in columns]


def test_a_file_of_a_newer_program_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer dflash-chat"):
        Store(store.path.parent)

    assert version(store.path) == 99


# ── disks ───────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "chats.db").write_bytes(b"these are my notes, not yours" * 100)
    with pytest.raises(StoreError, match=r"chats\.db: it is damaged") as told:
        Store(tmp_path)

    assert told.value.exit_code == EXIT_DISK
    assert "move it away" in told.value.hint
    assert (tmp_path / "chats.db").read_bytes().startswith(b"these are my notes")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StoreError, match="file exists") as told:
        Store(tmp_path / "data")
    assert "DFLASH_CHAT_DATA" in told.value.hint


def test_a_full_disk_is_named_and_harms_nothing(store: Store) -> None:
    chat = branched()
    store.save(chat)
    store._db.execute("PRAGMA max_page_count = 30")  # SQLite answers as on a full disk
    turn = chat.ask("more")
    turn.content = "words " * 100_000
    with pytest.raises(StoreError, match="the disk is full"):
        store.save(chat, [turn])

    assert len(store.load(chat.id).tree) == len(chat.tree) - 1
    integrity(store.path)
    store._db.execute("PRAGMA max_page_count = 100000")
    store.save(chat, [turn])
    assert essence(store.load(chat.id)) == essence(chat)


def test_a_file_that_may_only_be_read_is_named(store: Store) -> None:
    chat = branched()
    store.save(chat)
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="cannot be written"):
        store.save(chat)
    assert len(store.chats()) == 1


def test_chats_are_nobody_elses_to_read(tmp_path: Path) -> None:
    Store(tmp_path / "data")
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_CHAT_DATA", str(tmp_path / "here"))
    assert Store().path == tmp_path / "here" / "chats.db"


# ── several programs ────────────────────────────────────────────────────────────────────────────


def test_two_programs_in_one_chat_make_branches(store: Store) -> None:
    chat = Conversation()
    chat.ask("Hi")
    chat.answer("Hello")
    store.save(chat)
    with Store(store.path.parent) as other:
        mine, theirs = store.load(chat.id), other.load(chat.id)
        store.save(mine, [mine.ask("mine")])
        other.save(theirs, [theirs.ask("theirs")])

    both = store.load(chat.id)
    assert [turn.content for turn in both.branches(both.turns[-1].id)] == ["mine", "theirs"]
    assert both.turns[-1].content == "theirs"


def test_a_turn_is_not_deleted_with_what_another_program_said_below_it(store: Store) -> None:
    chat = Conversation()
    question = chat.ask("Hi")
    store.save(chat)
    theirs = store.load(chat.id)
    theirs.answer("Hello")
    store.save(theirs, theirs.turns[-1:])
    with pytest.raises(StoreError, match="another program has said more below it"):
        store.remove_turn(chat.id, question.id, ())

    assert len(store.load(chat.id).tree) == 2


def test_what_another_program_wrote_on_is_not_written_over_by_a_whole_chat(store: Store) -> None:
    mine = branched()
    store.save(mine)
    theirs = store.load(mine.id)
    theirs.turns[-1].content += "phyll"
    store.save(theirs, theirs.turns[-1:])
    first = next(iter(mine.tree))
    mine.tip = first
    elsewhere = [turn.id for turn in mine.below(first)]
    answer, *_ = (id_ for id_ in elsewhere if mine.tree[id_].content.startswith("Rayleigh"))
    store.remove_turn(mine.id, answer, ())
    mine.tip = answer
    store.save(mine, [mine.ask("And why not green?")])  # hangs on what was deleted

    again = store.load(mine.id)
    assert len(again.tree) == len(mine.tree)
    assert "Chlorophyll" in [turn.content for turn in again.tree.values()]


WRITER = """
import sys
import zlib
from pathlib import Path
from dflash_chat.chat import Conversation
from dflash_chat.store import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(Path(sys.argv[1]))  # they all create the file at once
for n in range(40):
    chat = Conversation()
    chat.ask(f"question {n}")
    store.save(chat)
    chat.answer("answer " * 50)
    store.save(chat, chat.turns)
"""


def test_programs_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]

    with Store(tmp_path) as store:
        assert len(store.chats()) == 120
        assert all(entry.turns == 2 for entry in store.chats())
    integrity(tmp_path / "chats.db")


def test_a_file_that_another_program_is_making_is_waited_for(tmp_path: Path) -> None:
    """SQLite refuses the change to WAL at once, without its usual waiting."""
    other = sqlite3.connect(tmp_path / "chats.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    with Store(tmp_path) as store:
        store.save(branched())
        assert len(store.chats()) == 1
    release.join()
    other.close()


def test_a_lock_that_another_program_keeps_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._db.execute("PRAGMA busy_timeout = 50")
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program holds it"):
        store.save(branched())
    assert store.chats() == []  # readers never wait
    holder.execute("ROLLBACK")
    store.save(branched())
