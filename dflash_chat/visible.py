"""Which cards a CUDA program sees, and in which order: CUDA's own rules for a list of cards.

Knows CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER and MIG. Asks nobody; gpu.py knows the cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Device:
    """A card, or a MIG instance of one, as NVML lists it. `board` is the handle of the whole card.

    `speed` ranks unlike cards: cores × MHz. `alias` is the older name of a MIG instance, "" for a
    card. `instances` is None unless the card is in MIG mode.
    """

    handle: Any
    board: Any
    uuid: str
    speed: int = 0
    alias: str = ""
    instances: tuple[Device, ...] | None = None

    @property
    def devices(self) -> tuple[Device, ...]:
        """What CUDA could use: the card itself, or its instances."""
        return (self,) if self.instances is None else self.instances


def visible(cards: Sequence[Device], environ: Mapping[str, str]) -> list[Device]:
    """Of `cards` in PCI order: those that a CUDA program under `environ` sees, in its order.

    CUDA_VISIBLE_DEVICES lists indices and beginnings of UUIDs; it counts up to its first wrong
    entry, and if it names a card twice nothing is visible. Indices follow CUDA_DEVICE_ORDER: the
    fastest card first (how CUDA ranks them is not documented; here it is cores × clock), or the
    order on the bus. One MIG instance is all that a program can use beside no other device.
    Source: CUDA programming guide, environment variables; MIG user guide, CUDA visibility.
    """
    order = list(cards)
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        order.sort(key=lambda card: -card.speed)  # stable: like cards stay in PCI order
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        order = _chosen(order, chosen)
    devices = [device for card in order for device in card.devices]
    return next(([device] for device in devices if device.alias), devices)


def _chosen(order: Sequence[Device], text: str) -> list[Device]:
    chosen: list[Device] = []
    for entry in text.split(","):
        device = _named(order, entry.strip())
        if device is None:
            break
        if device in chosen:
            return []
        chosen.append(device)
    return chosen


def _named(order: Sequence[Device], entry: str) -> Device | None:
    if entry.startswith(("GPU-", "MIG-")):
        devices = (device for card in order for device in {card, *card.devices})
        found = [d for d in devices if d.uuid.startswith(entry) or d.alias == entry]
        return found[0] if len(found) == 1 else None
    digits = re.match(r"\d+", entry)  # CUDA reads "1st" as 1, too
    return order[int(digits[0])] if digits and int(digits[0]) < len(order) else None
