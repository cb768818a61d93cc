"""An answer's blocks as rows of marked text: what X-ray draws, without drawing it. Pure Python.

    ▏A fixed-size buffer▏ keeps two~ indices~▏, head and▸▏

A border opens each block, ≡ one whose drafts were found in the text. ~…~ is the target's
correction, ▸ follows a bonus, and text without a mark was accepted (or, alone in its block, came of
a pass that drafted nothing), so that no colour is needed. Only blocks that changed are laid out
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, chop_cells

from dflash_chat.ui.origins import Block, Origin, Piece

BORDER, FOUND = "▏", "≡"
SHADES = 4  # of accepted tokens, by place

# What a model writes is shown and not obeyed.
_PICTURES: dict[int, int] = {c: 0x2400 + c for c in range(0x20)} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
del _PICTURES[ord("\n")]


class Run(NamedTuple):
    """Text of one block in one style, "" being the border's."""

    text: str
    block: int
    style: str


class _Place(NamedTuple):
    row: int
    runs: int
    column: int


class Layout:
    """Rows of `width` cells."""

    def __init__(self, width: int) -> None:
        self.width = max(width, 8)
        self.rows: list[list[Run]] = [[]]
        self._column = 0
        self._starts: list[_Place] = []

    def update(self, blocks: Sequence[Block], changed: int) -> None:
        """Lay out the blocks from number `changed` on."""
        if changed < len(self._starts):
            row, runs, self._column = self._starts[changed]
            del self.rows[row + 1 :], self.rows[row][runs:], self._starts[changed:]
        for number in range(len(self._starts), len(blocks)):
            self._starts.append(_Place(len(self.rows) - 1, len(self.rows[-1]), self._column))
            stats = blocks[number].stats
            self._put(Run(FOUND if stats and stats.found else BORDER, number, ""))
            for piece in blocks[number].pieces:
                for text, style in marked(piece):
                    self._write(text, number, style)

    @property
    def blocks(self) -> int:
        """How many are laid out."""
        return len(self._starts)

    def row_of(self, block: int) -> int:
        """The row in which a block begins, its border included."""
        place = self._starts[block]
        return place.row if place.column < self.width else place.row + 1

    def last_row_of(self, block: int) -> int:
        """The row in which a block ends."""
        following = block + 1
        return self._starts[following].row if following < len(self._starts) else len(self.rows) - 1

    def block_at(self, row: int, column: int) -> int | None:
        """Whose text stands in a cell."""
        if not 0 <= row < len(self.rows):
            return None
        for run in self.rows[row]:
            column -= cell_len(run.text)
            if column < 0:
                return run.block
        return None

    def _write(self, text: str, block: int, style: str) -> None:
        first, *others = text.translate(_PICTURES).split("\n")
        self._put(Run(first, block, style))
        for line in others:
            self._break()
            self._put(Run(line, block, style))

    def _put(self, run: Run) -> None:
        """Append a run, in a new row if it does not fit, in several if no row could hold it."""
        cells = cell_len(run.text)
        if self._column + cells > self.width and self._column > 0:
            self._break()
        if cells <= self.width:
            self._append(run, cells)
            return
        for part in chop_cells(run.text, self.width):
            if self._column:
                self._break()
            self._append(run._replace(text=part), cell_len(part))

    def _append(self, run: Run, cells: int) -> None:
        if run.text:
            self.rows[-1].append(run)
            self._column += cells

    def _break(self) -> None:
        self.rows.append([])
        self._column = 0


def marked(piece: Piece) -> list[tuple[str, str]]:
    """A token's text with its mark, in the styles of its parts. White space is left outside the
    mark; where there is nothing else, or no text at all, a sign stands for it.
    """
    match piece.origin:
        case Origin.ACCEPTED:
            return [(piece.text, f"accepted-{shade(piece.place)}")]
        case Origin.CORRECTION:
            before, core, after = _parts(piece.text)
            return [(before, "plain"), (f"~{core}~", "correction"), (after, "plain")]
        case Origin.BONUS:
            before, core, after = _parts(piece.text)
            return [(before + core + "▸" + after, "bonus")]
        case Origin.LOOKUP:
            return [(piece.text, "lookup")]
        case Origin.PLAIN | Origin.PROMPT:
            return [(piece.text, "plain")]


def shade(place: int) -> int:
    """1 for the first two tokens of a block, then 2, 3 and 4, each for twice as many."""
    return min((place // 2 + 1).bit_length(), SHADES)


def _parts(text: str) -> tuple[str, str, str]:
    """White space before, what it surrounds, and white space behind."""
    core = text.strip()
    if core:
        before, _, after = text.partition(core)
        return before, core, after
    sign = "↵" if "\n" in text else "·" if text else "_"
    return "", sign, text


def next_missed(blocks: Sequence[Block], current: int) -> int | None:
    """The next block behind `current` of which no draft was accepted, around the end; None if
    there is none.
    """
    numbers = [*range(current + 1, len(blocks)), *range(min(current + 1, len(blocks)))]
    return next((number for number in numbers if blocks[number].missed), None)


def worst(blocks: Sequence[Block]) -> int | None:
    """The block that committed least per second of those that drafted, the first of equals."""
    drafted = [i for i, block in enumerate(blocks) if block.stats and block.stats.drafted]
    return min(drafted, key=lambda i: blocks[i].tok_s, default=None)


def figures(blocks: Sequence[Block], current: int) -> tuple[str, str]:
    """Two lines about a block: what it brought, and what it cost."""
    if not blocks:
        return "no token yet", ""
    block, stats = blocks[current], blocks[current].stats
    number = f"block {current + 1} of {len(blocks)}"
    if stats is None:
        return f"{number} · the prompt's own token", ""
    brought = f"{stats.accepted}/{stats.drafted} accepted" if stats.drafted else "nothing drafted"
    if stats.found:
        brought += ", found in the text"
    first = f"{number} · {brought} · {stats.total_ms:.1f} ms · {block.tok_s:.0f} tok/s"
    second = (
        f"draft {stats.draft_ms:.1f} · verify {stats.verify_ms:.1f} · "
        f"sample {stats.sample_ms:.1f} · host {stats.host_ms:.1f} ms"
    )
    return first, second + (f" · {stats.why}" if stats.why else "")
