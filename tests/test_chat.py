"""Conversations: what the engine is sent, and that no branch is ever lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dflash_chat.chat import STREAMING, Conversation, Turn, titled
from dflash_chat.runtime.api import Message


def said(chat: Conversation) -> list[str]:
    return [turn.content for turn in chat.turns]


def test_messages_are_system_then_turns_in_order() -> None:
    chat = Conversation("Be brief.")
    chat.ask("Hi")
    chat.answer("Hello")
    chat.ask("Bye")

    assert [message.role for message in chat.messages()] == ["system", "user", "assistant", "user"]


def test_without_a_system_prompt_there_is_no_system_message() -> None:
    chat = Conversation()
    chat.ask("Hi")

    assert chat.messages() == (Message("user", "Hi"),)


def test_a_question_without_an_answer_joins_the_next_one() -> None:
    chat = Conversation()
    chat.ask("First")
    chat.answer("")
    chat.ask("Second")

    assert chat.messages() == (Message("user", "First\n\nSecond"),)


def test_retracting_takes_back_the_answer_but_never_the_question() -> None:
    chat = Conversation()
    chat.ask("Hi")
    chat.answer("Hel")
    chat.retract_answer()
    chat.retract_answer()

    assert said(chat) == ["Hi"]


def test_a_regenerated_answer_is_a_branch_beside_the_old_one() -> None:
    chat = Conversation()
    chat.ask("Hi")
    chat.answer("one")
    first = chat.turns[-1]
    chat.regenerate(first.id)
    chat.answer("two")

    assert said(chat) == ["Hi", "two"]
    assert [turn.content for turn in chat.branches(first.id)] == ["one", "two"]
    chat.switch(first.id)
    assert said(chat) == ["Hi", "one"]


def test_an_edited_question_is_a_branch_and_switching_brings_back_what_followed() -> None:
    chat = Conversation()
    first = chat.ask("One?")
    chat.answer("1")
    chat.ask("Two?")
    chat.answer("2")
    chat.edit(first.id, "Three?")
    chat.answer("3")

    assert said(chat) == ["Three?", "3"]
    chat.switch(first.id)
    assert said(chat) == ["One?", "1", "Two?", "2"]


def test_thoughts_are_not_sent_back() -> None:
    chat = Conversation()
    chat.ask("Hi")
    answer = chat.begin_answer()
    answer.thinking, answer.content = "hm", "Hello"
    chat.end_answer()

    assert chat.messages()[-1] == Message("assistant", "Hello")


def test_a_stopped_answer_is_written_on_in_place() -> None:
    chat = Conversation()
    chat.ask("Hi")
    chat.answer("Hel", "stopped")
    turn = chat.continue_answer()
    turn.content += "lo"
    chat.end_answer()

    assert said(chat) == ["Hi", "Hello"]
    assert turn.state == "complete"


def test_the_title_is_how_the_first_question_begins_until_a_person_names_the_chat() -> None:
    chat = Conversation()
    assert chat.title == ""
    chat.ask("Why is\nthe sky blue? " + "Really. " * 20)
    assert chat.title.startswith("Why is the sky blue? Really.")
    assert titled("See @a.txt\n\na.txt:\n```\nlong\n```") == "See @a.txt"
    assert titled("a\x1b[2J\tb 👩\u200d👧") == "a [2J b 👩\u200d👧"
    assert len(chat.title) <= 60
    chat.title = "Sky"
    chat.ask("And the sea?")
    assert chat.title == "Sky"


def test_turns_from_a_file_become_a_whole_tree_whatever_is_missing() -> None:
    chat = Conversation()
    chat.plant(
        [
            Turn("user", "Hi", None, "a"),
            Turn("assistant", "", "a", "b", state=STREAMING),  # killed before the first word
            Turn("assistant", "Hel", "a", "c", state=STREAMING),  # killed while writing
            Turn("user", "lost", "gone", "d"),
        ],
        tip="b",
    )

    assert said(chat) == ["Hi", "Hel"]
    assert chat.turns[-1].state == "stopped"


class AnyUse(RuleBasedStateMachine):
    """Whatever is done, every path is whole and nothing said is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.chat = Conversation()
        self.all_said: list[tuple[str, str | None, str]] = []  # id, parent, words

    def note(self, turn: Turn) -> None:
        self.all_said.append((turn.id, turn.parent, turn.content))

    def pick(self, number: int, role: str) -> Turn | None:
        turns = [turn for turn in self.chat.tree.values() if turn.role == role]
        return turns[number % len(turns)] if turns else None

    @precondition(lambda self: not self.chat.last or self.chat.last.role == "assistant")
    @rule(text=st.text(min_size=1))
    def ask(self, text: str) -> None:
        self.note(self.chat.ask(text))

    @precondition(lambda self: self.chat.last and self.chat.last.role == "user")
    @rule(text=st.text(), state=st.sampled_from(["complete", "stopped", "failed"]))
    def answer(self, text: str, state: str) -> None:
        question = self.chat.tip
        self.chat.answer(text, state)
        if text:
            self.note(self.chat.turns[-1])
        else:
            assert self.chat.tip == question

    @rule(number=st.integers(0, 99), text=st.text(min_size=1))
    def edit(self, number: int, text: str) -> None:
        if turn := self.pick(number, "user"):
            self.note(self.chat.edit(turn.id, text))

    @rule(number=st.integers(0, 99))
    def regenerate(self, number: int) -> None:
        if turn := self.pick(number, "assistant"):
            self.chat.regenerate(turn.id)
            assert self.chat.tip == turn.parent

    @rule(number=st.integers(0, 99), role=st.sampled_from(["user", "assistant"]))
    def switch(self, number: int, role: str) -> None:
        if turn := self.pick(number, role):
            self.chat.switch(turn.id)
            assert turn in self.chat.turns
            assert all(t.parent != self.chat.tip for t in self.chat.tree.values())

    @rule(number=st.integers(0, 99), role=st.sampled_from(["user", "assistant"]))
    def delete(self, number: int, role: str) -> None:
        if turn := self.pick(number, role):
            path, below = self.chat.turns, self.chat.below(turn.id)
            assert below[0] is turn
            assert all(each.parent in {t.id for t in below} for each in below[1:])
            beside = [each for each in self.chat.branches(turn.id) if each is not turn]
            self.chat.delete(turn.id)
            gone = {each.id for each in below}
            assert all(each.parent not in gone for each in self.chat.tree.values())
            self.all_said = [said for said in self.all_said if said[0] not in gone]
            if turn not in path:
                assert self.chat.turns == path
            elif beside:
                assert beside[-1] in self.chat.turns
            else:
                assert self.chat.tip == turn.parent

    @invariant()
    def nothing_else_is_lost(self) -> None:
        assert [(t.id, t.parent, t.content) for t in self.chat.tree.values()] == self.all_said

    @invariant()
    def the_path_runs_from_a_first_question_to_the_tip(self) -> None:
        turns = self.chat.turns
        assert [turn.parent for turn in turns] == [None, *(turn.id for turn in turns)][: len(turns)]
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + [
            "user"
        ] * (len(turns) % 2)

    @invariant()
    def what_the_engine_is_sent_alternates(self) -> None:
        roles = [message.role for message in self.chat.messages()]
        assert roles == [turn.role for turn in self.chat.turns]

    @invariant()
    def a_turn_is_one_of_its_branches(self) -> None:
        for turn in self.chat.turns:
            assert turn in self.chat.branches(turn.id)


AnyUse.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestAnyUse = AnyUse.TestCase
