"""The real chat, saving to `DFLASH_CHAT_DATA`, on an engine process that counts for ever.

Run by tests in a pty: `python -m tests.ui.scripted_chat [LOG]`. With LOG, the engine notes there
what it has said and when, one line `SECONDS NUMBER` each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

from dflash_chat.runtime.api import (
    Finished,
    Generate,
    Load,
    ModelInfo,
    Prefill,
    Progress,
    StepStats,
    Tokens,
)
from dflash_chat.runtime.client import EngineClient

STEP = StepStats(7, 0, 1, 0.5, 4.0, 0.2, 0.1, 100)
WORD_S = 0.005


class Counting:
    """Answers "0 1 2 3 …" until it is stopped or killed."""

    info = ModelInfo("smollm2-135m", "target", "drafter", "cpu", "", "", 2048, 8, 7, 1, 1, 1, 0.1)

    def __init__(self, log: str) -> None:
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def generate(
        self, request: Generate, cancelled: Callable[[], bool]
    ) -> Iterator[Prefill | Tokens | Finished]:
        yield Prefill(request.id, 0, 4, 4)
        number = 0
        while not cancelled():
            yield Tokens(request.id, f"{number} ", 1, STEP)
            os.write(self.log, f"{time.monotonic()} {number}\n".encode())
            number += 1
            time.sleep(WORD_S)


def engine(log: str) -> None:
    """Be the engine process."""
    from dflash_chat.runtime import worker

    def load(_: Load, __: Callable[[Progress], None]) -> worker.LoadedPair:
        return Counting(log)

    worker.main(load)


def main(log: str) -> None:
    """Be the chat, and ask."""
    from dflash_chat.keeper import Keeper
    from dflash_chat.runtime.api import SamplingParams
    from dflash_chat.ui import pace
    from dflash_chat.ui.app import ChatApp
    from dflash_chat.ui.chat_screen import ChatScreen
    from dflash_chat.ui.prompt import Prompt

    code = f"from tests.ui.scripted_chat import engine; engine({log!r})"
    client = EngineClient((sys.executable, "-uc", code))
    screen = ChatScreen(client, Load("smollm2-135m"), SamplingParams(), keeper=Keeper())
    app = ChatApp(client, screen, pace.give_way)
    app.call_later(screen.post_message, Prompt.Submitted("Count, please.", "Count, please."))
    app.run()


if __name__ == "__main__":
    main(sys.argv[1])
