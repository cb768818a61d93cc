"""Plan: what a pair takes of this machine and why, what would change it, and loading it that way.

The planner decides and explains; it is asked in a thread, for a machine without our engine, since
that one ends before anything else is loaded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, TypeVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.style import Style
from textual.widgets import Static

from dflash_chat import calibration, gpu, hub, planner
from dflash_chat.calibration import Key
from dflash_chat.candidates import Plan, Wishes
from dflash_chat.entries import Pair
from dflash_chat.errors import UserError
from dflash_chat.gpu import Gpu
from dflash_chat.plan import as_json, free_ram
from dflash_chat.progress import size
from dflash_chat.reasons import gib, remedy, shortage
from dflash_chat.runtime.api import Load, ModelInfo
from dflash_chat.ui import clipboard, plan_page
from dflash_chat.ui.benching import Benching
from dflash_chat.ui.dialogue import Dialogue
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.plan_page import Loaded, Part
from dflash_chat.ui.words import GAP, Words, flow, flowing

KEYS = (
    "↑/↓ choice",
    "←/→ change",
    "0–9 type it",
    "PageDown more",
    "a apply",
    "b bench now",
    "r reset",
    "j copy JSON",
    "Esc close",
)
REFRESH_S = 1.0
QUANT, WIDTH, CONTEXT = range(3)
T = TypeVar("T", str, int)
_DIGITS = 8
_WORDS = 7  # pieces of text on the screen


class MemoryBar(Static):
    """The parts of the memory, by colour and by letter, and what the letters stand for."""

    COMPONENT_CLASSES: ClassVar = {"part-spare", *(f"part-{letter}" for letter in "WDCGR")}

    _made: tuple[list[Part], int, str] | None = None

    def show(self, made: Plan) -> None:
        """Draw this plan's."""
        self._made = plan_page.parts(made.budget), made.free, plan_page.spare_words(made)
        self.refresh(layout=True)

    def render(self) -> Content:
        """The bar above its legend."""
        if self._made is None:
            return Content("planning …")
        parts, free, spare = self._made
        width = max(self.content_size.width, 20)
        bar = [
            Content.styled(letter * n, self._style(letter))
            for letter, n in plan_page.cells(parts, free, width)
        ]
        legend = {f" {p.letter}  {p.name} {gib(p.bytes)}": p.letter for p in parts}
        lines = [
            Content(GAP).join(self._with_sign(words, legend.get(words, "")) for words in line)
            for line in flow([*legend, spare], width)
        ]
        return Content("\n").join([Content("").join(bar), *lines])

    def _with_sign(self, words: str, letter: str) -> Content:
        return Content(words).stylize(self._style(letter), 0, 3) if letter else Content(words)

    def _style(self, letter: str) -> Style:
        return self.get_visual_style(f"part-{letter if letter.isalpha() else 'spare'}")


