"""`--replay` on screen: the real chat, whose questions are asked by the recording."""

from __future__ import annotations

from dflash_chat.replay import Recording, ReplayClient
from dflash_chat.runtime.api import Load, SamplingParams
from dflash_chat.ui.app import ChatApp
from dflash_chat.ui.chat_screen import ChatScreen
from dflash_chat.ui.transcript import UserTurn

LOOK_S = 0.1


class ReplayScreen(ChatScreen):
    """A chat that nobody has to type."""

    def __init__(self, recording: Recording, client: ReplayClient) -> None:
        load = Load(recording.info.pair)
        super().__init__(client, load, SamplingParams(), recording.system, recording.draft)
        self._player = client

    def on_mount(self) -> None:
        """Start asking."""
        super().on_mount()
        self.set_interval(LOOK_S, self._ask)

    def _ask(self) -> None:
        if question := self._player.next_question():
            self.dialogue.ask(UserTurn(question))  # it is no command, and names no files here


def run(recording: Recording) -> int:
    """Play until the person quits; the exit code."""
    client = ReplayClient(recording)
    screen = ReplayScreen(recording, client)
    app = ChatApp(client, screen)
    app.run()
    return app.return_code or screen.exit_code
