"""How likely a drafted prefix is to survive verification, learnt while decoding.

A drafted token is put on trial if all before it were right: it passes, or it is the step's one
miss. Nothing behind a miss or beyond the verified rows is ever seen. So what is learnt are hazards
of a miss, -log(1 - chance), which add up over slots and may be multiplied:

slots        by place in the block
confidence   by the drafter's own probability, in bins (histogram binning: Zadrozny and Elkan, ICML
             2001), so that neither its scale nor even its sign is trusted
moment       a factor for the text at hand, which forgets when prose turns into code (a change point
             model over a few factors: fixed share, Herbster and Warmuth, Machine Learning 32, 1998)

Where a block's confidence is known in time, each token has a bin, and confidence is a model of its
own beside slots × moment; which of the two is believed follows their likelihoods, by fixed share.
Where it is late, the confidence of the last blocks is one bin, whose factor multiplies the others.

Plain Python, some microseconds a step: slow tables are worked out every few steps. Knows neither
tokens nor costs.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import exp, log1p
from operator import mul

_PRIOR = 0.25  # chance of a miss before anything is known
_PRIOR_HAZARD = -log1p(-_PRIOR)
_PRIOR_TRIALS = 8.0  # what a prior is worth, in trials
_LEAST = 0.01  # chance to miss, or not to, that a kept curve is credited with
_MEMORY = 256.0  # trials after which older ones count half
_FIRST_STEPS, _LEARN_EVERY = 32, 8  # tables are worked out every step at first, then rarely

_FACTORS = (0.35, 0.6, 1.0, 1.6, 3.0, 9.0, 40.0)  # of the moment …
_USUAL = (0.1, 0.25, 0.35, 0.26, 0.02, 0.015, 0.005)  # … and how common they are
_NEGATIVE = tuple(-factor for factor in _FACTORS)
_CHANGE = 0.015  # chance that the text changes character from one step to the next

_SHARE = 0.03  # of the belief in a model that returns to even with every step
_LATELY = 0.8  # share of a block's confidence that counts one block later

_DOUBTS = [0.5 ** (i / 2) for i in range(24)]  # 1 - confidence, by half octaves
_EDGES = [1.0 - doubt for doubt in _DOUBTS[1:]]


class _Table:
    """Slow hazards by key: prior and counts, of which older ones weigh less. Each trial says what
    the other tables made of it, so that the products of all are right on average. `chained`: what
    is known of a key is the prior of the next.
    """

    def __init__(self, priors: Sequence[float], other: float, chained: bool = False) -> None:
        self._priors, self._other, self._chained = tuple(priors), other, chained
        self._trials = [0.0] * len(priors)
        self._misses = [0.0] * len(priors)
        self._others = [0.0] * len(priors)
        self.learn()

    def count(self, keys: Iterable[int], other: float, missed: bool) -> None:
        """One step's trials at `keys`; `missed`: the last of them was the miss."""
        key, trials, others = 0, self._trials, self._others
        for key in keys:
            trials[key] += 1.0
            others[key] += other
        if missed:
            self._misses[key] += 1.0

    def learn(self) -> None:
        """Work the hazards out anew."""
        self.hazards: list[float] = []
        other, chance = self._other, 0.0
        for k, own in enumerate(self._priors):
            if not (self._chained and k):
                chance = own
            trials = self._trials[k] + _PRIOR_TRIALS
            others = self._others[k] + _PRIOR_TRIALS * other
            hazard = -log1p(-(self._misses[k] + _PRIOR_TRIALS * chance) / trials) * trials / others
            chance = 1.0 - exp(-hazard * other)
            self.hazards.append(hazard)
            if trials > _MEMORY:
                self._trials[k] *= 0.5
                self._misses[k] *= 0.5
                self._others[k] *= 0.5


class _Moment:
    """How the text of the moment compares with the usual: a factor of every slot's hazard."""

    def __init__(self) -> None:
        self._weights = list(_USUAL)
        self.factor = sum(map(mul, _USUAL, _FACTORS))

    def observe(self, passed: float, missed: float) -> None:
        """Hazards of `passed` in all were passed, then one of `missed` was not (0: no miss)."""
        weights = [w * exp(passed * f) for w, f in zip(self._weights, _NEGATIVE, strict=False)]
        if missed:
            weights = [w - w * exp(missed * f) for w, f in zip(weights, _NEGATIVE, strict=False)]
        self._mix(weights, (1.0 - _CHANGE) / sum(weights), _CHANGE)

    def relax(self, left: float) -> None:
        """Forget all but `left` of the moment."""
        self._mix(self._weights, left, 1.0 - left)

    def _mix(self, weights: Sequence[float], scale: float, usual: float) -> None:
        self._weights = [w * scale + usual * u for w, u in zip(weights, _USUAL, strict=False)]
        self.factor = sum(map(mul, self._weights, _FACTORS))


