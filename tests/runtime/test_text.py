"""Ids equal a plain BPE's, text streams without half characters, stops hold back enough."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import gguf
from dflash_chat.runtime.api import Message
from dflash_chat.runtime.text import Detokenizer, StopStrings, Tokenizer, byte_alphabet, byte_level
from tests.runtime.gguf_writer import MERGES, SPECIAL, tokenizer_metadata, vocabulary

TEXTS = (
    "", " ", "hello there and your string", "The  capital\n\n of France?\t\r\n",
    "x=12;\n\tfor i in", "it's I'll DON'T we'Ve", "1234567890 ½ ٣४ ²", "日本語のテキスト",
    "😀😃👩‍👩‍👧‍👦🇫🇷", "naïve café e\u0301", "\u200b\u00a0\ufeff\x00",
    "<|im_end|> typed <|im_start|>by hand<|im_end", "a" * 200, "   lots    of   room   ",
    "עברית עם ניקוד ",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_gguf(tokenizer_metadata())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(smollm2_gguf)


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────

GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


class PlainBPE:
    """The algorithm in words: cut out special tokens, digits, words; merge the best pair first."""

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]
    ) -> None:
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.special = regex.compile("|".join(f"({regex.escape(token)})" for token in special))

    def encode(self, text: str) -> list[int]:
        ids, begin = [], 0
        for match in self.special.finditer(text):
            ids += [*self.plain(text[begin : match.start()]), self.ids[match[0]]]
            begin = match.end()
        return ids + self.plain(text[begin:])

    def plain(self, text: str) -> list[int]:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        words = [word for piece in pieces for word in GPT2_WORDS.findall(piece)]
        return [token for word in words for token in self.word(word)]

    def word(self, word: str) -> list[int]:
        alphabet = byte_alphabet()
        parts = [alphabet[byte] for byte in word.encode()]
        while True:
            pairs = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(parts))]
            rank, i = min(pairs, default=(1 << 30, 0))
            if rank == 1 << 30:
                return [self.ids[part] for part in parts]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_a_plain_bpes(tiny: Tokenizer, text: str) -> None:
    assert tiny.encode(text) == PlainBPE(vocabulary(), MERGES, SPECIAL).encode(text)


@given(text=st.text(max_size=60))
@example(text="a<|im_end|>b")
@settings(max_examples=300, deadline=None)
def test_ids_of_any_text_come_back_as_that_text(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert ids == PlainBPE(vocabulary(), MERGES, SPECIAL).encode(text)
    for special in SPECIAL:  # written out, they become what they name, and are no text
        text = text.replace(special, "")
    assert tiny.decode(ids) == text


@pytest.mark.weights
@pytest.mark.parametrize("text", TEXTS)
def test_the_real_vocabularys_ids_equal_a_plain_bpes(
    real: Tokenizer, smollm2_gguf: Path, text: str
) -> None:
    metadata = gguf.read(smollm2_gguf).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    plain = PlainBPE(
        [str(t) for t in tokens], [str(m) for m in merges], [str(t) for t in tokens[:17]]
    )
    assert real.encode(text) == plain.encode(text)


# ── chat ────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_is_rendered_by_the_models_template(tiny: Tokenizer) -> None:
    messages = [Message("user", "hi"), Message("assistant", "yo"), Message("user", "12")]
    expected = (
        "<|im_start|>system\nYou are a test<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\n12<|im_end|>\n"
    )
    assert tiny.render(messages, add_generation_prompt=False) == tiny.encode(expected)
    assert tiny.render(messages) == tiny.encode(expected + "<|im_start|>assistant\n")


def test_control_tokens_in_a_message_are_control_tokens(tiny: Tokenizer) -> None:
    """As in transformers; the template is plain text to the tokenizer."""
    assert tiny.render([Message("user", "<|im_end|>")]).count(2) == 3


def test_a_conversation_the_template_refuses_is_an_error_message() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    metadata = {**tokenizer_metadata(), "tokenizer.chat_template": template}
    with pytest.raises(CheckpointError, match="roles must alternate"):
        Tokenizer.from_gguf(metadata).render([Message("user", "hi")])  # type: ignore[arg-type]


def test_no_template_is_an_error_message() -> None:
    metadata = tokenizer_metadata()
    del metadata["tokenizer.chat_template"]
    with pytest.raises(CheckpointError, match="template"):
        Tokenizer.from_gguf(metadata).render([Message("user", "hi")])  # type: ignore[arg-type]


def test_stop_ids_are_every_end_the_file_names() -> None:
    metadata = {**tokenizer_metadata(), "tokenizer.ggml.eos_token_id": 0}
    metadata["tokenizer.ggml.eot_token_id"] = 3
    assert Tokenizer.from_gguf(metadata).stop_ids == {0, 2, 3}  # type: ignore[arg-type]


def test_added_ids_are_the_stops_and_all_that_is_no_merge() -> None:
    metadata = tokenizer_metadata()
    kinds = list(metadata["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    kinds[9] = 4  # user-defined
    metadata |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eot_token_id": 7}
    special = {i for i, kind in enumerate(kinds) if kind == 3}
    assert Tokenizer.from_gguf(metadata).added_ids == {*special, 7, 9}  # type: ignore[arg-type]


def test_a_folder_gives_the_same_tokenizer(tiny: Tokenizer, tmp_path: Path) -> None:
    tiny._fast.save_pretrained(str(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    folder = Tokenizer.from_checkpoint(tmp_path)
    assert folder.stop_ids == {2, 3}
    assert [folder.encode(text) for text in TEXTS] == [tiny.encode(text) for text in TEXTS]
    assert folder.render([Message("user", "x")]) == tiny.render([Message("user", "x")])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer.from_folder(tmp_path)


BROKEN: dict[str, tuple[str, object]] = {
    "kind 'llama'": ("tokenizer.ggml.model", "llama"),
    "pre-tokenizer 'llama-bpe'": ("tokenizer.ggml.pre", "llama-bpe"),
    "tokens is not a list of strings": ("tokenizer.ggml.tokens", [1, 2]),
    "a token appears twice": ("tokenizer.ggml.tokens", ["a", "a"]),
    "token_type does not match": ("tokenizer.ggml.token_type", [1]),
    "names no tokens": ("tokenizer.ggml.merges", ["Ġ zzz"]),
    "eos_token_id is 99999": ("tokenizer.ggml.eos_token_id", 99999),
    "merges is not a list": ("tokenizer.ggml.merges", "x"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_vocabulary_that_contradicts_itself_is_refused(message: str) -> None:
    key, value = BROKEN[message]
    with pytest.raises(CheckpointError) as refused:
        Tokenizer.from_gguf({**tokenizer_metadata(), key: value})  # type: ignore[dict-item]
    assert message in refused.value.message


def test_importing_text_does_not_import_transformers() -> None:
    code = "import sys, dflash_chat.runtime.text; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ── streams ─────────────────────────────────────────────────────────────────────────────────────

PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["😀", "日本", "👩‍👧", "é", "\U0010ffff"]),
)


@given(data=st.lists(st.one_of(PIECES.map(str.encode), st.binary(max_size=5))), cut=st.randoms())
@settings(max_examples=500, deadline=None)
def test_a_stream_adds_up_to_the_full_decode(data: list[bytes], cut: object) -> None:
    """One byte a token and random pushes; both decoders replace what is no character alike."""
    whole = b"".join(data)
    stream, text, i = Detokenizer(lambda byte: bytes([byte])), "", 0
    while i < len(whole):
        step = cut.randint(0, 4)  # type: ignore[attr-defined]
        text += stream.push(whole[i : i + step])
        i += step
    assert text + stream.finish() == whole.decode("utf-8", "replace")


@given(text=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_whole_characters_never_stream_as_replacements(text: str) -> None:
    stream = Detokenizer(lambda byte: bytes([byte]))
    emitted = [stream.push([byte]) for byte in text.encode()]
    assert "".join(emitted) == text
    assert all("�" not in part for part in emitted if "�" not in text)
    assert stream.finish() == ""


@given(ids=st.lists(st.integers(0, len(vocabulary()) - 1)))
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_as_transformers_decodes_them(tiny: Tokenizer, ids: list[int]) -> None:
    stream = tiny.decode_stream()
    text = "".join(stream.push([i]) for i in ids) + stream.finish()
    assert text == tiny._fast.decode(ids, skip_special_tokens=True)


def test_ids_beyond_the_vocabulary_are_silent(tiny: Tokenizer) -> None:
    assert tiny.decode([10**6]) == ""


def test_tokens_outside_the_byte_alphabet_are_plain_text() -> None:
    assert byte_level("Ġhi") == b" hi"
    assert byte_level("a b") == b"a b"


# ── stop strings ────────────────────────────────────────────────────────────────────────────────


def run(stops: Sequence[str], pushes: Sequence[str]) -> tuple[str, bool]:
    filter_ = StopStrings(stops)
    text, stopped = "", False
    for push in pushes:
        emit, stopped = filter_.push(push)
        text += emit
    return text + filter_.finish(), stopped


@pytest.mark.parametrize(
    ("stops", "pushes", "expected"),
    [
        ([], ["a", "b"], ("ab", False)),
        ([""], ["a"], ("a", False)),
        (["END"], ["text E", "N", "D more"], ("text ", True)),
        (["END"], ["text E", "NX"], ("text ENX", False)),
        (["END"], ["EN"], ("EN", False)),
        (["aab"], ["aa", "ab"], ("a", True)),
        (["abc", "b"], ["abc"], ("a", True)),
        (["abc", "bc"], ["a", "b", "c"], ("", True)),
        (["\n\n"], ["x\n", "y\n", "\n"], ("x\ny", True)),
        (["x"], ["ax", "bx"], ("a", True)),
    ],
)
def test_stop_strings(stops: list[str], pushes: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, pushes) == expected


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pushes=st.lists(st.text("abc", max_size=5)),
)
@settings(max_examples=800, deadline=None)
def test_stops_do_not_depend_on_how_the_text_is_cut(stops: list[str], pushes: list[str]) -> None:
    whole = "".join(pushes)
    assert run(stops, pushes) == run(stops, [whole]) == run(stops, list(whole)) or not whole
    shown, stopped = run(stops, pushes)
    assert stopped == any(stop in whole for stop in stops)
    assert not any(stop in shown for stop in stops)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=4)), text=st.text("abc"))
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_could_become_a_stop(stops: list[str], text: str) -> None:
    filter_ = StopStrings(stops)
    emit, stopped = filter_.push(text)
    held = "" if stopped else text[len(emit) :]
    assert not held or any(stop.startswith(held) for stop in stops)
