"""All pairs: what fits here, what the hub gives, what is installed; fetch, load, remove.

Fetching and removing are commands of ours in processes of their own, so that they can be stopped
and say the same here as in a shell. Ends with what should be loaded; a pull goes on without it.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from dflash_chat import here, listing, removal
from dflash_chat.access import READABLE
from dflash_chat.errors import EXIT_ACCESS, UserError
from dflash_chat.here import Machine
from dflash_chat.hub import ASK_ABOVE_BYTES
from dflash_chat.progress import Step, size
from dflash_chat.reasons import gib
from dflash_chat.runtime.api import EngineOptions, Load
from dflash_chat.ui import browser, clipboard, fetching, gate, models_table
from dflash_chat.ui.fetching import Pull
from dflash_chat.ui.models_table import Entry
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.plan_screen import PlanScreen
from dflash_chat.ui.text_screen import TextScreen
from dflash_chat.ui.watching import Watch
from dflash_chat.ui.words import Words, flowing

KEYS = (
    "Enter fetch or load", "/ filter", "s stop the pull", "d dry run", "x remove", "i details",
    "n tell me once it is open", "F4 plan", "Esc close",
)  # fmt: skip
LOOK_S = 0.5
SETTLE_S = 0.3  # a pair is asked about once the cursor rests on it
RECHECK_S = 5.0


class PairList(OptionList):
    """What stands below takes and gives room; the cursor stays in view."""

    def on_resize(self) -> None:
        """Scroll to the cursor once the rows are laid out."""
        self.call_after_refresh(self.scroll_to_highlight)


class ModelsScreen(ClosesOnce, Screen[Load | None]):
    """Ends with what should be loaded, or None. `loaded` is what is, `held` the bytes that its
    engine holds. `begin` starts a pull, which outlives this screen as `gates` do.
    """

    BINDINGS: ClassVar = [
        Binding("escape,f8", "back", "Close", id="close_models"),
        Binding("slash", "filter", "Filter", id="filter_models", priority=True),
        Binding("s", "stop", "Stop the pull", id="stop_pull"),
        Binding("d", "dry_run", "Dry run", id="dry_run"),
        Binding("x", "remove", "Remove", id="remove_model"),
        Binding("i", "details", "Details", id="model_details"),
        Binding("o", "open_page", "Open its page", id="open_page"),
        Binding("c", "copy_link", "Copy its address", id="copy_link"),
        Binding("l", "login", "Log in", id="login"),
        Binding("n", "watch", "Tell me once it is open", id="watch_gate"),
        Binding("f4", "plan", "Plan", id="plan_model"),
    ]

    def __init__(
        self, loaded: Load, held: int, pull: Pull, begin: Callable[[str, str], str], gates: Watch
    ) -> None:
        super().__init__()
        self._loaded, self._held = loaded, held
        self._pull, self._begin, self._gates = pull, begin, gates
        self._entries: list[Entry] = []
        self._listed: list[Entry] = []
        self._asking = ""  # the pair that the hub is asked about
        self._wanted = ""  # is fetched as soon as its gate opens
        self._sure = ""  # what the same key once more does
        self._said: tuple[str, str] = ("", "")  # a pair, and how its last command ended
        self._fetching = pull.pair

    def compose(self) -> ComposeResult:
        """Title, list, what is to be known of the pair under the cursor, keys."""
        yield Words(id="models-title")
        yield Input(placeholder="filter", id="models-filter")
        yield Words(id="models-head")
        yield PairList(id="models-list")
        with VerticalScroll(id="models-about", can_focus=False):
            yield Words(id="models-words")
        yield Words(id="models-keys")

    def on_mount(self) -> None:
        """List what there is."""
        self.query_one("#models-filter").display = False
        self.query_one("#models-title", Words).show("Models")
        self._list.focus()
        self._look()
        self.set_interval(LOOK_S, self._draw)

    @property
    def _whole(self) -> bool:
        """Whether there is anything to draw on: not before the first layout, nor while the screen
        is taken apart, when something that was awaited may end."""
        return len(self.query("#models-title, #models-head, #models-list, #models-words")) == 4

    @property
    def _list(self) -> OptionList:
        return self.query_one("#models-list", OptionList)

    @property
    def chosen(self) -> Entry | None:
        """The pair under the cursor."""
        at = self._list.highlighted if self._whole else None
        return self._listed[at] if at is not None and at < len(self._listed) else None

    # ── what there is ───────────────────────────────────────────────────────────────────────────

    @work(exclusive=True, group="look")
    async def _look(self) -> None:
        try:
            machine, words, found = await asyncio.to_thread(self._survey)
        except UserError as error:  # in a catalogue of one's own that was changed meanwhile
            if self._whole:
                self.query_one("#models-title", Words).show(f"Models · {error.message}")
            return
        if not self._whole:
            return
        before = {entry.name: entry.answers for entry in self._entries}
        for entry in found:
            entry.answers = before.get(entry.name)
        chosen = self.chosen
        self._entries = found
        card = machine.card
        device = f"{card.name}, {gib(card.free)}" if card else f"CPU, {gib(machine.ram)} of memory"
        self.query_one("#models-title", Words).show(f"Models · {device} · {words}")
        self._fill(chosen.name if chosen else self._loaded.pair)

    def _survey(self) -> tuple[Machine, str, list[Entry]]:
        machine = here.machine()
        return machine, models_table.disk_words(), models_table.entries(machine, self._loaded.pair)

    def _fill(self, name: str) -> None:
        """List what the filter finds, with the cursor on the pair of this name, or the first."""
        if not self._whole:
            return
        words = self.query_one("#models-filter", Input).value
        self._listed = [entry for entry in self._entries if models_table.found(entry, words)]
        self._list.clear_options()
        self._list.add_options(Option(Content(self._row(entry))) for entry in self._listed)
        names = [entry.name for entry in self._listed]
        self._list.highlighted = names.index(name) if name in names else 0 if names else None
        self._draw()

    def on_input_changed(self) -> None:
        """Filter as one types."""
        self._fill(chosen.name if (chosen := self.chosen) else "")

    def on_input_submitted(self) -> None:
        """Back to the list, as filtered."""
        self.set_focus(self._list)

    def on_option_list_option_highlighted(self) -> None:
        """Another pair: nothing was asked about it yet."""
        self._sure = self._wanted = ""
        self._draw()
        self._ask_hub(SETTLE_S)

    def on_resize(self) -> None:
        """Lines are broken, and rows cut, by us."""
        self.query_one("#models-keys", Words).show(flowing(KEYS, self.size.width - 2))
        self.call_after_refresh(self._draw)

    # ── drawing ─────────────────────────────────────────────────────────────────────────────────

    def _draw(self) -> None:
        if not self._whole:
            return
        if self._fetching != self._pull.pair:  # a pull began, or ended
            ended, self._fetching = self._fetching, self._pull.pair
            if ended:
                self._pulled(ended, self._pull.step)
        self.query_one("#models-head", Words).show(models_table.head(self._width))
        for at, entry in enumerate(self._listed):
            line = self._row(entry)
            if str(self._list.get_option_at_index(at).prompt) != line:
                self._list.replace_option_prompt_at_index(at, Content(line))
        chosen = self.chosen
        lines = self._about(chosen) if chosen else ["nothing of this name"] * bool(self._entries)
        self.query_one("#models-words", Words).show("\n".join(lines))

    @property
    def _width(self) -> int:
        return self._list.scrollable_content_region.width or self.size.width - 3

    def _row(self, entry: Entry) -> str:
        fetching = self._pull.words(10) if entry.name == self._pull.pair else ""
        return models_table.row(entry, self._width, self._is_loaded(entry), fetching)

    def _about(self, entry: Entry) -> list[str]:
        since = self._gates.since.get(_to_watch(entry), "")
        asking = self._asking == entry.name
        lines = models_table.about(entry, self._is_loaded(entry), asking, since)
        pull = self._pull
        if pull.pair == entry.name:
            lines = [lines[0], f"{pull.step.stage} · {pull.words(20)}"]
            lines += [fetching.safe_words(pull.step), "s stops it; Esc goes back, and it goes on"]
        elif pull.pair:
            lines.append(f"{pull.pair} is being fetched · {pull.words(10)}")
        if self._said[0] == entry.name:
            lines.append(self._said[1])
        if self._wanted == entry.name:
            lines.append("it is fetched as soon as the gate is open")
        return [line for line in lines if line]

    def _is_loaded(self, entry: Entry) -> bool:
        return entry.name == self._loaded.pair

    # ── the hub's gates ─────────────────────────────────────────────────────────────────────────

    @work(exclusive=True, group="gate")
    async def _ask_hub(self, after_s: float = 0.0) -> None:
        """Ask about the pair under the cursor, and again while its gate is waited for."""
        await asyncio.sleep(after_s)
        entry = self.chosen if self._whole else None
        if entry is None or not entry.sources or not entry.loads:
            return
        if after_s and entry.answers is not None and not gate.waits(entry.answers):
            return
        while True:
            self._asking = entry.name
            self._draw()
            try:
                entry.answers = await gate.ask(entry.sources)
            finally:
                self._asking = ""
            if self._wanted == entry.name and self._is_open(entry):
                self._fetch(entry)
            if not gate.waits(entry.answers):
                self._wanted = ""
                self._draw()
                return
            self._draw()
            await asyncio.sleep(RECHECK_S)

    def _is_open(self, entry: Entry) -> bool:
        return all(answer.state in READABLE for answer in entry.answers or [])

    def action_open_page(self) -> None:
        """Open the page of the next step, where there is a browser for it."""
        if address := self._address():
            self.run_worker(self._open(address), group="browser")

    async def _open(self, address: str) -> None:
        opened = await browser.open_page(address)
        words = "Opened" if opened else "There is no browser here; open"
        self.notify(f"{words} {address}", markup=False, timeout=5 if opened else 30)

    def action_copy_link(self) -> None:
        """Copy the address of that page."""
        if address := self._address():
            self.run_worker(clipboard.hand_over(self.app, address, address), group="copy")

    def _address(self) -> str:
        address = models_table.address(self.chosen) if self.chosen else ""
        if not address:
            self.notify("It has no page: nothing of it comes from the hub")
        return address

    def action_login(self) -> None:
        """Let the hub's own command log in, in this terminal."""
        command = _hf()
        if not command:
            self.notify("There is no `hf` command here: pip install huggingface_hub", markup=False)
            return
        try:
            with self.app.suspend():
                subprocess.run([command, "auth", "login"], check=False)
        except SuspendNotSupported:
            self.notify("This terminal cannot be lent: run `hf auth login` in another")
        self._ask_hub()

    def action_watch(self) -> None:
        """Be told once its authors have opened the gate, or no longer."""
        entry = self.chosen
        if entry is None:
            return
        name = _to_watch(entry)
        if name in self._gates.since or gate.waits_for_others(entry.answers or []):
            self._gates.toggle(name)
            self._draw()
        else:
            self._tell(f"Nobody's approval is waited for: {entry.name}")

    # ── fetching and loading ────────────────────────────────────────────────────────────────────

    def on_option_list_option_selected(self) -> None:
        """Load what is installed; fetch what is not, asking before much is fetched."""
        entry = self.chosen
        if entry is None:
            return
        if self._is_loaded(entry):
            self.dismiss(None)
        elif not entry.loads:
            self._tell(f"{entry.name} cannot be loaded yet: {listing.why_not(entry.pair)}")
        elif entry.installed:
            self.dismiss(load_of(entry.name, entry.build.name, self._loaded.options))
        elif self._pull.pair:
            self._tell(f"{self._pull.pair} is being fetched; one at a time")
        elif entry.plan is not None and not entry.plan.fits:
            self._tell(f"{entry.name} does not fit; in a shell, pull --force fetches it")
        elif not self._is_open(entry):
            self._wanted = entry.name
            self._ask_hub()
        elif entry.bytes > ASK_ABOVE_BYTES and not self._surely(entry, "Enter"):
            self._tell(f"Enter again fetches {entry.name}, {size(entry.bytes)}")
        else:
            self._fetch(entry)

    def _fetch(self, entry: Entry) -> None:
        self._wanted, self._said = "", ("", "")
        self._begin(entry.name, entry.to_fetch)
        self._draw()

    def _pulled(self, name: str, step: Step) -> None:
        self._said = name, fetching.end_words(name, step)
        self._look()
        if step.exit_code == EXIT_ACCESS and (entry := self.chosen) and entry.name == name:
            self._wanted = name
            self._ask_hub()

    def action_stop(self) -> None:
        """Interrupt the pull; complete files stay."""
        if self._pull.pair:
            self._pull.stop()
            self._draw()

    # ── other keys ──────────────────────────────────────────────────────────────────────────────

    def action_back(self) -> None:
        """Leave the filter, or the screen."""
        line = self.query_one("#models-filter", Input)
        if isinstance(self.focused, Input) or line.value:
            line.value = ""
            line.display = False
            self.set_focus(self._list)
        else:
            self.dismiss(None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A slash in the filter is one."""
        return action != "filter" or not isinstance(self.focused, Input)

    def action_filter(self) -> None:
        """Show the line to filter by."""
        line = self.query_one("#models-filter", Input)
        line.display = True
        self.set_focus(line)  # with the priority: no key behind the slash is the list's

    def action_details(self) -> None:
        """All that the catalogue knows of the pair."""
        if self.chosen:
            self.app.push_screen(TextScreen(self.chosen.name, listing.describe(self.chosen.pair)))

    def action_dry_run(self) -> None:
        """What a pull would fetch."""
        if self.chosen:
            self.notify(f"Asking what a pull of {self.chosen.name} would fetch …", markup=False)
            self._dry_run(self.chosen)

    @work(exclusive=True, group="dry")
    async def _dry_run(self, entry: Entry) -> None:
        name = fetching.named(entry.name, entry.to_fetch)
        _, out = await fetching.command("pull", name, "--dry-run")
        self.app.push_screen(TextScreen(f"pull {name} --dry-run", out))

    def action_remove(self) -> None:
        """Delete its weights, the second time it is asked for."""
        entry = self.chosen
        if entry is None:
            return
        there = removal.present(entry.pair)
        if not there:
            self._tell(f"{entry.name} is not installed")
        elif self._is_loaded(entry):
            self._tell(f"{entry.name} is loaded; load another pair first")
        elif self._pull.pair == entry.name:
            self._tell(f"{entry.name} is being fetched; s stops that")
        elif not self._surely(entry, "x"):
            total = size(sum(manifest.bytes for manifest in there))
            self._tell(f"x again deletes {entry.name}, {total}")
        else:
            self._remove(entry.name)

    @work(exclusive=True, group="remove")
    async def _remove(self, name: str) -> None:
        _, out = await fetching.command("rm", name, "--yes")
        self._said = name, out
        self._look()

    def action_plan(self) -> None:
        """What the pair under the cursor would take, and why."""
        entry = self.chosen
        if entry is None:
            return
        load = self._loaded
        if not self._is_loaded(entry):
            load = load_of(entry.name, "", load.options)
        self.app.push_screen(PlanScreen(entry.pair, load, self._held, self._begin), self._planned)

    def _planned(self, load: Load | None) -> None:
        if load is not None:
            self.dismiss(load)

    def _surely(self, entry: Entry, key: str) -> bool:
        """Whether this key was pressed on this pair just before."""
        sure, self._sure = self._sure, f"{key} {entry.name}"
        return sure == self._sure

    def _tell(self, words: str) -> None:
        self.notify(words, markup=False)


def load_of(pair: str, quant: str, before: EngineOptions) -> Load:
    """Another pair on the same device; what was chosen for the one before is left to the plan."""
    options = EngineOptions(
        device=before.device, dtype=before.dtype, threads=before.threads, lookup=before.lookup
    )
    return Load(pair, quant, options)


def _to_watch(entry: Entry) -> str:
    return fetching.named(entry.name, entry.to_fetch)


def _hf() -> str:
    """The hub's own command: the one beside our Python, or any."""
    own = Path(sys.executable).with_name("hf")
    return str(own) if own.exists() else shutil.which("hf") or ""
