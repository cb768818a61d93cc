"""Conversations as the engine is sent them."""

from __future__ import annotations

from dflash_chat.chat import Conversation
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

    assert chat.turns == [Message("user", "Hi")]
