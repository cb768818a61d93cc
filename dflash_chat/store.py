"""Conversations in one SQLite file: `chats.db` in the platform's folder for data, or in
`DFLASH_CHAT_DATA`.

Knows the tables and what can go wrong with a disk. Knows neither threads nor widgets: a `Store` is
used by the thread that opened it. The file is in WAL mode, so that readers and one writer never
wait for each other, and a killed program loses what it had not committed and no more. Every write
is one transaction and can be repeated, so two programs may write one conversation: their turns
become branches, and what waits in one of them is left alone by the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from dflash_chat.chat import Conversation, Turn
from dflash_chat.errors import EXIT_UNKNOWN_MODEL, DiskError, UsageError, UserError
from dflash_chat.runtime.api import Finished, ModelInfo, Prefill, SamplingParams, Tokens
from dflash_chat.runtime.api import decode as decode_event
from dflash_chat.runtime.api import encode as encode_event

FILE = "chats.db"
BUSY_S = 5.0  # how long a write waits for another program's
RECALLED, RECALLED_CHARS = 500, 50_000  # questions looked at for a history, and their length
ABANDONED_S = 30.0  # an answer nobody has written on for so long is nobody's any more

# Each script takes the file from one `user_version` to the next; all that is missing run in one
# transaction. What is being written is not indexed: that would cost the whole answer every time.
MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, title TEXT NOT NULL,
        created REAL NOT NULL, updated REAL NOT NULL,
        pair TEXT NOT NULL, build TEXT NOT NULL, system TEXT NOT NULL,
        settings TEXT NOT NULL, -- JSON: params, draft, info
        tip TEXT);
    CREATE INDEX conversations_updated ON conversations (updated);
    CREATE TABLE messages (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
        conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
        parent TEXT, role TEXT NOT NULL, content TEXT NOT NULL, thinking TEXT NOT NULL,
        state TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
        figures TEXT); -- JSON: the engine's Finished event
    CREATE INDEX messages_conversation ON messages (conversation);
    CREATE INDEX messages_streaming ON messages (updated) WHERE state = 'streaming';
    CREATE TABLE traces (
        message TEXT NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
        part INTEGER NOT NULL,
        events BLOB NOT NULL, -- protocol lines, deflated
        PRIMARY KEY (message, part)) WITHOUT ROWID;
    CREATE VIRTUAL TABLE words USING fts5 (
        content, content='messages', content_rowid='seq', tokenize='unicode61 remove_diacritics 2');
    CREATE TRIGGER messages_inserted AFTER INSERT ON messages BEGIN
        INSERT INTO words (rowid, content)
            SELECT new.seq, new.content WHERE new.state <> 'streaming';
    END;
    CREATE TRIGGER messages_updated AFTER UPDATE OF content, state ON messages
    WHEN (old.content, old.state) <> (new.content, new.state) BEGIN
        INSERT INTO words (words, rowid, content)
            SELECT 'delete', old.seq, old.content WHERE old.state <> 'streaming';
        INSERT INTO words (rowid, content)
            SELECT new.seq, new.content WHERE new.state <> 'streaming';
    END;
    CREATE TRIGGER messages_deleted AFTER DELETE ON messages BEGIN
        INSERT INTO words (words, rowid, content)
            SELECT 'delete', old.seq, old.content WHERE old.state <> 'streaming';
    END;
    """,
    """
    CREATE TABLE waiting (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, -- of the message it will be
        conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
        content TEXT NOT NULL);
    CREATE INDEX waiting_conversation ON waiting (conversation);
    INSERT INTO waiting (id, conversation, content)
        SELECT w.key, c.id, w.value FROM conversations AS c, json_each(c.settings, '$.waiting') AS w
        WHERE w.key NOT IN (SELECT id FROM messages);
    """,
)


T = TypeVar("T")


class StoreError(DiskError):
    """The chats cannot be read or written; `reason` is why, without the file's path."""

    def __init__(self, path: Path, reason: str, hint: str) -> None:
        super().__init__(f"{path}: {reason}", hint)
        self.reason = reason


class UnknownChatError(UserError):
    """No saved chat of that id."""

    exit_code = EXIT_UNKNOWN_MODEL


@dataclass(frozen=True)
class Listed:
    """A conversation in a list. Times are seconds since the epoch; `found` is the text around a
    search's first hit."""

    id: str
    title: str
    pair: str
    created: float
    updated: float
    turns: int
    found: str = ""


def data_folder() -> Path:
    """Where conversations lie."""
    if folder := os.environ.get("DFLASH_CHAT_DATA"):
        return Path(folder)
    from platformdirs import user_data_dir

    return Path(user_data_dir("dflash-chat"))


