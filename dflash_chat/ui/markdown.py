"""One chunk of Markdown → rows of styled text: hanging indents, tables, highlighted code.

Knows widths and styles by name (`.strong`, `.code` …, coloured in app.tcss); knows no widgets. Text
is laid out here, not by nested widgets, because a widget per list item or table cell is what makes
long answers slow. Only `Content` is used, so that text can be selected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from textual.content import Content
from textual.selection import Selection

from dflash_chat.ui.splitter import Chunk

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

EMPTY = Content("")
MIN_WIDTH = 8
HANG_MAX = 16  # code wraps below its own indent, up to here
CELL_GAP = 3  # " │ "


@dataclass(frozen=True)
class Row:
    """One line as drawn. The first `ours` characters are not the text's; `joint` is what stood
    where a wrapped line goes on from the row above, None at the start of a line; `fenced` rows are
    drawn as wide as the view, on the ground of code."""

    content: Content
    ours: int = 0
    joint: str | None = None
    fenced: bool = False


@dataclass(frozen=True)
class Line:
    """One line of text: `first` before its first row, `rest` before those it wraps to. Marks like
    bullets are part of `first` and are copied with it, unless the line is `fenced`."""

    body: Content
    first: Content = EMPTY
    rest: Content = EMPTY
    fenced: bool = False

    def rows(self, width: int) -> Iterator[Row]:
        """The line wrapped to `width` cells."""
        text, at = self.body.plain, 0
        if self.first.cell_length + self.body.cell_length <= width:
            yield self._row(self.first, self.body, None)
            return
        parts = self.body.wrap(max(width - self.rest.cell_length, MIN_WIDTH))
        for number, part in enumerate(parts):
            skipped = len(text[at:]) - len(text[at:].lstrip(" ")) if number else 0
            joint = text[at : at + skipped] if number else None
            at += skipped + len(part.plain)
            yield self._row(self.rest if number else self.first, part, joint)

    def _row(self, prefix: Content, part: Content, joint: str | None) -> Row:
        ours = len(prefix.plain) if self.fenced or joint is not None else 0
        return Row(prefix + part, ours, joint, self.fenced)


@dataclass(frozen=True)
class Rule:
    """A horizontal line."""

    def rows(self, width: int) -> Iterator[Row]:
        """One row of `width` cells."""
        yield Row(Content.styled("─" * width, ".rule"))


@dataclass(frozen=True)
class Table:
    """Cells by row, the head first; `aligns` is "left", "center" or "right" per column."""

    cells: tuple[tuple[Content, ...], ...]
    aligns: tuple[str, ...]

    def rows(self, width: int) -> Iterator[Row]:
        """The table squeezed into `width` cells, the widest columns first."""
        widths = self._widths(width)
        for number, cells in enumerate(self.cells):
            wrapped = [cell.wrap(w) for cell, w in zip(cells, widths, strict=True)]
            for y in range(max(map(len, wrapped))):
                parts = [
                    _aligned(lines[y] if y < len(lines) else EMPTY, w, align)
                    for lines, w, align in zip(wrapped, widths, self.aligns, strict=True)
                ]
                yield Row(Content.styled(" │ ", ".rule").join(parts).rstrip())
            if number == 0:
                yield Row(Content.styled("─┼─".join("─" * w for w in widths), ".rule"))

    def _widths(self, width: int) -> list[int]:
        columns = zip(*self.cells, strict=True)
        widths = [max(1, *(cell.cell_length for cell in column)) for column in columns]
        spare = width - CELL_GAP * (len(widths) - 1) - sum(widths)
        while spare < 0 and max(widths) > 1:
            widest = widths.index(max(widths))
            next_widest = max((w for w in widths if w < widths[widest]), default=1)
            cut = min(-spare, max(widths[widest] - next_widest, 1))
            widths[widest] -= cut
            spare += cut
        return widths


Piece = Line | Rule | Table


class Flow:
    """Pieces below one another, laid out for a width. Grows by `step` rows at a time."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = list(pieces)
        self._rows: list[Row] = []
        self._laid_out = 0  # of the pieces, at
        self._width = -1
        self.step = 1

    def extend(self, other: Flow, gap: bool) -> None:
        """Add what `other` shows, below a blank line if `gap`."""
        self._pieces += [Line(EMPTY), *other._pieces] if gap else other._pieces

    def rows(self, width: int) -> list[Row]:
        """The rows at `width` cells; those of the last width are kept."""
        if width != self._width:
            self._rows, self._laid_out, self._width = [], 0, width
        for piece in self._pieces[self._laid_out :]:
            self._rows += piece.rows(width)
        self._laid_out = len(self._pieces)
        return self._rows

    def height(self, width: int) -> int:
        """Number of rows at `width` cells, rounded up to a multiple of `step`."""
        return -(-len(self.rows(width)) // self.step) * self.step

    def drawn(self, y: int, width: int) -> Content:
        """Row `y`, code on its ground; nothing below the last row."""
        rows = self.rows(width)
        if y >= len(rows):
            return EMPTY
        content = rows[y].content
        if rows[y].fenced:
            content = content.pad_right(width - content.cell_length).stylize_before(".fence")
        return content

    def extract(self, selection: Selection) -> str:
        """The selected text without our indents, wrapped lines made whole again."""
        pieces: list[str] = []
        for y, row in enumerate(self._rows):
            if (span := selection.get_span(y)) is None:
                continue
            start, end = span
            plain = row.content.plain
            text = plain[max(start, row.ours) : len(plain) if end == -1 else end]
            if pieces:
                pieces.append("\n" if row.joint is None else row.joint)
            pieces.append(text)
        return "".join(pieces)


# ── chunks ──────────────────────────────────────────────────────────────────────────────────────


def plain(text: str) -> Flow:
    """Text as it stands."""
    return Flow(Line(Content(line)) for line in text.split("\n"))


def render(chunk: Chunk, highlighted: bool = True) -> Flow:
    """The rows of a chunk; code that still grows need not be highlighted."""
    if chunk.kind == "code":
        return Flow(_code(chunk.text, chunk.language if highlighted else "", EMPTY, EMPTY))
    tree = _tree(chunk.text)
    return Flow(_blocks(tree.children, EMPTY, EMPTY, chunk.number))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _tree(source: str) -> SyntaxTreeNode:
    from markdown_it.tree import SyntaxTreeNode

    return SyntaxTreeNode(_parser().parse(source))


def _code(text: str, language: str, first: Content, rest: Content) -> Iterator[Line]:
    text = text.expandtabs(4)
    content = Content(text)
    if language:
        from textual.highlight import highlight

        content = highlight(text, language=language.split()[0].lower())
    for at, line in enumerate(content.split("\n", allow_blank=True)):
        hang = len(line.plain) - len(line.plain.lstrip()) + 4
        margin = (rest if at else first) + " "
        yield Line(line, margin, rest + " " * min(hang + 1, HANG_MAX), fenced=True)


def _blocks(
    nodes: Iterable[SyntaxTreeNode], first: Content, rest: Content, number: int = 0
) -> Iterator[Piece]:
    """Block nodes with a blank line between those that need one."""
    previous = ""
    for node in nodes:
        if previous and not (_is_list(node) and previous == "paragraph"):
            yield Line(EMPTY, rest, rest)
        yield from _block(node, rest if previous else first, rest, number)
        previous = node.type


def _block(node: SyntaxTreeNode, first: Content, rest: Content, number: int) -> Iterator[Piece]:
    if node.type == "heading":
        yield from _text(_inline(node).stylize(f".h{node.tag[1]}"), first, rest)
    elif _is_list(node):
        yield from _list(node, first, rest, number)
    elif node.type == "blockquote":
        bar = Content.styled("▌ ", ".quote-bar")
        yield from _blocks(node.children, first + bar, rest + bar)
    elif node.type in ("fence", "code_block"):
        yield from _code(node.content.rstrip("\n"), node.info, first, rest)
    elif node.type == "hr":
        yield Rule()
    elif node.type == "table":
        yield _table(node)
    else:
        yield from _text(_inline(node), first, rest)


def _is_list(node: SyntaxTreeNode) -> bool:
    return node.type in ("bullet_list", "ordered_list")


def _list(node: SyntaxTreeNode, first: Content, rest: Content, number: int) -> Iterator[Piece]:
    number = number or int(node.attrs.get("start", 1))
    marks = ["•"] * len(node.children)
    if node.type == "ordered_list":
        marks = [f"{number + at}." for at in range(len(node.children))]
    width = max(map(len, marks)) + 1
    for at, (mark, item) in enumerate(zip(marks, node.children, strict=True)):
        before = rest if at else first
        bullet = Content.styled(mark.rjust(width - 1), ".bullet") + " "
        yield from _blocks(item.children, before + bullet, rest + " " * width)
        if not item.children:
            yield Line(EMPTY, before + bullet, rest)


def _text(content: Content, first: Content, rest: Content) -> Iterator[Line]:
    for at, line in enumerate(content.split("\n", allow_blank=True)):
        yield Line(line, rest if at else first, rest)


def _table(node: SyntaxTreeNode) -> Table:
    head, *bodies = node.children
    rows = [
        tuple(_inline(cell) for cell in row.children) for body in bodies for row in body.children
    ]
    cells = head.children[0].children
    aligns = tuple(str(cell.attrs.get("style", "text-align:left")).split(":")[1] for cell in cells)
    return Table((tuple(_inline(cell).stylize(".strong") for cell in cells), *rows), aligns)


def _aligned(content: Content, width: int, align: str) -> Content:
    spare = max(width - content.cell_length, 0)
    left = {"left": 0, "center": spare // 2, "right": spare}[align]
    return content.pad_left(left).pad_right(spare - left)


_INLINE_STYLES = {"em": ".em", "strong": ".strong", "s": ".strike", "link": ".link"}


def _inline(node: SyntaxTreeNode) -> Content:
    """An inline tree as styled text."""
    if node.type == "text":
        return Content(node.content)
    if node.type == "softbreak":
        return Content(" ")
    if node.type == "hardbreak":
        return Content("\n")
    if node.type == "code_inline":
        return Content.styled(node.content, ".code")
    inner = Content("").join([_inline(child) for child in node.children])
    if style := _INLINE_STYLES.get(node.type):
        inner = inner.stylize(style)
    target = str(node.attrs.get("href") or node.attrs.get("src") or "")
    if target and target != inner.plain:
        inner += Content.styled(f" ({target})", ".target")
    return inner
