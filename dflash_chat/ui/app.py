"""The Textual application: theme, palette, and the lifetime of the engine. No feature logic."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable

from textual.app import App, SystemCommand
from textual.screen import Screen

from dflash_chat.chat import Conversation
from dflash_chat.runtime.api import EngineOptions, Load, SamplingParams
from dflash_chat.runtime.client import EngineClient
from dflash_chat.ui import pace
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.keeper import Keeper


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
            yield SystemCommand("New chat", "Leave this chat", screen.action_new_chat)
            yield SystemCommand("Chats", "Open, search, export a chat", screen.action_sessions)
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
    source: str,
    options: EngineOptions,
    params: SamplingParams,
    system: str,
    draft: bool,
    chat: Conversation | None = None,
) -> int:
    """Chat until the person quits, in a new chat or in `chat`; the exit code."""
    gc.disable()  # until the first paint
    client, keeper = EngineClient(), Keeper()
    load = Load(pair, source, options)
    screen = ChatScreen(client, load, params, system, draft, keeper, chat)
    app = ChatApp(client, screen, pace.give_way)
    try:
        app.run()
    finally:
        keeper.close()
    return app.return_code or screen.exit_code
