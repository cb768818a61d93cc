"""How many rows the next pass verifies, so that drafting never costs more than it wins.

Every step takes the width that commits most tokens per millisecond, by what steps cost
(`costs.py`) and what drafts are worth (`acceptance.py`); one row is plain decoding and drafts
nothing. Estimates may be wrong, so a purse backs them, counted in plain steps: what drafting may
lose to begin with and, up to a limit, what it has won since. No step is drafted that may lose more
than half of it, and the emptier it is, the less a step may seem to lose.

While plain decoding wins or the purse cannot pay, single drafted steps look whether drafting wins
again, ever more rarely; one that does lets the purse begin anew. So from one look that wins to the
next, drafting never loses more than `PURSE_LIMIT` plain steps of what it has won, and `REFILL` for
every token decoded plainly. Drafts that were found in the text (`lookup.py`) are verified if that
seems to win more: instead of a draft, which then need not run, or of one that has.

Knows rows, tokens and milliseconds; knows neither models nor devices nor the clock.

    decision = controller.decide(context, most)          before the draft
    controller.goes_on(decision, confidence)             amid it, if it comes in two parts
    controller.cut(decision, confidence)                 behind it, if that is known in time
    controller.weigh(decision, most, found)              the same, if the text is known only then
    controller.observe(decision, accepted, …)            a step later, if the host runs ahead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from dflash_chat.runtime.acceptance import Acceptance
from dflash_chat.runtime.costs import Costs, StepCosts

PURSE = 5.0  # plain steps that drafting may lose before it has won any in an answer …
PURSE_LIMIT = 14.0  # … and after it has won many
REFILL = 0.006  # plain steps, for every token decoded plainly, up to `PURSE`
_BET = 0.5  # share of the purse that one step may lose
_BASELINE_EVERY = 400.0  # plain steps' time between two of them while drafting: 0.25 %
_FIRST_BASELINE = 8.0  # the same for the first two, and twice as much every time, …
_THIN = 1.8  # … while drafting seems to be no faster than this: the table may be wrong
_FIRST_LOOK, _LAST_LOOK = 15.0, 300.0  # plain tokens before a look, for each plain step it may lose
_LOOK_STAKE = 1.0  # plain steps that a look may lose, if any width loses so little
_LOOK_RARER = 3.0  # times longer before the next, when a look has not won
_TIE = 0.25  # plain steps that a step may seem to lose, and never more than half of the least stake
_TRUST = 10.0  # plain steps in the purse below which that shrinks with it
_HOPE = 0.3  # how much one block counts in what drafting seems to win …
_MOST_HOPE = 0.6  # … which is never more than this: good text may end at any moment
_FADE = 0.99  # share of the moment's text that is left after a plain step …
_NEW_ANSWER = 0.5  # … and in the next answer
_RECENT = 0.98  # share of a step that counts one step later in the speed-up
_TELL_EVERY = 50  # steps between two whose figures are told
_NO_LIMIT = float("inf")

PAYS = "most tokens per millisecond"
FOUND = "found in the text"
PLAIN = "plain decoding is faster"
LOOK = "looking whether drafting pays again"
SPENT = "drafting has lost too much lately"
BASELINE = "measuring plain decoding"
PINNED = "pinned"
OFF = "drafting is off"
NO_ROOM = "no room for drafted tokens"


@dataclass(slots=True)
class Decision:
    """One step: `width` rows, of which the first is the anchor; with `draft` the drafter runs
    first. `why` is one of this module's words; `ms` and `tokens` are what the step is expected to
    take and to commit, `stake` the plain steps it loses if nothing is accepted.
    """

    width: int
    draft: bool
    why: str
    costs: StepCosts
    ms: float
    tokens: float = 1.0
    stake: float = 0.0
    bins: Sequence[int] | None = None  # of the draft's confidence, once that was looked at

    @property
    def plain(self) -> bool:
        """Whether it verifies no drafts and runs none."""
        return self.width == 1 and not self.draft


@dataclass(frozen=True)
class Baseline:
    """Plain decoding at the present context, and when and behind how many tokens one of its steps
    was last measured.
    """

    ms: float
    age_ms: float  # of decoding since
    measured_context_tokens: int

    @property
    def tok_s(self) -> float:
        """Plain decoding's tokens per second."""
        return 1000.0 / self.ms


