"""`dflash-chat sessions`: saved chats listed, searched, shown, exported, imported and removed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dflash_chat.errors import EXIT_OK, DiskError, UserError

if TYPE_CHECKING:
    from dflash_chat.chat import Turn
    from dflash_chat.runtime.api import Prefill, Tokens
    from dflash_chat.store import Listed, Store

FORMATS = ("md", "json", "trace")


def add_actions(parser: argparse.ArgumentParser, confirm: Callable[[str], None]) -> None:
    """The grammar below `sessions`; `confirm` asks a person and ends the program on no."""
    _how(parser)
    actions = parser.add_subparsers(metavar="ACTION", title="actions (without one: ls)")

    def action(
        name: str, run: Callable[[argparse.Namespace], int], summary: str
    ) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(run=run, prog=added.prog)
        return added

    _how(action("ls", list_all, "chats, the latest first"))
    search = action("search", search_all, "chats that say all of these words in one message")
    search.add_argument("words", metavar="WORD", nargs="+")
    _how(search)
    show = action("show", show_one, "print a chat")
    show.add_argument("id", metavar="ID", help="the id, or how it begins")
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    export = action("export", export_one, "write a chat to stdout or to a file")
    export.add_argument("id", metavar="ID")
    export.add_argument(
        "--format", choices=FORMATS, default="md",
        help="md to read, json with all branches and steps, trace for --replay",
    )  # fmt: skip
    export.add_argument("--to", metavar="FILE", type=Path, help="instead of stdout")
    incoming = action("import", import_all, "take chats that were exported as JSON; prints ids")
    incoming.add_argument("files", metavar="FILE", nargs="+", type=Path)
    rm = action("rm", partial(remove_all, confirm=confirm), "delete chats")
    rm.add_argument("ids", metavar="ID", nargs="+")
    rm.add_argument("--yes", action="store_true", help="do not ask")


def _how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    how.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="ids only"
    )


# ── actions ─────────────────────────────────────────────────────────────────────────────────────


def list_all(args: argparse.Namespace) -> int:
    """Print all chats."""
    from dflash_chat.store import Store

    with Store() as store:
        _print(store.chats(), args, "there are no saved chats yet")
    return EXIT_OK


def search_all(args: argparse.Namespace) -> int:
    """Print the chats that were found."""
    from dflash_chat.store import Store

    with Store() as store:
        _print(store.search(" ".join(args.words)), args, "no chat says all of these words")
    return EXIT_OK


def show_one(args: argparse.Namespace) -> int:
    """Print one chat as Markdown, or as JSON without its steps."""
    from dflash_chat import export
    from dflash_chat.store import Store

    with Store() as store:
        chat = store.load(store.find(args.id))
    if args.json:
        _write(json.dumps(export.to_json(chat, lambda turn: []), indent=1, ensure_ascii=False))
    else:
        _write(export.printable(export.to_markdown(chat)))
    return EXIT_OK


def export_one(args: argparse.Namespace) -> int:
    """Write one chat in one of the formats."""
    from dflash_chat.store import Store

    with Store() as store:
        text = exported(store, store.find(args.id), args.format)
    if args.to is None:
        _write(text)
    else:
        try:
            args.to.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{args.to} cannot be written: {error.strerror}") from error
    return EXIT_OK


def exported(store: Store, conversation: str, form: str) -> str:
    """One chat as text in one of `FORMATS`."""
    from dflash_chat import export

    chat = store.load(conversation)
    if form == "md":
        return export.to_markdown(chat)

    def trace(turn: Turn) -> list[Prefill | Tokens]:
        return store.trace(turn.id)

    if form == "trace":
        return export.to_lines(chat, trace).decode()
    return json.dumps(export.to_json(chat, trace), ensure_ascii=False) + "\n"


def import_all(args: argparse.Namespace) -> int:
    """Save the chats of some files, all or none, and print their ids."""
    from dflash_chat import export
    from dflash_chat.store import Store

    chats = []
    for path in args.files:
        try:
            chats.append(export.from_json(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text") from error
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
    with Store() as store:
        for chat in chats:
            store.save(chat)
            for turn in chat.tree.values():
                store.add_trace(turn.id, turn.trace)
            _write(chat.id)
    return EXIT_OK


def remove_all(args: argparse.Namespace, confirm: Callable[[str], None]) -> int:
    """Delete chats."""
    from dflash_chat.store import Store

    with Store() as store:
        ids = list(dict.fromkeys(store.find(start) for start in args.ids))
        if not args.yes:
            titles = [listed.title for listed in store.chats() if listed.id in ids]
            confirm(f"Delete {', '.join(titles)}?")
        for id_ in ids:
            store.remove(id_)
    return EXIT_OK


# ── on stdout ───────────────────────────────────────────────────────────────────────────────────


def _print(listed: list[Listed], args: argparse.Namespace, none: str) -> None:
    """Print a list; `none` tells a person that it is empty."""
    if getattr(args, "quiet", False):
        lines = [entry.id for entry in listed]
    elif args.json:
        lines = [json.dumps([vars(entry) for entry in listed], indent=1, ensure_ascii=False)]
    else:
        lines = table(listed)
        if not lines:
            sys.stderr.write(f"{none}\n")
    if lines:
        _write("\n".join(lines))


def table(listed: list[Listed]) -> list[str]:
    """One line each, and the place that was found below it."""
    lines = []
    for entry in listed:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.updated))
        turns = f"{entry.turns} turn{'s' if entry.turns != 1 else ''}"
        lines.append(f"{entry.id}  {when}  {turns:>9}  {entry.pair:14}  {entry.title}")
        if entry.found:
            lines.append(f"            {entry.found}")
    return lines


def _write(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
