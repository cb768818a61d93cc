"""What can be done about the loaded pair: see its plan, load another, fetch and remove pairs.

A part of the chat screen. Whatever is loaded, the engine before it ends first, with all that it
holds of the device, and the conversation goes on. Its screens bring planner and catalogue with them
and are imported when they are shown, so that the first paint does not wait for those.
"""

from __future__ import annotations

from dataclasses import replace

from textual import work
from textual.screen import Screen

from dflash_chat import hub, pairs
from dflash_chat.errors import UnknownModelError, UsageError, UserError
from dflash_chat.progress import Step
from dflash_chat.runtime.api import Load
from dflash_chat.ui import fetching
from dflash_chat.ui.bars import grouped
from dflash_chat.ui.dialogue import Dialogue
from dflash_chat.ui.fetching import Pull
from dflash_chat.ui.transcript import Card
from dflash_chat.ui.watching import Watch


class ModelActions(Screen[None]):
    """Actions on pairs. `pull` and `gates` outlive the screen that began them."""

    dialogue: Dialogue
    pull: Pull
    gates: Watch

    def action_plan(self) -> None:
        """Show what the loaded pair takes, and why; load it otherwise."""
        self._show_plan()

    def action_bench(self) -> None:
        """The same, while what is loaded is measured."""
        self._show_plan(bench=True)

    @work(exclusive=True, group="plan")
    async def _show_plan(self, bench: bool = False) -> None:
        dialogue = self.dialogue
        try:
            pair = pairs.find(dialogue.load.pair)
        except UserError as error:
            self.notify(f"{error.message} {error.hint}".strip(), markup=False)
            return
        from dflash_chat.ui.plan_screen import PlanScreen

        held, fetch = self._held, self._begin_pull
        screen = PlanScreen(pair, dialogue.load, held, fetch, dialogue, bench)
        if load := await self.app.push_screen_wait(screen):
            self.load_instead(load)

    @work(exclusive=True, group="models")
    async def action_models(self) -> None:
        """Show all pairs."""
        from dflash_chat.ui.models_screen import ModelsScreen

        now = self.dialogue.load
        screen = ModelsScreen(now, self._held, self.pull, self._begin_pull, self.gates)
        if load := await self.app.push_screen_wait(screen):
            self.load_instead(load)

    def action_model(self, argument: str = "") -> None:
        """Load another pair that is installed; alone: say what is loaded."""
        if not argument:
            self._say_loaded()
            return
        from dflash_chat.ui.models_screen import load_of

        pair = pairs.find(argument)
        pair.wanted()
        found = hub.installed(pair)
        if found is None:
            raise UnknownModelError(f"{argument} is not installed.", "F8 fetches it.")
        options = self.dialogue.load.options
        same = pair.name == self.dialogue.load.pair
        load = load_of(pair.name, found.build.name, options)
        self.load_instead(replace(load, options=options) if same else load)

    def load_instead(self, load: Load) -> None:
        """End the engine, load this, and say so; a pair of another name brings its own sampling,
        and its own system prompt where that of the pair before was in use.
        """
        dialogue = self.dialogue
        before, words = dialogue.load.pair, "The engine that ran before ends first."
        if load.pair != before:
            pair, chat, params = pairs.find(load.pair), dialogue.chat, dialogue.params
            dialogue.params = replace(
                pair.sampling, seed=params.seed, max_tokens=params.max_tokens, stop=params.stop
            )
            if chat.system and chat.system == _system_of(before):
                chat.system = pair.system
            words += " The chat is kept; sampling is as this pair's authors advise."
        dialogue.load_instead(load)
        build = f"@{load.quant}" if load.quant else ""
        dialogue.show(Card(f"Loading {load.pair}{build}", words))

    @property
    def _held(self) -> int:
        """Bytes of the device that our engine holds."""
        info = self.dialogue.info
        if info is None:
            return 0
        return info.target_bytes + info.drafter_bytes + info.cache_bytes + info.other_bytes

    def _say_loaded(self) -> None:
        info = self.dialogue.info
        if info is None:
            raise UsageError("Nothing is loaded yet.")
        megabytes = {
            "target": info.target_bytes, "drafter": info.drafter_bytes, "caches": info.cache_bytes,
        }  # fmt: skip
        card = Card(
            info.pair,
            f"target   {info.target}\n"
            f"drafter  {info.drafter or 'none'} · blocks of {info.block_size}\n"
            f"on       {info.device} · {info.dtype} · {info.kernels}\n"
            f"memory   "
            + " · ".join(f"{name} {size / 1e6:.0f} MB" for name, size in megabytes.items())
            + f"\ncontext  {grouped(info.context_tokens)} tokens",
        )
        self.dialogue.show(card)

    def _begin_pull(self, name: str, build: str) -> str:
        if self.pull.pair:
            return f"{self.pull.pair} is being fetched; one at a time"
        self.run_worker(self.pull.fetch(name, build), group="pull")
        return f"{fetching.named(name, build)} is being fetched; F8 shows how far it is"

    def pulled(self, pair: str, step: Step) -> None:
        """A pull has ended, wherever the person looks now."""
        words = fetching.end_words(pair, step)
        failed = step.stage == "failed"
        self.app.notify(words, severity="error" if failed else "information", markup=False)

    def gate_opened(self, pair: str) -> None:
        """The authors of a pair that was watched have agreed."""
        self.app.notify(f"{pair} may be fetched now", markup=False)
        self.dialogue.show(Card(f"{pair} may be fetched now", "Its gate is open; F8 fetches it."))


def _system_of(pair: str) -> str:
    try:
        return pairs.find(pair).system
    except UserError:  # a folder of one's own that is gone
        return ""