class Controller:
    """Decides every step's width from what the steps before it have shown.

    `late`: a width must be final before its draft is there, so `cut` is never called. `pinned`:
    that many drafted tokens are verified whatever they cost; 0 never drafts. `survival` as
    `Acceptance` takes it.
    """

    def __init__(
        self,
        costs: Costs,
        draft_tokens: int,
        late: bool,
        pinned: int | None = None,
        survival: Sequence[float] = (),
    ) -> None:
        self.widths = tuple(n for n in costs.table.widths if n <= draft_tokens + 1)
        self.costs, self.late = costs, late
        self.pinned = pinned if len(self.widths) > 1 else 0
        self.acceptance = Acceptance(draft_tokens, late, survival)
        self.histogram = dict.fromkeys(self.widths, 0)  # steps by width
        self.last: Decision | None = None
        self._purse = PURSE
        self._staked = 0.0  # by steps whose outcome is not known yet
        self._hope = self._outlook(survival)  # plain steps that a block seems to win
        self._plain_tokens = 0  # since the last drafted step
        self._look_after = _FIRST_LOOK
        self._decoded_ms = self._baseline_due_ms = 0.0
        self._doubt_ms, self._doubt_after = 0.0, _FIRST_BASELINE  # when plain is next in doubt
        self._context = 0
        self._measured: tuple[float, int] | None = None  # the baseline: when, behind what
        self._recent_tokens = self._recent_ms = 0.0
        self._untold = 0  # steps until figures are told again

    def decide(self, context: int, most: int, found: Sequence[float] = ()) -> Decision:
        """The next step behind `context` tokens, of at most `most` rows. Without `late` the width
        of a drafted one is only an upper bound for `cut`. `found`: the chance of each draft that
        was found in the text to be right, if all before it are.
        """
        decision = self._decide(self.costs.at(context), most)
        if found and decision.why in (PAYS, PLAIN):
            decision = self._found(decision, most, found)
        self._staked += decision.stake
        self.last = decision
        return decision

    def goes_on(self, decision: Decision, confidence: Sequence[float]) -> bool:
        """Whether more drafts than those of which the drafter's `confidence` is known would be
        worth verifying, if it were of all others what it is of the least sure of these.
        """
        bins = self.acceptance.bins(confidence)
        bins += [min(bins)] * (decision.width - 1 - len(bins))
        i = self._worth(decision, self.acceptance.expected(bins))
        return self.widths[i] > len(confidence) + 1

    def cut(self, decision: Decision, confidence: Sequence[float]) -> int:
        """How many rows of a drafted step are worth verifying, now that the drafter's probability
        of its drafted tokens is known, or of the first of them, beyond which none is; they become
        the decision's width.
        """
        bins = decision.bins = self.acceptance.bins(confidence)
        if decision.why is PINNED:
            return decision.width
        expected = self.acceptance.expected(bins)
        i = self._worth(decision, expected)
        self._staked -= decision.stake
        if decision.why is LOOK:
            i = max(i, 1)
        self._set(decision, i, expected)
        self._staked += decision.stake
        hope = decision.tokens - 1.0 - decision.stake
        share = 1.0 if decision.why is LOOK else _HOPE
        self._hope = min(_MOST_HOPE, self._hope + share * (hope - self._hope))
        return decision.width

    def weigh(self, decision: Decision, most: int, found: Sequence[float]) -> Decision:
        """The step to launch behind a draft that has run and was cut: that one, or one that
        verifies what was `found` in its place. `most` and `found` as for `decide`.
        """
        if decision.why is PAYS:
            self._staked -= decision.stake
            decision = self._found(decision, most, found)
            self._staked += decision.stake
            self.last = decision
        return decision

    def tempted(self, decision: Decision, most: int, found: Sequence[float]) -> bool:
        """Whether a plain step would not have been one, had this been `found` before it."""
        return decision.why is PLAIN and self._found(decision, most, found) is not decision

    def observe(
        self,
        decision: Decision,
        accepted: int,
        context: int,
        draft_ms: float,
        verify_ms: float,
        confidence: Sequence[float] | None = None,
    ) -> None:
        """The step is done: behind `context` tokens its draft took `draft_ms` and the rest of it
        `verify_ms`; what a step without a draft took is all of the one kind. Steps are observed in
        the order of their decisions. `confidence`: what `cut` would have been told.
        """
        committed = accepted + 1
        ms = draft_ms + verify_ms
        if not decision.draft:
            draft_ms, verify_ms = 0.0, ms
        self.histogram[decision.width] += 1
        self.costs.observe(decision.width, context, draft_ms, verify_ms)
        self._context = context
        self._decoded_ms += ms
        self._recent_tokens = self._recent_tokens * _RECENT + committed
        self._recent_ms = self._recent_ms * _RECENT + ms
        won = accepted - decision.stake  # plain steps
        if decision.why is FOUND:  # which says nothing of the drafter
            self._settle(decision, won)
            self.acceptance.relax(_FADE)
            return
        if not decision.draft:
            self._measured = self._decoded_ms, context
            self._plain_tokens += 1
            self.acceptance.relax(_FADE)
            self._purse = max(self._purse, min(PURSE, self._purse + REFILL))
            return
        self.acceptance.observe(decision.width - 1, accepted, decision.bins, confidence)
        self._settle(decision, won)
        self._plain_tokens = 0
        if won > 0:
            if decision.why is LOOK:
                self._purse = max(self._purse, PURSE)
            else:
                self._look_after = _FIRST_LOOK

    def drop(self, decision: Decision) -> None:
        """The step's outcome will never be read."""
        self._staked -= decision.stake

    def new_answer(self, pinned: int | None = None) -> None:
        """Another answer begins, of which less is known, and which may not lose what those before
        it have won; `pinned` as for the whole.
        """
        self.pinned = pinned if len(self.widths) > 1 else 0
        self._purse, self._hope = min(self._purse, PURSE), min(self._hope, 0.0)
        self.acceptance.relax(_NEW_ANSWER)
        self._look_after = max(_FIRST_LOOK, self._look_after / _LOOK_RARER)
        self._untold = 0

    def told(self, decision: Decision) -> str:
        """The decision's figures, once in an answer's first and every fiftieth step; else ""."""
        self._untold -= 1
        if self._untold > 0:
            return ""
        self._untold = _TELL_EVERY
        return figures(decision)

    @property
    def baseline(self) -> Baseline | None:
        """Plain decoding now; None before one of its steps has run."""
        if self._measured is None:
            return None
        when, context = self._measured
        return Baseline(self.costs.at(self._context).plain_ms, self._decoded_ms - when, context)

    @property
    def speedup(self) -> float:
        """Of the last hundred steps or so over plain decoding; 1 before the first."""
        if not self._recent_ms:
            return 1.0
        return self._recent_tokens * self.costs.at(self._context).plain_ms / self._recent_ms

    @property
    def reason(self) -> str:
        """Why the last decision was made, in words and numbers."""
        return f"{self.last.why}: {figures(self.last)}" if self.last else ""

    def _found(self, plan: Decision, most: int, found: Sequence[float]) -> Decision:
        """A step whose drafts were found, if it seems to win more than `plan`; else that."""
        costs, widths = plan.costs, self.widths
        ran = plan.bins is not None
        best, saved_ms = 1.0 / costs.plain_ms, costs.draft_ms
        if ran:
            best, saved_ms = plan.tokens / plan.ms, 0.0
        elif plan.draft:
            drafted = self.acceptance.expected()
            by_width = zip(widths, costs.drafted_ms, strict=False)
            best = max(best, *(drafted[n - 1] / ms for n, ms in by_width))
        bet = self._bet()
        expected = list(accumulate(accumulate(found, mul, initial=1.0)))
        for n, drafted_ms in zip(widths[1:], costs.drafted_ms[1:], strict=False):
            ms = drafted_ms - saved_ms
            stake = ms / costs.plain_ms - 1.0
            if n > min(most, len(expected)) or stake > bet:
                break
            if expected[n - 1] / ms > best:
                best = expected[n - 1] / ms
                plan = Decision(n, ran, FOUND, costs, ms, expected[n - 1], stake)
        return plan

    def _settle(self, decision: Decision, won: float) -> None:
        """A stake comes back with what it won, in plain steps, or without."""
        self._staked -= decision.stake
        if decision.why is not PINNED:  # else somebody else's choice, and at nobody's risk
            self._purse = min(PURSE_LIMIT, self._purse + won)

    def _decide(self, costs: StepCosts, most: int) -> Decision:
        if self.pinned == 0 or most < self.widths[1]:
            return _plain(costs, OFF if self.pinned == 0 else NO_ROOM)
        if self.pinned is not None:
            i = self._widest(costs, min(most, self.pinned + 1))
            return self._drafted(i, PINNED, costs, self.acceptance.expected())
        if self._baseline_is_due(costs.plain_ms):
            return _plain(costs, BASELINE)
        bet, stake = self._bet(), costs.stakes[1]
        if stake > bet:
            if stake > self._purse - self._staked:
                return _plain(costs, SPENT)
            return self._look(1, SPENT, costs)
        tie = min(_TIE, stake / 2) * min(1.0, self._purse / _TRUST)
        if not self.late and self._hope > -tie:
            return self._drafted(self._widest(costs, most), PAYS, costs, None)
        expected = self.acceptance.expected()
        i = self._best(expected, costs, most, bet, costs.plain_ms * (1.0 + tie))
        if i:
            return self._drafted(i, PAYS if self.late else LOOK, costs, expected)
        return self._look(self._widest(costs, most, _LOOK_STAKE), PLAIN, costs)

    def _baseline_is_due(self, plain_ms: float) -> bool:
        """Whether plain decoding was not measured for long; or, where steps are so long that the
        host can time them, whether what was measured at load needs to be seen again."""
        now, doubt = self._decoded_ms, self._decoded_ms >= self._doubt_ms and not self.late
        if doubt:
            self._doubt_ms = now + self._doubt_after * plain_ms
            self._doubt_after *= 2.0
        if now < self._baseline_due_ms and not (doubt and self.speedup < _THIN):
            return False
        self._baseline_due_ms = now + _BASELINE_EVERY * plain_ms
        return True

    def _look(self, index: int, why: str, costs: StepCosts) -> Decision:
        """A look, if it is time for one, else a plain step and `why`."""
        if self._plain_tokens < self._look_after * costs.stakes[index]:
            return _plain(costs, why)
        self._look_after = min(_LOOK_RARER * self._look_after, _LAST_LOOK)
        return self._drafted(index, LOOK, costs, self.acceptance.expected())

    def _outlook(self, survival: Sequence[float]) -> float:
        """Plain steps that a block seems to win before any was drafted; 0 if nothing is known."""
        if not survival:
            return 0.0
        stakes = self.costs.at(self.costs.table.contexts[0]).stakes
        drafted = list(zip(self.widths, stakes, strict=True))[1:]
        hopes = [sum(survival[: n - 1]) - stake for n, stake in drafted]
        return min(_MOST_HOPE, max(hopes, default=0.0))

    def _bet(self, back: float = 0.0) -> float:
        """Plain steps that the next one may stake, or one that has `back` at stake already."""
        return _BET * (self._purse - (self._staked - back))

    def _worth(self, decision: Decision, expected: Sequence[float]) -> int:
        """Index of the width to verify behind a draft that is paid for; `expected` as
        `Acceptance.expected`, for as many rows as there are.
        """
        costs, most = decision.costs, min(decision.width, len(expected))
        return self._best(expected, costs, most, self._bet(decision.stake), costs.drafted_ms[0])

    def _best(
        self, expected: Sequence[float], costs: StepCosts, most: int, bet: float, one_row_ms: float
    ) -> int:
        """Index of the width with most tokens per millisecond, among those of at most `most` rows
        that stake no more than `bet`, if one row takes `one_row_ms`.
        """
        index, best = 0, 1.0 / one_row_ms
        stakes, drafted_ms = costs.stakes, costs.drafted_ms
        for i, n in enumerate(self.widths):
            if n > most or stakes[i] > bet:
                break
            rate = expected[n - 1] / drafted_ms[i]
            if rate > best and i:
                index, best = i, rate
        return index

    def _widest(self, costs: StepCosts, most: int, bet: float = _NO_LIMIT) -> int:
        """Index of the widest drafted width of at most `most` rows and that stake; 1 if none is."""
        for i in range(len(self.widths) - 1, 1, -1):
            if self.widths[i] <= most and costs.stakes[i] <= bet:
                return i
        return 1

    def _drafted(
        self, index: int, why: str, costs: StepCosts, expected: Sequence[float] | None
    ) -> Decision:
        decision = Decision(0, True, why, costs, 0.0)
        self._set(decision, index, expected)
        return decision

    def _set(self, decision: Decision, index: int, expected: Sequence[float] | None) -> None:
        """Give a drafted step its width, and what follows from it."""
        width, costs = self.widths[index], decision.costs
        decision.width = width
        decision.ms = costs.drafted_ms[index]
        decision.stake = costs.stakes[index]
        if expected is not None:
            decision.tokens = expected[width - 1]


def figures(decision: Decision) -> str:
    """What a step was expected to commit and to take, beside a plain one."""
    plain_ms = decision.costs.plain_ms
    if decision.width == 1 and not decision.draft:
        return f"{plain_ms:.2f} ms a token"
    return (
        f"{decision.width} rows, {decision.tokens:.1f} tokens in {decision.ms:.2f} ms; "
        f"plain 1 in {plain_ms:.2f}"
    )


def _plain(costs: StepCosts, why: str) -> Decision:
    return Decision(1, False, why, costs, costs.plain_ms)
