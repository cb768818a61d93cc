"""Conversations as the engine is sent them."""

from __future__ import annotations

from dflash_chat.chat import Conversation, as_markdown
from dflash_chat.runtime.api import Message


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

    assert chat.messages() == (Message("user", "Hi"),)


def test_an_edited_question_and_another_answer_are_branches() -> None:
    chat = Conversation()
    first = chat.ask("Hi")
    chat.answer("Hello")
    answer = chat.turns[-1]
    chat.edit(first.id, "Good morning")
    assert [turn.content for turn in chat.turns] == ["Good morning"]

    chat.tip = answer.id
    chat.regenerate(answer.id)
    chat.answer("Hey")
    assert [turn.content for turn in chat.turns] == ["Hi", "Hey"]
    assert len(chat.tree) == 4


def test_thoughts_are_not_sent_back() -> None:
    chat = Conversation()
    chat.ask("Hi")
    answer = chat.begin_answer()
    answer.thinking, answer.content = "hm", "Hello"
    chat.end_answer()

    assert chat.messages()[-1] == Message("assistant", "Hello")


def test_a_cut_answer_is_written_on_where_it_stands() -> None:
    chat = Conversation()
    chat.ask("Hi")
    chat.answer("Hel", "stopped")
    turn = chat.continue_answer()
    turn.content += "lo"
    chat.end_answer()

    assert [turn.content for turn in chat.turns] == ["Hi", "Hello"]


def test_an_exported_chat_reads_like_one() -> None:
    chat = Conversation("Be brief.")
    chat.ask("Hi")
    chat.answer("Hello")

    assert as_markdown(chat) == "> Be brief.\n\n## You\n\nHi\n\n## Answer\n\nHello\n"
