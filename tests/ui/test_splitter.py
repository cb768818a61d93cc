"""Where streamed Markdown is cut, and that no chunk grows without end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat.ui.splitter import CHUNK_CHARS, CODE_LINES, LIST_ITEMS, TABLE_ROWS, Chunk, Splitter


def split(source: str, piece: int = 7) -> list[Chunk]:
    """The chunks of `source`, fed a few characters at a time."""
    splitter = Splitter()
    chunks = []
    for start in range(0, len(source), piece):
        chunks += splitter.feed(source[start : start + piece])
    return chunks + splitter.finish()


def test_paragraphs_close_at_blank_lines() -> None:
    assert split("one\ntwo\n\nthree") == [Chunk("text", "one\ntwo"), Chunk("text", "three")]


def test_a_heading_closes_at_once() -> None:
    splitter = Splitter()

    assert splitter.feed("# Title\nbo") == [Chunk("text", "# Title")]
    assert splitter.tail == Chunk("text", "bo")


def test_code_comes_without_its_fences_and_keeps_blank_lines() -> None:
    assert split("a\n```python\nx = 1\n\ny = 2\n```\nb") == [
        Chunk("text", "a"),
        Chunk("code", "x = 1\n\ny = 2", "python"),
        Chunk("text", "b"),
    ]


def test_a_fence_that_is_still_being_written_shows_no_backticks() -> None:
    splitter = Splitter()
    splitter.feed("```py")
    assert splitter.tail == Chunk("code", "", "py")

    splitter.feed("thon\nx = 1\n``")
    assert splitter.tail is not None
    assert splitter.tail.kind == "code"
    assert splitter.tail.text.startswith("x = 1")

    splitter.feed("`")
    assert splitter.tail == Chunk("code", "x = 1", "python")


def test_code_that_never_closes_is_still_code() -> None:
    assert split("```\nx") == [Chunk("code", "x")]


def test_long_code_is_cut_and_says_so() -> None:
    chunks = split("```c\n" + "x;\n" * (2 * CODE_LINES + 1) + "```\n")

    assert [chunk.continued for chunk in chunks] == [False, True, True]
    assert {(chunk.kind, chunk.language) for chunk in chunks} == {("code", "c")}
    assert sum(chunk.text.count("x;") for chunk in chunks) == 2 * CODE_LINES + 1


def test_a_long_list_is_cut_at_items_and_goes_on_counting() -> None:
    chunks = split("\n".join(f"{i}. item" for i in range(1, 2 * LIST_ITEMS + 2)))

    assert [chunk.continued for chunk in chunks] == [False, True, True]
    assert [chunk.number for chunk in chunks] == [0, LIST_ITEMS + 1, 2 * LIST_ITEMS + 1]


def test_a_list_numbered_with_ones_goes_on_counting_too() -> None:
    chunks = split("1. item\n" * (LIST_ITEMS + 1))

    assert chunks[1].number == LIST_ITEMS + 1


def test_a_list_keeps_its_loose_items_nested_items_and_code() -> None:
    source = "- a\n\n- b\n  - c\n\n  ```sh\n- no item\n\n  ```\n- d"

    assert split(source) == [Chunk("list", source)]


def test_a_list_ends_at_text_after_a_blank_line() -> None:
    assert split("- a\n- b\n\ntext") == [Chunk("list", "- a\n- b"), Chunk("text", "text")]


def test_bullets_after_numbers_are_another_list() -> None:
    assert [chunk.text for chunk in split("1. a\n\n- b")] == ["1. a", "- b"]


def test_a_list_may_follow_a_paragraph_without_a_blank_line() -> None:
    assert [chunk.kind for chunk in split("Steps:\n1. a\n2. b")] == ["text", "list"]


def test_a_year_at_the_start_of_a_line_is_no_list() -> None:
    assert split("It was in\n1984. And") == [Chunk("text", "It was in\n1984. And")]


def test_a_rule_is_no_list() -> None:
    assert split("- - -\n\n***\n\n---") == [
        Chunk("text", "- - -"),
        Chunk("text", "***"),
        Chunk("text", "---"),
    ]


def test_a_line_start_that_may_become_anything_is_not_shown_yet() -> None:
    splitter = Splitter()
    splitter.feed("Steps:\n-")

    assert splitter.tail == Chunk("text", "Steps:")


def test_a_table_stays_whole_until_it_is_long_then_repeats_its_head() -> None:
    head = "| a | b |\n|---|---|\n"
    chunks = split(head + "| 1 | 2 |\n" * (TABLE_ROWS + 5) + "\ntext")

    assert [chunk.kind for chunk in chunks] == ["table", "table", "text"]
    assert all(chunk.text.startswith(head) for chunk in chunks[:2])
    assert sum(chunk.text.count("| 1 |") for chunk in chunks) == TABLE_ROWS + 5


def test_a_table_that_ends_where_it_is_cut_leaves_no_bare_head() -> None:
    chunks = split("| a |\n|---|\n" + "| 1 |\n" * TABLE_ROWS + "\ntext")

    assert [chunk.kind for chunk in chunks] == ["table", "text"]


@pytest.mark.parametrize("lead", ["", "- ", "> ", "```\n", "| "])
def test_no_chunk_outgrows_its_bound_even_without_a_newline(lead: str) -> None:
    splitter = Splitter()
    chunks = splitter.feed(lead)
    for _ in range(1000):
        chunks += splitter.feed("0123456789 word")
        assert splitter.tail is None or len(splitter.tail.text) <= CHUNK_CHARS
    chunks += splitter.finish()

    assert max(len(chunk.text) for chunk in chunks) <= CHUNK_CHARS
    assert "".join(chunk.text.replace(" ", "") for chunk in chunks).count("word") == 1000


_PIECES = st.sampled_from(
    ["word ", "\n", "\n\n", "- ", "  - ", "1. ", "```", "~~~", "# ", "| a ", "|---|\n", "> ", "*b*"]
)


@given(st.lists(_PIECES, max_size=60), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_the_cut_does_not_depend_on_how_the_text_arrives(pieces: list[str], piece: int) -> None:
    source = "".join(pieces)

    assert split(source, piece) == split(source, max(len(source), 1))


@given(st.lists(_PIECES, max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_word_is_lost(pieces: list[str]) -> None:
    source = "".join(pieces)
    kept = "".join(chunk.text for chunk in split(source)).count("word")

    plain = [line for line in source.split("\n") if "`" not in line and "~" not in line]
    assert kept >= sum(line.count("word") for line in plain)
