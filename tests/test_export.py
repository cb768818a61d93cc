"""Chats as files: what goes out comes in again, and nothing else does."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings

from dflash_chat import export
from dflash_chat.chat import Conversation, Turn
from dflash_chat.errors import UserError
from dflash_chat.runtime.api import Generate, Prefill, Ready, Tokens, decode
from tests.saved import INFO, branched, conversations, essence, recorded


def trace(turn: Turn) -> list[Prefill | Tokens]:
    return turn.trace


def out(chat: Conversation) -> dict[str, Any]:
    return json.loads(json.dumps(export.to_json(chat, trace)))


def without_numbers(turn: Turn) -> list[dict[str, object]]:
    return [vars(event) | {"id": 0} for event in turn.trace]


def test_json_comes_back_with_branches_settings_figures_and_steps() -> None:
    chat = branched()
    again = export.from_json(json.dumps(out(chat)))

    assert essence(again) == essence(chat)
    for before, after in zip(chat.tree.values(), again.tree.values(), strict=True):
        assert without_numbers(after) == without_numbers(before)
    assert any(turn.trace for turn in again.tree.values())


@settings(max_examples=40, deadline=None)
@given(chat=conversations())
def test_any_tree_comes_back(chat: Conversation) -> None:
    assert essence(export.from_json(json.dumps(out(chat)))) == essence(chat)


def test_an_imported_chat_never_takes_the_place_of_another() -> None:
    chat = branched()
    again = export.from_json(json.dumps(out(chat)))

    assert again.id != chat.id
    assert not set(again.tree) & set(chat.tree)


def test_markdown_is_the_active_path_and_closes_what_was_cut() -> None:
    chat = branched()
    chat.retract_answer()
    chat.answer("Chlorophyll:\n```python\nprint('green')", "stopped")

    assert export.to_markdown(chat) == (
        "# Why is the sky blue?\n\n*smollm2-135m · q4_1*\n\n## System\n\nBe brief.\n\n"
        "## You\n\nWhy is the sky blue?\n\n## Answer\n\nBecause **air** scatters blue.\n\n"
        "## You\n\nAnd the grass?\n\n"
        "## Answer (stopped)\n\nChlorophyll:\n```python\nprint('green')\n```\n"
    )


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert export.printable("a\x1b[31mred\x07\n\tb") == "a\ufffd[31mred\ufffd\n\tb"


def test_the_trace_is_the_protocol_of_the_active_path() -> None:
    chat = Conversation("Be brief.", info=INFO)
    chat.ask("One?")
    recorded(chat, "first answer here")
    chat.ask("Two?")
    recorded(chat, "second answer")
    events = [decode(line) for line in export.to_lines(chat, trace).splitlines()]

    assert isinstance(events[0], Ready)
    asked = [event for event in events if isinstance(event, Generate)]
    assert [[m.content for m in event.messages] for event in asked] == [
        ["Be brief.", "One?"],
        ["Be brief.", "One?", "first answer here", "Two?"],
    ]
    text = "".join(event.text for event in events if isinstance(event, Tokens))
    assert text == "first answer heresecond answer"


# ── what does not fit ───────────────────────────────────────────────────────────────────────────


def changed(path: str, value: object) -> str:
    """The export with one thing changed; `...` takes it out."""
    data = out(branched())
    at: Any = data
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "no exported chat"),
        ('{"format": "another"}', "no exported chat"),
    ],
    ids=["empty", "deep", "list", "format"],
)
def test_what_is_no_export_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        export.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", 9, "has version 9, this program reads 1"),
        ("system", 5, "system must be text"),
        ("title", "\ud800", "title must be text"),
        ("created", "today", "created must be a number"),
        ("created", float("nan"), "created must be a number"),
        ("draft", "yes", "draft must be true or false"),
        ("params.temperature", -1, "temperature must be a number from 0 up to 5"),
        ("params.warmth", 1, "params is not what this program writes"),
        ("params.stop", [1], "params has a wrong value"),
        ("info.pair", ..., "info is not complete"),
        ("messages", {}, "messages must be a list"),
        ("messages", [], "it has no messages"),
        ("messages.1", 7, "message 2 is not an object"),
        ("messages.1.content", None, "message 2: content must be text"),
        ("messages.1.parent", "nobody", "message 2: its parent is no earlier message"),
        ("messages.1.parent", [], "message 2: its parent is no earlier message"),
        ("messages.0.role", "assistant", "message 1: 'assistant' cannot speak here"),
        ("messages.0.role", "system", "message 1: 'system' cannot speak here"),
        ("messages.1.state", "lost", "message 2: its state must be one of complete"),
        ("messages.1.figures.type", "Tokens", "message 2: a recorded step cannot be read"),
        ("messages.1.figures.spec.steps", "x", "message 2: a recorded step has a wrong value"),
        ("messages.1.trace.2.stats", {}, "message 2: a recorded step cannot be read"),
        ("messages.1.trace.2.tokens", 1e400, "message 2: a recorded step has a wrong value"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(path: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        export.from_json(changed(path, value))
    assert "\n" not in refused.value.message


def test_no_damage_to_a_file_does_worse_than_refuse_it() -> None:
    dice = random.Random(1)
    whole = json.dumps(out(branched()))
    values = ["null", "[]", "{}", '"x"', "-1", "1e999", "true", '"\\ud800"', ""]
    for _ in range(400):
        at = dice.randrange(len(whole))
        text = whole[:at] + dice.choice(values) + whole[at + dice.randrange(40) :]
        try:
            chat = export.from_json(text)
        except UserError:
            continue
        assert essence(export.from_json(json.dumps(out(chat)))) == essence(chat)


def spots(at: dict[str, Any] | list[Any], path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in an export."""
    found = []
    for key, value in at.items() if isinstance(at, dict) else enumerate(at):
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += spots(value, (*path, key))
    return found


def test_a_single_wrong_value_anywhere_is_refused_or_harmless() -> None:
    dice = random.Random(2)

    for spot in dice.sample(spots(out(branched())), 150):
        data: Any = out(branched())
        at = data
        for step in spot[:-1]:
            at = at[step]
        at[spot[-1]] = dice.choice([None, [], {}, "x", -1, 1.5, True, [[]], {"a": 1}])
        try:
            chat = export.from_json(json.dumps(data))
        except UserError:
            continue
        assert essence(export.from_json(json.dumps(out(chat)))) == essence(chat)
