"""The target's tokenizer as one function from text to ids."""

from __future__ import annotations

from pathlib import Path

from dflash_chat.runtime.text import Tokenizer
from dflash_chat.training.scripts import Encode


def encoder(path: Path) -> Encode:
    """The runtime's own encoding: special tokens in the text become their ids."""
    return Tokenizer.from_checkpoint(path).encode
