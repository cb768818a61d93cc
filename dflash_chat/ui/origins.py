"""Tokens events → an answer's text by block and origin. Pure Python; draws nothing.

A block is what one verify pass committed; the first one is the token that prefill gave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dflash_chat.runtime.api import Spec, StepStats, Tokens


class Origin(Enum):
    """Where a token comes from."""

    PROMPT = "prompt"  # the first one, from prefill
    ACCEPTED = "accepted"  # drafted, and the target agreed
    LOOKUP = "lookup"  # the same, but found in the text and not the drafter's
    CORRECTION = "correction"  # the target's own, in place of a draft it rejected
    BONUS = "bonus"  # the target's own, behind a block of accepted drafts
    PLAIN = "plain"  # the target's own, from a pass without drafts


@dataclass(slots=True)
class Piece:
    """The text of one token as far as it has come; `place` in the block is 0 for the first."""

    origin: Origin
    place: int
    text: str = ""


@dataclass(slots=True)
class Block:
    """What one pass committed; `stats` is None for the token that prefill gave."""

    stats: StepStats | None
    pieces: list[Piece] = field(default_factory=list)

    @property
    def tok_s(self) -> float:
        """Committed ÷ seconds of the pass; 0 if it was not timed."""
        ms = self.stats.total_ms if self.stats else 0.0
        return len(self.pieces) * 1000 / ms if ms else 0.0

    @property
    def missed(self) -> bool:
        """Whether it drafted and the target agreed with nothing."""
        return self.stats is not None and self.stats.drafted > 0 and self.stats.accepted == 0


class Trace:
    """The blocks of one answer, and their sums."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.spec = Spec()
        self._news: int | None = None
        self._last: list[tuple[int, Piece]] = []  # tokens that may still get text, and their blocks

    def news(self) -> int | None:
        """The first block that was added or got text since this was asked last, or None."""
        news, self._news = self._news, None
        return news

    def take(self, event: Tokens) -> None:
        """Take an event."""
        changed = number = len(self.blocks)
        if event.stats is not None:
            self.spec = self.spec.add(event.stats)
        if event.tokens:
            block = Block(event.stats)
            block.pieces = [Piece(_origin(event.stats, i), i) for i in range(event.tokens)]
            self.blocks.append(block)
            self._last += [(number, piece) for piece in block.pieces]
        self._last = self._last[-max(len(event.lengths), event.tokens, 1) :]
        at, lengths = 0, list(event.lengths)
        if self._last and sum(lengths) < len(event.text):
            lengths = lengths or [0]
            lengths[-1] += len(event.text) - sum(lengths)  # what nobody claims is the last one's
        owners = self._last[len(self._last) - len(lengths) :]
        for length, (number, piece) in zip(lengths, owners, strict=False):
            if length:
                piece.text += event.text[at : at + length]
                changed, at = min(changed, number), at + length
        if changed < len(self.blocks):
            self._news = changed if self._news is None else min(changed, self._news)


def _origin(stats: StepStats | None, place: int) -> Origin:
    if stats is None:
        return Origin.PROMPT
    if not stats.drafted:
        return Origin.PLAIN
    if place < stats.accepted:
        return Origin.LOOKUP if stats.found else Origin.ACCEPTED
    return Origin.BONUS if stats.full else Origin.CORRECTION
