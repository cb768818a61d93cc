"""Between text and token ids: chat template, tokenizer, streamed text, stop strings.

Knows vocabularies and templates, from a GGUF file's metadata or from a folder's tokenizer files.
Does not know models, sampling or the screen. Importing it is cheap: transformers is imported when
a tokenizer is built.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import gguf, safetensors_file
from dflash_chat.runtime.api import Message
from dflash_chat.runtime.gguf import Value

_CONTROL, _USER_DEFINED = 3, 4  # token types, ggml docs/gguf.md
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}  # by tokenizer.ggml.pre
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_OF_TURN = "<|im_end|>"
_THOUGHT_OPENS = "<think>"
_THOUGHT_MARKS = {_THOUGHT_OPENS, "</think>", "<|channel>", "<channel|>"}  # text, special or not


class Tokenizer:
    """A chat tokenizer. `stop_ids` end an answer: of sequence, of turn, `<|im_end|>`.

    `added_ids` are those and every token added beside the merges.
    """

    def __init__(self, fast: Any, stop_ids: Iterable[int]) -> None:  # noqa: ANN401
        """fast: transformers' `PreTrainedTokenizerFast`. CheckpointError for its decoder."""
        end_of_turn = fast.get_vocab().get(_END_OF_TURN)
        self._fast = fast
        self.stop_ids = frozenset(stop_ids) | ({end_of_turn} if end_of_turn is not None else set())
        added = fast.added_tokens_decoder
        self.added_ids = self.stop_ids | added.keys()
        self._special_ids = self.stop_ids | {
            i for i, token in added.items() if token.special and token.content not in _THOUGHT_MARKS
        }
        decoder = json.loads(fast.backend_tokenizer.to_str())["decoder"]
        if not decoder or decoder.get("type") != "ByteLevel":
            kind = decoder and decoder.get("type")
            raise CheckpointError(f"Tokenizers with a {kind} decoder are not supported.")

    @classmethod
    def from_checkpoint(cls, path: Path) -> Tokenizer:
        """Of a `.gguf` file or a folder. Raises CheckpointError."""
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(gguf.read(path).metadata)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Value]) -> Tokenizer:
        """Byte-level BPE from a GGUF file's `tokenizer.*` keys.

        Raises CheckpointError for another kind of tokenizer, and for a vocabulary that contradicts
        itself.
        """
        from transformers import PreTrainedTokenizerFast

        vocabulary = _Vocabulary(metadata)
        roles = {
            f"{role}_token": vocabulary.tokens[token_id]
            for role in ("bos", "eos")
            if (token_id := vocabulary.token_id(f"{role}_token_id")) is not None
        }
        fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=vocabulary.build(),
            chat_template=vocabulary.chat_template(),
            clean_up_tokenization_spaces=False,
            **roles,
        )
        stop_ids = [i for key in _STOP_KEYS if (i := vocabulary.token_id(key)) is not None]
        return cls(fast, stop_ids)

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """From a folder's tokenizer files. Raises CheckpointError if transformers refuses them."""
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path.name} has no usable tokenizer: {str(error)[:200]}", "Fetch the model again."
            ) from error
        return cls(fast, _generation_stop_ids(path, fast.eos_token_id))

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; special tokens written out in it become what they name."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """All of an answer at once, special tokens left out: what the stream adds up to."""
        stream = self.decode_stream()
        return stream.push(ids) + stream.finish()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The conversation as the model was trained to see it.

        As in transformers, special tokens that somebody types become the control tokens they name.
        Raises CheckpointError if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: list[int] = self._fast.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except (TemplateError, ValueError) as error:
            raise CheckpointError(
                f"The chat template refuses this conversation: {error}",
                "Start a new conversation, or choose a chat model.",
            ) from error
        return ids

    def opening(self, prompt: Sequence[int]) -> str:
        """What a rendered prompt has written of the answer itself: the start of a thought, or
        nothing.
        """
        end = self.decode(prompt[-8:])
        at = end.rfind(_THOUGHT_OPENS)
        opened = at >= 0 and not end[at + len(_THOUGHT_OPENS) :].strip()
        return end[at:] if opened else ""

    def decode_stream(self) -> Detokenizer:
        """A new stream of text for one answer."""
        return Detokenizer(self._token_bytes)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        token = self._fast.backend_tokenizer.id_to_token(token_id)
        return b"" if token is None else byte_level(token)


class Detokenizer:
    """Ids in, text out, never half a character. Each id costs the same, however long the answer."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes that begin a character wait for the rest of it."""
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        """What still waited, as U+FFFD: the answer ended inside a character."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Ends an answer where one of `stops` first completes, however the text is cut into pushes."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string ended the answer.

        What could become a stop string is held back; the stop string itself is never shown.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        ends = [
            (begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0
        ]
        if ends:
            self._held, self._stopped = "", True
            return text[: min(ends)[1]], True
        shown = len(text) - self._possible(text)
        self._held = text[shown:]
        return text[:shown], False

    def resume(self, text: str) -> int:
        """`text` came before, and all of it was shown; how long an end of it is held again."""
        length = self._possible(text)
        self._held = text[len(text) - length :]
        return length

    def finish(self) -> str:
        """What was held back and turns out to be text."""
        held, self._held = self._held, ""
        return held

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if self._begins_stop(text[-n:]))
        return next(ends, 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)


def byte_level(token: str) -> bytes:
    """The bytes of a byte-level token; one with characters outside the alphabet is plain text."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself if printable, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}


