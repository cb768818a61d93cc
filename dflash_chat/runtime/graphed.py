"""The engine's steps as CUDA graphs: launched ahead, without a wait between them.

    late   launch(i + 1)  │  read(i) → tokens, text, stop checks     the width comes from the past
    now    draft(i + 1)   │  read(i) → …  │  confidence(i + 1) → width → verify(i + 1)
    found  read(i) → what stood behind its tokens before → verify(i + 1)

A step is a few replays: the draft, the target's forward over n rows, and the choice, greedy or
sampled as the request on the device says. Penalties alone are torch's, since they need the answer's
history. Either way the host waits once a step. Waiting for the draft's confidence leaves the device
idle for the moment the host needs to answer, which long steps do not feel and short ones do.
What ended an answer is found one step late: what was launched behind it is thrown away, and since
rows count only when the host commits them, there is nothing to undo.

The third way drafts nothing: the text so far says what comes next (`lookup.py`). Whether it does is
seen behind a draft, when step i has been read and the choice between the two is free; while the
text keeps winning, steps wait for each other, and the device for the host between them.

A plain step runs no draft. Its row's features are kept aside, and projected into the drafter's
context sixteen at a time or before the next draft.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from dflash_chat.runtime import timing
from dflash_chat.runtime.api import StepStats
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.controller import BASELINE, FOUND, PINNED, Controller, Decision
from dflash_chat.runtime.costs import CostTable
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.kernels import accept, sample
from dflash_chat.runtime.lookup import Found, Lookup
from dflash_chat.runtime.sampling import Sampler
from dflash_chat.runtime.step import Describable, Graphs, Step, TargetParts
from dflash_chat.runtime.width import MAX_ROWS, WIDTHS

CONTEXTS_OF_MEASURE = (1024, 8192, 65536)  # tokens that stand in the cache while widths are timed
KEPT = 16  # plain rows whose features may wait for their projection
WAIT_PAYS_FROM_MS = 2.0  # a step so long hardly feels that the host looks at its draft


class Passes(Protocol):
    """Something that keeps passes by name and runs them: `step.Graphs`."""

    def capture(self, name: str, run: Callable[[], None]) -> None:
        """Keep `run`, after it has been run at least once."""

    def replay(self, name: str) -> None:
        """Run it again."""


@dataclass
class _Flight:
    """A step that was begun, and once its width is known launched: where its record goes, and when
    what was done.
    """

    decision: Decision
    begun: timing.Mark
    drafted: timing.Mark
    confidence: Tensor  # fp32 on the host, there once `drafted` is reached
    found: Found | None = None  # None: the text was not known
    record: Tensor | None = None  # `accept.read`s it
    verified: timing.Mark = 0.0
    done: timing.Mark = 0.0


class GraphedSteps:
    """Steps of a target and its drafter over their caches, which the host moves on as it reads."""

    def __init__(
        self, step: Step, cache: KVCache, drafter: Drafter | None, draft_tokens: int, passes: Passes
    ) -> None:
        self.step, self.cache, self.drafter, self.passes = step, cache, drafter, passes
        most = 1 if drafter is None else draft_tokens + 1
        self.widths = sorted({n for n in WIDTHS if n < most} | {1, most})
        self._device = step.state.length.device
        self._request = sample.new_params(self._device)
        self._logits = torch.zeros(most, step.head_shape[0], device=self._device)
        self._hidden = {n: torch.empty(0) for n in self.widths}
        self._draft_hidden = torch.empty(0)
        cuda = self._device.type == "cuda"
        self._records = [torch.zeros_like(step.record, device="cpu") for _ in range(2)]
        self._confidences = [torch.zeros(MAX_ROWS) for _ in range(2)]
        self._found = torch.zeros(MAX_ROWS, dtype=torch.int64)
        if cuda:
            self._found = self._found.pin_memory()
            self._records = [record.pin_memory() for record in self._records]
            self._confidences = [c.pin_memory() for c in self._confidences]
        self._begun = self._launched = 0
        self._loose = False  # rows of the step begun last are in `step.features` alone
        self._unprojected = 0  # how many, once that step was read and none begun behind it
        self._kept = torch.zeros_like(step.features[:KEPT])  # rows of plain steps
        self._kept_from = torch.zeros_like(step.state.length)  # position of the first of them
        self._held = 0

    def capture(self) -> None:
        """Keep every pass that an answer may need. Both caches must be empty."""
        assert self.cache.length == 0, "only an empty engine is captured"
        for name, run in self._passes().items():
            self._place(0, 0)
            self.passes.capture(name, run)

    def _passes(self) -> dict[str, Callable[[], None]]:
        step, state = self.step, self.step.state
        out: dict[str, Callable[[], None]] = {}

        def forward(n: int) -> None:
            self._hidden[n] = step.forward(n)

        def choose(n: int) -> None:
            accept.accept(state, step.argmax(self._hidden[n]), step.record, step.script)

        def draw(n: int) -> None:
            logits = step.logits(self._hidden[n])
            chosen = sample.sample(logits, state.length, self._request)
            accept.accept(state, chosen, step.record)

        def logits(n: int) -> None:
            self._logits[:n].copy_(step.logits(self._hidden[n]))

        for n in self.widths:
            out[f"forward {n}"] = lambda n=n: forward(n)  # type: ignore[misc]
            out[f"choose {n}"] = lambda n=n: choose(n)  # type: ignore[misc]
            out[f"sample {n}"] = lambda n=n: draw(n)  # type: ignore[misc]
            out[f"logits {n}"] = lambda n=n: logits(n)  # type: ignore[misc]
        drafting = step.drafting
        if drafting is None:
            return out

        def draft() -> None:
            drafting.project()
            self._draft_hidden = drafting.forward()

        def propose() -> None:
            drafting.propose(*drafting.likeliest(self._draft_hidden))

        def guess() -> None:
            logits = drafting.logits(self._draft_hidden)
            drafting.propose(*sample.guess(logits, state.length, self._request))

        return out | {
            "project": drafting.project, "draft": draft, "propose": propose, "guess": guess,
        }  # fmt: skip

    def costs(self) -> CostTable:
        """The draft and every verify width timed, behind a few lengths of context."""
        room = self.cache.capacity - 2 * MAX_ROWS
        contexts = sorted({min(n, room) for n in CONTEXTS_OF_MEASURE})
        columns = [self._costs_at(context) for context in contexts]
        drafts = [draft_ms for *_, draft_ms in columns]
        rows = [list(row) for row in zip(*columns, strict=True)][:-1]
        return CostTable.measured(self.widths, contexts, drafts, rows)

    def _costs_at(self, context: int) -> list[float]:
        """Milliseconds of every width and of the draft; the first is a plain step with its part of
        a projection.
        """
        state, vocab = self.step.state, self.step.head_shape[0]

        def verify(n: int) -> None:
            self._place(0, context)
            state.ids.random_(0, vocab)  # rows that were equal would share their experts
            self.passes.replay(f"forward {n}")
            self.passes.replay(f"choose {n}")

        def draft() -> None:
            self.passes.replay("draft")
            self.passes.replay("propose")

        passes: list[Callable[[], object]] = [
            lambda n=n: verify(n)  # type: ignore[misc]
            for n in self.widths
        ]
        if self.drafter is None:
            times = timing.quickest_ms(passes, self._device)
            return [*times, times[0]]
        passes += [draft, lambda: self.passes.replay("project")]
        *times, project_ms = timing.quickest_ms(passes, self._device)
        times[0] += project_ms / KEPT
        return times

    def late(self, table: CostTable) -> bool:
        """Whether steps are too short to wait for their draft's confidence."""
        shortest = table.draft_ms[0] + table.verify_ms[min(1, len(table.widths) - 1)][0]
        return shortest < WAIT_PAYS_FROM_MS

    def decode(
        self, anchor: int, sampler: Sampler, controller: Controller,
        commit: Callable[[list[int]], None], lookup: Lookup | None = None,
    ) -> Generator[tuple[list[int], StepStats], None, None]:  # fmt: skip
        """Steps behind `anchor` until the caller closes: the accepted drafts with the target's own
        token behind them, and the step's figures. `commit` is told the ids of every step's
        rows before it is yielded; by then both caches hold them. Short steps look nothing up.
        """
        if controller.late:
            lookup = None
        if self.drafter is not None:
            self.drafter.flush()
        self._place(anchor, self.cache.length)
        if sampler.params.temperature > 0:
            sample.write(self._request, sampler, self.cache.length - sampler.length)
        ahead = not sampler.penalises  # else the next launch needs this step's tokens
        previous: timing.Mark | None = None
        following: _Flight | None = None
        flight = self._begin(controller, sampler, self.cache.length, lookup)
        try:
            while True:
                following = None
                leads = self._verify(flight, controller, sampler, lookup)
                furthest = self.cache.length + flight.decision.width
                if ahead and not leads and furthest < self.cache.capacity:
                    following = self._begin(controller, sampler, furthest)
                choices, stats = self._land(flight, anchor, previous, following, controller, commit)
                previous, anchor = flight.done, choices[-1]
                if lookup is not None:
                    lookup.extend(choices)
                if leads and ahead and self.cache.length < self.cache.capacity:
                    following = self._begin(controller, sampler, self.cache.length, lookup)
                yield choices, stats
                flight = following or self._begin(controller, sampler, self.cache.length, lookup)
        finally:
            self._close(following, controller)

    def _close(self, following: _Flight | None, controller: Controller) -> None:
        """Nobody will read `following`; the features of rows that count go to the drafter."""
        held = self._held
        if following is not None:
            controller.drop(following.decision)
            if following.record is not None:
                self.cache.advance(following.decision.width, 0)
                held -= following.decision.plain
        if self.drafter is None:
            return
        if held > 0:
            self.drafter.observe(self._kept[:held].clone())
        elif self._unprojected:
            self.drafter.observe(self.step.features[: self._unprojected].clone())

    def _place(self, anchor: int, length: int) -> None:
        """The device's state as if `length` rows were committed and projected."""
        state = self.step.state
        state.length.fill_(length)
        state.start.fill_(length)
        state.committed.zero_()
        state.ids[:1].fill_(anchor)
        state.block[:1].fill_(anchor)
        self._unprojected, self._held, self._loose = 0, 0, False

    def _begin(
        self, controller: Controller, sampler: Sampler, length: int, lookup: Lookup | None = None
    ) -> _Flight:
        """Decide on a step behind at most `length` rows and put its draft into the device's queue;
        the rest, too, unless the draft's confidence has a say. `lookup` where the text is known.
        """
        found = None if lookup is None else lookup.find(self.widths[-1] - 1)
        decision = controller.decide(
            length, self.cache.capacity - length, () if found is None else found.chances
        )
        begun = timing.mark(self._device)
        confidence = self._confidences[self._begun % 2]
        self._begun += 1
        if self.drafter is not None:
            self._take_features(decision)
        if decision.draft:
            self.passes.replay("draft")
            self.passes.replay("propose" if sampler.params.temperature <= 0 else "guess")
        elif found is not None and decision.why == FOUND:
            self._propose(found, decision.width)
        waits = decision.draft and not controller.late and decision.why != PINNED
        if waits:
            confidence.copy_(self.step.state.confidence, non_blocking=True)
        flight = _Flight(decision, begun, timing.mark(self._device), confidence, found)
        if not waits:
            self._launch(flight, sampler)
        return flight

    def _take_features(self, decision: Decision) -> None:
        """Bring the drafter's context up to the last step, as far as the step at hand needs it."""
        self._account(self._unprojected)
        self._unprojected = 0
        if self._held and (not decision.plain or self._held == KEPT):
            state = self.step.state
            self.step.features[: self._held].copy_(self._kept[: self._held])
            state.start.copy_(self._kept_from)
            state.committed.fill_(self._held)
            self._account(self._held)
            self._held = 0
            self._loose = True
        if self._loose and not decision.draft:  # whose graph begins with the projection
            self.passes.replay("project")
        self._loose = not decision.plain
        if decision.plain and not self._held:
            self._kept_from.copy_(self.step.state.length)

    def _propose(self, found: Found, width: int) -> None:
        """Fill the rows behind the anchor. What was filled in before has been read by now."""
        drafts = width - 1
        self._found[:drafts] = torch.tensor(found.tokens[:drafts])
        self.step.state.ids[1:width].copy_(self._found[:drafts], non_blocking=True)

    def _verify(
        self, flight: _Flight, controller: Controller, sampler: Sampler, lookup: Lookup | None
    ) -> bool:
        """Launch what waited for the draft's confidence. Whether the text drafts so well that the
        step behind this one should wait for it.
        """
        drafts, found = self.widths[-1] - 1, flight.found
        if found is None:
            found = Found() if lookup is None else lookup.find(drafts)
        room = self.cache.capacity - self.cache.length
        if flight.record is not None:
            return flight.decision.why == FOUND or controller.tempted(
                flight.decision, room, found.chances
            )
        timing.reach(flight.drafted)
        controller.cut(flight.decision, flight.confidence[:drafts].tolist())
        decision = flight.decision = controller.weigh(flight.decision, room, found.chances)
        if decision.why == FOUND:
            self._propose(found, decision.width)
        self._launch(flight, sampler)
        return decision.why == FOUND

    def _launch(self, flight: _Flight, sampler: Sampler) -> None:
        """Put forward and choice into the device's queue."""
        step, state, n = self.step, self.step.state, flight.decision.width
        self.passes.replay(f"forward {n}")
        if flight.decision.plain and self.drafter is not None:
            self._kept[self._held].copy_(step.features[0])
            self._held += 1
        flight.verified = timing.mark(self._device)
        if sampler.greedy:
            self.passes.replay(f"choose {n}")
        elif not sampler.penalises:
            self.passes.replay(f"sample {n}")
        else:
            self.passes.replay(f"logits {n}")
            chosen = sampler.choose(self._logits[:n], state.ids[1:n])
            accept.accept(state, chosen, step.record)
        flight.record = self._records[self._launched % 2]
        flight.record.copy_(step.record, non_blocking=True)
        self._launched += 1
        flight.done = timing.mark(self._device)

    def _land(
        self, flight: _Flight, anchor: int, previous: timing.Mark | None,
        following: _Flight | None, controller: Controller, commit: Callable[[list[int]], None],
    ) -> tuple[list[int], StepStats]:  # fmt: skip
        """Wait for a step's record and commit its rows."""
        assert flight.record is not None
        timing.reach(flight.done)
        decision, width = flight.decision, flight.decision.width
        n, choices, confidence = accept.read(flight.record, self.widths[-1] - 1)
        self.cache.advance(width, n + 1)
        if following is not None and not decision.plain:
            self._account(n + 1)  # the step behind it has projected them
        elif not decision.plain:
            self._unprojected = n + 1
        commit([anchor, *choices[:-1]])
        between = timing.ms_between
        stats = StepStats(
            drafted=width - 1,
            accepted=n,
            committed=n + 1,
            draft_ms=between(flight.begun, flight.drafted),
            verify_ms=between(flight.drafted, flight.verified),
            sample_ms=between(flight.verified, flight.done),
            host_ms=0.0 if previous is None else max(0.0, between(previous, flight.begun)),
            context_tokens=self.cache.length,
            why=decision.why,
            probe=decision.why == BASELINE,
            figures=controller.told(decision),
            found=decision.why == FOUND,
        )
        controller.observe(
            decision, n, self.cache.length, stats.draft_ms, stats.total_ms - stats.draft_ms,
            confidence if decision.draft and controller.late else None,
        )  # fmt: skip
        return choices, stats

    def _account(self, rows: int) -> None:
        """The drafter's context has `rows` more, and a block may stand behind them."""
        if self.drafter is not None and rows:
            self.drafter.cache.advance(rows, rows)
            self.drafter.cache.advance(self.drafter.config.block_size, 0)


def captured(engine: Engine) -> GraphedSteps:
    """The steps of an empty engine.

    Raises CheckpointError for weights without a kernel, and whatever compiling and capturing raise.
    """
    drafter = engine.drafter
    assert drafter is None or isinstance(drafter, Drafter)
    parts = TargetParts.of(cast(Describable, engine.target))
    step = Step(parts, engine.cache, drafter, engine.taps)
    steps = GraphedSteps(step, engine.cache, drafter, engine.draft_tokens, Graphs())
    steps.capture()
    return steps
