"""Conversations as files: Markdown to read, JSON to keep and to import, protocol lines to replay.

The JSON holds the whole tree with the per-step trace of every answer, in the words of
`runtime.api`. Nothing in a file is trusted: what does not fit is refused with one sentence that
says where it is. Knows no database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dflash_chat.chat import ROLES, STATES, STREAMING, Conversation, Turn, new_id
from dflash_chat.errors import UserError
from dflash_chat.runtime.api import (
    Finished,
    Generate,
    ModelInfo,
    Prefill,
    Ready,
    SamplingParams,
    Tokens,
    decode,
    encode,
)
from dflash_chat.settings import SAMPLING_RANGES

FORMAT, VERSION = "dflash-chat conversation", 1
FENCE = "```"

T = TypeVar("T")
Trace = Callable[[Turn], list[Prefill | Tokens]]


# ── out ─────────────────────────────────────────────────────────────────────────────────────────


def to_markdown(chat: Conversation) -> str:
    """The active path, for reading."""
    parts = [f"# {chat.title}"]
    if chat.pair:
        parts.append(f"*{' · '.join(word for word in (chat.pair, chat.build) if word)}*")
    if chat.system:
        parts.append("## System\n\n" + chat.system)
    for turn in chat.turns:
        note = "" if turn.state in ("complete", STREAMING) else f" ({turn.state})"
        parts.append("## You" if turn.role == "user" else f"## Answer{note}")
        if turn.thinking:
            thinking = turn.thinking.strip()
            parts.append(f"<details><summary>Thinking</summary>\n\n{thinking}\n\n</details>")
        if (
            turn.content.count(FENCE) % 2
        ):  # stopped in a code block, which must not swallow the rest
            parts.append(f"{turn.content.strip()}\n{FENCE}")
        else:
            parts.append(turn.content.strip())
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def to_json(chat: Conversation, trace: Trace) -> dict[str, Any]:
    """Everything: the tree, the settings, and the steps of every answer."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": chat.title,
        "created": chat.created,
        "pair": chat.pair,
        "build": chat.build,
        "system": chat.system,
        "params": asdict(chat.params),
        "draft": chat.draft,
        "info": asdict(chat.info) if chat.info else None,
        "tip": chat.tip,
        "messages": [
            {
                **{name: getattr(turn, name) for name in _TURN_FIELDS},
                "figures": _body(turn.figures) if turn.figures else None,
                "trace": [_body(event) for event in trace(turn)],
            }
            for turn in chat.tree.values()
        ],
    }


def to_lines(chat: Conversation, trace: Trace) -> bytes:
    """The active path as the engine's protocol had it, one line each; `--replay` plays it."""
    lines = [encode(Ready(chat.info))] if chat.info else []
    path = Conversation(chat.system)
    for number, turn in enumerate(chat.turns):
        if turn.role == "assistant" and turn.figures:
            lines.append(encode(Generate(number, path.messages(), chat.params, chat.draft)))
            lines += [encode(replace(event, id=number)) for event in trace(turn)]
            lines.append(encode(replace(turn.figures, id=number)))
        path.plant([turn], turn.id)
    return b"".join(lines)


_TURN_FIELDS = ("id", "parent", "role", "content", "thinking", "state", "created")


def _body(event: Prefill | Tokens | Finished) -> dict[str, Any]:
    """An event as the protocol writes it, without its request's number."""
    body: dict[str, Any] = json.loads(encode(event))
    del body["id"]
    return body


# ── in ──────────────────────────────────────────────────────────────────────────────────────────