_BYTE_OF = {char: byte for byte, char in byte_alphabet().items()}


def _generation_stop_ids(path: Path, eos: int | None) -> list[int]:
    """The tokenizer's end of sequence, and those of generation_config.json if there is one."""
    config = path / "generation_config.json"
    listed = safetensors_file.read_json(config).get("eos_token_id") if config.exists() else None
    ids = listed if isinstance(listed, list) else [listed]
    return [i for i in (eos, *ids) if type(i) is int]


class _Vocabulary:
    """The `tokenizer.*` keys of a GGUF file, checked. Lists are as long as the vocabulary."""

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        self._metadata = metadata
        model, pre = self._get("ggml.model"), self._get("ggml.pre")
        if model != "gpt2" or pre not in _SPLITS_DIGITS:
            self._refuse(f"kind {model!r:.40} with pre-tokenizer {pre!r:.40} is not supported")
        self._split_digits = _SPLITS_DIGITS[str(pre)]
        self.tokens = self._strings("ggml.tokens")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            self._refuse("a token appears twice")

    def build(self) -> Any:  # noqa: ANN401
        """The `tokenizers.Tokenizer`."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE(vocab=self._ids, merges=self._merges()))
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([digits, bytes_of_words])
            if self._split_digits
            else bytes_of_words
        )
        backend.decoder = decoders.ByteLevel()
        kinds = self._kinds()
        for kind, add in (
            (_CONTROL, backend.add_special_tokens),
            (_USER_DEFINED, backend.add_tokens),
        ):
            special = kind == _CONTROL
            add([
                AddedToken(token, special=special, normalized=False)
                for token, its in zip(self.tokens, kinds, strict=True)
                if its == kind
            ])  # fmt: skip
        return backend

    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def token_id(self, key: str) -> int | None:
        """The id under `tokenizer.ggml.<key>`, None if there is none."""
        token_id = self._metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            self._refuse(f"{key} is {token_id!r:.40}")
        return token_id

    def _kinds(self) -> list[Value]:
        kinds = self._get("ggml.token_type")
        if not isinstance(kinds, list) or len(kinds) != len(self.tokens):
            self._refuse("token_type does not match the tokens")
        return kinds

    def _merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self._strings("ggml.merges"):
            left, _, right = merge.partition(" ")
            if not (left in self._ids and right in self._ids and left + right in self._ids):
                self._refuse(f"the merge {merge!r:.80} names no tokens")
            pairs.append((left, right))
        return pairs

    def _strings(self, key: str) -> list[str]:
        values = self._get(key)
        if not isinstance(values, list):
            self._refuse(f"{key} is not a list of strings")
        strings = [value for value in values if isinstance(value, str)]
        if not values or len(strings) != len(values):
            self._refuse(f"{key} is not a list of strings")
        return strings

    def _get(self, key: str) -> Value | None:
        return self._metadata.get(f"tokenizer.{key}")

    def _refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"The GGUF file's tokenizer: {why}.", "Choose another checkpoint.")
