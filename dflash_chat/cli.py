"""The command line: what can be typed, and how errors and exit codes leave.

Knows the grammar; what a command becomes is in `commands.py`. Parsing imports nothing heavy.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from dflash_chat import __version__, commands, completion, sessions
from dflash_chat.errors import (
    EXIT_DISK,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER,
    UsageError,
    UserError,
)
from dflash_chat.settings import (
    DEFAULT_PAIR,
    KEYS,
    RandomBenchArgs,
    suggest,
)

_EXIT_CODES = """\
exit codes:
  0    ok
  1    something else went wrong
  2    wrong usage
  3    no access: token missing or wrong, terms not accepted
  4    unknown model or chat, or not installed and not to be fetched
  5    does not fit, or no supported GPU
  6    disk full or not writable
  7    the engine crashed
  130  interrupted
"""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error becomes one line and a hint."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 still gets its answer
    _set_up_logging()
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except UserError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader left. Python flushes once more at exit; that must not fail aloud either.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_OTHER
    except Exception as error:  # a bug: one line for the person, the traceback on demand
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _complain(f"nothing more can be written: {error.strerror}", "free some space")
            return EXIT_DISK
        log.debug("unexpected", exc_info=True)
        _complain(f"{type(error).__name__}: {error}", "set DFLASH_CHAT_LOG=debug for the traceback")
        return EXIT_OTHER
    return code


def _run(argv: list[str]) -> int:
    parser = build_parser()
    flags = completion.flags(parser)
    try:
        args, unknown = parser.parse_known_args(argv)
    except UsageError:  # an unknown flag before a value looks like a wrong command: name the flag
        unknown = [w for w in argv if w.startswith("--") and w.partition("=")[0] not in flags]
        if not unknown:
            raise
    if unknown:
        elsewhere = unknown[0] in flags
        hint = f"see {args.prog} --help" if elsewhere else suggest(unknown[0], flags)
        raise UsageError(f"unknown argument {unknown[0]!r}", hint)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _complain(message: str, hint: str) -> None:
    print(f"dflash-chat: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


def _set_up_logging() -> None:
    """Remarks of ours go to stderr; DFLASH_CHAT_LOG=debug (or info) shows everybody's."""
    level = os.environ.get("DFLASH_CHAT_LOG", "").upper()
    if level in ("DEBUG", "INFO"):
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, format="dflash-chat: %(message)s")