def from_json(text: str) -> Conversation:
    """The conversation of an export, under new ids, so that it never overwrites another; traces
    are in its turns. Raises UserError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(f"it is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _bad("it is no exported chat of dflash-chat")
    if data.get("version") != VERSION:
        raise UserError(
            f"the file has version {data.get('version')}, this program reads {VERSION}",
            "export it again with the program that wrote it, or install a newer one",
        )
    chat = Conversation(
        system=_read(data, "system", str),
        title=_read(data, "title", str),
        pair=_read(data, "pair", str),
        build=_read(data, "build", str),
        created=_read(data, "created", float),
        params=_params(_read(data, "params", dict)),
        draft=_read(data, "draft", bool),
        info=_made(ModelInfo, data["info"], "info") if data.get("info") is not None else None,
    )
    turns: dict[str, Turn] = {}
    for number, entry in enumerate(_read(data, "messages", list), 1):
        where = f"message {number}"
        if not isinstance(entry, dict):
            raise _bad(f"{where} is not an object")
        id_ = _read(entry, "id", str, where)
        if id_ in turns:
            raise _bad(f"{where} has the id of another: {id_[:40]!r}")
        turns[id_] = _turn(entry, where, turns)
    if not turns:
        raise _bad("it has no messages")
    tip = data.get("tip")
    known = turns.get(tip) if isinstance(tip, str) else None
    chat.plant(turns.values(), known.id if known else None)
    return chat


def _turn(entry: Mapping[str, Any], where: str, earlier: Mapping[str, Turn]) -> Turn:
    parent = entry.get("parent")
    if parent is not None and not (isinstance(parent, str) and parent in earlier):
        raise _bad(f"{where}: its parent is no earlier message")
    role, state = _read(entry, "role", str, where), _read(entry, "state", str, where)
    before = earlier[parent].role if parent is not None else "assistant"
    if role not in ROLES or (role == "assistant" and before == "assistant"):
        raise _bad(f"{where}: {role!r} cannot speak here")
    if state not in STATES:
        raise _bad(f"{where}: its state must be one of {', '.join(STATES)}")
    figures = entry.get("figures")
    finished = _event(figures, where) if figures is not None else None
    if finished is not None and not isinstance(finished, Finished):
        raise _bad(f"{where}: its figures are none")
    trace = [_event(event, where) for event in _read(entry, "trace", list, where)]
    return Turn(
        role,
        _read(entry, "content", str, where),
        earlier[parent].id if parent is not None else None,
        new_id(),
        _read(entry, "thinking", str, where),
        state,
        _read(entry, "created", float, where),
        finished,
        [event for event in trace if isinstance(event, Prefill | Tokens)],
    )


def _event(body: object, where: str) -> object:
    try:
        assert isinstance(body, dict)
        event = decode(json.dumps({**body, "id": 0}).encode())
    except (ValueError, AssertionError, RecursionError) as error:
        raise _bad(f"{where}: a recorded step cannot be read") from error
    if not fits(event, type(event)):
        raise _bad(f"{where}: a recorded step has a wrong value")
    return event


def _params(data: dict[str, Any]) -> SamplingParams:
    stop = data.get("stop")
    params: SamplingParams = _made(
        SamplingParams, {**data, "stop": tuple(stop) if isinstance(stop, list) else stop}, "params"
    )
    for key, limits in SAMPLING_RANGES.items():
        value = getattr(params, key)
        if value is not None and not limits.holds(value):
            raise _bad(f"params: {key} must be {limits}")
    return params


def _made(kind: type[T], data: object, where: str) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or not data.keys() <= names:
        raise _bad(f"{where} is not what this program writes")
    try:
        made = kind(**data)
    except TypeError as error:
        raise _bad(f"{where} is not complete") from error
    if not fits(made, kind):
        raise _bad(f"{where} has a wrong value")
    return made


def _read(data: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    value: T | None = data.get(key)
    if value is None or not fits(value, kind):
        words = {str: "text", float: "a number", bool: "true or false", list: "a list"}
        place = f"{where}: {key}" if where else key
        raise _bad(f"{place} must be {words.get(kind, 'an object')}")
    return value


def fits(value: object, kind: object) -> bool:
    """Whether a value is of the annotated type, all the way down, finite, and valid Unicode."""
    if is_dataclass(kind):
        return isinstance(value, kind) and all(  # type: ignore[arg-type]
            fits(getattr(value, name), hint)
            for name, hint in _hints(kind).items()  # type: ignore[arg-type]
        )
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items()
        )
    if kind is float or kind is int:
        allowed = (int, float) if kind is float else (int,)
        if not isinstance(value, allowed) or isinstance(value, bool):
            return False
        return isfinite(value) and abs(value) < 2**63
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
    assert isinstance(kind, type), kind
    return isinstance(value, kind)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _bad(why: str) -> UserError:
    return UserError(
        f"the file is no exported chat: {why}",
        "export it again: dflash-chat sessions export ID --format json",
    )
