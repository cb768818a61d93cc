"""Drafts that cost nothing: where the last tokens stood before, what stood behind them then.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) over prompt and answer:
text that quotes, edits or repeats itself writes its own draft. How far one is right hangs on the
length of the match and on what the other places say where the last tokens stand: whether one goes
on in the same way, and whether one does not. The chances are learnt from every step, whoever
drafted it: what a step commits shows how far the lookup would have come.

Pure Python, some microseconds a step. Knows token ids; knows neither models nor costs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

SHORTEST = 2  # tokens of a match
LONGEST = 24  # beyond that length matches are equal
_LATEST = 32  # of all places where the shortest match stands, so many are looked at
_EDGES = (3, 4, 5, 6, 8, 12, 20)  # lengths at which another bin of matches begins
# Log-odds of the default pair on MT-bench, by bin, for the only place with such a match …
_ALONE = (0.15, 0.6, 1.1, 1.15, 1.5, 1.7, 2.3, 3.0)
_SECONDED = 1.1  # … more where another place goes on in the same way …
_CONTESTED = (0.0, -1.2, -2.1)  # … less where one goes on otherwise: a shorter match, or as long
_KINDS = 2 * len(_CONTESTED)  # of a bin
_FIRST_KIND = [_KINDS * bisect_right(_EDGES, length) for length in range(LONGEST + 1)]
_PRIOR_TRIALS = 8.0  # what a prior is worth
_MEMORY = 256.0  # trials of a kind after which older ones count half


class Chances:
    """The chance that the next token of a match is right, by the match's kind (`kind_of`). Every
    token that was right makes the match one longer.
    """

    def __init__(self) -> None:
        odds = [
            alone + seconded + contested
            for alone in _ALONE
            for seconded in (0.0, _SECONDED)
            for contested in _CONTESTED
        ]
        self._trials = [_PRIOR_TRIALS] * len(odds)
        self._right = [_PRIOR_TRIALS / (1.0 + exp(-o)) for o in odds]

    def of(self, kinds: Sequence[int]) -> list[float]:
        """Of each kind, in (0, 1)."""
        right, trials = self._right, self._trials
        return [right[kind] / trials[kind] for kind in kinds]

    def observe(self, kind: int, right: bool) -> None:
        """The next token of such a match was right, or not."""
        self._trials[kind] += 1.0
        self._right[kind] += right
        if self._trials[kind] > _MEMORY:
            self._trials[kind] *= 0.5
            self._right[kind] *= 0.5


def kind_of(length: int, seconded: bool, against: int) -> int:
    """Of a match of `length` tokens: whether another one goes on with the same token, and how long
    the longest is that goes on with another, 0 if none does.
    """
    contested = (against > 0) + (against >= length)
    return _FIRST_KIND[min(length, LONGEST)] + seconded * len(_CONTESTED) + contested


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
        self._found = Found()
        self._kinds: list[int] = []  # of the match that each found token stands behind
        self.extend(ids)

    def find(self, most: int) -> Found:
        """At most `most` tokens behind the longest match of the text's end, the latest of equals;
        nothing where there is none.
        """
        self._found, self._kinds = Found(), []
        if matches := self._matches():
            length, end = max(matches)
            tokens = self._behind(end, most)
            self._kinds = self._kinds_of(matches, length, tokens)
            self._found = Found(tokens, self._chances.of(self._kinds))
        return self._found

    def extend(self, ids: Sequence[int]) -> None:
        """The text goes on with `ids`; learn how far what was found last was right."""
        for kind, found, token in zip(self._kinds, self._found.tokens, ids, strict=False):
            self._chances.observe(kind, found == token)
            if found != token:
                break
        self._found = Found()
        text = self._ids
        for token in ids:
            if len(text) >= SHORTEST:
                self._ends.setdefault((text[-2], text[-1]), []).append(len(text) - 1)
            text.append(token)

    def _matches(self) -> list[tuple[int, int]]:
        """Length of each match of the text's end, and the place of its last token."""
        text = self._ids
        if len(text) < SHORTEST:
            return []
        matches, tail = [], text[-LONGEST:]
        for end in self._ends.get((text[-2], text[-1]), [])[-_LATEST:]:
            n, most = SHORTEST, min(LONGEST, end + 1)
            if text[max(0, end + 1 - LONGEST) : end + 1] == tail:  # at once, since loops are long
                n = most
            while n < most and text[end - n] == text[-1 - n]:
                n += 1
            matches.append((n, end))
        return matches

    def _kinds_of(
        self, matches: list[tuple[int, int]], length: int, tokens: list[int]
    ) -> list[int]:
        """What kind of match each of the tokens stands behind, if those before it are right."""
        text, most = self._ids, len(tokens)
        whole = len(text)
        text += tokens  # since a match near the end goes on with what is found
        against, ending = [0] * most, [0] * most  # matches that say otherwise at each token
        for n, end in matches:
            follows = text[end + 1 : end + 1 + most]
            if follows != tokens:
                i = next(i for i, token in enumerate(tokens) if follows[i] != token)
                against[i] = max(against[i], n + i)
                ending[i] += 1
        del text[whole:]
        left, kinds = len(matches), []
        for i in range(most):
            left -= ending[i]
            kinds.append(kind_of(length + i, left > 1, against[i]))
        return kinds

    def _behind(self, end: int, most: int) -> list[int]:
        """What follows place `end`; a text that would run out goes on with what was proposed."""
        tokens = self._ids[end + 1 : end + 1 + most]
        for i in range(most - len(tokens)):
            tokens.append(tokens[i])
        return tokens
