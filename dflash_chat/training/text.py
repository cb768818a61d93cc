"""The target's tokenizer as one function from text to ids."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dflash_chat.runtime import gguf
from dflash_chat.training.scripts import Encode


def encoder(path: Path) -> Encode:
    """Byte-level BPE of a GGUF with the `smollm` pre-tokenizer; special tokens map to their ids."""
    metadata = gguf.read(path).metadata
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(str(m).split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    kinds = metadata["tokenizer.ggml.token_type"]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode
