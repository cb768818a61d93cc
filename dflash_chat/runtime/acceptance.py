"""How likely a drafted prefix is to survive verification, learnt while decoding.

A drafted token is put on trial if all before it were right: it passes, or it is the step's one
miss. Nothing behind a miss or beyond the verified rows is ever seen. So the models here are of
hazards, the chance to miss at a trial:

slots        by place in the block
confidence   by the drafter's own probability of its token, in bins (histogram binning: Zadrozny and
             Elkan, ICML 2001), so that neither its scale nor even its sign is trusted

The slots' slow table is multiplied with a fast factor for the text of the moment, which is what
forgets when prose turns into code (a change point model over a few factors: fixed share, Herbster
and Warmuth, Machine Learning 32, 1998). Which of the two models is believed follows their
likelihoods, by the same rule.

Plain Python, some microseconds a step. Knows neither tokens nor costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, frexp, log1p
from operator import mul

_PRIOR = 0.25  # chance of a miss before anything is known
_PRIOR_TRIALS = 8.0  # what a prior is worth, in trials
_MEMORY = 256.0  # trials after which older ones count half

_FACTORS = (0.35, 0.6, 1.0, 1.6, 3.0, 9.0)  # of the moment …
_USUAL = (0.1, 0.25, 0.35, 0.25, 0.03, 0.02)  # … and how common they are
_CHANGE = 0.015  # chance that the text changes character from one step to the next

_SHARE = 0.03  # of the belief in a model that returns to even with every step
_LATELY = 0.7  # share of a block's doubt that counts one block later …
_USUALLY = 0.005  # … and of a block in the usual one

_HALF_OCTAVES = 24  # bins of the drafter's doubt, 1 - confidence, down to 2^-12
_LEAST_DOUBT = 2.0**-12
_MIDDLE = 0.5**0.5  # of an octave


class _Table:
    """Slow hazards of a miss by key, -log(1 - chance), that add up over slots and may be
    multiplied: prior and counts, of which older ones weigh less.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.hazards = [_hazard(prior) for prior in priors]
        self._priors = tuple(priors)
        self._misses = [0.0] * len(priors)
        self._trials = [0.0] * len(priors)

    def count(self, keys: Sequence[int], missed: bool) -> None:
        """One step's trials; `missed`: the last of them was the miss."""
        trials = self._trials
        for key in keys:
            trials[key] += 1.0
            if trials[key] > _MEMORY:
                trials[key] *= 0.5
                self._misses[key] *= 0.5
        if missed:
            self._misses[keys[-1]] += 1.0
        self._learn(keys)

    def _learn(self, keys: Sequence[int]) -> None:
        for k in keys:
            prior = _PRIOR_TRIALS * self._priors[k]
            rate = (self._misses[k] + prior) / (self._trials[k] + _PRIOR_TRIALS)
            self.hazards[k] = _hazard(rate)


class _SlotTable(_Table):
    """By slot. What is known of a slot is the prior of the next, so that slots that are hardly ever
    reached are judged by those before them.
    """

    def _learn(self, keys: Sequence[int]) -> None:
        rate = _PRIOR
        self.hazards = [
            _hazard(rate := (misses + _PRIOR_TRIALS * rate) / (trials + _PRIOR_TRIALS))
            for misses, trials in zip(self._misses, self._trials, strict=True)
        ]


def _hazard(chance: float) -> float:
    return -log1p(-chance)


class _Moment:
    """How the text of the moment compares with the usual: a factor of every slot's hazard."""

    def __init__(self) -> None:
        self._weights = list(_USUAL)
        self.factor = sum(map(mul, _USUAL, _FACTORS))

    def observe(self, passed: float, missed: float) -> None:
        """Hazards of `passed` in all were passed, then one of `missed` was not (0: no miss)."""
        if missed:
            both = passed + missed
            weights = [
                w * (exp(-passed * f) - exp(-both * f))
                for w, f in zip(self._weights, _FACTORS, strict=True)
            ]
        else:
            weights = [w * exp(-passed * f) for w, f in zip(self._weights, _FACTORS, strict=True)]
        self._mix(weights, (1.0 - _CHANGE) / sum(weights), _CHANGE)

    def relax(self, left: float) -> None:
        """Forget all but `left` of the moment."""
        self._mix(self._weights, left, 1.0 - left)

    def _mix(self, weights: Sequence[float], scale: float, usual: float) -> None:
        self._weights = [w * scale + usual * u for w, u in zip(weights, _USUAL, strict=True)]
        self.factor = sum(map(mul, self._weights, _FACTORS))


