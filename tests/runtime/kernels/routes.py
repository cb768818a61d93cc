"""What a routing says, taken apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_chat.runtime.kernels.router import Routing


class Member(NamedTuple):
    """A row at a place."""

    place: int
    expert: int
    row: int
    rank: int


def members(routing: Routing) -> list[Member]:
    """Every row of every place."""
    found = []
    for place, entry in enumerate(routing.experts[: int(routing.active)].tolist()):
        for member in routing.members[place, : entry >> 16].tolist():
            found.append(Member(place, entry % 2**16, member % 2**16, member >> 16))
    return found


def slots_of(routing: Routing) -> Tensor:
    """int64 [T, k], the expert of each rank; every one is there exactly once."""
    slots = torch.full(routing.weights.shape, -1)
    for _, expert, row, rank in members(routing):
        assert slots[row, rank] == -1, f"row {row} has two experts of rank {rank}"
        slots[row, rank] = expert
    assert (slots >= 0).all(), f"{slots}"
    return slots
