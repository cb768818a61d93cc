"""Which token of which pass a character of the answer came from."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat.runtime.api import StepStats, Tokens
from dflash_chat.runtime.text import Lengths, StopStrings
from dflash_chat.ui.origins import Origin, Trace


def passed(
    text: str, lengths: Sequence[int], drafted: int, accepted: int, tokens: int, found: bool = False
) -> Tokens:
    stats = StepStats(drafted, accepted, tokens, 1.0, 2.0, 0.5, 0.5, 9, found=found)
    return Tokens(1, text, tokens, stats, tuple(lengths))


def texts(trace: Trace) -> list[list[str]]:
    return [[piece.text for piece in block.pieces] for block in trace.blocks]


def origins(trace: Trace) -> list[list[Origin]]:
    return [[piece.origin for piece in block.pieces] for block in trace.blocks]


def test_every_origin() -> None:
    trace = Trace()
    trace.take(Tokens(1, "A", 1, None, (1,)))
    trace.take(passed(" bc d", (2, 1, 2), drafted=4, accepted=2, tokens=3))
    trace.take(passed("efg", (1, 1, 1), drafted=2, accepted=2, tokens=3))
    trace.take(passed("h", (1,), drafted=0, accepted=0, tokens=1))
    trace.take(passed("ij", (1, 1), drafted=3, accepted=1, tokens=2, found=True))

    assert texts(trace) == [["A"], [" b", "c", " d"], ["e", "f", "g"], ["h"], ["i", "j"]]
    accepted = Origin.ACCEPTED
    assert origins(trace) == [
        [Origin.PROMPT], [accepted, accepted, Origin.CORRECTION],
        [accepted, accepted, Origin.BONUS], [Origin.PLAIN],
        [Origin.LOOKUP, Origin.CORRECTION],
    ]  # fmt: skip
    assert [piece.place for piece in trace.blocks[1].pieces] == [0, 1, 2]


def test_a_pass_that_a_stop_cut_short_ends_with_a_draft() -> None:
    trace = Trace()
    trace.take(passed("ab", (1, 1), drafted=7, accepted=2, tokens=2))
    assert origins(trace) == [[Origin.ACCEPTED, Origin.ACCEPTED]]


def test_text_that_was_held_back_goes_to_the_tokens_that_gave_it() -> None:
    trace = Trace()
    trace.take(passed("a", (1, 0, 0), drafted=4, accepted=2, tokens=3))
    assert trace.news() == 0
    assert trace.news() is None
    trace.take(passed("", (0, 0, 0), drafted=4, accepted=0, tokens=1))
    assert trace.news() == 1
    trace.take(passed("bcdef", (1, 1, 1, 2), drafted=4, accepted=0, tokens=1))
    trace.take(passed("g", (1,), drafted=4, accepted=0, tokens=1))
    assert trace.news() == 0
    assert texts(trace) == [["a", "b", "c"], ["d"], ["ef"], ["g"]]
    trace.take(Tokens(1, "!", 0, None, (1,)))
    assert texts(trace)[-1] == ["g!"]
    assert trace.spec.steps == 4


def test_text_without_an_owner_is_the_last_tokens() -> None:
    trace = Trace()
    trace.take(passed("abc", (), drafted=4, accepted=1, tokens=2))
    trace.take(Tokens(1, "\N{REPLACEMENT CHARACTER}", 0))
    assert texts(trace) == [["", "abc\N{REPLACEMENT CHARACTER}"]]


def test_a_block_knows_its_rate_and_whether_drafting_missed() -> None:
    trace = Trace()
    trace.take(Tokens(1, "A", 1, None, (1,)))
    trace.take(passed("ab", (1, 1), drafted=3, accepted=1, tokens=2))
    trace.take(passed("a", (1,), drafted=3, accepted=0, tokens=1))
    trace.take(passed("a", (1,), drafted=0, accepted=0, tokens=1))
    assert [block.tok_s for block in trace.blocks] == [0, 500, 250, 250]
    assert [block.missed for block in trace.blocks] == [False, False, True, False]


PIECES = st.lists(st.lists(st.text(alphabet="ab<", max_size=4), min_size=1, max_size=5), max_size=8)


@given(passes=PIECES)
@settings(max_examples=300, deadline=None)
def test_however_stop_strings_hold_text_back_each_token_gets_its_own(
    passes: list[list[str]],
) -> None:
    stops, lengths, trace = StopStrings(("<ab<", "<<b")), Lengths(), Trace()
    shown = ""
    for pieces in passes:
        emit, stopped = stops.push("".join(pieces))
        shown += emit
        shares = lengths.share(map(len, pieces), len(emit))
        assert sum(shares) == len(emit)
        trace.take(passed(emit, shares, drafted=7, accepted=len(pieces) - 1, tokens=len(pieces)))
        if stopped:
            break
    else:
        tail = stops.finish()
        shown += tail
        trace.take(Tokens(1, tail, 0, lengths=lengths.share((), len(tail))))
    given = [piece for pieces in passes[: len(trace.blocks)] for piece in pieces]
    got = [text for block in texts(trace) for text in block]
    assert "".join(got) == shown
    assert "".join(given).startswith(shown)
    cut = len(shown)
    for piece in given:
        assert got.pop(0) == piece[:cut]
        cut -= min(cut, len(piece))