class PlanScreen(ClosesOnce, Screen[Load | None]):
    """Ends with what should be loaded instead, or None.

    `load` is how the pair is, or would be, loaded. `held` counts the bytes that the engine holds
    now of the device. `dialogue` is there if this is the pair that its engine has loaded; with
    `bench` that is measured at once. `fetch` begins a pull of a pair's build and says so.
    """

    BINDINGS: ClassVar = [
        Binding("escape,q,f4", "leave", "Close", id="close_plan"),
        Binding("up", "choose(-1)", "Choice above", id="plan_up"),
        Binding("down", "choose(1)", "Choice below", id="plan_down"),
        Binding("left", "change(-1)", "Less", id="plan_less"),
        Binding("right", "change(1)", "More", id="plan_more"),
        Binding("pageup", "page(-1)", "Page up", id="plan_page_up"),
        Binding("pagedown", "page(1)", "Page down", id="plan_page_down"),
        Binding("a", "apply", "Load it so", id="plan_apply"),
        Binding("r", "reset", "As it was", id="plan_reset"),
        Binding("b", "bench", "Bench now", id="plan_bench"),
        Binding("j", "copy_json", "Copy as JSON", id="plan_json"),
        Binding("backspace", "rub_out", "Take a digit back", id="plan_rub_out"),
        *(Binding(digit, f"digit('{digit}')", show=False) for digit in "0123456789"),
    ]

    def __init__(
        self, pair: Pair, load: Load, held: int, fetch: Callable[[str, str], str],
        dialogue: Dialogue | None = None, bench: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pair, self.load = pair, load
        self._held, self._dialogue, self._bench_now = held, dialogue, bench
        self._fetch, self._sure = fetch, ""  # the build that is fetched if it is wished again
        self._info = dialogue.info if dialogue else None
        self._benching = Benching(dialogue, self._benched)
        self._wishes = self._first = Wishes(load.quant, load.options)
        self.made: Plan | None = None
        self.settled = False  # `made` is of the present wishes
        self.problem = ""
        self._loaded: Loaded | None = None
        self._card: Gpu | None = None
        self._why_cpu = ""
        self._row, self._typed = QUANT, ""

    def compose(self) -> ComposeResult:
        """Title; memory, choices, reasons, figures; keys."""
        yield Words(id="plan-title")
        with VerticalScroll(id="plan-page", can_focus=False):
            yield MemoryBar(id="plan-memory")
            yield Words(id="plan-choices")
            yield Words(id="plan-problem")
            yield Words(id="plan-bench")
            yield Words(id="plan-why")
            yield Words(id="plan-figures")
        yield Words(id="plan-keys")

    def on_mount(self) -> None:
        """Ask the driver, then the planner."""
        self._begin()
        self.set_interval(REFRESH_S, self._draw)

    def on_resize(self) -> None:
        """Lines are broken by us."""
        self.query_one("#plan-keys", Words).show(flowing(KEYS, self.size.width - 2))
        self.call_after_refresh(self._draw)

    # ── planning ────────────────────────────────────────────────────────────────────────────────

    @work(exclusive=True, group="plan")
    async def _begin(self) -> None:
        """Find the device, and what the plan says of that which is loaded."""
        await asyncio.to_thread(self._survey)
        if self._info is not None:
            self._loaded = await asyncio.to_thread(self._as_loaded, self._info)
        await self._plan()
        if self._loaded and self.made and self.made.build != self._loaded.plan.build:
            self._first = self._wishes = replace(self._wishes, build=self._loaded.plan.build.name)
            await self._plan()
        if self._bench_now:
            self.action_bench()

    def _survey(self) -> None:
        on_cpu = self._info is not None and self._info.device.lower() == "cpu"
        if self.load.options.device == "cpu" or on_cpu:
            self._why_cpu = "as it is loaded" if on_cpu else "as you named it"
            return
        found = gpu.survey()
        self._card = found.gpus[0] if found.gpus else None
        self._why_cpu = found.problem

    def _ask(self, wishes: Wishes, estimated: bool = False) -> Plan:
        """The plan on this device as it would be without our engine."""
        card, ram = self._card, 0
        if card is None:
            ram = (free_ram() or -self._held) + self._held
        else:
            card = replace(card, free=card.free + self._held)
        if estimated:
            return planner.plan(self.pair, wishes, card, ram)
        return planner.plan(self.pair, wishes, card, ram, calibration.read)

    def _as_loaded(self, info: ModelInfo) -> Loaded | None:
        found = hub.installed(self.pair, self.load.quant)
        build = found.build.name if found else self.load.quant
        options = replace(self.load.options, context_tokens=info.context_tokens)
        try:
            plan = self._ask(Wishes(build, options), estimated=True)
        except UserError:
            return None
        card = self._card
        device = (card.name, card.driver) if card else ("", "")
        known = calibration.read(Key(*device, self.pair.name, plan.build.name))
        return Loaded(plan, plan.costs, info, known.costs, None, None)

    async def _plan(self) -> None:
        try:
            self.made = await asyncio.to_thread(self._ask, self._wishes)
            self.problem = ""
        except UserError as error:
            self.problem = f"{error.message}. {error.hint}".strip(". ")
        self.settled = True
        self._draw()

    @work(exclusive=True, group="plan")
    async def _plan_again(self) -> None:
        await self._plan()

    @work(exclusive=True, group="plan")
    async def _benched(self) -> None:
        """A bench has ended: the plan may go by what it found."""
        self._info = self._dialogue.info if self._dialogue else None
        if self._info is not None:
            self._loaded = await asyncio.to_thread(self._as_loaded, self._info)
        await self._plan()

    # ── drawing ─────────────────────────────────────────────────────────────────────────────────

    def _draw(self) -> None:
        if len(self.query(Words)) < _WORDS:  # not composed yet, or gone while the plan was made
            return
        made = self.made
        self.query_one("#plan-title", Words).show(self._title())
        choices = plan_page.choice_lines(made, self._wishes, self._row, self._typed)
        self.query_one("#plan-choices", Words).show("\n".join(choices), "change")
        problem = self.query_one("#plan-problem", Words)
        problem.display = bool(words := self._trouble())
        problem.show(words)
        bench = self.query_one("#plan-bench", Words)
        bench.display = bool(lines := self._benching.lines())
        bench.show("\n".join(lines), "bench")
        if made is None:
            return
        self.query_one(MemoryBar).show(made)
        width = self.query_one("#plan-why").content_size.width
        reasons = plan_page.reason_lines(made, width)
        self.query_one("#plan-why", Words).show("\n".join(reasons), "why")
        figures = plan_page.measured_lines(made, self._now_loaded())
        self.query_one("#plan-figures", Words).show(
            "\n".join(figures), "estimates and measurements"
        )

    def _title(self) -> str:
        name = f"Plan · {self.pair.name}"
        if self.made is None:
            return name
        name += f"@{self.made.build.name}"
        if self._card is None:
            why = f" ({self._why_cpu})" if self._why_cpu else ""
            return f"{name} on the CPU{why}"
        return f"{name} on {self._card.name} ({gib(self.made.free)} free without this chat)"

    def _trouble(self) -> str:
        """What is wrong with the wish, or with the plan."""
        made = self.made
        if self.problem:
            return f"! {self.problem}"
        if made is None:
            return ""
        if made.missing:
            return f"! it cannot be loaded yet: {made.missing}"
        return "" if made.fits else f"✗ {shortage(made)}; {remedy(made)}"

    def _now_loaded(self) -> Loaded | None:
        if self._loaded is None or self._dialogue is None:
            return self._loaded
        now, meter = time.monotonic(), self._dialogue.meter
        return replace(self._loaded, plain=meter.plain, plain_age_s=meter.plain_age_s(now))

    # ── keys ────────────────────────────────────────────────────────────────────────────────────

    def action_leave(self) -> None:
        """Stop the bench; else back, and nothing is loaded."""
        if self._benching.running:
            self._benching.stop()
        else:
            self.dismiss(None)

    def on_unmount(self) -> None:
        """Nobody waits for the bench any more."""
        self._benching.close()

    def action_bench(self) -> None:
        """Measure what is loaded, for some seconds."""
        self._benching.start()
        self._draw()

    def action_choose(self, by: int) -> None:
        """Go to another of the three choices."""
        self._row, self._typed = (self._row + by) % 3, ""
        self._look_at_choices()
        self._draw()

    def _look_at_choices(self) -> None:
        """What is being changed is in view, however few rows there are."""
        choices = self.query_one("#plan-choices")
        self.query_one("#plan-page").scroll_to_widget(choices, animate=False)

    def action_page(self, by: int) -> None:
        """Scroll."""
        page = self.query_one("#plan-page", VerticalScroll)
        (page.scroll_page_down if by > 0 else page.scroll_page_up)(animate=False)

    def action_change(self, by: int) -> None:
        """Take the next value that there is, or the one before."""
        self._typed = ""
        options = self._wishes.options
        if self._row == QUANT:
            build = _beside(plan_page.builds(self.pair), self._wishes.build, by)
            self._wish(replace(self._wishes, build=build))
        elif self._row == WIDTH:
            known = plan_page.widths(self.pair)
            self._wish_number(_beside(known, options.draft_tokens, by))
        else:
            now = options.context_tokens
            known = plan_page.contexts(self.pair, now)
            self._wish_number(_beside(known, now, by))

    def action_digit(self, digit: str) -> None:
        """Type a number: of drafted tokens if that is the choice, else of context."""
        if self._row == QUANT:
            self._row = CONTEXT
        self._type((self._typed + digit).lstrip("0")[:_DIGITS])

    def action_rub_out(self) -> None:
        """Take a digit back."""
        self._type(self._typed[:-1])

    def _type(self, typed: str) -> None:
        self._typed = typed
        if self._row != QUANT:
            self._wish_number(int(typed or 0))

    def _wish_number(self, number: int) -> None:
        """Of drafted tokens or of context, whichever is the choice; 0 leaves it to the planner."""
        options = self._wishes.options
        if self._row == WIDTH:
            options = replace(options, draft_tokens=number)
        else:
            options = replace(options, context_tokens=number)
        self._wish(replace(self._wishes, options=options))

    def _wish(self, wishes: Wishes) -> None:
        self._wishes, self.settled = wishes, False
        self._look_at_choices()
        self._draw()
        self._plan_again()

    def action_reset(self) -> None:
        """As it is loaded."""
        self._typed = ""
        self._wish(self._first)

    def action_copy_json(self) -> None:
        """Copy what `plan --json` prints."""
        if self.made is not None:
            text = json.dumps(as_json(self.made), indent=1)
            self.run_worker(clipboard.hand_over(self.app, text, "the plan"), group="copy")

    def _fetched(self, made: Plan) -> str:
        """Fetch its build, the second time it is asked for."""
        name = made.build.name
        if self._sure != name:
            self._sure = name
            count = size(made.build.source.bytes)
            return f"{name} is not installed; a again fetches it, {count} and its drafter"
        self._sure = ""
        return self._fetch(self.pair.name, name)

    def action_apply(self) -> None:
        """Load the pair as planned, unless that cannot be."""
        made = self.made
        if made is None or not self.settled or self._trouble():
            self.notify(self._trouble() or "The plan is being made", markup=False)
            return
        if self._benching.running:
            self.notify("The bench is running; Esc stops it")
            return
        if hub.installed(self.pair, made.build.name) is None:
            self.notify(self._fetched(made), markup=False)
            return
        options = self._wishes.options
        wanted = replace(
            self.load.options, context_tokens=options.context_tokens,
            draft_tokens=options.draft_tokens,
        )  # fmt: skip
        self.dismiss(Load(self.load.pair, made.build.name, wanted))


def _beside(known: list[T], now: T, by: int) -> T:
    at = known.index(now) if now in known else 0
    return known[(at + by) % len(known)]
