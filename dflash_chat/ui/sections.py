"""What the side panel says: sections that shrink, so that the panel fits the rows there are.

Pure text. Every number is `Meter`'s, `ModelInfo`'s or NVML's; here are only words and bars. What
the words mean stands in `api.GLOSSARY`, from which each section's tooltip is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import wrap

from dflash_chat.gpu import Sample
from dflash_chat.runtime.api import GLOSSARY, ModelInfo
from dflash_chat.ui.bars import SHADES, bar, columns, grouped, stacked, thousands
from dflash_chat.ui.meter import Meter

WIDTH = 26  # cells of bars; a line of words may have one more
AS_FAST = 0.98  # of plain decoding: less of a difference is noise, and no bad news


@dataclass(frozen=True)
class View:
    """Everything there is to show. `gpu` is None without one."""

    meter: Meter
    info: ModelInfo | None
    draft: bool
    now: float
    gpu: Sample | None = None


@dataclass(frozen=True)
class Section:
    """A title and the lines below it; without lines it is left out."""

    name: str
    title: str
    lines: list[str]

    @property
    def height(self) -> int:
        """Rows, the title's included."""
        return 1 + len(self.lines) if self.lines else 0


Lines = Callable[[View, int], list[str]]


def speed_lines(view: View, level: int) -> list[str]:
    """tok/s now and for the answer, the rates before, and what plain decoding reaches."""
    meter = view.meter
    present, answer = meter.now_tok_s(view.now), meter.answer_tok_s
    lines = [
        f"{present:6.0f} tok/s  now" if present else "     – tok/s  now",
        f"{answer:6.0f} tok/s  answer" if answer else "     – tok/s  answer",
    ]
    if level > 1:
        lines.append(columns(meter.rates[-WIDTH:])[0])
    plain = meter.plain
    if plain is None:
        return [*lines, "     –× plain"]
    speedup = meter.speedup
    times = f"{speedup:6.2f}×" if speedup else "     –×"
    lines.append(f"{times} plain, {plain.tok_s:.0f} tok/s")
    if level > 1:
        age = meter.plain_age_s(view.now)
        when = "at load" if age is None else f"{age:.0f} s ago"
        lines.append(f"measured {when} at {thousands(plain.context_tokens)}")
    return lines


