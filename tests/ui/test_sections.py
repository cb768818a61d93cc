"""What the panel says, to the letter, and what it gives up when rows are scarce."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dflash_chat.gpu import Sample
from dflash_chat.runtime.api import GLOSSARY, Prefill, StepStats, Timing, Tokens
from dflash_chat.ui import sections
from dflash_chat.ui.bars import bar, columns, stacked, thousands
from dflash_chat.ui.meter import Meter
from dflash_chat.ui.sections import SECTIONS, TOOLTIPS, View
from tests.ui.fake_client import INFO

CARD = replace(
    INFO, device="NVIDIA H200", target_bytes=51_300_000_000, drafter_bytes=900_000_000,
    cache_bytes=2_100_000_000, other_bytes=1_700_000_000,
)  # fmt: skip
SAMPLE = Sample(58_100_000_000, 140_000_000_000, 97, 327.4, 700.0, 1980, 64, "")


def view(gpu: Sample | None = None) -> View:
    """Two drafted passes and a plain one behind a prompt of 61 tokens, at time 10."""
    meter, info = Meter(), INFO if gpu is None else CARD
    meter.loaded(info)
    meter.read(Prefill(1, 4812, 4873, 4873))
    meter.take(Tokens(1, "x", 1, None, (1,), Timing(ttft_s=0.084, prefill_s=0.08)), 9.0)
    for drafted, accepted, at in ((7, 7, 9.1), (3, 1, 9.2), (0, 0, 9.5)):
        stats = StepStats(
            drafted, accepted, accepted + 1, 2.5 if drafted else 0.0, 7, 0.5, 0.5, 4884, "because"
        )
        meter.take(Tokens(1, "x", accepted + 1, stats), at)
    return View(meter, info, True, 10.0, gpu)


def text(name: str, shown: View, level: int = 3) -> str:
    return "\n".join(line.rstrip() for line in SECTIONS[name](shown, level))


def test_speed() -> None:
    assert text("speed", view()) == (
        "   379 tok/s  now\n"
        "   379 tok/s  answer\n"
        "█\n"
        "  3.03× plain, 125 tok/s\n"
        "measured 0 s ago at 4.9k"
    )


def test_before_a_live_pass_the_baseline_is_the_one_of_loading() -> None:
    meter = Meter()
    meter.loaded(replace(INFO, plain_ms=8.0, plain_context=1024))
    shown = View(meter, INFO, True, 0.0)
    assert text("speed", shown).endswith("–× plain, 125 tok/s\nmeasured at load at 1.0k")
    assert text("speed", View(Meter(), None, True, 0.0)).endswith("–× plain")


def test_drafting_that_loses_is_said_in_the_title() -> None:
    meter = Meter()
    meter.loaded(replace(INFO, plain_ms=8.0))
    meter.take(Tokens(1, "x", 1, StepStats(7, 0, 1, 2, 8, 0.5, 0.5, 10)), 0.0)
    titles = [s.title for s in sections.sections(View(meter, INFO, True, 0.0), 40)[0]]
    assert titles[0] == "SPEED  slower than plain"
    titles = [s.title for s in sections.sections(View(meter, INFO, False, 0.0), 40)[0]]
    assert titles[0] == "SPEED"
    as_fast = Meter()
    as_fast.loaded(replace(INFO, plain_ms=11.9))
    as_fast.take(Tokens(1, "x", 1, StepStats(7, 0, 1, 2, 9, 0.5, 0.5, 10)), 0.0)
    assert 0.98 < as_fast.speedup < 1
    titles = [s.title for s in sections.sections(View(as_fast, INFO, True, 0.0), 40)[0]]
    assert titles[0] == "SPEED"


def test_acceptance() -> None:
    assert text("acceptance", view()) == (
        "tau 3.7 = 2.7 drafted + 1\n"
        "█  █                 █\n"
        "█  █                 █\n"
        "█  █                 █\n"
        "1  2  3  4  5  6  7  8\n"
        "   █  ▄  ▄  ▄  ▄  ▄  ▄\n"
        "survival · full blocks 50%"
    )
    assert text("acceptance", view(), 1) == "tau 3.7 = 2.7 drafted + 1\n█  █                 █"


def test_block() -> None:
    assert text("block", view()) == (
        "████▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▒▒░\n"
        "█ draft 1.7   ▓ verify 7.0\n"
        "▒ sample 0.5  ░ host 0.5\n"
        "width 1 of 8, mean 4.3\n"
        "  because"
    )


def test_the_figures_behind_a_width_are_shown_when_they_were_told() -> None:
    shown = view()
    for figures in ("4 rows, 2.6 tokens in 13.20 ms; plain 1 in 9.80", ""):
        stats = StepStats(3, 1, 2, 2.5, 7, 0.5, 0.5, 4886, "because", figures=figures)
        shown.meter.take(Tokens(1, "x", 2, stats), 9.6)
        assert text("block", shown).endswith(
            "  because\n  lately 4 rows, 2.6\n  tokens in 13.20 ms;\n  plain 1 in 9.80"
        )
    shown.meter.begin()
    assert shown.meter.figures == ""


def test_prompt_and_context() -> None:
    assert text("prompt", view()) == "cached 4 812 · read 61\nttft 84 ms\nprefill 762 tok/s"
    assert text("context", view(), 1) == "4 884 of 8 192 · 60%"


def test_gpu() -> None:
    assert text("gpu", view(SAMPLE)) == (
        "58.1 of 140.0 GB · 97%\n"
        "█████████▒               ▏\n"
        "█ target 51.3 ▓ drafter 0.9\n"
        "▒ caches 2.1  ░ other 1.7\n"
        "327 W · 2.0 GHz · 64 °C"
    )
    assert text("gpu", view(replace(SAMPLE, throttled="power limit")), 1).endswith(
        "slowed down: power limit"
    )
    assert text("gpu", view()) == ""


def test_a_card_that_tells_nothing_still_has_its_parts() -> None:
    silent = Sample(None, None, None, None, None, None, None, None)
    assert text("gpu", view(silent)).splitlines()[1:] == [
        "█ target 51.3 ▓ drafter 0.9", "▒ caches 2.1  ░ other 1.7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("info", "draft", "words"),
    [
        (INFO, True, "draft ON k≤7"),
        (INFO, False, "draft OFF: switched off"),
        (replace(INFO, drafter=""), True, "draft OFF: no drafter"),
    ],
)
@pytest.mark.parametrize("rows", [16, 22, 48])
def test_there_is_always_a_line_that_says_whether_it_drafts(
    info: sections.ModelInfo, draft: bool, words: str, rows: int
) -> None:
    shown = replace(view(), info=info, draft=draft)
    engine = sections.sections(shown, rows)[0][-1]
    assert (engine.name, engine.lines[0]) == ("engine", words)


SLOWED = replace(SAMPLE, throttled="power supply")


@pytest.mark.parametrize("gpu", [None, SAMPLE, SLOWED], ids=["CPU", "GPU", "slowed GPU"])
@pytest.mark.parametrize("rows", range(16, 60))
def test_the_panel_fits_its_rows_and_more_rows_never_show_less(
    rows: int, gpu: Sample | None
) -> None:
    shown, gap = sections.sections(view(gpu), rows)
    used = [section for section in shown if section.lines]
    assert sum(section.height for section in used) + gap * (len(used) - 1) <= rows
    more, _ = sections.sections(view(gpu), rows + 1)
    assert all(len(a.lines) <= len(b.lines) for a, b in zip(shown, more, strict=True))
    assert all(len(line) <= 27 for section in shown for line in section.lines)
    lines = [line for section in shown for line in section.lines]
    assert ("slowed down: power supply" in lines) == (gpu is SLOWED)


def test_twenty_four_rows_show_every_section_but_no_gaps() -> None:
    """The title and the keys take two of them."""
    shown, gap = sections.sections(view(SAMPLE), 22)
    assert (gap, [section.name for section in shown if section.lines]) == (0, list(SECTIONS))


def test_every_word_of_a_tooltip_is_defined_once() -> None:
    words = [word for name in SECTIONS for word in TOOLTIPS[name]]
    assert len(set(words)) == len(words)
    assert set(words) <= set(GLOSSARY)
    assert "tau: acceptance length" in sections.tooltip("acceptance")


@pytest.mark.parametrize(
    ("values", "total", "drawn"),
    [
        ((1, 1, 1, 1), 0, "██▓▓▒▒░░"),
        ((1, 0, 3), 0, "██▒▒▒▒▒▒"),
        ((1, 1), 8, "█▓      "),
        ((), 0, "        "),
        ((0.01, 7.99), 0, "▓▓▓▓▓▓▓▓"),
    ],
)
def test_stacked_parts_fill_what_they_stand_for(
    values: tuple[float, ...], total: float, drawn: str
) -> None:
    assert stacked(values, 8, total) == drawn


def test_bars_and_columns() -> None:
    assert [bar(share, 4) for share in (-1, 0.125, 1, 9)] == ["    ", "▌   ", "████", "████"]
    assert columns([0, 1, 100], 2) == ["  █", " ▁█"]
    assert columns([0.5], top=1.0) == ["▄"]
    assert [thousands(n) for n in (999, 1000, 81234)] == ["999", "1.0k", "81.2k"]
