"""The Textual application: theme, palette, and the lifetime of the engine. No feature logic."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import CommandPalette
from textual.drivers import linux_driver
from textual.filter import LineFilter
from textual.screen import Screen

from dflash_chat.chat import Conversation
from dflash_chat.config import Config
from dflash_chat.errors import UserError
from dflash_chat.keeper import Keeper
from dflash_chat.runtime.api import EngineOptions, Load, SamplingParams
from dflash_chat.runtime.client import EngineClient
from dflash_chat.ui import chosen, pace, terminal
from dflash_chat.ui.actions import ACTIONS, APP, PROMPT, TURN, in_scope
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.colourless import Colourless
from dflash_chat.ui.completion import themes
from dflash_chat.ui.legible import legible
from dflash_chat.ui.overlay import ClosesOnce
from dflash_chat.ui.words import literal

HEIGHTS = [(0, "-low"), (8, "-short"), (24, "-high")]
SETTLE_S = 0.5  # by then the first screenful of a reopened chat is drawn


class Palette(ClosesOnce, CommandPalette):
    """Textual's palette, which fails when a page of a list is asked for that is not drawn yet."""

    def _action_command_list(self, action: str) -> None:
        with contextlib.suppress(KeyError):
            super()._action_command_list(action)


def _forgiving(encoding: str) -> Callable[[], codecs.IncrementalDecoder]:
    """What Textual makes its decoder of; its own ends the app at a byte that is no UTF-8."""
    return partial(codecs.getincrementaldecoder(encoding), errors="replace")


linux_driver.getincrementaldecoder = _forgiving  # type: ignore[assignment,attr-defined]


class ChatApp(App[None], inherit_bindings=False):
    """One chat with one engine. `on_started` is called once the engine's process runs. `theme` ""
    leaves the usual one; `on_theme` is called with each that is chosen here."""

    CSS_PATH = "app.tcss"
    TITLE = "dflash-chat"
    VERTICAL_BREAKPOINTS = HEIGHTS
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(action.keys, action.method, action.name, id=action.id, priority=True)
        for action in in_scope(APP)
    ]

    def __init__(
        self,
        client: EngineClient,
        chat: ChatScreen,
        on_started: Callable[[], None] = lambda: None,
        theme: str = "",
        on_theme: Callable[[str], None] = lambda name: None,
    ) -> None:
        before = os.environ.pop("NO_COLOR", None)  # or Textual takes it out, and draws in grey
        super().__init__()
        if before is not None:
            os.environ["NO_COLOR"] = before
        self.no_color = bool(before)  # an empty one asks for nothing: no-color.org
        if theme:
            self.theme = theme
        self._client = client
        self._chat = chat
        self._on_started = on_started
        self._on_theme = on_theme

    def get_line_filters(self) -> Sequence[LineFilter]:
        """What goes over each row before it is drawn."""
        return [Colourless()] if self.no_color else super().get_line_filters()

    def watch_theme(self, before: str, theme: str) -> None:
        """Tell who asked."""
        if self.is_running and theme != before:
            self._on_theme(theme)

    def get_css_variables(self) -> dict[str, str]:
        """The theme's colours; the terminal's own stay as they are."""
        variables = super().get_css_variables()
        return variables if self.current_theme.ansi else legible(variables)

    async def on_load(self) -> None:
        """Start the engine before anything is drawn, so that both start at once."""
        await self._client.start()
        self._on_started()

    def get_default_screen(self) -> Screen[None]:
        """The chat."""
        return self._chat

    def action_command_palette(self) -> None:
        """Show the palette, unless it is shown."""
        if not any(isinstance(screen, CommandPalette) for screen in self.screen_stack):
            self.push_screen(Palette(id="--command-palette"))

    async def action_quit(self) -> None:
        """Leave; what was typed last stays for the next time."""
        self._chat.keep_typed()
        await super().action_quit()

    def on_mount(self) -> None:
        """What can wait comes after the first paint."""
        self.set_keymap(self._chat.keymap)
        self._chat.tell(terminal.SAVE_TITLE)
        self.set_timer(SETTLE_S, self._settle)

    async def _settle(self) -> None:
        await asyncio.to_thread(_import_what_answers_need)
        pace.tidy()

    async def on_unmount(self) -> None:
        """Take the engine along."""
        self._chat.tell(terminal.RESTORE_TITLE)
        await self._chat.gates.close()
        await self._chat.pull.close()
        await self._client.close()

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Lend the terminal to another program. Textual's own way does not take it back if
        something is raised meanwhile; and Ctrl+C is that program's, not the end of the chat."""
        failed: OSError | UserError | None = None
        with super().suspend():
            before = signal.signal(signal.SIGINT, lambda *_: None)
            try:
                yield
            except (OSError, UserError) as error:
                failed = error
            finally:
                signal.signal(signal.SIGINT, before)
        if failed:
            raise failed

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: what the chat can do, then Textual's own commands."""
        own = [action for action in ACTIONS if action.scope not in (PROMPT, TURN)]
        if isinstance(screen, ChatScreen):
            for action in own:
                if action.id != "palette":
                    words = f"{action.does} · {action.usage}" if action.command else action.does
                    yield SystemCommand(action.name, literal(words), partial(screen.choose, action))
        yield from (
            command
            for command in super().get_system_commands(screen)
            if command.title not in ("Quit", "Theme", "Keys")
        )


def _import_what_answers_need() -> None:
    """Warm imports whose first use would otherwise stall a frame."""
    import textual.highlight  # noqa: F401

    from dflash_chat.ui import markdown, models_screen, plan_screen  # noqa: F401
    from dflash_chat.ui.splitter import Chunk

    markdown.render(Chunk("code", "pass", "python"))
    markdown.render(Chunk("text", "**warm**"))


def run(
    pair: str,
    quant: str,
    options: EngineOptions,
    params: SamplingParams,
    system: str,
    draft: bool,
    config: Config,
    chat: Conversation | None = None,
) -> int:
    """Chat until the person quits, in a new chat or in `chat`; the exit code."""
    gc.disable()  # until the first paint
    client, keeper = EngineClient(), Keeper()
    load = Load(pair, quant, options)
    screen = ChatScreen(client, load, params, system, draft, config.keys, keeper, chat)
    theme = chosen.theme(config.theme, themes())
    keep = partial(chosen.keep, configured=config.theme)
    app = ChatApp(client, screen, pace.give_way, theme, keep)
    try:
        app.run()
    finally:
        keeper.close()
    return app.return_code or screen.exit_code