class Store:
    """One connection to the file, for one thread. Every method raises StoreError where the file or
    its disk is at fault."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or data_folder()) / FILE
        with self._faults():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            with self._faults():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def save(self, chat: Conversation, turns: Iterable[Turn] = ()) -> None:
        """Write what `chat` says of itself and the given turns, new or changed, but no traces; an
        answer that has no word yet is left out. A chat that is not in the file, or of which other
        programs have deleted what the turns hang on, is written whole, but not over what they have
        changed; one with nothing in it is none. While nothing was asked, its title is how what
        waits begins."""
        now = time.time()
        settings = {
            "params": asdict(chat.params),
            "draft": chat.draft,
            "info": asdict(chat.info) if chat.info else None,
        }
        last = chat.tree.get(chat.tip or "")
        tip = chat.tip if last is None or last.said else last.parent
        row = (
            chat.id, _clean(chat.title), chat.created, now, chat.pair,
            chat.build, _clean(chat.system), json.dumps(settings), tip,
        )  # fmt: skip
        turns = list(turns)
        changed = {turn.id for turn in turns}
        with self._transaction():
            settled = [(id_,) for id_ in chat.settled]
            self._db.executemany("DELETE FROM waiting WHERE id = ?", settled)
            if not chat.tree and not chat.waiting:
                self._db.execute(
                    "DELETE FROM conversations WHERE id = ?1"
                    " AND NOT EXISTS (SELECT 1 FROM messages WHERE conversation = ?1)"
                    " AND NOT EXISTS (SELECT 1 FROM waiting WHERE conversation = ?1)",
                    (chat.id,),
                )
                return
            known = self._db.execute("SELECT 1 FROM conversations WHERE id = ?", (chat.id,))
            if not known.fetchone() or not self._hang(turns):
                turns = list(chat.tree.values())
            self._db.execute(
                "INSERT INTO conversations VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE"
                " SET updated = excluded.updated, pair = excluded.pair, build = excluded.build,"
                " system = excluded.system, settings = excluded.settings, tip = excluded.tip,"
                " title = iif(EXISTS (SELECT 1 FROM messages WHERE conversation = excluded.id),"
                " title, excluded.title)",
                row,
            )
            self._db.executemany(
                "INSERT INTO waiting (id, conversation, content) VALUES (?,?,?) ON CONFLICT (id) DO"
                " UPDATE SET content = excluded.content WHERE content <> excluded.content",
                [(id_, chat.id, _clean(text)) for id_, text in chat.waiting.items()],
            )
            self._db.executemany(
                "INSERT INTO messages (id, conversation, parent, role, content, thinking, state,"
                " created, updated, figures) VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO"
                " UPDATE SET content = excluded.content, thinking = excluded.thinking,"
                " state = excluded.state, updated = excluded.updated, figures = excluded.figures"
                " WHERE ?",
                [
                    (
                        turn.id, chat.id, turn.parent, turn.role, _clean(turn.content),
                        _clean(turn.thinking), turn.state, turn.created, now,
                        encode_event(turn.figures).decode() if turn.figures else None,
                        turn.id in changed,
                    )
                    for turn in turns
                    if turn.said
                ],
            )  # fmt: skip

    def _hang(self, turns: Sequence[Turn]) -> bool:
        """Whether what these turns hang on is in the file or among them."""
        parents = {t.parent for t in turns if t.parent} - {t.id for t in turns}
        marks = ",".join("?" * len(parents))
        (found,) = self._db.execute(
            f"SELECT count(*) FROM messages WHERE id IN ({marks})", tuple(parents)
        ).fetchone()
        return bool(found == len(parents))

    def add_trace(self, turn: str, events: Sequence[Prefill | Tokens]) -> None:
        """Append to the trace of a saved turn."""
        if not events:
            return
        lines = zlib.compress(b"".join(encode_event(event) for event in events), 1)
        with self._transaction():
            self._db.execute(
                "INSERT INTO traces SELECT ?1, coalesce(max(part), 0) + 1, ?2"
                " FROM traces WHERE message = ?1",
                (turn, lines),
            )

    def rename(self, conversation: str, title: str) -> None:
        """Give a conversation a title."""
        with self._transaction():
            self._db.execute(
                "UPDATE conversations SET title = ? WHERE id = ?",
                (_clean(title), conversation),
            )

    def remove(self, conversation: str) -> None:
        """Delete a conversation with all its branches."""
        with self._transaction():
            self._db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))

    def remove_turn(self, conversation: str, turn: str, below: Collection[str]) -> None:
        """Delete a turn and all that hangs below it, unless that is more than `below`."""
        with self._transaction():
            found = self._db.execute(
                "WITH RECURSIVE below (id) AS (SELECT ?2 UNION SELECT m.id FROM messages AS m"
                " JOIN below ON m.parent = below.id WHERE m.conversation = ?1)"
                " SELECT id FROM below",
                (conversation, turn),
            ).fetchall()
            if not {id_ for (id_,) in found} <= {turn, *below}:
                reason = "another program has said more below it"
                raise StoreError(self.path, reason, "open the chat again to see it")
            self._db.executemany("DELETE FROM messages WHERE id = ?", found)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────

    def load(self, conversation: str) -> Conversation:
        """A conversation without its traces. Raises UnknownChatError."""
        with self._faults():
            found = self._db.execute(
                "SELECT id, title, created, pair, build, system, settings, tip FROM conversations"
                " WHERE id = ?",
                (conversation,),
            ).fetchone()
            rows = self._db.execute(
                "SELECT role, content, parent, id, thinking, state, created, figures FROM messages"
                " WHERE conversation = ? ORDER BY seq",
                (conversation,),
            ).fetchall()
        if found is None:
            raise UnknownChatError(f"there is no chat {conversation}", "dflash-chat sessions")
        id_, title, created, pair, build, system, settings_json, tip = found
        settings = json.loads(settings_json)
        params = settings["params"] | {"stop": tuple(settings["params"]["stop"])}
        chat = Conversation(
            system, id_, title, pair, build, _made(SamplingParams, params) or SamplingParams(),
            settings["draft"], _made(ModelInfo, settings["info"]), created,
        )  # fmt: skip
        turns = (
            Turn(role, content, parent, key, thinking, state, at, _figures(figures))
            for role, content, parent, key, thinking, state, at, figures in rows
        )
        chat.plant(turns, tip)
        self.load_waiting(chat)
        return chat

    def load_waiting(self, chat: Conversation) -> None:
        """Bring up to date what waits in `chat`."""
        with self._faults():
            rows = self._db.execute(
                "SELECT id, content FROM waiting WHERE conversation = ? ORDER BY seq", (chat.id,)
            ).fetchall()
        chat.settled = frozenset(id_ for id_, _ in rows if id_ in chat.tree)  # killed while asked
        chat.waiting = {id_: text for id_, text in rows if id_ not in chat.tree}

    def questions(self) -> list[str]:
        """What was asked lately in all chats, each text once, oldest first."""
        with self._faults():
            rows = self._db.execute(
                "SELECT content FROM messages WHERE role = 'user' AND length(content) <= ?"
                " ORDER BY seq DESC LIMIT ?",
                (RECALLED_CHARS, RECALLED),
            ).fetchall()
        return list(dict.fromkeys(text for (text,) in rows))[::-1]

    def trace(self, turn: str) -> list[Prefill | Tokens]:
        """The events of one answer as far as they were saved, oldest first."""
        with self._faults():
            parts = self._db.execute(
                "SELECT events FROM traces WHERE message = ? ORDER BY part", (turn,)
            ).fetchall()
            lines = b"".join(zlib.decompress(part) for (part,) in parts).splitlines()
        events = map(_event, lines)
        return [event for event in events if isinstance(event, Prefill | Tokens)]

    def chats(self, limit: int = -1) -> list[Listed]:
        """Conversations, the latest first."""
        return self._listed("SELECT id, '' AS found, 0 AS place FROM conversations", (), limit)

    def search(self, text: str, limit: int = 50) -> list[Listed]:
        """Conversations that say all words of `text` in one message, the best first; a word may
        be the beginning of one. Where no message does, titles and messages that have `text` as it
        stands, which also finds words of languages that put no spaces between them."""
        words = " ".join('"' + word.replace('"', '""') + '"*' for word in text.split())
        found = words and self._listed(
            "SELECT conversation AS id, snippet(words, 0, '', '', '…', 16) AS found, rank AS place"
            " FROM words JOIN messages ON messages.seq = words.rowid WHERE words MATCH ?"
            " ORDER BY rank LIMIT 1000",  # the limit also keeps snippet() where it may be used
            (words.replace("\0", ""),),
            limit,
        )
        return found or self._listed(
            "SELECT conversation AS id, substr(content, max(1, instr(lower(content), lower(?1))"
            " - 30), 100) AS found, 1 AS place FROM messages WHERE instr(lower(content), lower(?1))"
            " UNION ALL SELECT id, '', 0 FROM conversations WHERE instr(lower(title), lower(?1))",
            (text.strip(),),
            limit,
        )

    def find(self, start: str) -> str:
        """The id of the conversation whose id begins with `start`. Raises UnknownChatError with
        the nearest ids, UsageError if there are several."""
        with self._faults():
            ids: list[str] = [
                i for (i,) in self._db.execute("SELECT id FROM conversations ORDER BY updated")
            ]
        found = [i for i in ids if i.startswith(start.lower())] if start else []
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{len(found)} chats begin with {start}", "say more of the id")
        from difflib import get_close_matches

        near = get_close_matches(start.lower(), ids, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "dflash-chat sessions lists them"
        raise UnknownChatError(f"there is no chat {start!r}", hint)

    def latest(self) -> str:
        """The id of the conversation written last. Raises UnknownChatError if there is none."""
        if listed := self.chats(limit=1):
            return listed[0].id
        raise UnknownChatError("there is no chat to continue", "start one with dflash-chat")

    def _listed(self, ids: str, arguments: tuple[str, ...], limit: int) -> list[Listed]:
        with self._faults():
            rows = self._db.execute(
                f"WITH hits AS ({ids}),"
                " best AS (SELECT id, found, min(place) AS place FROM hits GROUP BY id)"
                " SELECT c.id, c.title, c.pair, c.created, c.updated, (SELECT count(*) FROM"
                " messages WHERE conversation = c.id), best.found"
                " FROM best JOIN conversations AS c ON c.id = best.id"
                " ORDER BY best.place, c.updated DESC, c.rowid DESC LIMIT ?",
                (*arguments, limit),
            ).fetchall()
        return [
            Listed(id_, title, pair, created, updated, turns, " ".join(found.split()))
            for id_, title, pair, created, updated, turns, found in rows
        ]

    # ── the file ────────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA synchronous = NORMAL")  # with WAL: safe, and no fsync per save
        if self._version() < len(MIGRATIONS):
            self.path.chmod(0o600)
            self._keep_a_log()
            with self._transaction():
                for script in MIGRATIONS[self._version() :]:
                    for statement in _statements(script):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        if self._version() > len(MIGRATIONS):
            hint = "install that version, or set DFLASH_CHAT_DATA to another folder"
            raise StoreError(self.path, "it was written by a newer dflash-chat", hint)
        abandoned = time.time() - ABANDONED_S
        stopped = "FROM messages WHERE state = 'streaming' AND updated < ?"
        if self._db.execute(f"SELECT 1 {stopped}", (abandoned,)).fetchone():
            with self._transaction():
                self._db.execute(
                    f"UPDATE messages SET state = 'stopped' WHERE id IN (SELECT id {stopped})",
                    (abandoned,),
                )

    def _keep_a_log(self) -> None:
        """Put the file into WAL mode, which stays with it. SQLite's own waiting does not cover this
        change, so programs that make the file at the same moment wait for each other here."""
        give_up = time.monotonic() + BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
            time.sleep(0.01)

    def _version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return int(version)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. IMMEDIATE: what another program wrote meanwhile is seen, never undone."""
        with self._faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, zlib.error, OSError) as error:
            reason, hint = _why(error)
            raise StoreError(self.path, reason, hint) from error


