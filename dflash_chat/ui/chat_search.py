"""The palette finds what was said in saved chats, below the commands it finds."""

from __future__ import annotations

import asyncio
from functools import partial

from textual.command import Hit, Hits, Provider
from textual.content import Content

from dflash_chat.keeper import Keeper
from dflash_chat.store import Listed, StoreError
from dflash_chat.ui.saved_actions import SavedActions
from dflash_chat.ui.words import literal

SHOWN = 8
FEWEST_CHARS = 3  # that are worth a search
SCORE = 0.1  # of the best; a command that fits has more


class SavedChats(Provider):
    """Chats that say all words of what is typed."""

    async def search(self, query: str) -> Hits:
        """The best ones; to choose one opens it."""
        screen = self.screen
        assert isinstance(screen, SavedActions), screen
        keeper = screen.dialogue.record.keeper
        if keeper is None or len(query.strip()) < FEWEST_CHARS:
            return
        for place, chat in enumerate(await asyncio.to_thread(_found, keeper, query)):
            yield Hit(
                SCORE / (1 + place),
                Content(chat.title),
                partial(screen.open_saved, chat.id),
                text=chat.title,
                help=literal(f"chat · {chat.found}" if chat.found else "chat"),
            )


def _found(keeper: Keeper, query: str) -> list[Listed]:
    try:
        with keeper.store() as store:
            return store.search(query, SHOWN)
    except StoreError:
        return []
