"""GPUs by name: memory, bandwidth and compute capability, for plans without the card at hand.

Figures are the vendor's data sheets: memory in GiB as sold, bandwidth in 10⁹ bytes per second.
Knows names and figures; asks no driver (gpu.py does).
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from difflib import get_close_matches

from dflash_chat.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A kind of GPU. `gib` as sold; `bandwidth_gb_s` by data sheet."""

    name: str
    gib: float
    bandwidth_gb_s: float
    capability: tuple[int, int]

    @property
    def usable(self) -> int:
        """Bytes that are free on an idle card: what is sold, less the driver's share of it."""
        return usable(round(self.gib * GIB))


def usable(total: int) -> int:
    """Bytes of `total` that a driver leaves free on an idle card, about: a hundredth and a third of
    a GiB less. Cards of 8 to 140 GiB report 0.3 to 1.3 GiB less than they are sold with.
    """
    return max(0, total - total // 100 - GIB // 3)


_SHEETS: tuple[tuple[tuple[int, int], tuple[tuple[str, float, float], ...]], ...] = (
    ((7, 5), (("Tesla T4", 16, 320), ("RTX 2080 Ti", 11, 616))),
    (
        (8, 0),
        (
            ("A100 40GB", 40, 1555), ("A100 80GB PCIe", 80, 1935), ("A100 80GB SXM", 80, 2039),
            ("A30", 24, 933),
        ),
    ),
    (
        (8, 6),
        (
            ("RTX 3050", 8, 224), ("RTX 3060", 12, 360), ("RTX 3060 Ti", 8, 448),
            ("RTX 3070", 8, 448), ("RTX 3070 Ti", 8, 608), ("RTX 3080", 10, 760),
            ("RTX 3080 Ti", 12, 912), ("RTX 3090", 24, 936), ("RTX 3090 Ti", 24, 1008),
            ("RTX A2000", 12, 288), ("RTX A4000", 16, 448), ("RTX A5000", 24, 768),
            ("RTX A6000", 48, 768), ("A10", 24, 600), ("A40", 48, 696),
        ),
    ),
    (
        (8, 9),
        (
            ("RTX 4060 Laptop", 8, 256), ("RTX 4070 Laptop", 8, 256),
            ("RTX 4080 Laptop", 12, 432), ("RTX 4090 Laptop", 16, 576), ("RTX 4060", 8, 272),
            ("RTX 4060 Ti", 16, 288), ("RTX 4070", 12, 504), ("RTX 4070 Ti", 12, 504),
            ("RTX 4070 Ti SUPER", 16, 672), ("RTX 4080", 16, 717), ("RTX 4080 SUPER", 16, 736),
            ("RTX 4090", 24, 1008), ("RTX 4000 Ada", 20, 360), ("RTX 5000 Ada", 32, 576),
            ("RTX 6000 Ada", 48, 960), ("L4", 24, 300), ("L40", 48, 864), ("L40S", 48, 864),
        ),
    ),
    (
        (9, 0),
        (
            ("H100 PCIe", 80, 2000), ("H100 SXM", 80, 3350), ("H100 NVL", 94, 3900),
            ("GH200 96GB", 96, 4000), ("H200", 140.4, 4800),
        ),
    ),
    ((10, 0), (("B200", 180, 8000),)),
    (
        (12, 0),
        (
            ("RTX 5070 Laptop", 8, 384), ("RTX 5080 Laptop", 16, 896),
            ("RTX 5090 Laptop", 24, 896), ("RTX 5060", 8, 448), ("RTX 5060 Ti", 16, 448),
            ("RTX 5070", 12, 672), ("RTX 5070 Ti", 16, 896), ("RTX 5080", 16, 960),
            ("RTX 5090", 32, 1792), ("RTX PRO 4000", 24, 672), ("RTX PRO 4500", 32, 896),
            ("RTX PRO 5000", 48, 1344), ("RTX PRO 6000", 96, 1792),
        ),
    ),
)  # fmt: skip
CARDS = tuple(
    Card(name, gib, speed, capability)
    for capability, sheet in _SHEETS
    for name, gib, speed in sheet
)


def find(name: str) -> Card:
    """The card of this name, "NVIDIA", "GeForce" and case being left out.

    Raises UsageError with the nearest names.
    """
    wanted = _plain(name)
    known = {_plain(card.name): card for card in CARDS}
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[key].name for key in near)}?" if near else ""
    raise UsageError(f"no card named {name!r}", hint or "give its memory instead: --vram 24G")


def reported(name: str) -> Card | None:
    """The card whose name is in what a driver calls it, the longest one, or None."""
    words = f" {_plain(name)} "
    found = [card for card in CARDS if f" {_plain(card.name)} " in words]
    return max(found, key=lambda card: len(card.name), default=None)


def guessed_bandwidth(total: int) -> float:
    """GB/s of a card of this memory that nobody named: the middle of the known ones of its size,
    or of the next size below.
    """
    below = {card.gib for card in CARDS if card.gib * GIB <= total * 1.07}
    size = max(below, default=min(card.gib for card in CARDS))
    alike = (card for card in CARDS if size * 0.93 < card.gib <= size)
    return statistics.median_low(card.bandwidth_gb_s for card in alike)


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4070 Ti SUPER` → `rtx 4070 ti super`."""
    words = re.findall(r"[a-z]+|\d+[a-z]*", name.lower())
    joined = " ".join(word for word in words if word not in ("nvidia", "geforce", "gpu"))
    return re.sub(r"^(\d{4})", r"rtx \1", joined)
