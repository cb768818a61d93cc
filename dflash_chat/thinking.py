"""What a model thinks aloud, told apart from what it answers.

Pure text, streamed: knows the marks of the chat templates in use, `<think> … </think>` (Qwen) and
`<|channel>thought … <channel|>` (Gemma 4). A thought stands before the answer; a mark inside the
answer is text like any other.
"""

from __future__ import annotations

_MARKS = {"<think>": "</think>", "<|channel>thought\n": "<channel|>"}


class ThoughtSplitter:
    """Feed text, get pieces: (whether it is thought, text)."""

    def __init__(self) -> None:
        self.thinking = False  # inside a thought
        self._close = ""  # the mark that will end it
        self._held = ""  # may become a mark, or space between thought and answer
        self._thought = self._answering = False  # there was a thought; the answer has begun

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """The pieces that `text` completes, in order."""
        pieces: list[tuple[bool, str]] = []
        text, self._held = self._held + text, ""
        while text:
            if self._answering:
                pieces.append((False, text))
                break
            text = self._in_thought(text, pieces) if self.thinking else self._before_answer(text)
        return pieces

    def finish(self) -> list[tuple[bool, str]]:
        """No text follows: what was held back is text after all."""
        held, self._held = self._held, ""
        if not self.thinking and self._thought:
            held = held.lstrip()
        return [(self.thinking, held)] if held else []

    def _in_thought(self, text: str, pieces: list[tuple[bool, str]]) -> str:
        """Take the thought from the beginning of `text`; returns what stands behind it."""
        thought, mark, rest = text.partition(self._close)
        if mark:
            self.thinking = False
        else:
            self._held = text[len(text) - _overlap(text, self._close) :]
            thought = text[: len(text) - len(self._held)]
        if thought:
            pieces.append((True, thought))
        return rest

    def _before_answer(self, text: str) -> str:
        """Skip a mark that opens a thought; returns what is to be looked at next."""
        body = text.lstrip()
        for opening, close in _MARKS.items():
            if body.startswith(opening):
                self.thinking = self._thought = True
                self._close = close
                return body[len(opening) :]
        if not body or any(opening.startswith(body) for opening in _MARKS):
            self._held = text
            return ""
        self._answering = True
        return body if self._thought else text


def split(text: str) -> tuple[str, str]:
    """The thought and the answer in a whole text."""
    splitter = ThoughtSplitter()
    pieces = splitter.feed(text) + splitter.finish()
    thought = "".join(piece for is_thought, piece in pieces if is_thought)
    answer = "".join(piece for is_thought, piece in pieces if not is_thought)
    return thought, answer


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
