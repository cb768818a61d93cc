"""What a setting does to drafts and to the cache is said when it is made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dflash_chat.runtime.api import SamplingParams, Spec
from dflash_chat.ui.effects import effect, law
from tests.ui.test_chat_flow import open_chat

SAMPLED = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"temperature": 1.2}, "fewer"), ({"temperature": 0.2}, "more"),
        ({"top_k": 0}, "fewer"), ({"top_k": 10}, "more"),
        ({"top_p": 1.0}, "fewer"), ({"top_p": 0.5}, "more"),
        ({"min_p": 0.0}, "fewer"), ({"min_p": 0.2}, "more"),
        ({"repetition_penalty": 1.2}, "fewer"), ({"presence_penalty": -1.0}, "fewer"),
    ],
)  # fmt: skip
def test_the_direction_is_said(change: dict[str, float], word: str) -> None:
    changed = replace(SAMPLED, **change)  # type: ignore[arg-type]
    assert f"as a rule {word} drafts are accepted" in effect(SAMPLED, changed, {})
    other = {"fewer": "more", "more": "fewer"}[word]
    assert f"as a rule {other} drafts are accepted" in effect(changed, SAMPLED, {})


@pytest.mark.parametrize("change", [{"seed": 7}, {"max_tokens": 5}, {"stop": ("END",)}])
def test_what_changes_no_draw_changes_no_acceptance(change: dict[str, object]) -> None:
    assert effect(SAMPLED, replace(SAMPLED, **change), {}) == ""  # type: ignore[arg-type]


def test_filters_of_a_greedy_choice_do_nothing() -> None:
    assert effect(SamplingParams(), SamplingParams(top_k=5), {}) == ""


def test_what_was_measured_is_said() -> None:
    greedy, seeded = SamplingParams(), SamplingParams(temperature=1.0, seed=3)
    measured = {law(greedy): Spec(2, 8, 4, (0, 0, 2)), law(seeded): Spec(2, 8, 1, (1, 1))}

    words = effect(greedy, replace(seeded, seed=4), measured)
    assert words.endswith("Measured in this session: tau 1.5 at it, tau 3.0 before.")


async def test_the_chat_says_what_a_setting_costs() -> None:
    async with open_chat() as chat:
        await chat.type("/set")
        assert "temperature         0.0" in chat.text
        assert "seed                another for every answer" in chat.text
        await chat.type("/set temperature=0.5")
        assert "drafts" not in chat.text  # nothing is loaded that would draft
        await chat.load()
        await chat.type("One?")
        chat.client.answer("An answer of some length.", cached=0, prompt=4873)
        await chat.settle()
        await chat.type("/set temperature=1.2")
        tau = chat.screen.dialogue.meter.spec.tau
        assert "harder to guess: as a rule fewer drafts are accepted" in chat.text
        assert f"Measured in this session: tau {tau:.1f} before." in chat.text

        await chat.type("/system Be brief.")
        cached = chat.screen.dialogue.meter.context_tokens
        assert cached > 4873
        assert f"anew from its beginning; 4 {cached - 4000} cached tokens no longer" in chat.text
        await chat.type("/clear")
        await chat.type("/system Be very brief.")
        assert "anew" not in chat.text  # of a new chat nothing is cached
