"""Drafts that cost nothing: where the last tokens stood before, what stood behind them then.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) over prompt and answer:
text that quotes, edits or repeats itself writes its own draft. How far one is right is learnt by
the length of the match, from every step, whoever drafted it: what a step commits shows how far the
lookup would have come.

Pure Python, some microseconds a step. Knows token ids; knows neither models nor costs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 2  # tokens of a match
LONGEST = 24  # beyond that length matches are equal
_LATEST = 32  # of all places where the shortest match stands, so many are looked at
_EDGES = (3, 4, 5, 6, 8, 12, 20)  # lengths at which another bin of matches begins
_PRIORS = (0.5, 0.6, 0.7, 0.75, 0.78, 0.83, 0.9, 0.97)  # of the default pair on MT-bench
_PRIOR_TRIALS = 8.0  # what a prior is worth
_MEMORY = 256.0  # trials of a bin after which older ones count half


class Chances:
    """The chance that the next token of a match is right, by the match's length. Every token that
    was right makes the match one longer.
    """

    def __init__(self) -> None:
        self._right = [0.0] * (len(_EDGES) + 1)
        self._trials = [0.0] * (len(_EDGES) + 1)

    def of(self, length: int) -> float:
        """For a match of `length` tokens, in (0, 1)."""
        k = bisect_right(_EDGES, length)
        return (self._right[k] + _PRIORS[k] * _PRIOR_TRIALS) / (self._trials[k] + _PRIOR_TRIALS)

    def observe(self, length: int, right: bool) -> None:
        """The next token of such a match was right, or not."""
        k = bisect_right(_EDGES, length)
        self._trials[k] += 1.0
        self._right[k] += right
        if self._trials[k] > _MEMORY:
            self._trials[k] *= 0.5
            self._right[k] *= 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup proposes: `tokens` behind a match, each with its chance to be right if all
    before it are.
    """

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()


class Lookup:
    """One text, prompt first, as it grows; `chances` outlive it."""

    def __init__(self, ids: Sequence[int], chances: Chances) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # of every pair but the text's last
        self._chances = chances
        self._found, self._length = Found(), 0
        self.extend(ids)

    def find(self, most: int) -> Found:
        """At most `most` tokens behind the longest match of the text's end, the latest of equals;
        nothing where there is none.
        """
        end, self._length = self._longest()
        tokens = self._behind(end, most) if self._length else ()
        lengths = range(self._length, self._length + len(tokens))
        self._found = Found(tokens, [self._chances.of(length) for length in lengths])
        return self._found

    def extend(self, ids: Sequence[int]) -> None:
        """The text goes on with `ids`; learn how far what was found last was right."""
        for i, (found, token) in enumerate(zip(self._found.tokens, ids, strict=False)):
            self._chances.observe(self._length + i, found == token)
            if found != token:
                break
        self._found = Found()
        text = self._ids
        for token in ids:
            if len(text) >= SHORTEST:
                self._ends.setdefault((text[-2], text[-1]), []).append(len(text) - 1)
            text.append(token)

    def _longest(self) -> tuple[int, int]:
        """Place of the match's last token, and the match's length; 0 if there is none."""
        text = self._ids
        place, length = 0, 0
        ends = self._ends.get((text[-2], text[-1]), []) if len(text) >= SHORTEST else []
        for end in reversed(ends[-_LATEST:]):
            n, most = SHORTEST, min(LONGEST, end + 1)
            while n < most and text[end - n] == text[-1 - n]:
                n += 1
            if n > length:
                place, length = end, n
            if length == LONGEST:
                break
        return place, length

    def _behind(self, end: int, most: int) -> list[int]:
        """What follows place `end`; a text that would run out goes on with what was proposed."""
        tokens = self._ids[end + 1 : end + 1 + most]
        for i in range(most - len(tokens)):
            tokens.append(tokens[i])
        return tokens
