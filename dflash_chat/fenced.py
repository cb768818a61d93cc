"""The code in a Markdown text. Knows no widgets and no terminal."""

from __future__ import annotations


def code_blocks(source: str) -> list[str]:
    """Block by block, as it would be pasted."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").parse(source)
    return [token.content for token in tokens if token.type in ("fence", "code_block")]
