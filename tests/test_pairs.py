"""The catalogue: what is shipped, what a person may add, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_chat import pairs
from dflash_chat.errors import EXIT_UNKNOWN_MODEL, UnknownModelError, UsageError
from dflash_chat.pairs import HubSource, PyPISource
from dflash_chat.settings import DEFAULT_PAIR

ENTRY = f"""\
[[pair]]
name = "mine"
aliases = ["Own"]
title = "My pair"
licence = "MIT"
architecture = "llama"
[pair.sampling]
temperature = 1
[[pair.build]]
name = "bf16"
weights = "bf16"
format = "safetensors"
bits = 16
kind = "hub"
repo = "me/mine"
revision = "main"
patterns = ["*.json"]
bytes = 5
[[pair.build]]
name = "q4_0"
weights = "q4_0"
format = "gguf"
bits = 4.5
kind = "pypi"
package = "mine"
version = "1.0"
wheel_bytes = 10
wheel_sha256 = "{"a" * 64}"
member = "mine/mine.gguf"
bytes = 9
sha256 = "{"b" * 64}"
[pair.drafter]
kind = "folder"
path = "/drafters/mine"
block_size = 16
"""


@pytest.fixture
def user_file(own_folders: Path) -> Path:
    path = own_folders / "config" / "dflash-chat" / "models.toml"
    path.parent.mkdir(parents=True)
    path.write_text(ENTRY)
    return path


def test_the_default_pair_is_shipped_with_both_sources_in_order() -> None:
    pair = pairs.find(DEFAULT_PAIR)
    wheel, snapshot = (build.source for build in pair.builds)
    assert isinstance(wheel, PyPISource)
    assert isinstance(snapshot, HubSource)
    assert wheel.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert wheel.bytes == 98_362_432
    assert len(snapshot.revision) == 40, "pinned to a commit"
    assert pair.drafter.path.parent.parent == Path(pairs.__file__).parent
    assert (pair.drafter.block_size, pair.drafter.draft_tokens) == (8, 7)


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M", " smollm2 "])
def test_find_takes_names_and_aliases_in_any_case(name: str) -> None:
    assert pairs.find(name).name == "smollm2-135m"


def test_an_unknown_name_gets_suggestions(user_file: Path) -> None:
    with pytest.raises(UnknownModelError) as caught:
        pairs.find("smolm2")
    assert "smollm2" in caught.value.hint
    assert caught.value.exit_code == EXIT_UNKNOWN_MODEL


def test_a_user_pair_follows_the_shipped_ones(user_file: Path) -> None:
    pair = pairs.find("own")
    assert pair.title == "My pair"
    assert pair.sampling.temperature == 1
    assert pair.drafter.path == Path("/drafters/mine")
    assert pair.drafter.draft_tokens == 15, "the whole block, unless it says otherwise"
    assert pairs.load_catalogue(user_file) == (*pairs.load_catalogue(), pair)


def test_a_user_pair_replaces_the_shipped_one_of_its_name(user_file: Path) -> None:
    user_file.write_text(ENTRY.replace('"mine"\naliases', '"smollm2-135m"\naliases'))
    assert pairs.find("smollm2-135m").title == "My pair"
    assert len(pairs.load_catalogue(user_file)) == len(pairs.load_catalogue())


MISTAKES = {
    "missing": ('licence = "MIT"\n', "", "'licence' is missing"),
    "type": ("bytes = 9", 'bytes = "9"', "'bytes' must be a whole number, not '9'"),
    "bool": ("bytes = 9", "bytes = true", "'bytes' must be a whole number, not True"),
    "range": ("bytes = 9", "bytes = 0", "'bytes' must be from 1"),
    "unknown key": ('title = "My pair"', 'title = "My"\ntilte = "My"', "'tilte' is not known"),
    "unknown kind": (
        'kind = "hub"',
        'kind = "ftp"',
        "'kind' must be pypi or hub or",
    ),
    "hash": ("a" * 64, "a" * 63, "'wheel_sha256' has an unusable value"),
    "option as package": ('package = "mine"', 'package = "--pre"', "'package' has an unusable"),
    "alias": ('aliases = ["Own"]', 'aliases = ["a+b"]', "'aliases' has an unusable entry: 'a+b'"),
    "path as name": ('name = "mine"', 'name = "../mine"', "'name' has an unusable value"),
    "upwards": ("mine/mine.gguf", "../mine.gguf", "'member' has an unusable value"),
    "sampling": ("temperature = 1", "temperature = -1", "'temperature' must be a number from 0"),
    "list": ('["*.json"]', '["*.json", 1]', "'patterns' must be a list of texts"),
    "table": ("[pair.sampling]\ntemperature = 1", "sampling = 1", "'sampling' must be a table"),
    "draft": ("block_size = 16", "block_size = 4\ndraft_tokens = 4", "'draft_tokens' must be from"),
    "not toml": ("[[pair]]", "[[pair", "not valid TOML"),
}


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_with_its_file(user_file: Path, old: str, new: str, words: str) -> None:
    user_file.write_text(ENTRY.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        pairs.load_catalogue(user_file)
    assert words in caught.value.message
    assert str(user_file) in caught.value.message


def test_the_entry_of_a_mistake_is_named(user_file: Path) -> None:
    user_file.write_text(ENTRY.replace("bytes = 9", "bytes = 0"))
    with pytest.raises(UsageError, match=r"pair 1 \(mine\), build 2 \(q4_0\): key 'bytes'"):
        pairs.load_catalogue(user_file)


def test_two_pairs_of_one_name_in_one_file_are_refused(user_file: Path) -> None:
    user_file.write_text(ENTRY + ENTRY)
    with pytest.raises(UsageError, match="appears twice"):
        pairs.load_catalogue(user_file)


def test_a_build_is_named_after_an_at_sign() -> None:
    assert pairs.find("smollm2@BF16").quant == "bf16"
    assert [build.name for build in pairs.find("smollm2@bf16").wanted()] == ["bf16"]
    assert [build.name for build in pairs.find("smollm2").wanted()] == ["q4_1", "bf16"]


def test_a_build_that_the_pair_lacks_gets_suggestions() -> None:
    with pytest.raises(UnknownModelError, match="has no build 'q4'") as caught:
        pairs.find("smollm2@q4")
    assert caught.value.hint == "did you mean q4_1?"
