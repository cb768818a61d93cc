"""Streamed Markdown text → chunks that will not change any more, and one open chunk.

Pure text, line by line. Every chunk is small: a list is cut at item boundaries, a table or a code
block at line boundaries, so that no later step has to handle more than `CHUNK_CHARS` at once. What
is cut says so (`continued`), and is drawn without a gap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

CHUNK_CHARS = 4000
CODE_LINES = 60
LIST_ITEMS = 8
TABLE_ROWS = 40

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([^`]*)$")
_ITEM = re.compile(r"^( *)([-*+]|(\d{1,9})[.)])(?:\s|$)")
_MARKS_ONLY = re.compile(r"^[-=*+#>|_ ]*(?:\d+[.)]? *)?$")  # a line start that may become anything
_HEADING = re.compile(r"^ {0,3}#{1,6}(?:\s|$)")


@dataclass(frozen=True)
class Chunk:
    """A piece of Markdown of one kind: "text", "list", "table" or "code".

    `text` of code comes without its fences. `number` is what the first item of a continued ordered
    list counts as; 0 takes the number that is written there.
    """

    kind: str
    text: str
    language: str = ""
    continued: bool = False
    number: int = 0


@dataclass
class _Open:
    """The chunk that still grows. `kind` "" is decided by the first line."""

    kind: str = ""
    continued: bool = False
    lines: list[str] = field(default_factory=list)
    size: int = 0
    language: str = ""
    fence: str = ""  # the mark that opened a code block
    inner_fence: str = ""  # the same inside a list item
    indent: int = 0  # of the fence, or of the list's first item
    mark: str = ""  # of the list's first item
    items: int = 0  # of the list, in this chunk
    number: int = 0  # of the chunk's first item
    numbered_by_us: bool = False
    blank: bool = False  # the list's last line was empty


class Splitter:
    """Feed text, get closed chunks; `tail` is the chunk still open."""

    def __init__(self) -> None:
        self._partial = ""  # the line that has not ended yet
        self._open = _Open()

    @property
    def tail(self) -> Chunk | None:
        """The open chunk as far as it is known."""
        lines, partial = self._open.lines, self._partial
        if self._open.fence:
            partial = "" if self._closes_fence(partial) else partial
        elif fence := _FENCE.match(partial):
            return self._chunk(self._open.kind, lines) if lines else _code(fence)
        elif _MARKS_ONLY.match(partial):
            partial = ""
        lines = [*lines, partial] if partial else lines
        if not lines and not self._open.fence:
            return None
        return self._chunk(self._open.kind or _kind_of(lines[0]), lines)

    def feed(self, text: str) -> list[Chunk]:
        """Take more text; return the chunks it closed, in order."""
        self._closed: list[Chunk] = []
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._take(line)
        while self._open.size + len(self._partial) > CHUNK_CHARS:
            self._cut_partial()
        return self._closed

    def finish(self) -> list[Chunk]:
        """The text has ended: the chunks that are left."""
        closed = self.feed("\n") if self._partial else []
        self._closed = []
        if self._open.lines:
            self._close("")
        return closed + self._closed

    def _take(self, line: str) -> None:
        """One whole line, without its newline."""
        if self._open.fence:
            self._take_code(line)
        elif self._open.kind == "list":
            self._take_in_list(line)
        else:
            self._take_text(line)

    def _take_code(self, line: str) -> None:
        if self._closes_fence(line):
            self._close("")
            return
        code = self._open
        self._append(line[min(code.indent, len(line) - len(line.lstrip(" "))) :])
        if len(code.lines) >= CODE_LINES or code.size > CHUNK_CHARS:
            self._close("code", continued=True)
            self._open.fence, self._open.indent = code.fence, code.indent
            self._open.language = code.language

    def _take_in_list(self, line: str) -> None:
        item = _ITEM.match(line)
        indent = len(line) - len(line.lstrip(" "))
        if self._open.inner_fence:
            if _closes(line, self._open.inner_fence):
                self._open.inner_fence = ""
        elif (fence := _FENCE.match(line)) and indent >= 2:
            self._open.inner_fence = fence[2]
        elif not line.strip():
            self._open.blank = True
        elif item and indent <= self._open.indent + 1:
            if not self._begin_item(item):
                self._take_text(line)
                return
        elif indent < 2 and (self._open.blank or fence or _HEADING.match(line)):
            self._close("")
            self._take_text(line)
            return
        else:
            self._open.blank = False
        self._append(line)
        if self._open.size > CHUNK_CHARS:
            self._cut_list()

    def _begin_item(self, item: re.Match[str]) -> bool:
        """Count a new top-level item; False if it starts another list (another kind of mark)."""
        self._open.blank = False
        if (item[3] is None) != (self._open.mark[-1] in "-*+"):
            self._close("")
            return False
        if self._open.items >= LIST_ITEMS:
            self._cut_list()
        self._open.items += 1
        return True

    def _cut_list(self) -> None:
        cut = self._open
        self._close("list", continued=True)
        self._open.indent, self._open.mark = cut.indent, cut.mark
        if cut.mark[-1] in ".)":
            self._open.number, self._open.numbered_by_us = cut.number + cut.items, True

    def _take_text(self, line: str) -> None:
        if fence := _FENCE.match(line):
            self._close("")
            self._open.kind, self._open.fence, self._open.indent = "code", fence[2], len(fence[1])
            self._open.language = fence[3].strip()
        elif not line.strip():
            self._close("")
        elif _HEADING.match(line):
            self._close("")
            self._append(line)
            self._close("")
        elif (item := _ITEM.match(line)) and self._begins_list(item):
            self._close("")
            self._open.kind, self._open.indent, self._open.mark = "list", len(item[1]), item[2]
            self._open.items, self._open.number = 1, int(item[3] or 0)
            self._append(line)
        elif self._open.kind == "table" and "|" not in line:
            self._close("")
            self._take_text(line)
        else:
            self._open.kind = self._open.kind or _kind_of(line)
            self._append(line)
            if self._open.kind == "table" and len(self._open.lines) >= TABLE_ROWS + 2:
                head = self._open.lines[:2]
                self._close("table", continued=True)
                self._open.lines, self._open.size = head, sum(map(len, head))
            elif self._open.size > CHUNK_CHARS:
                self._close("text", continued=True)

    def _begins_list(self, item: re.Match[str]) -> bool:
        """Whether an item mark starts a list here; inside a paragraph only "1." and bullets do."""
        if len(item[1]) > 3 or re.fullmatch(r" *([-*])(?: *\1){2,} *", item.string):
            return False
        return not self._open.lines or item[3] in (None, "1")

    def _closes_fence(self, line: str) -> bool:
        return _closes(line, self._open.fence)

    def _cut_partial(self) -> None:
        """One line without end: cut it, at a space if there is one."""
        room = max(CHUNK_CHARS - self._open.size, 1)
        at = self._partial.rfind(" ", 0, room) + 1 or room
        line, self._partial = self._partial[:at], self._partial[at:]
        if self._open.fence:
            self._take_code(line)
            return
        self._open.kind = self._open.kind or _kind_of(line)
        self._append(line)
        if self._open.kind == "list":
            self._cut_list()
        else:
            self._close("text", continued=True)

    def _append(self, line: str) -> None:
        self._open.lines.append(line)
        self._open.size += len(line) + 1

    def _chunk(self, kind: str, lines: list[str]) -> Chunk:
        number = self._open.number if self._open.numbered_by_us else 0
        chunk = Chunk(kind, "\n".join(lines), self._open.language, self._open.continued, number)
        return replace(chunk, text=chunk.text.rstrip()) if kind == "list" else chunk

    def _close(self, next_kind: str, continued: bool = False) -> None:
        """Close the open chunk, if it holds anything, and open one of `next_kind`."""
        table_head_only = (
            self._open.kind == "table" and self._open.continued and len(self._open.lines) == 2
        )
        if self._open.lines and not table_head_only:
            self._closed.append(
                self._chunk(self._open.kind or _kind_of(self._open.lines[0]), self._open.lines)
            )
        self._open = _Open(next_kind, continued)


def _code(fence: re.Match[str]) -> Chunk:
    return Chunk("code", "", fence[3].strip())


def _kind_of(line: str) -> str:
    return "table" if line.lstrip().startswith("|") else "text"


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    return len(bare) >= len(fence) and set(bare) == {fence[0]}