# ── what can be typed ───────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage block."""

    def error(self, message: str) -> NoReturn:
        typed = re.match(r"argument (COMMAND|ACTION): invalid choice: '(.*?)'", message)
        if typed is None:
            raise UsageError(message, hint=f"see {self.prog} --help")
        hint = suggest(typed[2], completion.commands(self))
        if typed[1] == "COMMAND":
            hint += ' To ask something: dflash-chat --once "…"'
        raise UsageError(f"there is no command '{self.prog} {typed[2]}'", hint)


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar; completion is generated from it."""
    parser = _Parser(
        prog="dflash-chat",
        description="Chat in the terminal with a local model, drafted by DFlash.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=commands.chat, prog=parser.prog)
    parser.add_argument("--version", action="version", version=f"dflash-chat {__version__}")
    parser.add_argument(
        "--once",
        metavar="PROMPT",
        nargs="?",
        const="",
        help="answer one prompt on stdout and exit; what comes through stdin is put before it",
    )
    opening = parser.add_mutually_exclusive_group()
    opening.add_argument(
        "--continue", action="store_true", dest="continue_", help="go on with the latest chat"
    )
    opening.add_argument("--resume", metavar="ID", help="go on with a saved chat")
    opening.add_argument(
        "--replay", metavar="FILE", type=Path, help="play an exported chat at true speed, no model"
    )
    _add_model(parser, None)
    parser.add_argument("-s", "--system", metavar="TEXT", help="system prompt")
    _add_options(parser)
    _add_quant(parser, None)
    parser.add_argument("--seed", metavar="N", help="same as -o seed=N")
    parser.add_argument("--no-draft", action="store_true", help="plain decoding, for comparison")
    parser.add_argument(
        "--plain", action="store_true", help="chat line by line, without drawing on the screen"
    )
    parser.add_argument(
        "--stats", action="store_true", help="with --once or --plain: figures on stderr"
    )
    parser.add_argument("--json", action="store_true", help="with --once: one JSON object")
    parser.add_argument(
        "-x", "--extract", action="store_true",
        help="with --once: only the first code block, or all if there is none",
    )  # fmt: skip

    subparsers = parser.add_subparsers(
        metavar="COMMAND", title="commands (without one: the chat)", parser_class=_Parser
    )
    pull = _command(subparsers, "pull", commands.pull, "fetch a pair and print where it is")
    pull.add_argument("pair", metavar="PAIR")
    _add_quant(pull, argparse.SUPPRESS)
    pull.add_argument("--verify", action="store_true", help="hash everything, even if it is there")
    pull.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    pull.add_argument("--force", action="store_true", help="even if it does not fit this machine")
    pull.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="progress as JSON lines"
    )
    pull.add_argument("--yes", action="store_true", help="do not ask")

    listing = _command(subparsers, "list", commands.list_pairs, "pairs and what is installed", "ls")
    how = listing.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    how.add_argument("-q", "--quiet", action="store_true", help="names only")

    show = _command(subparsers, "show", commands.show, "all that is known of a pair")
    show.add_argument("pair", metavar="PAIR")
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    plan = _command(
        subparsers, "plan", commands.plan, "what a card can take, and why; loads nothing"
    )
    plan.add_argument(
        "pair", metavar="PAIR", nargs="?", default="", help="or PAIR@BUILD; none: all"
    )
    plan.add_argument("--vram", metavar="SIZE", default="", help="of a card that is not here: 24G")
    plan.add_argument("--gpu", metavar="NAME", default="", help='its name: "RTX 3090"')
    plan.add_argument("--ctx", metavar="TOKENS", help="same as -o ctx=TOKENS")
    _add_quant(plan, argparse.SUPPRESS)
    _add_options(plan, default=argparse.SUPPRESS)
    plan.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    rm = _command(subparsers, "rm", commands.remove, "delete a pair's weights")
    rm.add_argument("pair", metavar="PAIR")
    _add_quant(rm, argparse.SUPPRESS)
    rm.add_argument("--yes", action="store_true", help="do not ask")

    bench = _command(
        subparsers, "bench", commands.bench, "measure a pair with and without drafting"
    )
    _add_model(bench, argparse.SUPPRESS)
    bench.add_argument(
        "--prompts", metavar="FILE", type=Path, help='JSONL with "prompt" or "turns" (first turns)'
    )
    bench.add_argument("--limit", metavar="N", type=int, help="only the first N prompts")
    _add_options(bench, default=argparse.SUPPRESS)
    bench.add_argument("--seed", metavar="N", default=argparse.SUPPRESS, help="same as -o seed=N")
    bench.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    bench.add_argument(
        "--sweep", action="store_true", help="every number of drafted tokens, and the controller"
    )
    bench.add_argument(
        "--random-weights", metavar="PAIR", help="time the real step on published shapes (CUDA)"
    )
    _add_quant(bench, argparse.SUPPRESS)
    bench.add_argument("--drafter", choices=("auto", "bf16", "fp8"), help="same as -o drafter=…")
    bench.add_argument("--draft-head", metavar="HEAD", help="same as -o draft_head=HEAD")
    random = bench.add_argument_group("only with --random-weights")
    before = f"before the step (default: {RandomBenchArgs.context})"
    random.add_argument("--context", metavar="TOKENS", type=int, help=before)
    random.add_argument(
        "--widths", metavar="N,N,…", type=_whole_numbers, help="rows of the passes to time"
    )
    law = random.add_mutually_exclusive_group()
    law.add_argument("--accept-length", metavar="X", type=float, help="simulate drafts of this tau")
    law.add_argument(
        "--accept-curve", metavar="A1,R", type=_curve,
        help="… of which the first is right with A1, each other R times as often as the one before",
    )  # fmt: skip

    saved = _command(subparsers, "sessions", sessions.list_all, "saved chats")
    sessions.add_actions(saved, commands.confirm)
    about = "what may keep this machine from chatting; exit code 1 if something fails"
    doctor = _command(subparsers, "doctor", commands.doctor, about)
    doctor.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    shell = _command(subparsers, "completion", _completion, "print a completion script")
    shell.add_argument("shell", metavar="SHELL", choices=completion.SHELLS, help="bash, zsh, fish")
    return parser


def _command(
    subparsers: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *aliases: str,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, aliases=aliases, help=summary, description=summary, allow_abbrev=False
    )
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="PAIR",
        default=default,
        help=f"pair, or PAIR@BUILD (default: {DEFAULT_PAIR})",
    )


def _add_quant(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--quant", metavar="BUILD", default=default, help="which build of the target: see show PAIR"
    )


def _add_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "-o",
        metavar="KEY=VALUE",
        action="append",
        dest="options",
        default=default,
        help=f"repeatable; keys: {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", default=default, help="same as -o max_tokens=N"
    )


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 4,8,16") from error


def _curve(text: str) -> tuple[float, float]:
    try:
        first, ratio = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 0.8,0.9") from error
    return first, ratio


def _completion(args: argparse.Namespace) -> int:
    print(completion.script(args.shell, build_parser()))
    return EXIT_OK
