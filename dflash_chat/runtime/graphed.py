"""The engine's steps as CUDA graphs: launched ahead and read one step late, without a wait between.

    launch(i + 1)  │  read(i) → tokens, text, stop checks      the GPU goes from step to step

A launch is a few replays: the draft (or, for a pass of the anchor alone, only the projection of
what was committed), the target's forward over n rows, and the choice, greedy or sampled as the
request on the device says. Penalties alone are torch's, since they need the answer's history.
What ended an answer is found one step late: the step launched behind it is thrown away, and since
rows count only when the host commits them, there is nothing to undo.

A plain answer drafts nothing; its rows' features are copied for the drafter's next turn.
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
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.fused import MAX_ROWS
from dflash_chat.runtime.kernels import accept, sample
from dflash_chat.runtime.sampling import Sampler
from dflash_chat.runtime.step import Describable, Graphs, Step, TargetParts
from dflash_chat.runtime.width import WIDTHS, Survival, WidthChooser

CONTEXT_OF_MEASURE = 1024  # tokens that stand in the cache while the widths are timed


class Passes(Protocol):
    """Something that keeps passes by name and runs them: `step.Graphs`."""

    def capture(self, name: str, run: Callable[[], None]) -> None:
        """Keep `run`, after it has been run at least once."""

    def replay(self, name: str) -> None:
        """Run it again."""


@dataclass(frozen=True)
class _Flight:
    """A step that was launched: its rows, where its record goes, and when what was done."""

    width: int
    record: Tensor  # int32 [1 + rows] on the host
    features: Tensor | None  # [1, K·C] of a plain step with a drafter
    begun: timing.Mark
    drafted: timing.Mark
    verified: timing.Mark
    done: timing.Mark


class GraphedSteps:
    """Steps of a target and its drafter over their caches, which the host moves on as it reads."""

    def __init__(
        self, step: Step, cache: KVCache, drafter: Drafter | None, draft_tokens: int, passes: Passes
    ) -> None:
        self.step, self.cache, self.drafter, self.passes = step, cache, drafter, passes
        most = 1 if drafter is None else draft_tokens + 1
        self.widths = sorted({n for n in WIDTHS if n < most} | {1, most})
        self.survival = Survival(most - 1)
        self.chooser: WidthChooser | None = None
        self._device = step.state.length.device
        self._request = sample.new_params(self._device)
        self._logits = torch.zeros(most, step.head_shape[0], device=self._device)
        self._hidden = {n: torch.empty(0) for n in self.widths}
        self._draft_hidden = torch.empty(0)
        cuda = self._device.type == "cuda"
        self._records = [
            torch.zeros(1 + MAX_ROWS, dtype=torch.int32, pin_memory=cuda) for _ in range(2)
        ]
        self._launched = 0
        self._unprojected = 0  # rows whose features only `step.features` holds

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
            accept.accept(state, step.argmax(self._hidden[n]), step.record)

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
            drafting.propose(drafting.argmax(self._draft_hidden))

        def guess() -> None:
            logits = drafting.logits(self._draft_hidden)
            drafting.propose(sample.guess(logits, state.length, self._request))

        return out | {
            "project": drafting.project, "draft": draft, "propose": propose, "guess": guess,
        }  # fmt: skip

    def measure(self) -> None:
        """Time the draft and every verify width; from then on verify only what pays."""
        if self.drafter is None:
            return
        state = self.step.state
        context = min(CONTEXT_OF_MEASURE, self.cache.capacity - 2 * MAX_ROWS)
        vocab = self.step.head_shape[0]

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
        passes += [draft, lambda: self.passes.replay("project")]
        *verify_ms, draft_ms, project_ms = timing.quickest_ms(passes, self._device)
        cost = [float("inf")] * self.widths[-1]  # of widths without a graph
        for n, ms in zip(self.widths, verify_ms, strict=True):
            cost[n - 1] = ms
        cost[0] += project_ms - draft_ms  # a pass of one row drafts nothing
        self.chooser = WidthChooser(cost, draft_ms)

    def decode(
        self,
        anchor: int,
        sampler: Sampler,
        draft: bool,
        commit: Callable[[list[int]], None],
        pinned: int = 0,
    ) -> Generator[tuple[list[int], StepStats], None, None]:
        """Steps behind `anchor` until the caller closes: the accepted drafts with the target's own
        token behind them, and the step's figures. `commit` is told the ids of every step's
        rows before it is yielded; by then both caches hold them. `pinned` drafts that many each
        time, as far as such a width was captured.
        """
        drafting = draft and self.drafter is not None
        if self.drafter is not None:
            self.drafter.flush()
        self._place(anchor, self.cache.length)
        if sampler.params.temperature > 0:
            sample.write(self._request, sampler, self.cache.length - sampler.length)
        ahead = not sampler.penalises  # else the next launch needs this step's tokens
        previous: timing.Mark | None = None
        flight = self._launch(self._width(drafting, pinned), drafting, sampler)
        following: _Flight | None = None
        try:
            while True:
                following = None
                width = self._width(drafting, pinned)
                if ahead and self.cache.length + flight.width + width <= self.cache.capacity:
                    following = self._launch(width, drafting, sampler)
                choices, stats = self._land(flight, anchor, previous, following, commit)
                previous, anchor = flight.done, choices[-1]
                yield choices, stats
                flight = following or self._launch(self._width(drafting, pinned), drafting, sampler)
        finally:
            if following is not None:  # nobody will read it
                self.cache.advance(following.width, 0)
            elif self._unprojected:
                self._observe(self.step.features[: self._unprojected].clone())

    def _width(self, drafting: bool, pinned: int) -> int:
        """Rows of the next pass: what pays, and has room behind the committed rows."""
        most = self.cache.capacity - self.cache.length
        if not drafting:
            most = 1
        elif pinned:
            most = min(most, pinned + 1)
        elif self.chooser is not None:
            most = min(most, self.chooser.choose(self.survival.chances))
        return max(n for n in self.widths if n <= most)

    def _place(self, anchor: int, length: int) -> None:
        """The device's state as if `length` rows were committed and projected."""
        state = self.step.state
        state.length.fill_(length)
        state.start.fill_(length)
        state.committed.zero_()
        state.ids[:1].fill_(anchor)
        state.block[:1].fill_(anchor)
        self._unprojected = 0

    def _launch(self, n: int, drafting: bool, sampler: Sampler) -> _Flight:
        """Put a step of n rows into the device's queue."""
        step, state = self.step, self.step.state
        begun = timing.mark(self._device)
        if drafting:
            self._draft(n, sampler)
        drafted = timing.mark(self._device)
        self.passes.replay(f"forward {n}")
        verified = timing.mark(self._device)
        if sampler.greedy:
            self.passes.replay(f"choose {n}")
        elif not sampler.penalises:
            self.passes.replay(f"sample {n}")
        else:
            self.passes.replay(f"logits {n}")
            chosen = sampler.choose(self._logits[:n], state.ids[1:n])
            accept.accept(state, chosen, step.record)
        record = self._records[self._launched % 2]
        record.copy_(step.record, non_blocking=True)
        self._launched += 1
        features = None
        if not drafting and self.drafter is not None:
            features = step.features[:1].clone()
        done = timing.mark(self._device)
        return _Flight(n, record, features, begun, drafted, verified, done)

    def _draft(self, n: int, sampler: Sampler) -> None:
        """Project what was committed last and, if more than the anchor is verified, draft."""
        drafting = self.step.drafting
        assert drafting is not None
        self._projected(self._unprojected)
        self._unprojected = 0
        if n == 1:
            self.passes.replay("project")
        else:
            self.passes.replay("draft")
            self.passes.replay("propose" if sampler.params.temperature <= 0 else "guess")

    def _land(
        self, flight: _Flight, anchor: int, previous: timing.Mark | None,
        following: _Flight | None, commit: Callable[[list[int]], None],
    ) -> tuple[list[int], StepStats]:  # fmt: skip
        """Wait for a step's record and commit its rows."""
        timing.reach(flight.done)
        n, *chosen = flight.record.tolist()
        choices = chosen[: n + 1]
        self.cache.advance(flight.width, n + 1)
        if flight.features is not None:
            self._observe(flight.features)
        elif following is not None:
            self._projected(n + 1)  # by the launch behind it
        else:
            self._unprojected = n + 1
        if flight.width > 1:
            self.survival.observe(flight.width - 1, n)
        commit([anchor, *choices[:-1]])
        between = timing.ms_between
        stats = StepStats(
            drafted=flight.width - 1,
            accepted=n,
            committed=n + 1,
            draft_ms=between(flight.begun, flight.drafted),
            verify_ms=between(flight.drafted, flight.verified),
            sample_ms=between(flight.verified, flight.done),
            host_ms=0.0 if previous is None else max(0.0, between(previous, flight.begun)),
            context_tokens=self.cache.length,
        )
        return choices, stats

    def _projected(self, rows: int) -> None:
        """The drafter's context has `rows` more, and a block behind them."""
        if self.drafter is not None:
            self.drafter.cache.advance(rows, rows)
            self.drafter.cache.advance(self.drafter.config.block_size, 0)

    def _observe(self, features: Tensor) -> None:
        if self.drafter is not None:
            self.drafter.observe(features)


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
