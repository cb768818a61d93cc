"""Saves the conversation on screen, on a thread of its own, so that no disk ever stalls a frame.

Takes live objects and looks at them when it writes: whoever changes one says so afterwards. What
could not be saved stays due; the chat goes on and `problem` says why. Knows no widgets.
"""

from __future__ import annotations

import contextlib
import threading
import time
from math import inf
from pathlib import Path

from dflash_chat.chat import Conversation, Turn
from dflash_chat.presence import Presence
from dflash_chat.runtime.api import Prefill, Tokens
from dflash_chat.store import FILE, Store, StoreError, data_folder

SAVE_S = 0.5  # between two saves of what is being written; one takes well below 1 ms
ASK_S = 1.0  # how long a question may wait for its save
RETRY_S = 5.0
CLOSE_S = 2.0


class Keeper:
    """The writer of one file. `folder` None takes the usual place."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.presence = Presence(folder)
        self._wake = threading.Condition()
        self._saving = threading.Lock()
        self._due: dict[str, tuple[Conversation, Turn | None]] = {}  # by id, parents first
        self._due_at = inf
        self._marked = self._saved = 0  # how often something became due, and how much of it is done
        self._last = 0.0  # when the last save ended
        self._closing = False
        self._traced: dict[str, int] = {}  # events of a turn's trace that are in the file
        self.problem = ""  # why nothing is saved now
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def keep(self, chat: Conversation, *turns: Turn) -> None:
        """Save as soon as possible."""
        self._mark(chat, turns, 0.0)

    def keep_now(self, chat: Conversation, *turns: Turn) -> None:
        """Save and wait for it, though not for long: a slow disk must not hold up the answer."""
        self._mark(chat, turns, 0.0)
        self._flush()

    def writing(self, chat: Conversation, *turns: Turn) -> None:
        """An answer has grown, or what is typed: save it with what else it grows by in the next
        half second."""
        self._mark(chat, turns, SAVE_S)

    def trace(self, turn: Turn) -> list[Prefill | Tokens]:
        """All events of an answer, from the file and from this session. Raises StoreError."""
        with self._saving, Store(self._folder) as store:
            return [*store.trace(turn.id), *turn.trace[self._traced.get(turn.id, 0) :]]

    def store(self) -> Store:
        """The file with all that is due, for lists and for opening another chat. Raises
        StoreError."""
        self._flush()
        return Store(self._folder)

    def remove(self, conversation: str) -> None:
        """Delete a conversation; nothing of it that is still due comes back. Raises StoreError."""
        with self._saving, Store(self._folder) as store:
            with self._wake:
                due = self._due.items()
                self._due = {id_: job for id_, job in due if job[0].id != conversation}
            store.remove(conversation)

    def remove_turn(self, chat: Conversation, turn: Turn) -> None:
        """Delete a turn and all below it; nothing of them that is still due comes back. Raises
        StoreError."""
        with self._saving, Store(self._folder) as store:
            below = [each.id for each in chat.below(turn.id)]
            store.remove_turn(chat.id, turn.id, below)
            with self._wake:
                for id_ in below:
                    self._due.pop(id_, None)

    def questions(self) -> list[str]:
        """What was asked lately in all chats, oldest first; none where there is no file yet, or
        none that can be read."""
        with contextlib.suppress(StoreError):
            if ((self._folder or data_folder()) / FILE).exists():
                with self.store() as store:
                    return store.questions()
        return []

    def close(self) -> None:
        """Save what is due, and end."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(CLOSE_S)
        self.presence.close()

    def _flush(self) -> None:
        """Have what is due saved now, and wait for it, though not for long."""
        with self._wake:
            mark = self._marked
            if self._saved < mark and not self.problem:
                self._due_at = 0.0
                self._wake.notify_all()
                self._wake.wait_for(lambda: self.problem or self._saved >= mark, ASK_S)

    def _mark(self, chat: Conversation, turns: tuple[Turn, ...], within_s: float) -> None:
        with self._wake:
            self._due[chat.id] = (chat, None)
            self._due |= {turn.id: (chat, turn) for turn in turns}
            self._marked += 1
            due_at = self._last + within_s if within_s else 0.0
            if due_at < self._due_at:
                self._due_at = due_at
                self._wake.notify_all()

    # ── the thread ──────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self.problem = self.problem or ("" if self._closing else "saving has failed")

    def _work(self) -> None:
        store: Store | None = None
        while not self._closing:
            with self._wake:
                left = self._due_at - time.monotonic()
                if left > 0 and not self._closing:
                    self._wake.wait(None if left == inf else left)
                    continue
            with self._saving:
                store = self._save(store)
        with self._saving:
            store = self._save(store)
        if store:
            store.close()

    def _save(self, store: Store | None) -> Store | None:
        """Write what is due, opening the file if need be."""
        with self._wake:
            due, self._due, self._due_at = self._due, {}, inf
            mark = self._marked
        if not due:
            return store
        problem = ""
        try:
            store = store or Store(self._folder)
            for chat in {chat.id: chat for chat, _ in due.values()}.values():
                own = [turn for owner, turn in due.values() if turn and owner.id == chat.id]
                turns = [turn for turn in own if turn.said]
                store.save(chat, turns)
                for turn in turns:
                    self._save_trace(store, turn)
        except StoreError as error:
            problem = error.reason
        with self._wake:
            self._last = time.monotonic()
            self.problem = problem
            if problem:
                self._due = {**due, **self._due}
                self._due_at = min(self._due_at, self._last + RETRY_S)
            else:
                self._saved = mark
            self._wake.notify_all()
        return store

    def _save_trace(self, store: Store, turn: Turn) -> None:
        done = self._traced.get(turn.id, 0)
        events = turn.trace[done:]
        store.add_trace(turn.id, events)
        self._traced[turn.id] = done + len(events)
