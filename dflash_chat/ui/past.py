"""The turns of a reopened chat: the last ones at once, earlier ones when one scrolls up to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual import work
from textual.content import Content
from textual.widgets import Static

from dflash_chat.chat import Turn
from dflash_chat.ui.answer import PIECE_CHARS, AnswerTurn
from dflash_chat.ui.transcript import Transcript, Turns, UserTurn

PAGE_TURNS = 10
PAGE_CHARS = 3_000  # what is drawn before anything is seen; fills most screens
NEAR_ROWS = 4
LOOK_S = 0.25


class Past(Static):
    """Stands above the turns that are mounted and says how many are not.

    `answer` makes the widget of one, `words` says what stands below a question.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        answer: Callable[[Turn], AnswerTurn],
        words: Callable[[Turn], str],
    ) -> None:
        super().__init__()
        self._left = list(turns)
        self._answer, self._words = answer, words
        self._height = 0  # of all turns, when last looked at

    async def on_mount(self) -> None:
        """The first page comes with the first paint."""
        self._transcript = next(node for node in self.ancestors if isinstance(node, Transcript))
        self.watch(self._transcript, "scroll_y", self._look, init=False)
        await self._page()
        self.set_interval(LOOK_S, self._fill)

    def _look(self) -> None:
        """Somebody who has scrolled up close to here wants the page before."""
        at = self._transcript
        if self._left and at.scroll_y <= NEAR_ROWS and not at.following:
            self._turn_page()

    def _fill(self) -> None:
        """Turns that do not fill the view want others above, once it is known how tall they are."""
        height, self._height = self._height, self._transcript.virtual_size.height
        if self._left and height == self._height and self._transcript.max_scroll_y <= NEAR_ROWS:
            self._turn_page()

    @work(exclusive=True)
    async def _turn_page(self) -> None:
        """Mount a page; what is in view stays where it is."""
        transcript = self._transcript
        edge, following = transcript.region.y, transcript.following
        top = next((turn for turn in transcript.turns if turn.region.bottom > edge), self)
        row = top.virtual_region.y - transcript.scroll_y
        await self._page()

        def stay(times: int) -> None:
            transcript.scroll_to(y=top.virtual_region.y - row, animate=False, immediate=True)
            if times:  # answers are laid out only after they were drawn
                self.call_after_refresh(stay, times - 1)

        if not following:
            self.call_after_refresh(stay, 2)

    async def _page(self) -> None:
        page: list[Turn] = []
        chars = 0
        while self._left and not (page and page[0].role == "user" and _enough(len(page), chars)):
            page.insert(0, self._left.pop())
            chars += len(page[0].content)
        left = len(self._left)
        self.update(Content(f"↑ {left} earlier turn{'s' * (left > 1)}" if left else ""))
        self.display = bool(left)
        widgets = [self._widget(turn) for turn in page]
        await self._transcript.query_one(Turns).mount_all(widgets, after=self)
        for widget in widgets:
            if isinstance(widget, AnswerTurn):
                for _ in range(2 + len(widget.turn.content) // PIECE_CHARS):
                    widget.draw()

    def _widget(self, turn: Turn) -> UserTurn | AnswerTurn:
        if turn.role == "assistant":
            return self._answer(turn)
        words = self._words(turn)
        question = UserTurn(turn.content, notes=[words] if words else [])
        question.turn = turn
        question.waiting(False)
        return question


def _enough(turns: int, chars: int) -> bool:
    return turns >= PAGE_TURNS or chars >= PAGE_CHARS
