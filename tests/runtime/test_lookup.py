"""What a lookup finds, against a plain search, and how far it learns to trust it."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat.runtime.lookup import LONGEST, SHORTEST, Chances, Lookup, kind_of


def found(text: Sequence[int], most: int = 7) -> tuple[int, ...]:
    return tuple(Lookup(text, Chances()).find(most).tokens)


def search(text: Sequence[int], most: int) -> tuple[int, ...]:
    """The definition: the longest match that ends before the text's end, the latest of equals."""
    best = (0, 0)
    for end in range(1, len(text)):
        n = 0
        while n < min(end, LONGEST) and text[end - 1 - n] == text[-1 - n]:
            n += 1
        best = max(best, (n, end))
    length, end = best
    if length < SHORTEST:
        return ()
    out = list(text)
    for i in range(most):
        out.append(out[end + i])
    return tuple(out[len(text) :])


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 15))
@settings(deadline=None, max_examples=300)
def test_it_finds_what_a_plain_search_finds(text: list[int], most: int) -> None:
    assert found(text, most) == search(text, most)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(1, 5), max_size=10))
@settings(deadline=None)
def test_a_text_that_grows_is_as_one_that_was_there(text: list[int], cuts: list[int]) -> None:
    lookup, at = Lookup([], Chances()), 0
    for cut in [*cuts, len(text)]:
        lookup.extend(text[at : at + cut])
        at += cut
        lookup.find(3)
    assert tuple(lookup.find(7).tokens) == found(text)


def test_the_longest_match_wins_and_of_equals_the_latest() -> None:
    assert found([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 1) == (7,)
    assert found([2, 3, 7, 2, 3, 8, 2, 3], 1) == (8,)
    assert found([1, 2, 3, 4, 3]) == ()
    assert found([1]) == found([]) == ()


def test_a_loop_is_proposed_to_go_on() -> None:
    assert found([9, 1, 2, 3, 1, 2, 3], 7) == (1, 2, 3, 1, 2, 3, 1)


def alone(*lengths: int) -> list[int]:
    """Matches that no other place agrees or disagrees with."""
    return [kind_of(length, False, 0) for length in lengths]


def test_what_a_step_commits_teaches_whoever_drafted_it() -> None:
    chances = Chances()
    known = chances.of(alone(2, 3, 4))
    lookup = Lookup([1, 2, 3, 4, 5, 9, 1, 2], chances)
    told = lookup.find(3)
    assert tuple(told.tokens) == (3, 4, 5)
    assert told.chances == known

    lookup.extend([3, 7])  # the first was right, the second was not, the third is not known
    learnt = chances.of(alone(2, 3, 4))
    assert learnt[0] > known[0]
    assert learnt[1] < known[1]
    assert learnt[2] == known[2]

    lookup.extend([8])  # nothing was asked
    assert chances.of(alone(2, 3, 4)) == learnt


def test_trust_follows_a_text_that_changes() -> None:
    chances, untold = Chances(), Chances().of(alone(2))
    (kind,) = alone(5)
    for right, least, most in ((True, 0.98, 1.0), (False, 0.0, 0.2), (True, 0.8, 1.0)):
        for _ in range(600):
            chances.observe(kind, right)
        assert least < chances.of([kind])[0] < most
    assert chances.of(alone(2)) == untold, "another length"


def test_other_places_speak_for_a_token_or_against_it() -> None:
    def first(text: Sequence[int]) -> float:
        """The chance of the first token that is found."""
        return Lookup(text, Chances()).find(1).chances[0]

    alone = first([1, 2, 3, 7, 1, 2])
    seconded = first([1, 2, 3, 8, 1, 2, 3, 7, 1, 2])
    contested = first([1, 2, 4, 8, 1, 2, 3, 7, 1, 2])
    both = first([1, 2, 4, 8, 1, 2, 3, 9, 1, 2, 3, 7, 1, 2])
    assert contested < both < alone < seconded

    longer = first([5, 1, 2, 3, 7, 5, 1, 2])
    by_shorter = first([6, 1, 2, 4, 5, 1, 2, 3, 7, 5, 1, 2])
    by_as_long = first([5, 1, 2, 4, 5, 1, 2, 3, 7, 5, 1, 2])
    assert by_as_long < by_shorter < longer


def kinds(text: Sequence[int], most: int) -> list[int]:
    """The definition: of the places where the text's end and all found before this one stand."""
    tokens = search(text, most)
    whole, lengths = [*text, *tokens], {}
    for end in range(1, len(text)):
        n = 0
        while n < min(end, LONGEST) and text[end - 1 - n] == text[-1 - n]:
            n += 1
        if n >= SHORTEST:
            lengths[end] = n
    answer = []
    for i, token in enumerate(tokens):
        here = {e: n + i for e, n in lengths.items() if tuple(whole[e : e + i]) == tokens[:i]}
        same = [n for e, n in here.items() if whole[e + i] == token]
        other = [n for e, n in here.items() if whole[e + i] != token]
        answer.append(kind_of(max(same), len(same) > 1, max(other, default=0)))
    return answer


@given(st.lists(st.integers(0, 2), min_size=12, max_size=30), st.integers(1, 7))
@settings(deadline=None, max_examples=300)
def test_kinds_are_those_of_a_plain_search(text: list[int], most: int) -> None:
    chances = Chances()
    assert list(Lookup(text, chances).find(most).chances) == chances.of(kinds(text, most))
