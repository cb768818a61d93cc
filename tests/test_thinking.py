"""Thoughts are told from answers wherever the stream is cut."""

from __future__ import annotations

import pytest

from dflash_chat.thinking import ThoughtSplitter, split

TEXTS = {
    "<think>\nhm, 2 < 3\n</think>\n\nThree.": ("\nhm, 2 < 3\n", "Three."),
    "\n <think>a</think>b": ("a", "b"),
    "<|channel>thought\nhm<channel|>Three.": ("hm", "Three."),
    "<|channel>thought\n<channel|>\n\nThree.": ("", "Three."),
    "<think></think>\n\nThree.": ("", "Three."),
    "<think>one</think>\n<think>two</think>\nanswer": ("onetwo", "answer"),
    "<think>never closed </thi": ("never closed </thi", ""),
    "<think>closed</think>\n\n": ("closed", ""),
    "An answer about <think> and </think>.": ("", "An answer about <think> and </think>."),
    "<thin air": ("", "<thin air"),
    "  indented": ("", "  indented"),
    "<think>a</think> <|channel>": ("a", "<|channel>"),
    "": ("", ""),
}


@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_gives_the_same_parts(text: str) -> None:
    assert split(text) == TEXTS[text]
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            splitter, parts = ThoughtSplitter(), ["", ""]
            for piece in (text[:first], text[first:second], text[second:]):
                for is_thought, part in splitter.feed(piece):
                    parts[not is_thought] += part
            for is_thought, part in splitter.finish():
                parts[not is_thought] += part
            assert tuple(parts) == TEXTS[text]


def test_nothing_is_held_back_that_cannot_be_a_mark() -> None:
    splitter = ThoughtSplitter()

    assert splitter.feed("<think>a < b </") == [(True, "a < b ")]
    assert splitter.feed("p>") == [(True, "</p>")]
    assert splitter.feed("</think>\nyes") == [(False, "yes")]
    assert splitter.feed(" <think>") == [(False, " <think>")]
