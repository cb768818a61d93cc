"""The numbers beside the chat, and the same in one line for narrow terminals.

Draws what `sections` says, and looks at the GPU once a second; computes nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content

from dflash_chat.gpu import Sample, Sampler
from dflash_chat.runtime.api import ModelInfo
from dflash_chat.ui.bars import columns
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.sections import SECTIONS, View, draft_words, sections, tooltip
from dflash_chat.ui.words import Words

GPU_PERIOD_S = 1.0


# Bars by their shade, as `bars.SHADES` has them, and how many times as fast as plain decoding.
_PAINT = (
    ("part-1", re.compile("[█▏▎▍▌▋▊▉▁▂▃▄▅▆▇]+")), ("part-2", re.compile("▓+")),
    ("part-3", re.compile("▒+")), ("part-4", re.compile("░+")),
    ("faster", re.compile(r"\d+\.\d+×")),
)  # fmt: skip


class Figures(Words):
    """A section's words, with coloured bars."""

    def painted(self, text: str) -> Content:
        """Bars in the colour of their shade."""
        content = Content(text)
        for name, pattern in _PAINT:
            for found in pattern.finditer(text):
                content = content.stylize(f".{name}", *found.span())
        return content


class SidePanel(VerticalScroll, can_focus=False):
    """One widget per section, in as much detail as there is room for."""

    COMPONENT_CLASSES: ClassVar = {name for name, _ in _PAINT}

    def __init__(self, watch: Callable[[], Sampler] = Sampler) -> None:
        super().__init__()
        self._watch = watch
        self._sampler: Sampler | None = None
        self.gpu: Sample | None = None

    def compose(self) -> ComposeResult:
        """One section each; what its numbers mean comes up under the mouse."""
        for name in SECTIONS:
            section = Figures(id=name, classes="section")
            section.tooltip = Content(tooltip(name))
            yield section

    def on_mount(self) -> None:
        """NVML is first asked when the screen stands, and never in the UI's own thread."""
        self.set_interval(GPU_PERIOD_S, self._look)

    async def _look(self) -> None:
        if self._sampler is None:
            self._sampler = await asyncio.to_thread(self._watch)
        if self._sampler.available:
            self.gpu = await asyncio.to_thread(self._sampler.sample)

    def on_unmount(self) -> None:
        """Let go of NVML."""
        if self._sampler is not None:
            self._sampler.close()

    def show_numbers(self, meter: Meter, info: ModelInfo | None, draft: bool, now: float) -> None:
        """Draw the present numbers."""
        on_gpu = info is not None and info.device.lower() != "cpu"
        view = View(meter, info, draft, now, self.gpu if on_gpu else None)
        shown, gap = sections(view, self.size.height)
        self.set_class(gap == 0, "-tight")
        for section in shown:
            words = self.query_one(f"#{section.name}", Words)
            words.display = bool(section.lines)
            words.show("\n".join(section.lines), section.title)


class StatusLine(Words):
    """The panel's numbers in one line."""

    def show_numbers(self, meter: Meter, info: ModelInfo | None, draft: bool, now: float) -> None:
        """Draw as many numbers as fit, the most important first."""
        rate = meter.now_tok_s(now) or meter.answer_tok_s
        words = [f"{rate:.0f} tok/s" if rate else "– tok/s"]
        if meter.speedup:
            words[0] += f" · {meter.speedup:.1f}×"
        if info is not None:
            words.append(draft_words(info, draft))
        if meter.spec.steps:
            words.append(f"tau {meter.spec.tau:.1f} {columns(meter.spec.histogram)[0]}")
        if info is not None:
            words.append(f"ctx {meter.context_tokens / info.context_tokens:.0%}")
        while len(words) > 1 and len(" · ".join(words)) > self.size.width:
            words.pop()
        self.show(" · ".join(words))
