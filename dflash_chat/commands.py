"""What a command becomes: its arguments, checked, and the code that runs it.

Answers and listings go to stdout, everything else to stderr. Every command imports what it needs
when it runs. Raises UserErrors; `cli.py` has the grammar and says them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from dflash_chat.errors import EXIT_OK, UsageError, UserError
from dflash_chat.settings import (
    DEFAULT_PAIR,
    BenchArgs,
    OnceArgs,
    RandomBenchArgs,
    Settings,
    parse_options,
)

if TYPE_CHECKING:
    from dflash_chat.chat import Conversation
    from dflash_chat.pairs import Pair


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


def chat(args: argparse.Namespace) -> int:
    """Chat, drawn or in lines; or what comes instead: one answer, a replay."""
    reopening = args.continue_ or args.resume is not None or args.replay
    if reopening and args.once is not None:
        raise UsageError("--once asks nothing of a saved chat")
    typed = args.plain or _is_terminal(sys.stdin)
    if args.once is not None or (not reopening and not typed):
        return once(args)
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


def once(args: argparse.Namespace) -> int:
    """Answer one prompt, typed or piped."""
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


def bench(args: argparse.Namespace) -> int:
    """Measure a pair, or random weights of its shapes."""
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


def pull(args: argparse.Namespace) -> int:
    """Fetch a pair."""
    pair, _ = _chosen(args.pair, parse_options(_options(args)))
    from dflash_chat import here, pull

    wanted = pull.PullArgs(args.verify, args.force, args.dry_run, args.json, args.yes)
    return pull.run(pair, wanted, _ask_if_possible, here.machine())


def plan(args: argparse.Namespace) -> int:
    """What a card takes."""
    settings = parse_options(_options(args))
    from dflash_chat import plan
    from dflash_chat.planner import Wishes

    if settings.quant and not args.pair:
        raise UsageError("a build is named, and no pair", "dflash-chat plan PAIR@BUILD")
    pair = _named(args.pair, settings) if args.pair else None
    wishes = Wishes(pair.quant if pair else "", settings.engine)
    return plan.run(plan.Args(wishes, pair, args.vram, args.gpu, args.json))


def list_pairs(args: argparse.Namespace) -> int:
    """The catalogue, and what is installed."""
    from dflash_chat import listing, pairs

    catalogue = pairs.load_catalogue(pairs.user_file())
    if args.quiet:
        print(listing.names(catalogue))
    elif args.json:
        print(json.dumps(listing.rows(catalogue), indent=1))
    else:
        print(listing.table(listing.rows(catalogue), listing.terminal_width()))
    return EXIT_OK


def show(args: argparse.Namespace) -> int:
    """All of one pair."""
    from dflash_chat import listing, pairs

    pair = pairs.find(args.pair)
    print(listing.as_json(pair) if args.json else listing.describe(pair))
    return EXIT_OK


def remove(args: argparse.Namespace) -> int:
    """Delete a pair's weights."""
    pair, _ = _chosen(args.pair, parse_options(_options(args)))
    from dflash_chat import pull

    return pull.remove(pair, args.yes, confirm)


def doctor(args: argparse.Namespace) -> int:
    """What may be wrong here."""
    from dflash_chat import doctor

    return doctor.run(args.json)


def confirm(question: str) -> None:
    """Return on yes; end the program otherwise. Never asks what nobody could answer."""
    if not _is_terminal(sys.stdin):
        raise UsageError("nobody can be asked here", hint="add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was done")


def _ask_if_possible(question: str) -> None:
    """`confirm` on a terminal; elsewhere the command itself is the answer."""
    if _is_terminal(sys.stdin) and _is_terminal(sys.stderr):
        confirm(question)


def _is_terminal(stream: object) -> bool:
    return stream is not None and bool(getattr(stream, "isatty", lambda: False)())
