"""The generate loop: prefill, then draft → verify → accept → commit. Read this file first.

Invariant between steps: the target's cache, the drafter's context and `log` hold the same n tokens,
and one more token, the anchor, is chosen but in none of them.

    prompt ──prefill──▶ n tokens in both caches, first anchor from the last row
    anchor ──draft────▶ d1 … dk        (drafter: one forward; or found in the text, for nothing)
    verify  [anchor, d1 … dk] ─▶ k+1 rows, each choosing its next token   (target: one forward)
    accept  the longest prefix d1 … da that the rows chose themselves
    commit(a + 1)     anchor and accepted drafts stay; row a's choice is the bonus, the next anchor

Token ids only: the engine knows no text, no templates and no processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dflash_chat.errors import UsageError
from dflash_chat.runtime.api import SamplingParams, StepStats
from dflash_chat.runtime.baseline import Plain
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.controller import BASELINE, FOUND, PINNED, Controller, Decision
from dflash_chat.runtime.costs import Costs, CostTable
from dflash_chat.runtime.lookup import Chances, Found, Lookup
from dflash_chat.runtime.sampling import Sampler, accepted
from dflash_chat.runtime.timing import StepTimer, quickest_ms

if TYPE_CHECKING:
    from dflash_chat.runtime.graphed import GraphedSteps  # needs Triton


class Target(Protocol):
    """What the engine needs of an architecture (see `models/llama.py`)."""

    device: torch.device

    @property
    def kernels(self) -> str:
        """What multiplies, in words."""

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weights."""

    def forward(
        self, ids: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [T, C] and tapped features [T, K·C] of a provisional block ids [T]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, C]."""


class BlockDrafter(Protocol):
    """What the engine needs of a drafter (see `drafter.py`)."""

    @property
    def length(self) -> int:
        """Tokens observed so far."""

    def observe(self, features: Tensor) -> None:
        """The next committed tokens' features [T, K·C]."""

    def flush(self) -> None:
        """Project what was observed."""

    def rewindable(self, n: int) -> int:
        """n if `truncate` can cut back to it, else 0."""

    def truncate(self, n: int) -> None:
        """Forget every token from n on."""

    def forward(self, anchor: int, n: int) -> Tensor:
        """Hidden states [n, C] of the n tokens behind `anchor`."""

    def read(self, ids: Sequence[int]) -> None:
        """The text goes on with these tokens."""

    def candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [T, N] of hidden states [T, C], and their tokens, int64 [N]; None: all."""


@dataclass(frozen=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the caches; `cached` of them were there before."""

    cached: int
    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """Committed tokens of one verify pass, or the first token (`stats` None).

    A `reason` ends the answer: "stop", "length" or "context".
    """

    tokens: tuple[int, ...]
    stats: StepStats | None
    reason: str = ""


CONTEXTS_OF_MEASURE = (64, 2048)  # tokens that stand in the cache while the widths are timed
LOOKS = 3  # rounds in which a known table is compared with the moment, …
ALIKE = 1.15  # … whose passes may have become slower by that much more than another
FIRST_DRAFTS = 3  # that a CPU looks at before the others: it rarely pays to verify more of a draft

_Steps = Generator[tuple[list[int], StepStats], None, None]  # chosen tokens of each step


