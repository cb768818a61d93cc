"""The real program with the real default pair in a pseudo-terminal, as a person would use it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dflash_chat.chat import STOPPED, Conversation, Turn
from dflash_chat.store import Store, UnknownChatError
from tests.ui.terminal import Terminal
from tests.ui.test_kill import engines_of

COMMAND = [sys.executable, "-m", "dflash_chat", "-o", "temperature=0", "--max-tokens", "1200"]
STORY = "Tell me a long story about a lighthouse."
NUMBERS = "Write the numbers from 1 to 300, one to a line."

pytestmark = [pytest.mark.slow, pytest.mark.weights]


@pytest.fixture
def chats(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the chats go; configuration and log are this test's own, too."""
    monkeypatch.setenv("DFLASH_CHAT_DATA", str(tmp_path / "chats"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "chats"


def saved(chats: Path) -> Conversation:
    """The chat as it is in the file, an empty one before anything was asked."""
    with Store(chats) as store:
        try:
            return store.load(store.latest())
        except UnknownChatError:
            return Conversation()


class Talk:
    """A person at the terminal, and what is saved meanwhile."""

    def __init__(self, terminal: Terminal, chats: Path) -> None:
        self.terminal, self.chats = terminal, chats
        terminal.wait_for("● ready")
        self.before = saved(chats)

    def answer(self) -> Turn | None:
        """The last answer, if it is another or has grown."""
        turn = saved(self.chats).last
        if turn is None or turn.role == "user":
            return None
        was = self.before.tree.get(turn.id)
        return turn if was is None or len(turn.content) > len(was.content) + 20 else None

    def streams(self) -> bool:
        """Whether the answer that is being written says something by now."""
        turn = self.answer()
        return turn is not None and len(turn.content) > 20

    def stop(self) -> Turn:
        """Let the answer stream, stop it, and return it."""
        self.terminal.wait(self.streams, "some text")
        self.terminal.wait_for("● answering")  # text is saved before the header is painted
        self.terminal.press("escape")
        answer = self.ended()
        assert answer.state == STOPPED
        self.terminal.wait_for("stopped · cached")
        return answer

    def ended(self) -> Turn:
        """The answer that was just written, once it is saved and shown as a whole."""
        known = [turn.figures for turn in self.before.tree.values()]

        def whole() -> bool:
            answer = self.answer()
            return answer is not None and answer.figures not in [None, *known]

        self.terminal.wait(whole, "all of the answer")
        answer, self.before = self.answer(), saved(self.chats)
        assert answer is not None
        self.terminal.wait_for("● ready")
        self.terminal.wait_for(re.findall(r"\w+", answer.content)[-1])
        return answer

    def at_last_turn(self, key: str, does: str) -> None:
        """Put the cursor on the last turn and press a key that the footer names."""
        self.terminal.press("alt+up")
        self.terminal.wait_for(f"{key} {does}")
        self.terminal.press(key)


def talk(terminal: Terminal, chats: Path, asked: str) -> None:
    """Send, stop, continue, answer again, edit, copy."""
    person = Talk(terminal, chats)
    terminal.press(asked, "enter")
    stopped = person.stop()

    person.at_last_turn("c", "continue")
    continued = person.stop()
    assert continued.id == stopped.id
    assert continued.content.startswith(stopped.content)

    terminal.press("ctrl+r")
    again = person.stop()
    assert saved(chats).branches(again.id) == [continued, again]
    assert again.content[:20] == continued.content[:20]  # it is greedy

    terminal.press("up")
    terminal.wait_for("editing · Esc")
    terminal.press(" In one sentence.", "enter")
    edited = person.ended()
    question, first = saved(chats).turns[-2], saved(chats).tree[again.parent or ""]
    assert question.content == f"{asked} In one sentence."
    assert saved(chats).branches(question.id) == [first, question]

    person.at_last_turn("y", "copy")
    terminal.wait(lambda: bool(terminal.clipboard), "the clipboard")
    assert terminal.clipboard == edited.content
    terminal.press("escape")


def leave(terminal: Terminal) -> None:
    terminal.press("ctrl+q")
    assert terminal.end() == 0


def test_a_chat_is_had_left_and_resumed(chats: Path) -> None:
    with Terminal(COMMAND, 120, 40) as terminal:
        talk(terminal, chats, STORY)
        terminal.wait_for("draft O")  # ON, or OFF where drafts do not pay on this machine
        leave(terminal)
    before = saved(chats)
    with Terminal([*COMMAND, "--continue"], 80, 24) as terminal:
        terminal.wait_for("branch 2 of 2")  # the question that was edited
        terminal.press("f3")
        terminal.wait_for(" blocks · tau ")
        terminal.press("f3")
        talk(terminal, chats, NUMBERS)
        leave(terminal)
    after = saved(chats)
    assert after.id == before.id
    assert [turn.id for turn in after.turns][: len(before.turns)] == [t.id for t in before.turns]
    assert not engines_of(chats)
