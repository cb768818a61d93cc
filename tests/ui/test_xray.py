"""X-ray: marks to the letter, layout that is the same however news comes, and every key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.app import App

import dflash_chat
from dflash_chat.runtime.api import Spec, StepStats, Tokens
from dflash_chat.ui.origins import Origin, Piece, Trace
from dflash_chat.ui.xray import XrayScreen, XrayView
from dflash_chat.ui.xray_layout import Layout, figures, marked, next_missed, shade, worst
from tests.ui.test_chat_flow import Chat, open_chat


def passed(
    *pieces: str, drafted: int, accepted: int, ms: float = 10.0, found: bool = False
) -> Tokens:
    stats = StepStats(
        drafted, accepted, len(pieces), 1.0, ms - 2, 0.5, 0.5, 99, "because", found=found
    )
    return Tokens(1, "".join(pieces), len(pieces), stats, tuple(map(len, pieces)))


def trace_of(*events: Tokens) -> Trace:
    trace = Trace()
    for event in events:
        trace.take(event)
    return trace


SAID = (
    Tokens(1, "A", 1, None, (1,)),
    passed(" fixed", "-size", " buffer", drafted=7, accepted=2),
    passed(" keeps", " two", " indices", drafted=2, accepted=2, ms=9.0),
    passed(",", drafted=7, accepted=0),
    passed(" head", drafted=0, accepted=0),
    passed("\n", drafted=3, accepted=0, ms=20.0),
    passed("and", " tail", drafted=7, accepted=1),
)


def rows(trace: Trace, width: int) -> list[str]:
    layout = Layout(width)
    layout.update(trace.blocks, 0)
    return ["".join(run.text for run in row) for row in layout.rows]


def test_marks_tell_every_origin_without_colour() -> None:
    assert rows(trace_of(*SAID), 60) == [
        "▏A▏ fixed-size ~buffer~▏ keeps two indices▸▏~,~▏ head▏~↵~",
        "▏and ~tail~",
    ]


def test_a_block_that_was_found_in_the_text_says_so_without_colour() -> None:
    copied = passed(" of", " the", " town", drafted=4, accepted=2, found=True)
    trace = trace_of(*SAID[:2], copied, SAID[3])
    assert rows(trace, 60) == ["▏A▏ fixed-size ~buffer~≡ of the ~town~▏~,~"]
    first, _ = figures(trace.blocks, 2)
    assert first.startswith("block 3 of 4 · 2/4 accepted, found in the text · ")
    assert "found" not in figures(trace.blocks, 1)[0]


def test_no_row_is_wider_than_the_screen_and_tokens_stay_whole() -> None:
    assert rows(trace_of(*SAID), 12) == [
        "▏A▏ fixed", "-size ", "~buffer~▏", " keeps two", " indices▸▏", "~,~▏ head▏", "~↵~",
        "▏and ~tail~",
    ]  # fmt: skip
    assert rows(trace_of(passed("x" * 20 + "界" * 5, drafted=0, accepted=0)), 8) == [
        "▏", "xxxxxxxx", "xxxxxxxx", "xxxx界界", "界界界",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("origin", "text", "drawn"),
    [
        (Origin.ACCEPTED, " a", " a"),
        (Origin.CORRECTION, "  a b ", "  ~a b~ "),
        (Origin.CORRECTION, " ", "~·~ "),
        (Origin.CORRECTION, "\n\n", "~↵~\n\n"),
        (Origin.CORRECTION, "", "~_~"),
        (Origin.BONUS, " a\n", " a▸\n"),
        (Origin.BONUS, "\n", "↵▸\n"),
        (Origin.LOOKUP, " a", " a"),
        (Origin.PLAIN, "a", "a"),
        (Origin.PROMPT, "a", "a"),
    ],
)
def test_marks(origin: Origin, text: str, drawn: str) -> None:
    assert "".join(part for part, _ in marked(Piece(origin, 0, text))) == drawn


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert rows(trace_of(passed("a\x1b[31m\tb\r\x9b", drafted=0, accepted=0)), 40) == [
        "▏a␛[31m␉b␍\N{REPLACEMENT CHARACTER}"
    ]


def test_accepted_tokens_are_shaded_by_place() -> None:
    assert [shade(place) for place in range(16)] == [1] * 2 + [2] * 4 + [3] * 8 + [4] * 2


PASSES = st.lists(
    st.tuples(
        st.lists(st.text(alphabet="ab \n界\t", max_size=9), min_size=1, max_size=5),
        st.integers(0, 4),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def events_of(passes: Sequence[tuple[list[str], int, bool]]) -> list[Tokens]:
    """Passes, some of which hold all their text back until the next that does not."""
    events, held, lengths = [], "", []
    for pieces, drafted, holds in passes:
        stats = StepStats(drafted, min(drafted, len(pieces) - 1), len(pieces), 1, 2, 3, 4, 9)
        held += "".join(pieces)
        lengths += map(len, pieces)
        if holds:
            events.append(Tokens(1, "", len(pieces), stats, (0,) * len(pieces)))
        else:
            events.append(Tokens(1, held, len(pieces), stats, tuple(lengths)))
            held, lengths = "", []
    return events


@given(passes=PASSES, width=st.integers(8, 30))
@settings(max_examples=200, deadline=None)
def test_rows_are_the_same_however_the_news_came(
    passes: list[tuple[list[str], int, bool]], width: int
) -> None:
    trace, growing = Trace(), Layout(width)
    for event in events_of(passes):
        trace.take(event)
        changed = trace.news()
        if changed is not None:
            growing.update(trace.blocks, changed)
        whole = Layout(width)
        whole.update(trace.blocks, 0)
        assert growing.rows == whole.rows
        assert all(sum(cell_len(run.text) for run in row) <= width for row in growing.rows)
        for block in range(len(trace.blocks)):
            own = [i for i, row in enumerate(growing.rows) for run in row if run.block == block]
            assert growing.row_of(block) == own[0]
            assert growing.last_row_of(block) >= own[-1]


def long_trace(tokens: int) -> Trace:
    trace = Trace()
    for i in range(tokens // 3):
        trace.take(
            passed(" some", " words", "\n" if i % 9 == 0 else " more", drafted=7, accepted=2)
        )
    return trace


def test_news_cost_the_same_however_long_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        "dflash_chat.ui.xray_layout.marked",
        lambda piece: [(drawn.append(piece.text) or piece.text, "plain")],
    )
    trace, layout = long_trace(6000), Layout(100)
    trace.news()
    layout.update(trace.blocks, 0)
    assert len(drawn) == 6000
    drawn.clear()
    trace.take(passed(" a", " b", drafted=3, accepted=1))
    changed = trace.news()
    assert changed == 2000
    layout.update(trace.blocks, changed)
    assert drawn == [" a", " b"]


def test_a_block_is_found_by_its_cell() -> None:
    trace, layout = trace_of(*SAID), Layout(60)
    layout.update(trace.blocks, 0)
    assert [layout.block_at(0, x) for x in (0, 1, 2, 22, 23)] == [0, 0, 1, 1, 2]
    assert layout.block_at(1, 3) == 6
    assert (layout.block_at(1, 50), layout.block_at(9, 0)) == (None, None)


def test_the_next_block_without_a_hit_goes_around_and_the_worst_is_the_slowest() -> None:
    blocks = trace_of(*SAID).blocks
    assert [next_missed(blocks, n) for n in (0, 3, 4, 5, 6)] == [3, 5, 5, 3, 3]
    assert worst(blocks) == 5
    plain = trace_of(SAID[0], SAID[4]).blocks
    assert (next_missed(plain, 1), worst(plain), next_missed([], 0), worst([])) == (None,) * 4


def test_figures_of_a_block() -> None:
    blocks = trace_of(*SAID).blocks
    assert figures(blocks, 1) == (
        "block 2 of 7 · 2/7 accepted · 10.0 ms · 300 tok/s",
        "draft 1.0 · verify 8.0 · sample 0.5 · host 0.5 ms · because",
    )
    assert figures(blocks, 4)[0] == "block 5 of 7 · nothing drafted · 10.0 ms · 100 tok/s"
    assert figures(blocks, 0)[0] == "block 1 of 7 · the prompt's own token"
    assert figures([], 0)[0] == "no token yet"


# ── on screen ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def answered() -> AsyncIterator[Chat]:
    async with open_chat((100, 30)) as chat:
        await chat.load()
        await chat.type("Hello?")
        for event in SAID:
            chat.client.emit(event)
        await chat.settle()
        yield chat


async def xray(chat: Chat) -> XrayScreen:
    await chat.pilot.press("f3")
    await chat.pilot.pause()
    screen = chat.app.screen
    assert isinstance(screen, XrayScreen)
    screen.show_news()
    await chat.pilot.pause()
    return screen


def drawn(screen: XrayScreen, selector: str = "XrayView") -> str:
    widget = screen.query_one(selector)
    lines = [strip.text.rstrip() for strip in widget.render_lines(widget.outer_size.region)]
    return "\n".join(line.strip() for line in lines).strip()


async def press(chat: Chat, screen: XrayScreen, *keys: str) -> int:
    await chat.pilot.press(*keys)
    await chat.pilot.pause()
    return screen.query_one(XrayView).current


async def test_f3_shows_the_last_answer_and_every_key_goes_where_it_says(answered: Chat) -> None:
    screen = await xray(answered)
    assert drawn(screen).splitlines() == [
        "▏A▏ fixed-size ~buffer~▏ keeps two indices▸▏~,~▏ head▏~↵~", "▏and ~tail~",
    ]  # fmt: skip
    assert drawn(screen, "#xray-title") == "X-ray · 7 blocks · tau 1.83 · full blocks 20%"
    assert "~correction~" in drawn(screen, "#xray-legend")
    view = screen.query_one(XrayView)
    assert view.current == 6
    assert await press(answered, screen, "right") == 6
    assert await press(answered, screen, "left") == 5
    assert await press(answered, screen, "home") == 0
    assert await press(answered, screen, "left") == 0
    assert await press(answered, screen, "tab") == 3
    assert "block 4 of 7 · 0/7 accepted" in drawn(screen, "#xray-figures")
    assert await press(answered, screen, "w") == 5
    assert await press(answered, screen, "tab") == 3
    assert await press(answered, screen, "end") == 6
    await answered.pilot.click(XrayView, offset=(5, 0))
    assert await press(answered, screen) == 1
    await answered.pilot.press("f3")
    assert answered.app.screen is answered.screen


async def test_esc_closes_it_and_does_not_stop_the_answer(answered: Chat) -> None:
    await xray(answered)
    await answered.pilot.press("escape")
    assert answered.app.screen is answered.screen
    assert answered.client.cancelled == []


async def test_it_goes_on_with_the_answer_and_follows_its_end_only_from_there(
    answered: Chat,
) -> None:
    screen = await xray(answered)
    view = screen.query_one(XrayView)

    async def more() -> None:
        answered.client.emit(passed(" on", drafted=3, accepted=0))
        await answered.settle()
        screen.show_news()
        await answered.pilot.pause()

    await more()
    assert drawn(screen).endswith("▏and ~tail~▏ ~on~")
    assert view.current == 7
    await press(answered, screen, "home")
    await more()
    assert drawn(screen).endswith("▏ ~on~▏ ~on~")
    assert view.current == 0


async def test_without_an_answer_the_key_and_the_command_do_nothing() -> None:
    async with open_chat() as chat:
        await chat.load()
        await chat.pilot.press("f3")
        assert chat.app.screen is chat.screen
        await chat.type("/xray")
        assert chat.app.screen is chat.screen


async def test_the_command_opens_it_too(answered: Chat) -> None:
    await answered.type("/xray")
    assert isinstance(answered.app.screen, XrayScreen)


async def test_a_plain_answer_has_nothing_to_look_for(answered: Chat) -> None:
    answered.client.finish(Spec())
    await answered.settle()
    await answered.type("And plainly?")
    answered.client.stream("Twelve plain letters", draft=False)
    await answered.settle()
    screen = await xray(answered)
    assert drawn(screen) == "▏Twel▏ve p▏lain▏ let▏ters"
    assert await press(answered, screen, "tab", "w") == 4


class Alone(App[None]):
    """Nothing but X-ray."""

    CSS_PATH = Path(dflash_chat.__file__).with_name("ui") / "app.tcss"

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.xray = XrayScreen(trace)

    def get_default_screen(self) -> XrayScreen:
        return self.xray


async def test_only_rows_in_view_are_drawn() -> None:
    app = Alone(long_trace(6000))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        view = app.xray.query_one(XrayView)
        asked: list[int] = []
        original = view.render_line
        view.render_line = lambda y: (asked.append(y), original(y))[1]  # type: ignore[method-assign]
        await pilot.press("home")
        await pilot.pause()
        assert asked
        assert len(asked) <= 4 * view.size.height
        assert view.virtual_size.height > 300
        assert view.scroll_offset.y == 0
        await pilot.press("end")
        await pilot.pause()
        assert view.scroll_offset.y + view.size.height >= view.virtual_size.height


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "ansi-dark", "ansi-light"])
async def test_every_origin_looks_different_in_every_kind_of_theme(theme: str) -> None:
    app = Alone(trace_of(*SAID))
    async with app.run_test(size=(100, 30)) as pilot:
        app.theme = theme
        await pilot.pause()
        view = app.xray.query_one(XrayView)
        strips = view.render_lines(view.outer_size.region)[:2]
        styles = {segment.text: segment.style for strip in strips for segment in strip}
        looks = [styles[text] for text in (" fixed", "~buffer~", " indices▸", " head")]
        assert len({(s.color, s.bgcolor, s.underline, s.bold) for s in looks if s}) == 4
