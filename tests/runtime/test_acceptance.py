"""What drafts are worth, learnt from what verification lets see."""

from __future__ import annotations

import random

import pytest

from dflash_chat.runtime.acceptance import Acceptance

SLOTS = 15


def _passed(chances: list[float], rng: random.Random) -> int:
    n = 0
    while n < len(chances) and rng.random() < chances[n]:
        n += 1
    return n


def _text(model: Acceptance, chance: float, steps: int, drafted: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        model.observe(drafted, _passed([chance] * drafted, rng))


def _geometric(chance: float, rows: int) -> float:
    return sum(chance**i for i in range(rows))


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.93])
def test_averages_find_what_a_pass_commits(chance: float) -> None:
    model = Acceptance(SLOTS, late=True)
    _text(model, chance, 400, SLOTS)
    for rows in (2, 5, 16):
        assert model.expected()[rows - 1] == pytest.approx(_geometric(chance, rows), rel=0.3)


def test_expectations_begin_with_the_bonus_and_never_fall() -> None:
    expected = Acceptance(SLOTS, late=False).expected([3] * SLOTS)
    assert expected[0] == 1.0
    assert len(expected) == SLOTS + 1
    assert expected == sorted(expected)


def test_slots_that_were_never_verified_are_judged_by_those_before_them() -> None:
    good, bad = Acceptance(SLOTS, late=True), Acceptance(SLOTS, late=True)
    _text(good, 0.95, 200, 4)
    _text(bad, 0.4, 200, 4)
    assert good.expected()[-1] > 8
    assert bad.expected()[-1] < 3


def test_what_stands_behind_the_first_miss_teaches_nothing() -> None:
    missed_at_once = Acceptance(SLOTS, late=True)
    for _ in range(100):
        missed_at_once.observe(SLOTS, 0)
    assert missed_at_once._by_slot._trials == [100.0] + [0.0] * (SLOTS - 1)


def test_a_few_steps_of_other_text_are_enough_to_change_the_mind() -> None:
    model = Acceptance(SLOTS, late=True)
    _text(model, 0.95, 200, SLOTS)
    before = model.expected()[-1]
    for _ in range(6):
        model.observe(SLOTS, 0)
    assert model.expected()[-1] < before / 3
    model.relax(0.0)
    assert model.expected()[-1] > before / 2


def _sees(kind: str, late: bool) -> Acceptance:
    """A model after 1500 blocks whose slots are right with a chance of 0.97 or 0.3, mixed at
    random, and a drafter that says so, says the opposite, or says nothing of use.
    """
    rng = random.Random(1)
    model = Acceptance(SLOTS, late)
    for _ in range(1500):
        chances = [rng.choice([0.97, 0.97, 0.97, 0.3]) for _ in range(SLOTS)]
        said = [rng.choice(chances) for _ in chances] if kind == "useless" else chances
        sure = [1 - c if kind == "inverted" else c for c in said]
        bins = None if late else model.bins(sure)
        model.observe(SLOTS, _passed(chances, rng), bins, sure if late else None)
    return model


def _expected(model: Acceptance, sure: float) -> list[float]:
    return model.expected(model.bins([sure] * SLOTS))


@pytest.mark.parametrize(("kind", "sure", "unsure"), [("told", 0.97, 0.3), ("inverted", 0.03, 0.7)])
def test_confidence_is_believed_whatever_its_scale_or_sign(
    kind: str, sure: float, unsure: float
) -> None:
    model = _sees(kind, late=False)
    assert model.belief > 0.6
    assert _expected(model, sure)[-1] > 2.5 * _expected(model, unsure)[-1]
    assert _expected(model, sure)[3] == pytest.approx(_geometric(0.97, 4), rel=0.15)


def test_useless_confidence_is_not_believed() -> None:
    model = _sees("useless", late=False)
    assert _expected(model, 0.97)[-1] == pytest.approx(_expected(model, 0.3)[-1], rel=0.2)


def _blocks_at(character: float, model: Acceptance, steps: int, rng: random.Random) -> None:
    """Blocks whose slots are all right with this chance, as the drafter says."""
    for _ in range(steps):
        drafted = _passed([character] * SLOTS, rng)
        model.observe(SLOTS, drafted, confidence=[character] * SLOTS)


def test_late_confidence_of_whole_blocks_tells_the_character_of_the_text() -> None:
    rng, model = random.Random(2), Acceptance(SLOTS, late=True)
    for _ in range(20):
        for character in (0.95, 0.6):
            _blocks_at(character, model, 15, rng)
    unsure = model.expected()[-1]
    for _ in range(3):  # the first slot is right every time, and none behind it is on trial
        model.observe(1, 1, confidence=[0.95] * SLOTS)
    sure = model.expected()[-1]
    assert sure > 1.4 * unsure
    for _ in range(6):
        model.observe(1, 1, confidence=[0.6] * SLOTS)
    assert model.expected()[-1] < 0.85 * sure


def test_a_kept_curve_is_where_expectations_begin_and_not_where_they_end() -> None:
    for late in (True, False):
        good, bad, unknown = (
            Acceptance(SLOTS, late, shares)
            for shares in ([0.95**i for i in range(1, 16)], (0.4, 0.1, 0.0), ())
        )
        assert good.expected()[-1] > 1.5 * unknown.expected()[-1]
        assert bad.expected()[-1] < 0.6 * unknown.expected()[-1]
        for _ in range(60):
            bad.observe(SLOTS, SLOTS)
        assert bad.expected()[-1] > 0.7 * SLOTS


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("confidence", [0.0, 1.0, 1e-9, 1 - 1e-16, 0.5])
def test_any_probability_is_understood(confidence: float, late: bool) -> None:
    model = Acceptance(2, late)
    for _ in range(300):
        bins = None if late else model.bins([confidence] * 2)
        model.observe(2, 1, bins, [confidence] * 2 if late else None)
    assert 1.0 < model.expected(bins)[-1] <= 3.0