def _why(error: sqlite3.Error | zlib.error | OSError) -> tuple[str, str]:
    """What is wrong with the file or its disk, and what helps."""
    code = _primary(error)
    elsewhere = "or set DFLASH_CHAT_DATA to another folder"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower(), f"make the folder writable, {elsewhere}"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return "the disk is full or failing", f"free some space, {elsewhere}"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return "it cannot be written", f"make file and folder writable, {elsewhere}"
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) or isinstance(error, zlib.error):
        return "it is damaged, or no file of ours", f"move it away, {elsewhere}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program holds it", "close that program"
    return str(error), f"move it away, {elsewhere}"


def _primary(error: Exception) -> int:
    """SQLite's primary code of an error, without what extends it; 255 if it is none of SQLite's."""
    return int(getattr(error, "sqlite_errorcode", -1)) & 0xFF


def _statements(script: str) -> Iterator[str]:
    """A script's statements; `executescript` would commit before the first."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate becomes "?"."""
    return text.encode(errors="replace").decode()


def _figures(line: str | None) -> Finished | None:
    event = _event(line.encode()) if line else None
    return event if isinstance(event, Finished) else None


def _event(line: bytes) -> object:
    """A protocol line; None if another version wrote it and this one cannot read it."""
    try:
        return decode_event(line)
    except ValueError:
        return None


def _made(kind: type[T], data: dict[str, object] | None) -> T | None:
    """A dataclass of what another version may have written: without what is not known here, None
    if something is missing."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{key: value for key, value in data.items() if key in known}) if data else None
    except TypeError:
        return None