class Engine:
    """One target, its drafter and their caches; one sequence at a time.

    `draft_tokens` is how many tokens are drafted. A verify pass carries all of them, or, once
    `measure` has timed every width, what `controller` decides; with `lookup` it also weighs drafts
    that are found in the text. `taps` are the target layers the drafter observes. Closing the
    generator between steps is safe: every yield is a consistent state.
    """

    def __init__(
        self,
        target: Target,
        cache: KVCache,
        drafter: BlockDrafter | None,
        taps: Sequence[int],
        draft_tokens: int,
        stop_ids: frozenset[int],
        lookup: bool = True,
    ) -> None:
        self.target, self.cache, self.drafter = target, cache, drafter
        self.taps = tuple(taps) if drafter is not None else ()
        self.draft_tokens = draft_tokens
        on_cpu = target.device.type == "cpu"
        self._first = min(FIRST_DRAFTS, draft_tokens) if on_cpu else draft_tokens
        self.stop_ids = stop_ids
        self._widths = range(1, draft_tokens + 2 if drafter is not None else 2)  # of eager passes
        self._pinned: int | None = draft_tokens  # where a request does not say
        self._looks_up, self._chances = lookup, Chances()
        self.controller = Controller(
            Costs(CostTable.even(self._widths)), draft_tokens, late=False, pinned=draft_tokens
        )
        self.graphed: GraphedSteps | None = None  # runs the steps, if there
        self.eager_because = ""  # why it is not there
        self.measured = False
        self._survival: Sequence[float] = ()  # what controllers begin with
        self._budget = 0  # tokens the answer may have in all
        self.log: list[int] = []  # ids of the committed rows, the key of prefix reuse

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        draft: bool = True,
        draft_tokens: int = 0,
        answered: int = 0,
    ) -> Generator[Prefilled | Step, None, None]:
        """Answer `prompt`. Raises UsageError if it is empty or leaves no room in the context.

        `draft_tokens` pins how many are drafted, 0 does not. The last `answered` ids of the prompt
        are the beginning of the answer: it goes on as if it had not been cut, within a budget of
        `max_tokens` more.
        """
        if not prompt or len(prompt) >= self.cache.capacity:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.cache.capacity}",
                "shorten it, start a new chat, or load with a larger -o ctx",
            )
        sampler = Sampler(params, prompt[: len(prompt) - answered])
        sampler.accept(prompt[len(prompt) - answered :])
        self._budget = answered + params.max_tokens
        last_hidden = yield from self._prefill(prompt)
        chosen = sampler.choose(self.target.logits(last_hidden), _no_tokens(self.target.device))
        step = self._clip([int(chosen[0])], None, sampler)
        yield step
        if step.reason:
            return
        anchor = step.tokens[-1]
        self.controller.new_answer((draft_tokens or self._pinned) if draft else 0)
        lookup = None
        if self._looks_up and self.controller.pinned is None:
            lookup = Lookup([*self.log, anchor], self._chances)
        if self.graphed is None:
            steps = self._steps(anchor, sampler, lookup)
        else:  # the same as CUDA graphs, which keep both caches themselves
            steps = self.graphed.decode(anchor, sampler, self.controller, self.log.extend, lookup)
        with closing(steps):
            for tokens, stats in steps:
                step = self._clip(tokens, stats, sampler)
                yield step
                if step.reason:
                    return

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kind of pass once, so that no first answer pays for packing, compiling and
        allocation. On a GPU also the largest chunk of a prompt, whose memory is then held.
        """
        assert self.cache.length == 0, "only an empty engine is warmed up"
        _, features = self._dry_pass(self.draft_tokens + 1)
        if self.target.device.type == "cuda":
            _, features = self._dry_pass(min(self.cache.largest_block, self.cache.capacity))
        if self.drafter is not None:
            if self.target.device.type == "cpu":  # as few rows as a pass may leave to the drafter
                for rows in range(1, len(features)):
                    self.drafter.observe(features[:rows])
                    self.drafter.flush()
                    self.drafter.truncate(0)
            hidden = self._dry_draft(self.drafter, features)
            most, first = len(hidden), self._first
            for rows in {most, first, most - first} - {0}:
                self.drafter.candidates(hidden[:rows])

    @torch.inference_mode()
    def measure(
        self,
        pinned: bool = False,
        known: CostTable | None = None,
        survival: Sequence[float] = (),
    ) -> None:
        """Time the draft and every verify width, unless they are `known`; from then on verify what
        pays or, with `pinned`, all drafts as before. `survival`: how far the pair's drafts got
        before, as `Controller` takes it.
        """
        late = False
        if self.graphed is not None:
            table = known or self.graphed.costs()
            late = self.graphed.late(table)
        else:
            table = known or self._costs()
        self._pinned = self.draft_tokens if pinned else None
        self._survival = survival
        self.controller = Controller(
            Costs(table), self.draft_tokens, late, self._pinned, self._survival
        )
        self.measured = True

    def new_controller(self) -> Controller:
        """One that knows what was measured at load and nothing that was learnt since."""
        old = self.controller
        return Controller(
            Costs(old.costs.table), self.draft_tokens, old.late, self._pinned, self._survival
        )

    @property
    def plain(self) -> Plain | None:
        """Plain decoding as measured last, at load if no step was plain since; None before that."""
        if not self.measured:
            return None
        if (live := self.controller.baseline) is not None:
            return Plain(live.ms, live.measured_context_tokens)
        context = self.controller.costs.table.contexts[0]
        return Plain(self.controller.costs.at(context).plain_ms, context)

    def at_present(self, known: CostTable) -> CostTable | None:
        """A table of this machine at the speed of the moment, by a look at plain decoding; None if
        the draft or a pass of some rows no longer compares with it as it did, or others would be
        timed. Takes a twentieth of what `measure` takes without a table.
        """
        contexts = self._contexts()
        if known.widths != tuple(self._widths) or known.contexts != contexts:
            return None
        passes = self._passes(contexts[0])
        before = [*(row[0] for row in known.verify_ms), known.draft_ms[0]]
        looked = sorted({0, min(FIRST_DRAFTS, len(known.widths) - 1), len(passes) - 1})
        times = quickest_ms([passes[i] for i in looked], self.target.device, LOOKS)
        ratios = [ms / before[i] for i, ms in zip(looked, times, strict=True)]
        return known.scaled(ratios[0]) if max(ratios) <= ALIKE * min(ratios) else None

    def _costs(self) -> CostTable:
        """Every pass timed behind a few lengths of context."""
        widths, contexts = self._widths, self._contexts()
        drafts: list[float] = []
        verifies: list[list[float]] = []
        for context in contexts:
            times = quickest_ms(self._passes(context), self.target.device)
            verifies.append(times[: len(widths)])
            drafts.append(times[-1])  # without a drafter never looked at
        return CostTable.measured(widths, contexts, drafts, list(zip(*verifies, strict=True)))

    def _contexts(self) -> tuple[int, ...]:
        """Lengths behind which passes are timed."""
        most = self.cache.capacity - self._widths[-1]
        return tuple(sorted({min(n, most) for n in CONTEXTS_OF_MEASURE}))

    def _passes(self, context: int) -> list[Callable[[], object]]:
        """What is timed: a pass of each width, with the greedy choice of its tokens, and a draft.
        What a draw costs beyond that is paid for every token alike, drafted or not.
        """
        sampler = Sampler(SamplingParams(temperature=0.0), [])

        def verify(n: int) -> None:
            sampler.choose(self._dry_pass(n, context)[0], self._tensor([0] * (n - 1)))

        def draft(drafter: BlockDrafter, left: Tensor) -> None:
            sampler.guess(*drafter.candidates(self._dry_draft(drafter, left)[: self._first]))

        passes: list[Callable[[], object]] = [partial(verify, n) for n in self._widths]
        if self.drafter is not None:
            passes.append(partial(draft, self.drafter, self._dry_pass(2)[1]))
        return passes

    def _dry_draft(self, drafter: BlockDrafter, left: Tensor) -> Tensor:
        """Hidden states [k, C] of a draft behind a pass that left features [T, K·C]; all is
        forgotten.
        """
        drafter.observe(left)
        hidden = drafter.forward(0, self.draft_tokens)
        drafter.truncate(0)
        return hidden

    def _dry_pass(self, n: int, context: int = 0) -> tuple[Tensor, Tensor]:
        """A pass of n rows that commits nothing; its logits [≤ n, V] and features [n, K·C]. With
        `context` as if so many rows stood before it, whatever they hold.
        """
        self.cache.length = context
        hidden, features = self.target.forward(self._tensor([0] * n), self.cache, self.taps)
        logits = self.target.logits(hidden[-self.draft_tokens - 1 :])
        self.cache.commit(0)
        self.cache.length = 0
        return logits, features

    def forget(self) -> None:
        """Empty both caches, whatever state an error has left them in."""
        self.cache.truncate(0)
        if self.drafter is not None:
            self.drafter.truncate(0)
        self.log.clear()

    def _prefill(self, prompt: Sequence[int]) -> Generator[Prefilled, None, Tensor]:
        """Reuse the longest common prefix, read the rest in chunks; returns the last row [1, C].

        On a CPU the last row is always read alone. Who asks the same again reads only that, and
        gets the same answer, bit for bit.
        """
        cached = self._reuse(prompt)
        hidden = torch.empty(0)
        yield Prefilled(cached, cached, len(prompt))
        chunked = len(prompt) - (self.cache.device.type == "cpu")
        ends = [*range(cached, chunked, self.cache.largest_block), chunked, len(prompt)]
        for begin, end in pairwise(dict.fromkeys(ends)):
            ids = list(prompt[begin:end])
            hidden, features = self.target.forward(self._tensor(ids), self.cache, self.taps)
            self._commit(ids, features)
            if self.drafter is not None:
                self.drafter.flush()
            yield Prefilled(cached, end, len(prompt))
        return hidden[-1:]

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many of its first tokens are in both caches: the common prefix, or nothing where a
        ring has lost what stands before its end; at least one prompt token is always read again.
        """
        held = min(len(self.log), self.cache.length, len(prompt) - 1)
        if self.drafter is not None:
            held = min(held, self.drafter.length)
        n = 0
        while n < held and self.log[n] == prompt[n]:
            n += 1
        n = self.cache.rewindable(n)
        if self.drafter is not None:
            n = self.drafter.rewindable(n)
        return n

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut both caches back to what is reusable."""
        n = self.reusable(prompt)
        self.cache.truncate(n)
        del self.log[n:]
        if self.drafter is not None:
            self.drafter.truncate(n)
        return n

    def _steps(self, anchor: int, sampler: Sampler, lookup: Lookup | None) -> _Steps:
        """Draft–verify cycles, as wide as the controller says."""
        timer, controller = StepTimer(self.target.device), self.controller
        while True:
            timer.start()
            context = self.cache.length
            found = lookup.find(self.draft_tokens) if lookup else Found()
            decision = controller.decide(context, self.cache.capacity - context, found.chances)
            drafted = self._propose(anchor, sampler, decision, found)
            width = len(drafted)
            block = torch.cat([self._tensor([anchor]), drafted])
            timer.mark("draft")
            hidden, features = self.target.forward(block, self.cache, self.taps)
            logits = self.target.logits(hidden)
            timer.mark("verify")
            outcome = torch.cat([drafted, sampler.choose(logits, drafted)])
            timer.mark("sample")
            rows = outcome.tolist()  # the step's only sync; every mark has completed behind it
            proposals, choices = rows[:width], rows[width:]
            n = accepted(proposals, choices)
            self._commit([anchor, *proposals[:n]], features[: n + 1])
            ms = timer.read()
            draft_ms = ms["draft"]
            controller.observe(
                decision, n, self.cache.length, draft_ms, sum(ms.values()) - draft_ms
            )
            stats = StepStats(
                drafted=width,
                accepted=n,
                committed=n + 1,
                draft_ms=draft_ms,
                verify_ms=ms["verify"],
                sample_ms=ms["sample"],
                host_ms=ms["host"],
                context_tokens=self.cache.length,
                why=decision.why,
                probe=decision.why == BASELINE,
                figures=controller.told(decision),
                found=decision.why == FOUND,
            )
            if lookup:
                lookup.extend(choices[: n + 1])
            yield choices[: n + 1], stats
            anchor = choices[n]

    def _propose(self, anchor: int, sampler: Sampler, decision: Decision, found: Found) -> Tensor:
        """The drafted tokens worth verifying, int64 [≤ draft_tokens].

        To multiply by the head is much of a draft on a CPU. There the last slots are left out,
        unless the first are so sure that more rows might pay.
        """
        if decision.why == FOUND:
            return self._tensor(found.tokens[: decision.width - 1])
        if self.drafter is None or not decision.draft:
            return self._tensor([])
        hidden = self.drafter.forward(anchor, decision.width - 1)  # [k, C]
        first = len(hidden) if decision.why == PINNED else self._first
        tokens, chances = sampler.guess(*self.drafter.candidates(hidden[:first]))
        confidence = chances.tolist()
        if len(hidden) > first and self.controller.goes_on(decision, confidence):
            more, chances = sampler.guess(*self.drafter.candidates(hidden[first:]), first)
            tokens, confidence = torch.cat([tokens, more]), confidence + chances.tolist()
        return tokens[: self.controller.cut(decision, confidence) - 1]

    def _commit(self, ids: list[int], features: Tensor) -> None:
        """The first len(ids) rows of the block become context of target, drafter and log."""
        self.cache.commit(len(ids))
        if self.drafter is not None:
            self.drafter.observe(features)
            self.drafter.read(ids)
        self.log += ids

    def _clip(self, tokens: list[int], stats: StepStats | None, sampler: Sampler) -> Step:
        """End the answer at a stop id, the token budget or the context's end, what comes first."""
        budget = self._budget - sampler.length
        reason = ""
        for i, token in enumerate(tokens[:budget]):
            if token in self.stop_ids:
                tokens, reason = tokens[: i + 1], "stop"
                break
        else:
            if len(tokens) >= budget:
                tokens, reason = tokens[:budget], "length"
            elif self.cache.length >= self.cache.capacity:
                reason = "context"
        sampler.accept(tokens)
        if stats is not None and len(tokens) < stats.committed:
            kept = len(tokens)
            stats = replace(stats, accepted=min(stats.accepted, kept), committed=kept)
        return Step(tuple(tokens), stats, reason)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.target.device)


def _no_tokens(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)
