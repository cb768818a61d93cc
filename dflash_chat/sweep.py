"""`dflash-chat bench --sweep`: every number of drafted tokens against the controller's choice.

Plain decoding, each number that is always drafted and the controller take turns on every prompt,
the order of turns reversed from prompt to prompt. Only its own answers teach the controller. How
far the widest passes' drafts survived is kept, and plans are made by it from then on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dflash_chat import bench, once
from dflash_chat.bench import CONTROLLER, PLAIN
from dflash_chat.errors import EXIT_OK, UsageError
from dflash_chat.runtime.api import ModelInfo, SamplingParams
from dflash_chat.settings import BenchArgs
from dflash_chat.speed import Survival

if TYPE_CHECKING:
    from dflash_chat.runtime.session import Session

_CLOSE = 0.98  # what the controller loses for the choice to be worth naming


@dataclass(frozen=True)
class Tally:
    """Pooled figures of one way, and how many answers were plain decoding's, word for word."""

    way: bench.Way = field(default_factory=bench.Way)
    identical: int = 0


def run(args: BenchArgs) -> int:
    """Measure, keep and print. Raises UsageError for -o k and for a prompt file that cannot be
    used.
    """
    if args.settings.engine.draft_tokens:
        raise UsageError("--sweep tries every number of drafted tokens", "leave -o k=… out")
    prompts, sampling = bench.chosen(args)
    installed, session = bench.load(args)
    from dflash_chat.runtime import fitting  # torch comes in here, not before

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    tallies = measure(session, prompts, sampling, say)
    survival, kept = survival_of(tallies), False
    if survival:
        kept = fitting.keep_survival(installed, session.engine, survival)
    report = as_json(session.info, len(prompts), sampling, tallies)
    report |= {"acceptance": survival.to_dict() if survival else None, "kept": kept}
    sys.stdout.write((json.dumps(report) if args.json else in_words(report)) + "\n")
    return EXIT_OK


def measure(
    session: Session, prompts: Sequence[str], sampling: SamplingParams, say: Callable[[str], None]
) -> dict[int, Tally]:
    """Every way on every prompt; by way, plain first and the controller last."""
    engine = session.engine
    controller, fixed = engine.controller, engine.new_controller()
    ways = [PLAIN, *(width - 1 for width in controller.widths[1:]), CONTROLLER]
    tallies = dict.fromkeys(ways, Tally())
    for number, prompt in enumerate(prompts, 1):
        answers = {}
        for way in ways if number % 2 else reversed(ways):
            engine.controller = controller if way == CONTROLLER else fixed
            answers[way] = bench.answer(session, prompt, sampling, way != PLAIN, max(way, 0))
        for way, (text, finished) in answers.items():
            old, same = tallies[way], text == answers[PLAIN][0]
            tallies[way] = Tally(old.way.plus(finished), old.identical + same)
        engine.controller = controller
        say(
            f"{number}/{len(prompts)}  plain {tallies[PLAIN].way.tok_s:.1f}  "
            f"{_name(best_fixed(tallies))} {tallies[best_fixed(tallies)].way.tok_s:.1f}  "
            f"controller {tallies[CONTROLLER].way.tok_s:.1f} tok/s"
        )
    return tallies


def best_fixed(tallies: Mapping[int, Tally]) -> int:
    """The number of always drafted tokens with most tokens per second."""
    return max((way for way in tallies if way > PLAIN), key=lambda way: tallies[way].way.tok_s)


def survival_of(tallies: Mapping[int, Tally]) -> Survival | None:
    """How far drafts survived where most of them were verified; None if none ever was."""
    return tallies[max(tallies)].way.survival


def as_json(
    info: ModelInfo, prompts: int, sampling: SamplingParams, tallies: Mapping[int, Tally]
) -> dict[str, Any]:
    """The object of `bench --sweep --json`; field names are part of the interface. `recommended` is
    "controller", "plain" or "k = N".
    """
    plain = tallies[PLAIN].way.tok_s
    fixed, controlled = best_fixed(tallies), tallies[CONTROLLER].way.tok_s
    best = max(PLAIN, fixed, key=lambda way: tallies[way].way.tok_s)
    trusted = controlled >= _CLOSE * tallies[best].way.tok_s
    return {
        "pair": info.pair,
        "device": info.device,
        "dtype": info.dtype,
        "kernels": info.kernels,
        "prompts": prompts,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "ways": [
            {
                "way": _name(way),
                "tau": round(tally.way.spec.tau, 4),
                "tok_s": round(tally.way.tok_s, 2),
                "speedup": _ratio(tally.way.tok_s, plain),
                "step_ms": round(tally.way.step_ms, 4),
                "tokens": tally.way.decoded,
                "identical": tally.identical,
                "spec": tally.way.spec.to_json(),
            }
            for way, tally in tallies.items()
        ],
        "best_fixed": fixed,
        "controller_to_best_fixed": _ratio(controlled, tallies[fixed].way.tok_s),
        "recommended": _name(CONTROLLER if trusted else best),
        "why": tallies[CONTROLLER].way.why,
        "versions": info.versions,
    }


def in_words(report: Mapping[str, Any]) -> str:
    """The same for people."""
    ways = {row["way"]: row for row in report["ways"]}
    lines = [
        f"{report['pair']} on {report['device']} ({report['dtype']}, {report['kernels']}), "
        f"temperature {report['temperature']:g}, {report['prompts']} prompts of at most "
        f"{report['max_tokens']} tokens",
        f"{'way':<10}  {'tau':>5}  {'tok/s':>7}  {'× plain':>7}  {'ms/step':>7}  identical",
    ]
    lines += [
        f"{name:<10}  {row['tau']:5.2f}  {row['tok_s']:7.1f}  {row['speedup']:7.3f}  "
        f"{row['step_ms']:7.2f}  {row['identical']:9d}"
        for name, row in ways.items()
    ]
    controller, fixed = ways[_name(CONTROLLER)], _name(report["best_fixed"])
    lines += [
        f"controller  {once.width_words(controller['spec']['widths'])}; "
        f"the last: {report['why'] or 'none'}",
        f"best fixed  {fixed}, {ways[fixed]['speedup']:.3f} × plain; the controller reaches "
        f"{report['controller_to_best_fixed']:.3f} of it",
        f"advice      {_advice(report)}",
    ]
    if report["kept"]:
        tokens = report["acceptance"]["tokens"]
        lines.append(f"kept        the acceptance of {tokens} tokens; plan goes by it from now on")
    return "\n".join(lines)


def _advice(report: Mapping[str, Any]) -> str:
    name = report["recommended"]
    if name == _name(CONTROLLER):
        return "leave the width to the controller"
    flag = "--no-draft" if name == _name(PLAIN) else f"-o k={report['best_fixed']}"
    return f"{flag} was faster than the controller on these prompts"


def _name(way: int) -> str:
    return {PLAIN: "plain", CONTROLLER: "controller"}.get(way, f"k = {way}")


def _ratio(rate: float, to: float) -> float:
    return round(rate / to, 4) if to else 0.0
