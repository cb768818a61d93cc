"""The numbers beside the chat, and the same in one line for narrow terminals.

Draws what `Meter` says; computes nothing but lengths of bars.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from dflash_chat.runtime.api import ModelInfo
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.words import Words

WIDTH = 26  # cells inside the panel
EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = " ▁▂▃▄▅▆▇█"


def bar(share: float, width: int) -> str:
    """A bar of `share` (0 to 1) of `width` cells, in eighths of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()).ljust(width)


def columns(values: Sequence[float], rows: int = 1, step: int = 1) -> list[str]:
    """Upright bars scaled to the largest value, top row first; only zero is invisible."""
    top = max(values, default=0) or 1
    eighths = [max(round(value / top * rows * 8), 1 if value else 0) for value in values]
    return [
        (" " * (step - 1)).join(LEVELS[min(max(height - row * 8, 0), 8)] for height in eighths)
        for row in reversed(range(rows))
    ]


def grouped(number: int) -> str:
    """4873 → "4 873"."""
    return f"{number:,}".replace(",", " ")


def draft_words(info: ModelInfo, draft: bool) -> str:
    """Whether drafting is on, and if not, why."""
    if not info.drafter:
        return "draft OFF: no drafter"
    return f"draft ON k≤{info.draft_tokens}" if draft else "draft OFF: switched off"


class SidePanel(VerticalScroll, can_focus=False):
    """SPEED, ACCEPTANCE, BLOCK, CONTEXT and ENGINE."""

    def compose(self) -> ComposeResult:
        """One section each."""
        for name in ("speed", "acceptance", "block", "context", "engine"):
            yield Words(id=name, classes="section")

    def show_numbers(self, meter: Meter, info: ModelInfo | None, draft: bool, now: float) -> None:
        """Draw the present numbers."""
        total_ms = f"{meter.block_ms.total:.1f} ms" if meter.spec.steps else "–"
        self._show("speed", "SPEED", speed_lines(meter, now))
        self._show("acceptance", "ACCEPTANCE", acceptance_lines(meter, info))
        self._show("block", f"BLOCK  {total_ms}", block_lines(meter))
        self._show("context", "CONTEXT", context_lines(meter, info))
        self._show("engine", "ENGINE", engine_lines(info, draft))

    def _show(self, name: str, title: str, lines: list[str]) -> None:
        self.query_one(f"#{name}", Words).show("\n".join(lines), title)


def speed_lines(meter: Meter, now: float) -> list[str]:
    """tok/s now and for the answer, and the rates before."""
    present = meter.now_tok_s(now)
    return [
        f"{present:6.0f} tok/s  now" if present else "     – tok/s  now",
        f"{meter.answer_tok_s:6.0f} tok/s  answer"
        if meter.answer_tok_s
        else "     – tok/s  answer",
        columns(meter.rates[-WIDTH:])[0],
    ]


def acceptance_lines(meter: Meter, info: ModelInfo | None) -> list[str]:
    """tau in words and the histogram of committed tokens per pass."""
    spec = meter.spec
    if not (spec.steps or info):
        return ["tau –"]
    size = max(info.block_size if info else 0, len(spec.histogram), 1)
    counts = [*spec.histogram, *[0] * (size - len(spec.histogram))]
    step = max(1, min(3, WIDTH // size))
    tau = f"tau {spec.tau:.1f} = {max(spec.tau - 1, 0):.1f} drafted + 1" if spec.steps else "tau –"
    ticks = (" " * (step - 1)).join(str(n % 10) for n in range(1, size + 1))
    return [tau, *columns(counts, 3, step), ticks, "tokens per verify pass"]


def block_lines(meter: Meter) -> list[str]:
    """Milliseconds of a pass by part."""
    block = meter.block_ms
    parts = {
        "draft": block.draft,
        "verify": block.verify,
        "sample": block.sample,
        "host": block.host,
    }
    total = block.total or 1.0
    if not meter.spec.steps:
        return list(parts)
    return [f"{name:6} {bar(ms / total, WIDTH - 13)}{ms:6.1f}" for name, ms in parts.items()]


def context_lines(meter: Meter, info: ModelInfo | None) -> list[str]:
    """How full the cache is."""
    if info is None:
        return ["–"]
    share = meter.context_tokens / info.context_tokens
    used, total = grouped(meter.context_tokens), grouped(info.context_tokens)
    return [f"{used} of {total} · {share:.0%}", bar(share, WIDTH - 1) + "▏"]


def engine_lines(info: ModelInfo | None, draft: bool) -> list[str]:
    """What is loaded and whether it drafts."""
    if info is None:
        return ["not loaded yet"]
    return [draft_words(info, draft), f"{info.device} · {info.dtype}", info.kernels]


class StatusLine(Words):
    """The panel's numbers in one line."""

    def show_numbers(self, meter: Meter, info: ModelInfo | None, draft: bool, now: float) -> None:
        """Draw as many numbers as fit, the most important first."""
        rate = meter.now_tok_s(now) or meter.answer_tok_s
        words = [f"{rate:.0f} tok/s" if rate else "– tok/s"]
        if meter.spec.steps:
            words.append(f"tau {meter.spec.tau:.1f} {columns(meter.spec.histogram)[0]}")
        if info is not None:
            words.append(f"ctx {meter.context_tokens / info.context_tokens:.0%}")
            words.append(draft_words(info, draft))
        while len(words) > 1 and len(" · ".join(words)) > self.size.width:
            words.pop()
        self.show(" · ".join(words))
