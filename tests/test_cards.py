"""Cards by the names that people and drivers give them."""

from __future__ import annotations

import pytest

from dflash_chat import cards
from dflash_chat.cards import CARDS, GIB
from dflash_chat.errors import EXIT_USAGE, UsageError


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX 3090", "RTX 3090"),
        ("3090", "RTX 3090"),
        ("nvidia geforce rtx 4070 ti super", "RTX 4070 Ti SUPER"),
        ("h200", "H200"),
        ("RTX4090", "RTX 4090"),
        ("a100-80gb-sxm", "A100 80GB SXM"),
    ],
)
def test_a_card_is_found_by_its_name(typed: str, name: str) -> None:
    assert cards.find(typed).name == name


@pytest.mark.parametrize(("typed", "near"), [("RTX 3091", "RTX 3090"), ("H20", "H200")])
def test_a_misspelt_card_suggests_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        cards.find(typed)
    assert near in caught.value.hint
    assert caught.value.exit_code == EXIT_USAGE


def test_an_unknown_maker_is_asked_for_the_memory() -> None:
    with pytest.raises(UsageError) as caught:
        cards.find("Voodoo")
    assert "--vram" in caught.value.hint


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "Tesla T4"),
    ],
)
def test_a_driver_s_name_leads_to_the_data_sheet(reported: str, name: str) -> None:
    found = cards.reported(reported)
    assert found is not None
    assert found.name == name


def test_a_card_that_nobody_knows_has_no_data_sheet() -> None:
    assert cards.reported("NVIDIA H9000") is None


# GiB free on idle cards of these sizes, as reported by drivers
@pytest.mark.parametrize(
    ("sold", "free"),
    [(8, 7.65), (12, 11.65), (16, 15.6), (24, 23.5), (32, 31.4), (80, 79.1), (140.4, 139.7)],
)
def test_what_is_usable_is_near_what_drivers_report_and_not_more(sold: float, free: float) -> None:
    usable = cards.usable(round(sold * GIB)) / GIB
    assert 0.98 * free <= usable <= free


def test_a_bigger_card_has_more_to_use() -> None:
    sizes = [cards.usable(n * GIB) for n in range(1, 200)]
    assert sizes == sorted(set(sizes))


def test_a_guessed_bandwidth_is_one_of_a_card_of_that_size() -> None:
    for size in (8, 12, 16, 24, 32, 48, 80, 96):
        alike = {card.bandwidth_gb_s for card in CARDS if 0.93 * size < card.gib <= size}
        assert cards.guessed_bandwidth(size * GIB) in alike


def test_every_size_has_a_guess() -> None:
    assert all(cards.guessed_bandwidth(n * GIB) > 0 for n in range(1, 2048))
