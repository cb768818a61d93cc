"""Numbers as block glyphs. Colour is never needed to read them."""

from __future__ import annotations

from collections.abc import Sequence

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = " ▁▂▃▄▅▆▇█"
SHADES = "█▓▒░"


def bar(share: float, width: int) -> str:
    """A bar of `share` (0 to 1) of `width` cells, in eighths of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()).ljust(width)


def stacked(values: Sequence[float], width: int, total: float = 0.0) -> str:
    """Up to four values side by side, one shade each, in `width` cells that stand for `total`, or
    for their sum; blank where nothing is left. Boundaries lie where they are rounded to.
    """
    whole = max(total, sum(values)) or 1.0
    cells, reached = "", 0.0
    for shade, value in zip(SHADES, values, strict=False):
        reached += value
        cells += shade * (round(reached / whole * width) - len(cells))
    return cells.ljust(width)


def columns(values: Sequence[float], rows: int = 1, step: int = 1, top: float = 0.0) -> list[str]:
    """Upright bars scaled to `top`, or to the largest value, top row first; only zero is
    invisible.
    """
    top = top or max(values, default=0) or 1
    eighths = [max(round(value / top * rows * 8), 1 if value else 0) for value in values]
    return [
        (" " * (step - 1)).join(LEVELS[min(max(height - row * 8, 0), 8)] for height in eighths)
        for row in reversed(range(rows))
    ]


def grouped(number: int) -> str:
    """4873 → "4 873"."""
    return f"{number:,}".replace(",", " ")


def thousands(number: int) -> str:
    """4873 → "4.9k"."""
    return f"{number / 1000:.1f}k" if number >= 1000 else str(number)
