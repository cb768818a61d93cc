"""The turns of a reopened chat: the last ones at once, earlier ones when one scrolls up to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual import work
from textual.content import Content
from textual.widgets import Static

from dflash_chat.chat import Turn
from dflash_chat.ui.transcript import AnswerTurn, Transcript, UserTurn

PAGE_TURNS = 20
PAGE_CHARS = 10_000  # what is drawn before anything is seen; at least one question and its answer
NEAR_ROWS = 4


class Past(Static):
    """Stands above the turns that are mounted and says how many are not.

    `words` says what stands below an answer.
    """

    def __init__(self, turns: Sequence[Turn], words: Callable[[Turn], str]) -> None:
        super().__init__()
        self._left = list(turns)
        self._words = words

    async def on_mount(self) -> None:
        """The first page comes with the first paint."""
        self.watch(self._transcript, "scroll_y", self._look)
        await self._page()

    @property
    def _transcript(self) -> Transcript:
        return next(node for node in self.ancestors if isinstance(node, Transcript))

    def _look(self) -> None:
        if self._left and self._transcript.scroll_y <= NEAR_ROWS:
            self._turn_page()

    @work(exclusive=True)
    async def _turn_page(self) -> None:
        """Mount a page and keep in view what was."""
        transcript = self._transcript
        from_end = transcript.virtual_size.height - transcript.scroll_y
        following = transcript.following
        await self._page()

        def stay() -> None:
            if not following:
                y = transcript.virtual_size.height - from_end
                transcript.scroll_to(y=y, animate=False, immediate=True)

        self.call_after_refresh(stay)

    async def _page(self) -> None:
        page: list[Turn] = []
        chars = 0
        while self._left and len(page) < PAGE_TURNS and (chars < PAGE_CHARS or len(page) < 2):
            page.insert(0, self._left.pop())
            chars += len(page[0].content)
        left = len(self._left)
        self.update(Content(f"↑ {left} earlier turn{'s' * (left > 1)}" if left else ""))
        self.display = bool(left)
        widgets = [restored(turn, self._words(turn)) for turn in page]
        await self._transcript.turns.mount_all(widgets, after=self)
        for widget in widgets:
            while isinstance(widget, AnswerTurn) and widget.behind:
                widget.draw()
        self.call_after_refresh(self._look)


def restored(turn: Turn, words: str) -> UserTurn | AnswerTurn:
    """The widget of a turn from the file; an answer is drawn by whoever mounts it."""
    if turn.role == "user":
        return UserTurn(turn.content, turn)
    answer = AnswerTurn()
    answer.write(turn.content)
    answer.finish(words)
    return answer
