"""The Textual application: theme, palette, and the lifetime of the engine. No feature logic."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable

from textual.app import App, SystemCommand
from textual.screen import Screen

from dflash_chat.runtime.api import EngineOptions, Load, SamplingParams
from dflash_chat.runtime.client import EngineClient
from dflash_chat.ui import pace
from dflash_chat.ui.chat_screen import ChatScreen


class ChatApp(App[None]):
    """One chat with one engine. `on_started` is called once the engine's process runs."""

    CSS_PATH = "app.tcss"
    TITLE = "dflash-chat"

    def __init__(
        self,
        client: EngineClient,
        chat: ChatScreen,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._client = client
        self._chat = chat
        self._on_started = on_started

    async def on_load(self) -> None:
        """Start the engine before anything is drawn, so that both start at once."""
        await self._client.start()
        self._on_started()

    def get_default_screen(self) -> Screen[None]:
        """The chat."""
        return self._chat

    def on_mount(self) -> None:
        """What can wait comes after the first paint."""
        self.call_after_refresh(self._settle)

    async def _settle(self) -> None:
        await asyncio.to_thread(_import_what_answers_need)
        gc.collect()
        gc.freeze()  # start-up's objects live on; scanning them again would only stall frames
        gc.enable()

    async def on_unmount(self) -> None:
        """Take the engine along."""
        await self._client.close()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every action of the chat, then Textual's own commands."""
        if isinstance(screen, ChatScreen):
            yield SystemCommand("New chat", "Forget this chat", screen.action_new_chat)
            yield SystemCommand("Stop", "Stop the answer", screen.action_stop)
            yield SystemCommand("Retry", "Ask again after a failure", screen.action_retry)
            yield SystemCommand("Panel", "Show or hide the numbers", screen.action_toggle_panel)
            yield SystemCommand("To the end", "Follow the answer", screen.action_follow)
            yield SystemCommand("Keys and commands", "Help", screen.action_help)
        yield from super().get_system_commands(screen)


def _import_what_answers_need() -> None:
    """Warm imports whose first use would otherwise stall a frame."""
    import textual.highlight  # noqa: F401

    from dflash_chat.ui import markdown
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
) -> int:
    """Chat until the person quits; the exit code."""
    gc.disable()  # until the first paint
    client = EngineClient()
    chat = ChatScreen(client, Load(pair, quant, options), params, system, draft)
    app = ChatApp(client, chat, pace.give_way)
    app.run()
    return app.return_code or chat.exit_code