def acceptance_lines(view: View, level: int) -> list[str]:
    """tau in words, passes by committed tokens, and how far drafts survive."""
    spec, info = view.meter.spec, view.info
    if not (spec.steps or info):
        return ["tau –"]
    size = max(info.block_size if info else 0, len(spec.histogram), 1)
    counts = [*spec.histogram, *[0] * (size - len(spec.histogram))]
    step = max(1, min(3, WIDTH // size))
    tau = f"tau {spec.tau:.1f} = {max(spec.tau - 1, 0):.1f} drafted + 1" if spec.steps else "tau –"
    ticks = (" " * (step - 1)).join(str(n % 10) for n in range(1, size + 1))
    full = f"full blocks {spec.full_blocks:.0%}" if spec.drafted else "full blocks –"
    full = f"survival · {full}" if level > 2 else full
    lines = [tau, *columns(counts, 3 if level > 2 else 1, step)]
    if level > 1:
        lines.append(ticks)
    if level > 2:
        survival = (0.0, *spec.survival)[:size]  # the i-th draft stands below i + 1 tokens
        lines += columns(survival, 1, step, top=1.0)
    return [*lines, full] if level > 1 else lines


def block_lines(view: View, level: int) -> list[str]:
    """Milliseconds of a pass by part, and its width with the reason."""
    block, last = view.meter.block_ms, view.meter.last
    if last is None:
        return ["–"]
    parts = (block.draft, block.verify, block.sample, block.host)
    lines = [stacked(parts, WIDTH)]
    if level > 1:
        names = ("draft", "verify", "sample", "host")
        lines += _legend([f"{name} {ms:.1f}" for name, ms in zip(names, parts, strict=True)])
    most = f" of {view.info.draft_tokens + 1}" if view.info else ""
    spec = view.meter.spec
    lines.append(f"width {last.width}{most}, mean {spec.drafted / max(spec.steps, 1) + 1:.1f}")
    if level > 1:
        figures = f"lately {view.meter.figures}" if view.meter.figures else ""
        for words in (last.why, figures):
            lines += wrap(words, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return lines


def _legend(words: list[str]) -> list[str]:
    """Four parts behind the shades that stand for them, two to a line."""
    parts = [f"{shade} {word}" for shade, word in zip(SHADES, words, strict=True)]
    return [f"{parts[0]:13} {parts[1]}", f"{parts[2]:13} {parts[3]}"]


def prompt_lines(view: View, level: int) -> list[str]:
    """What was read this turn and how fast."""
    meter = view.meter
    if meter.prefill is None:
        return ["–"]
    lines = [f"cached {grouped(meter.prefill.cached)} · read {grouped(meter.read_tokens)}"]
    if level > 1:
        ttft = f"{meter.ttft_s * 1000:.0f} ms" if meter.ttft_s else "–"
        rate = f"{meter.prefill_tok_s:.0f} tok/s" if meter.prefill_tok_s else "–"
        lines += [f"ttft {ttft}", f"prefill {rate}"]
    return lines


def context_lines(view: View, level: int) -> list[str]:
    """How full the cache is."""
    if view.info is None:
        return ["–"]
    share = view.meter.context_tokens / view.info.context_tokens
    used, total = grouped(view.meter.context_tokens), grouped(view.info.context_tokens)
    lines = [f"{used} of {total} · {share:.0%}"]
    return [*lines, bar(share, WIDTH - 1) + "▏"] if level > 1 else lines


def gpu_lines(view: View, level: int) -> list[str]:
    """Memory by part and what NVML says; nothing without a GPU."""
    gpu, info = view.gpu, view.info
    if gpu is None or info is None:
        return []
    lines = []
    if gpu.used is not None and gpu.total:
        busy = "" if gpu.utilisation is None else f" · {gpu.utilisation}%"
        lines.append(f"{gpu.used / 1e9:.1f} of {gpu.total / 1e9:.1f} GB{busy}")
    parts = (info.target_bytes, info.drafter_bytes, info.cache_bytes, info.other_bytes)
    if level > 1:
        lines.append(stacked(parts, WIDTH - 1, gpu.total or 0) + "▏")
    if level > 2:
        names = ("target", "drafter", "caches", "other")
        lines += _legend([f"{name} {n / 1e9:.1f}" for name, n in zip(names, parts, strict=True)])
    now = [
        f"{gpu.power_w:.0f} W" if gpu.power_w is not None else "",
        f"{gpu.sm_clock_mhz / 1000:.1f} GHz" if gpu.sm_clock_mhz is not None else "",
        f"{gpu.temperature_c} °C" if gpu.temperature_c is not None else "",
    ]
    lines += [" · ".join(filter(None, now))] if any(now) else []
    return [*lines, f"slowed down: {gpu.throttled}"[:WIDTH]] if gpu.throttled else lines


def engine_lines(view: View, level: int) -> list[str]:
    """Whether it drafts, and what computes."""
    info = view.info
    if info is None:
        return ["not loaded yet"]
    lines = [draft_words(info, view.draft)]
    return [*lines, f"{info.device} · {info.dtype}", info.kernels] if level > 1 else lines


def draft_words(info: ModelInfo, draft: bool) -> str:
    """Whether drafting is on, and if not, why."""
    if not info.drafter:
        return "draft OFF: no drafter"
    return f"draft ON k≤{info.draft_tokens}" if draft else "draft OFF: switched off"


SECTIONS: dict[str, Lines] = {
    "speed": speed_lines,
    "acceptance": acceptance_lines,
    "block": block_lines,
    "prompt": prompt_lines,
    "context": context_lines,
    "gpu": gpu_lines,
    "engine": engine_lines,
}
TOOLTIPS = {
    "speed": ("tok/s", "plain", "speed-up"),
    "acceptance": ("tau", "accepted", "committed", "histogram", "survival", "full blocks"),
    "block": ("draft", "verify", "sample", "host", "width", "lately"),
    "prompt": ("cached", "read", "ttft", "prefill"),
    "context": ("context",),
    "gpu": ("memory by part",),
    "engine": ("drafted",),
}
# What is given up first when rows are scarce: a section and the level it falls to, 0 hides it.
FOLDS = (
    ("engine", 1), ("acceptance", 2), ("gpu", 2), ("prompt", 1), ("block", 1), ("context", 1),
    ("acceptance", 1), ("speed", 1), ("gpu", 1), ("prompt", 0), ("context", 0), ("gpu", 0),
    ("block", 0),
)  # fmt: skip


def tooltip(name: str) -> str:
    """The definitions of a section's numbers."""
    return "\n".join(f"{word}: {GLOSSARY[word]}" for word in TOOLTIPS[name])


def sections(view: View, rows: int) -> tuple[list[Section], int]:
    """All sections in as much detail as `rows` allow, and the blank rows below each."""
    levels = dict.fromkeys(SECTIONS, 3)
    made = {name: _section(name, view, 3) for name in SECTIONS}
    if _height(made) + sum(1 for s in made.values() if s.lines) - 1 <= rows:
        return list(made.values()), 1
    for name, level in FOLDS:
        if _height(made) <= rows:
            break
        levels[name] = level
        made[name] = _section(name, view, level)
    return list(made.values()), 0


def _section(name: str, view: View, level: int) -> Section:
    title = name.upper()
    if name == "speed" and view.draft and 0 < view.meter.speedup < AS_FAST:
        title = "SPEED  slower than plain"
    if name == "block" and view.meter.last is not None:
        title = f"BLOCK  {view.meter.block_ms.total:.1f} ms"
    return Section(name, title, SECTIONS[name](view, level) if level else [])


def _height(made: dict[str, Section]) -> int:
    return sum(section.height for section in made.values())