class Acceptance:
    """Expected tokens of a verify pass by its rows, for a block of `slots` drafted tokens.

    `late`: the drafter's confidence is known only when the pass is done. Then the confidence of the
    blocks before stands for it, all slots of them, whether they were on trial or not.
    """

    def __init__(self, slots: int, late: bool) -> None:
        self.belief = 0.5  # in the confidence rather than the moment's misses
        self._late = late
        self._by_slot = _SlotTable([_PRIOR] * slots)
        self._moment = _Moment()
        self._by_doubt = _Table([0.85 * 0.5 ** (i / 2) for i in range(_HALF_OCTAVES)])
        self._usual_doubt = 0.0  # hazard of a slot by its confidence, on average; 0: none seen
        self._doubt_sum = self._doubt_blocks = 0.0  # the same of the last blocks, and their weight

    def expected(self, confidence: Sequence[float] | None = None) -> list[float]:
        """expected[n - 1]: tokens that a pass of n rows will commit, the bonus included.

        `confidence`: the drafter's probability of each token it drafted, in [0, 1], at most `slots`
        of them; only without `late`.
        """
        slots, factor, belief = self._by_slot.hazards, self._moment.factor, self.belief
        if confidence is not None:
            factor *= 1.0 - belief
            doubts = self._by_doubt.hazards
            hazards = [
                factor * hazard + belief * doubts[_bin(sure)]
                for hazard, sure in zip(slots, confidence, strict=False)
            ]
        else:
            if self._late and self._usual_doubt:
                factor += belief * (self._outlook() - factor)
            hazards = [factor * hazard for hazard in slots]
        survives = total = 1.0
        out = [1.0]
        for hazard in hazards:
            survives *= exp(-hazard)
            total += survives
            out.append(total)
        return out

    def observe(
        self, drafted: int, accepted: int, confidence: Sequence[float] | None = None
    ) -> None:
        """A pass verified the first `drafted` tokens and accepted the first `accepted` of them."""
        if not drafted:
            return
        missed = accepted < drafted
        slots = self._by_slot.hazards
        passed = sum(slots[:accepted])
        slip = slots[accepted] if missed else 0.0
        if confidence is not None:
            self._observe_confidence(confidence, accepted, missed, passed, slip)
        self._moment.observe(passed, slip)
        self._by_slot.count(range(accepted + missed), missed)

    def relax(self, left: float) -> None:
        """Forget all but `left` of what is special about the text of the moment."""
        self._moment.relax(left)
        self._doubt_sum *= left
        self._doubt_blocks *= left

    def _observe_confidence(
        self, confidence: Sequence[float], accepted: int, missed: bool, passed: float, slip: float
    ) -> None:
        factor = self._moment.factor
        likelihood = _likelihood(passed * factor, slip * factor)
        bins = [_bin(sure) for sure in confidence]
        hazards = [self._by_doubt.hazards[k] for k in bins]
        if not self._late:
            passed = sum(hazards[:accepted])
            slip = hazards[accepted] if missed else 0.0
            self._judge(likelihood, _likelihood(passed, slip))
        else:
            if self._usual_doubt:
                outlook = self._outlook()
                self._judge(likelihood, _likelihood(passed * outlook, slip * outlook))
            doubt = sum(hazards) / len(hazards)
            self._usual_doubt += (
                _USUALLY * (doubt - self._usual_doubt) if self._usual_doubt else doubt
            )
            self._doubt_sum = self._doubt_sum * _LATELY + doubt
            self._doubt_blocks = self._doubt_blocks * _LATELY + 1.0
        self._by_doubt.count(bins[: accepted + missed], missed)

    def _outlook(self) -> float:
        """How the last blocks' doubt compares with the usual."""
        return self._doubt_sum / (self._doubt_blocks * self._usual_doubt)

    def _judge(self, for_moment: float, for_confidence: float) -> None:
        """Move the belief by how likely either model thought what happened."""
        for_confidence *= self.belief
        for_moment *= 1.0 - self.belief
        belief = for_confidence / (for_moment + for_confidence)
        self.belief = belief + _SHARE * (0.5 - belief)


def _likelihood(passed: float, missed: float) -> float:
    """Of passing hazards of `passed` in all and then missing one of `missed` (0: no miss)."""
    return exp(-passed) * (1.0 - exp(-missed)) if missed else exp(-passed)


def _bin(confidence: float) -> int:
    """The half octave of the drafter's doubt; 0 is the greatest."""
    doubt = 1.0 - confidence
    if doubt >= 1.0:
        return 0
    if doubt < _LEAST_DOUBT:
        return _HALF_OCTAVES - 1
    mantissa, exponent = frexp(doubt)
    return -2 * exponent + (mantissa < _MIDDLE)