class Acceptance:
    """Expected tokens of a verify pass by its rows, for a block of `slots` drafted tokens.

    `late`: the drafter's confidence is known only when the pass is done. Then the confidence of the
    blocks before stands for it, all slots of them, whether they were on trial or not. `survival`:
    of earlier passes, the share that accepted at least 1, 2, … drafted tokens, if it is known.
    """

    def __init__(self, slots: int, late: bool, survival: Sequence[float] = ()) -> None:
        self.belief = 0.5  # in confidence rather than slots × moment; unless late
        self._late = late
        self._steps = 0
        self._moment = _Moment()
        priors = _chances(survival)[:slots]
        priors += [priors[-1] if priors else _PRIOR] * (slots - len(priors))
        self._by_slot = _Table(priors, 1.0, chained=not survival)
        self._sure = self._blocks = 0.0  # mean confidence of the last blocks, summed; their weight
        self._bin: int | None = None  # of that, once there was a block
        self._factor = 1.0  # what it does to the slots' hazards
        if late:
            self._by_confidence = _Table([_PRIOR] * len(_DOUBTS), _PRIOR_HAZARD)
        else:
            self._by_confidence = _Table([0.85 * doubt for doubt in _DOUBTS], 1.0)
        self._learn()

    def bins(self, confidence: Sequence[float]) -> list[int]:
        """Of the drafter's probabilities of its tokens, in [0, 1], at most `slots` of them."""
        return [bisect(_EDGES, sure) for sure in confidence]

    def expected(self, bins: Sequence[int] | None = None) -> list[float]:
        """expected[n - 1]: tokens that a pass of n rows will commit, the bonus included.

        `bins`: the block's, which are never known in time if `late`.
        """
        factor = -self._moment.factor * self._factor
        if bins is None:
            return list(accumulate([exp(factor * hazard) for hazard in self._before]))
        belief, hazards = self.belief, self._by_confidence.hazards
        factor *= 1.0 - belief
        doubts = accumulate([hazards[k] for k in bins], initial=0.0)
        both = zip(self._before, doubts, strict=False)
        return list(accumulate([exp(factor * slots - belief * doubt) for slots, doubt in both]))

    def observe(
        self,
        drafted: int,
        accepted: int,
        bins: Sequence[int] | None = None,
        confidence: Sequence[float] | None = None,
    ) -> None:
        """A pass verified the first `drafted` tokens and accepted the first `accepted` of them.
        `bins` are the block's; if `late`, its `confidence` comes instead.
        """
        if not drafted:
            return
        missed = accepted < drafted
        tried = accepted + missed
        passed = self._before[accepted] * self._factor
        slip = self._before[tried] * self._factor - passed
        if bins is not None:
            self._judge(bins, accepted, missed, passed, slip)
            self._by_confidence.count(bins[:tried], 1.0, missed)
        elif self._bin is not None:
            mean = self._before[tried] / tried
            self._by_confidence.count((self._bin,) * tried, mean, missed)
        self._by_slot.count(range(tried), self._factor, missed)
        self._moment.observe(passed, slip)
        self._steps += 1
        if self._steps < _FIRST_STEPS or self._steps % _LEARN_EVERY == 0:
            self._by_confidence.learn()
            self._learn()
        if self._late and confidence:
            self._sure = self._sure * _LATELY + sum(confidence) / len(confidence)
            self._blocks = self._blocks * _LATELY + 1.0
            self._bin = bisect(_EDGES, self._sure / self._blocks)
            self._factor = self._by_confidence.hazards[self._bin]

    def relax(self, left: float) -> None:
        """Forget all but `left` of what is special about the text of the moment."""
        self._moment.relax(left)
        self._sure *= left
        self._blocks *= left

    def _learn(self) -> None:
        self._by_slot.learn()
        self._before = list(accumulate(self._by_slot.hazards, initial=0.0))  # of the slots before

    def _judge(
        self, bins: Sequence[int], accepted: int, missed: bool, passed: float, slip: float
    ) -> None:
        """Move the belief by how likely either model thought what happened."""
        hazards, factor = self._by_confidence.hazards, self._moment.factor
        doubt = sum([hazards[k] for k in bins[:accepted]])
        for_confidence = self.belief * _likelihood(doubt, hazards[bins[accepted]] if missed else 0)
        for_moment = (1.0 - self.belief) * _likelihood(passed * factor, slip * factor)
        belief = for_confidence / (for_moment + for_confidence)
        self.belief = belief + _SHARE * (0.5 - belief)


def _chances(survival: Sequence[float]) -> list[float]:
    """Of a miss, slot by slot, where so large a share of passes got beyond each."""
    chances, before = [], 1.0
    for share in survival:
        chance = 1.0 - share / before if before > 0 else 1.0
        chances.append(min(max(chance, _LEAST), 1.0 - _LEAST))
        before = share
    return chances


def _likelihood(passed: float, missed: float) -> float:
    """Of passing hazards of `passed` in all and then missing one of `missed` (0: no miss)."""
    return exp(-passed) * (1.0 - exp(-missed)) if missed else exp(-passed)
