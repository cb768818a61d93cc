"""The command line: what can be typed, what it becomes, and how errors and exit codes leave.

Answers and listings go to stdout, everything else to stderr. Parsing imports nothing heavy: each
command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dflash_chat import __version__, completion, sessions
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
    BenchArgs,
    OnceArgs,
    RandomBenchArgs,
    Settings,
    parse_options,
    suggest,
)

if TYPE_CHECKING:
    from dflash_chat.chat import Conversation
    from dflash_chat.pairs import Pair

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
    parser.set_defaults(run=_chat, prog=parser.prog)
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

    commands = parser.add_subparsers(
        metavar="COMMAND", title="commands (without one: the chat)", parser_class=_Parser
    )
    pull = _command(commands, "pull", _pull, "fetch a pair and print where it is")
    pull.add_argument("pair", metavar="PAIR")
    _add_quant(pull, argparse.SUPPRESS)
    pull.add_argument("--verify", action="store_true", help="hash everything, even if it is there")
    pull.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    pull.add_argument("--force", action="store_true", help="even if it does not fit this machine")
    pull.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="progress as JSON lines"
    )
    pull.add_argument("--yes", action="store_true", help="do not ask")

    listing = _command(commands, "list", _list, "pairs and what is installed", "ls")
    how = listing.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    how.add_argument("-q", "--quiet", action="store_true", help="names only")

    show = _command(commands, "show", _show, "all that is known of a pair")
    show.add_argument("pair", metavar="PAIR")
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    plan = _command(commands, "plan", _plan, "what a card can take, and why; loads nothing")
    plan.add_argument(
        "pair", metavar="PAIR", nargs="?", default="", help="or PAIR@BUILD; none: all"
    )
    plan.add_argument("--vram", metavar="SIZE", default="", help="of a card that is not here: 24G")
    plan.add_argument("--gpu", metavar="NAME", default="", help='its name: "RTX 3090"')
    plan.add_argument("--ctx", metavar="TOKENS", help="same as -o ctx=TOKENS")
    _add_quant(plan, argparse.SUPPRESS)
    _add_options(plan, default=argparse.SUPPRESS)
    plan.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    rm = _command(commands, "rm", _rm, "delete a pair's weights")
    rm.add_argument("pair", metavar="PAIR")
    _add_quant(rm, argparse.SUPPRESS)
    rm.add_argument("--yes", action="store_true", help="do not ask")

    bench = _command(commands, "bench", _bench, "measure a pair with and without drafting")
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

    saved = _command(commands, "sessions", sessions.list_all, "saved chats")
    sessions.add_actions(saved, _confirm)
    about = "what may keep this machine from chatting; exit code 1 if something fails"
    doctor = _command(commands, "doctor", _doctor, about)
    doctor.add_argument("--json", action="store_true", default=argparse.SUPPRESS)

    shell = _command(commands, "completion", _completion, "print a completion script")
    shell.add_argument("shell", metavar="SHELL", choices=completion.SHELLS, help="bash, zsh, fish")
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *aliases: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
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


# ── what it becomes ─────────────────────────────────────────────────────────────────────────────


def _options(args: argparse.Namespace) -> list[str]:
    """All settings as key=value; the flags come last and win."""
    names = ("seed", "max_tokens", "ctx", "drafter", "draft_head", "quant")
    flags = {name: getattr(args, name, None) for name in names}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return [*(args.options or ()), *given]


def _chosen(name: str, settings: Settings) -> tuple[Pair, Settings]:
    """The pair, and the settings with the build that was named beside it.

    Refuses what the runtime cannot load, before anything starts.
    """
    pair = _named(name, settings)
    pair.wanted()
    return pair, replace(settings, quant=pair.quant)


def _named(name: str, settings: Settings) -> Pair:
    """The pair, with the build that was named in either way."""
    from dflash_chat import pairs

    pair = pairs.find(name)
    if settings.quant:
        if pair.quant not in ("", settings.quant):
            raise UsageError(f"two builds are named: {pair.quant} and {settings.quant}")
        pair = pair.narrowed(settings.quant)
    return pair


def _chat(args: argparse.Namespace) -> int:
    reopening = args.continue_ or args.resume is not None or args.replay
    if reopening and args.once is not None:
        raise UsageError("--once asks nothing of a saved chat")
    typed = args.plain or _is_terminal(sys.stdin)
    if args.once is not None or (not reopening and not typed):
        return _once(args)
    if not typed:
        raise UsageError(
            "the chat needs a terminal to type in", hint="do not redirect stdin, or use --plain"
        )
    from dflash_chat import terminals

    why = "" if args.plain else terminals.only_lines(os.environ)
    if not (args.plain or why or _is_terminal(sys.stdout)):
        why = "stdout is not a terminal"
    in_lines = args.plain or bool(why)
    if not in_lines and not _is_terminal(sys.stderr):
        raise UsageError(
            "the chat is drawn on stderr, and stderr is not a terminal",
            hint="do not redirect it, or use --plain or --once",
        )
    if args.json or args.extract or (args.stats and not in_lines):
        raise UsageError("--json and -x need --once, --stats needs --once or --plain")
    if args.replay and in_lines:
        raise UsageError(
            "a replay is drawn, and here are only lines",
            hint="dflash-chat sessions import FILE, then sessions show ID",
        )
    if args.replay:
        return _replay(args)
    chat, given = _reopened(args), parse_options(_options(args))
    name = args.model or (chat and chat.pair) or DEFAULT_PAIR
    if chat is not None and name == chat.pair:
        given = replace(given, quant=given.quant or chat.build)
    pair, settings = _chosen(name, given)
    sampling = chat.params if chat else pair.sampling
    settings = replace(settings, sampling=parse_options(_options(args), sampling).sampling)
    if chat is not None and args.system is not None:
        chat.system = args.system
    system = pair.system if args.system is None else args.system
    draft = not args.no_draft and (chat is None or chat.draft)
    if in_lines:
        from dflash_chat import plain

        if why:
            plain.say(f"{why}, so the chat goes line by line")
        return plain.run(pair.name, settings, system, draft, args.stats, chat)
    from dflash_chat import config
    from dflash_chat.ui import app
    from dflash_chat.ui.actions import usual_keys
    from dflash_chat.ui.completion import themes

    return app.run(
        config=config.load(config.config_file(), usual_keys(), themes()),
        pair=pair.name,
        quant=settings.quant,
        options=settings.engine,
        params=settings.sampling,
        system=system,
        draft=draft,
        chat=chat,
    )


def _reopened(args: argparse.Namespace) -> Conversation | None:
    """The saved chat that `--continue` or `--resume` names."""
    if not (args.continue_ or args.resume is not None):
        return None
    from dflash_chat.store import Store

    with Store() as store:
        return store.load(store.latest() if args.continue_ else store.find(args.resume))


def _replay(args: argparse.Namespace) -> int:
    from dflash_chat import replay

    recording = replay.read(args.replay)
    from dflash_chat.ui import replay_screen

    return replay_screen.run(recording)


def _once(args: argparse.Namespace) -> int:
    pair, settings = _chosen(args.model or DEFAULT_PAIR, parse_options(_options(args)))
    from dflash_chat import once

    prompt = args.once or ""
    if not _is_terminal(sys.stdin):
        piped = sys.stdin.buffer.read().decode("utf-8", errors="replace") if sys.stdin else ""
        prompt = "\n".join(part for part in (piped.rstrip(), prompt) if part)
    if not prompt.strip():
        raise UsageError("there is no prompt", hint='dflash-chat --once "…", or pipe one in')
    system = pair.system if args.system is None else args.system
    if args.json and args.extract:
        raise UsageError("--json and -x are two ways to print one answer")
    shape = (args.stats, args.json, args.extract)
    return once.run(OnceArgs(prompt, pair.name, system, settings, not args.no_draft, *shape))


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


def _bench_random(args: argparse.Namespace) -> int:
    from dflash_chat import bench_random

    settings = parse_options(_options(args))
    context = RandomBenchArgs.context if args.context is None else args.context
    return bench_random.run(
        RandomBenchArgs(
            args.random_weights, settings.quant or "bf16", context, args.widths or (),
            args.accept_length or 0.0, args.accept_curve or (0.0, 0.0), settings.engine,
            args.json, args.sweep,
        )
    )  # fmt: skip


def _bench(args: argparse.Namespace) -> int:
    _refuse_what_is_of_the_other_bench(args)
    if args.random_weights:
        return _bench_random(args)
    if args.limit is not None and args.limit < 1:
        raise UsageError("--limit must be at least 1")
    pair, settings = _chosen(args.model or DEFAULT_PAIR, parse_options(_options(args)))
    wanted = BenchArgs(pair.name, args.prompts, settings, args.limit or 0, args.json, args.sweep)
    if args.sweep:
        from dflash_chat import sweep

        return sweep.run(wanted)
    from dflash_chat import bench

    return bench.run(wanted)


def _refuse_what_is_of_the_other_bench(args: argparse.Namespace) -> None:
    """Random weights answer no prompts, and a real pair has its own acceptance."""
    names, why = ["prompts", "limit", "model"], "does not go with --random-weights"
    if not args.random_weights:
        names = ["context", "widths", "accept_length", "accept_curve"]
        why = "needs --random-weights PAIR"
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} {why}", "see dflash-chat bench --help")


def _pull(args: argparse.Namespace) -> int:
    pair, _ = _chosen(args.pair, parse_options(_options(args)))
    from dflash_chat import here, pull

    wanted = pull.PullArgs(args.verify, args.force, args.dry_run, args.json, args.yes)
    return pull.run(pair, wanted, _ask_if_possible, here.machine())


def _plan(args: argparse.Namespace) -> int:
    settings = parse_options(_options(args))
    from dflash_chat import plan
    from dflash_chat.planner import Wishes

    if settings.quant and not args.pair:
        raise UsageError("a build is named, and no pair", "dflash-chat plan PAIR@BUILD")
    pair = _named(args.pair, settings) if args.pair else None
    wishes = Wishes(pair.quant if pair else "", settings.engine)
    return plan.run(plan.Args(wishes, pair, args.vram, args.gpu, args.json))


def _list(args: argparse.Namespace) -> int:
    from dflash_chat import listing, pairs

    catalogue = pairs.load_catalogue(pairs.user_file())
    if args.quiet:
        print(listing.names(catalogue))
    elif args.json:
        print(json.dumps(listing.rows(catalogue), indent=1))
    else:
        print(listing.table(listing.rows(catalogue), listing.terminal_width()))
    return EXIT_OK


def _show(args: argparse.Namespace) -> int:
    from dflash_chat import listing, pairs

    pair = pairs.find(args.pair)
    print(listing.as_json(pair) if args.json else listing.describe(pair))
    return EXIT_OK


def _rm(args: argparse.Namespace) -> int:
    pair, _ = _chosen(args.pair, parse_options(_options(args)))
    from dflash_chat import pull

    return pull.remove(pair, args.yes, _confirm)


def _doctor(args: argparse.Namespace) -> int:
    from dflash_chat import doctor

    return doctor.run(args.json)


def _completion(args: argparse.Namespace) -> int:
    print(completion.script(args.shell, build_parser()))
    return EXIT_OK


def _confirm(question: str) -> None:
    """Return on yes; end the program otherwise. Never asks what nobody could answer."""
    if not _is_terminal(sys.stdin):
        raise UsageError("nobody can be asked here", hint="add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was done")


def _ask_if_possible(question: str) -> None:
    """`_confirm` on a terminal; elsewhere the command itself is the answer."""
    if _is_terminal(sys.stdin) and _is_terminal(sys.stderr):
        _confirm(question)


def _is_terminal(stream: object) -> bool:
    return stream is not None and bool(getattr(stream, "isatty", lambda: False)())
