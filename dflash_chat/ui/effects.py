"""What a changed sampling setting does to drafting, in a line or two: the direction that follows
from how drafts are accepted, and what was measured. Pure; knows no widgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dflash_chat.runtime.api import SamplingParams, Spec


def law(params: SamplingParams) -> SamplingParams:
    """What of `params` acceptance depends on."""
    return replace(SamplingParams(), **{name: getattr(params, name) for name in _LAW})


def effect(
    before: SamplingParams, after: SamplingParams, measured: Mapping[SamplingParams, Spec]
) -> str:
    """What going from `before` to `after` does to acceptance, "" if nothing. `measured` has the
    passes of this session by `law`."""
    if law(before) == law(after):
        return ""
    words = [_direction(before, after)]
    taus = [
        f"tau {spec.tau:.1f} {where}"
        for where, params in (("at it", after), ("before", before))
        if (spec := measured.get(law(params)))
    ]
    if taus:
        words.append(f"Measured in this session: {', '.join(taus)}.")
    return "\n".join(filter(None, words))


_LAW = (
    "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _direction(before: SamplingParams, after: SamplingParams) -> str:
    """A draft is accepted where it equals the target's own draw, and the drafter guesses without
    penalties."""
    penalised = _penalty(after) - _penalty(before)
    if penalised:
        which = "fewer" if penalised > 0 else "more"
        return f"The drafter does not see penalties: as a rule {which} drafts are accepted."
    if before.temperature == after.temperature == 0:
        return ""  # the likeliest token is taken, whatever the filters leave
    pairs = zip(_choices(before), _choices(after), strict=True)
    if all(b <= a for b, a in pairs):
        return "Tokens are harder to guess: as a rule fewer drafts are accepted."
    return "Tokens are easier to guess: as a rule more drafts are accepted."


def _penalty(params: SamplingParams) -> float:
    return (
        abs(params.repetition_penalty - 1)
        + abs(params.presence_penalty)
        + abs(params.frequency_penalty)
    )


def _choices(params: SamplingParams) -> tuple[float, ...]:
    """Each grows with the number of tokens that may be drawn."""
    return params.temperature, params.top_k or float("inf"), params.top_p, -params.min_p
