"""Whole answers of random weights whose acceptance is dictated: plain, every fixed width, and the
controller that chooses one each step.

The step is the real one with its graphs, its host and its caches; only how many drafts count, what
confidence the drafter shows, and where the router sends a row come from a law. A drafted token is
right, if all before it are, with its own chance p ~ Beta(2m, 2(1 - m)), m = a1 for the first and r
for the others, so that slot i survives with a1 · r^(i-1) on average. The confidence is an
overconfident, noisy reading of it: sigmoid(0.5 + 1.2 logit p + 0.5 z), z standard normal.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dflash_chat.runtime import measure
from dflash_chat.runtime.api import EngineOptions, SamplingParams
from dflash_chat.runtime.controller import Controller
from dflash_chat.runtime.costs import Costs
from dflash_chat.runtime.graphed import GraphedSteps
from dflash_chat.runtime.measure import SCRIPT_STEPS, Law, Subject
from dflash_chat.runtime.sampling import Sampler
from dflash_chat.runtime.step import Graphs
from dflash_chat.runtime.width import MAX_ROWS

DRAFTS = 15
TOKENS = 2000  # of an answer
CHAT, MIXED, CODE = (Law(first=a1, ratio=r) for a1, r in ((0.75, 0.80), (0.82, 0.86), (0.92, 0.93)))


@dataclass(frozen=True)
class Trace:
    """Of every step: drafts that would be accepted in a row, and the drafter's confidence."""

    accepted: Sequence[int]
    confidence: Sequence[Sequence[float]]

    @classmethod
    def of(cls, law: Law, seed: int = 0) -> Trace:
        """One kind of text."""
        draws = random.Random(seed)
        steps = [_block(law, draws) for _ in range(SCRIPT_STEPS)]
        return cls([right for right, _ in steps], [sure for _, sure in steps])

    @classmethod
    def switching(cls, laws: Sequence[Law], seed: int = 0) -> Trace:
        """Kinds of text that change after 50 to 300 tokens."""
        draws = random.Random(seed)
        accepted: list[int] = []
        confidence: list[Sequence[float]] = []
        while len(accepted) < SCRIPT_STEPS:
            kind, left = draws.randrange(len(laws)), draws.randint(50, 300)
            while left > 0:
                right, sure = _block(laws[kind], draws)
                accepted.append(right)
                confidence.append(sure)
                left -= accepted[-1] + 1
        return cls(accepted[:SCRIPT_STEPS], confidence[:SCRIPT_STEPS])


def _block(law: Law, draws: random.Random) -> tuple[int, list[float]]:
    """How many of a block's drafts are right in a row, and how sure the drafter is of each."""
    means = [law.first, *[law.ratio] * (MAX_ROWS - 1)]
    chances = [min(max(draws.betavariate(2 * m, 2 - 2 * m), 1e-9), 1 - 1e-9) for m in means]
    wrong = [draws.random() >= chance for chance in chances]
    logits = [math.log(chance / (1 - chance)) for chance in chances]
    sure = [1 / (1 + math.exp(-(0.5 + 1.2 * x + draws.gauss(0, 0.5)))) for x in logits]
    return wrong.index(True) if True in wrong else MAX_ROWS, sure


class Dictated:
    """Graphs whose drafts show the trace's confidence."""

    def __init__(self, subject: Subject) -> None:
        self._graphs, self._state = Graphs(), subject.step.state
        device = self._state.confidence.device
        self.confidence = torch.zeros(SCRIPT_STEPS, MAX_ROWS, device=device)

    def capture(self, name: str, run: Callable[[], None]) -> None:
        """As `Graphs`."""
        self._graphs.capture(name, run)

    def replay(self, name: str) -> None:
        """As `Graphs`."""
        self._graphs.replay(name)
        if name == "propose":
            row = (self._state.step % SCRIPT_STEPS).long()
            self._state.confidence.copy_(self.confidence[row][0])


def run(
    name: str, quant: str, context: int, traces: dict[str, Trace], options: EngineOptions,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """tok/s of every trace by every way of decoding, and of each way's ratio to plain."""
    device = torch.device("cuda")
    with torch.inference_mode():
        subject = measure.build(name, quant, context, device, options)
        step, cache = subject.step, subject.cache
        measure.route_at_random(subject)
        step.script = torch.zeros(SCRIPT_STEPS, dtype=torch.int32, device=device)
        passes = Dictated(subject)
        steps = GraphedSteps(step, cache, subject.drafter, DRAFTS, passes)
        steps.capture()
        table = steps.costs()
        late = steps.late(table)
        report: dict[str, Any] = {"costs": table.to_dict(), "late": late, "traces": {}}
        ks = [n - 1 for n in steps.widths]
        for label, trace in traces.items():
            step.script.copy_(torch.tensor(trace.accepted, dtype=torch.int32))
            passes.confidence.copy_(torch.tensor(trace.confidence))
            ways: dict[str, float] = {}
            for k in (0, *ks[1:], 0):
                found, _ = _answer(
                    subject, steps, Controller(Costs(table), DRAFTS, late, k), context
                )
                ways[f"k = {k}"] = max(found, ways.get(f"k = {k}", 0.0))
            auto = Controller(Costs(table), DRAFTS, late)
            ways["auto"], host_ms = _answer(subject, steps, auto, context)
            report["traces"][label] = made = _figures(ways) | {
                "tok_s": ways, "widths": auto.histogram, "host_ms": host_ms,
            }  # fmt: skip
            fixed = ", ".join(f"{way} {tok_s:.0f}" for way, tok_s in ways.items())
            say(f"{label} (tok/s): {fixed}")
            say(
                f"  auto is {made['speedup']:.2f}x plain, {made['of_best_fixed']:.3f} of the best "
                f"k, {made['of_widest']:.2f} of k = {DRAFTS}; idle {host_ms:.3f} ms a step"
            )
    return report


def _figures(ways: dict[str, float]) -> dict[str, float]:
    """The controller's ratio to plain decoding, to the best fixed width and to the widest."""
    auto, fixed = ways["auto"], [tok_s for way, tok_s in ways.items() if way != "auto"]
    return {
        "speedup": auto / ways["k = 0"],
        "of_best_fixed": auto / max(fixed),
        "of_widest": auto / ways[f"k = {DRAFTS}"],
    }


def _answer(
    subject: Subject, steps: GraphedSteps, controller: Controller, context: int
) -> tuple[float, float]:
    """tok/s of one answer behind `context` tokens, and milliseconds a step between its parts."""
    subject.cache.length = subject.drafter.cache.length = context
    subject.step.state.step.zero_()
    committed, idle_ms, passes = 0, 0.0, 0
    torch.cuda.synchronize()
    started = time.perf_counter()
    answer = steps.decode(7, Sampler(SamplingParams(), []), controller, lambda _: None)
    for choices, stats in answer:
        committed += len(choices)
        idle_ms += stats.host_ms
        passes += 1
        if committed >= TOKENS:
            break
    answer.close()
    torch.cuda.synchronize()
    return committed / (time.perf_counter() - started), idle_ms / passes
