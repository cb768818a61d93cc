"""The shipped catalogue: complete, true to its own arithmetic, and refusing every wrong edit."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dflash_chat import catalogue
from dflash_chat.entries import Build, Drafter, HubSource, Pair
from dflash_chat.errors import UsageError
from dflash_chat.runtime.models import find

SHIPPED = catalogue.load_catalogue()
PAIRS = pytest.mark.parametrize("pair", SHIPPED, ids=lambda pair: pair.name)
EDITS = 100


def test_every_public_pair_for_one_machine_is_there() -> None:
    assert {pair.name for pair in SHIPPED} == {
        "gemma-4-26b-a4b", "gemma-4-31b", "gemma-4-12b", "qwen3.6-27b", "qwen3.6-35b-a3b",
        "qwen3.8-27b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3-4b",
        "qwen3-8b", "qwen3-coder-30b-a3b", "llama-3.1-8b", "gpt-oss-20b", "muse-glimmer-30b",
        "smollm2-135m",
    }  # fmt: skip


def test_no_name_or_alias_means_two_pairs() -> None:
    names = [name for pair in SHIPPED for name in (pair.name, *pair.aliases)]
    assert len(names) == len(set(names))


@PAIRS
def test_every_entry_says_what_it_knows_since_when_and_from_whom(pair: Pair) -> None:
    entries: list[Pair | Build | Drafter] = [pair, *pair.builds]
    entries += [pair.drafter] if pair.drafter.source else []
    for entry in entries:
        assert entry.facts
        assert all(fact.date >= "2025-12" for fact in entry.facts)
    assert pair.default
    assert pair.sampling.temperature > 0, "the card's advice"


@PAIRS
def test_a_branch_stands_only_where_no_commit_is_known(pair: Pair) -> None:
    sources = [build.source for build in pair.builds] + [pair.drafter.source]
    for source in sources:
        if isinstance(source, HubSource):
            assert source.revision == "main" or re.fullmatch("[0-9a-f]{40}", source.revision)


@PAIRS
def test_what_is_on_the_device_came_through_the_download(pair: Pair) -> None:
    for build in pair.builds:
        assert build.resident_bytes <= build.source.bytes, build.name


@PAIRS
def test_drafters_have_the_bytes_that_their_shapes_give(pair: Pair) -> None:
    """Two bytes for each parameter of the published layout; DFlash2 adds to it."""
    c, drafter = pair.drafter.config, pair.drafter
    hidden, taps = c["hidden_size"], len(c["dflash_config"]["target_layer_ids"])
    q, kv = (c[f"num_{n}_heads"] * c["head_dim"] for n in ("attention", "key_value"))
    layer = 2 * hidden * (q + kv) + 3 * hidden * c["intermediate_size"]
    layer += 2 * hidden + 2 * c["head_dim"]
    parameters = hidden * hidden * taps + c["num_hidden_layers"] * layer + 2 * hidden
    more = 0.12 if drafter.version == 2 else 0.003
    assert 2 * parameters <= drafter.bytes * 1.003
    assert drafter.bytes <= 2 * parameters * (1 + more)


FILLERS: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_parameters": {
        "rope_theta": 1e6,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
    },
}  # fmt: skip


@pytest.mark.parametrize("pair", [p for p in SHIPPED if p.loadable], ids=lambda pair: pair.name)
def test_the_runtime_counts_the_same_bytes_in_bf16(pair: Pair) -> None:
    module = find(pair.config["model_type"])
    fillers = FILLERS if "gemma" in pair.architecture else {**FILLERS, "rope_parameters": None}
    shapes = module.Config.from_hf({**pair.config, **fillers}).tensor_shapes()
    numbers = 0
    for shape in shapes.values():
        product = 1
        for side in shape:
            product *= side
        numbers += product
    assert 2 * numbers == pytest.approx(pair.build("bf16").resident_bytes, rel=1e-6)


@PAIRS
def test_layer_types_are_written_once_and_count_for_every_layer(pair: Pair) -> None:
    for config in (pair.config, pair.drafter.config):
        if "layer_types" in config:
            assert len(config["layer_types"]) == config["num_hidden_layers"]


def test_a_dflash2_drafter_has_the_architecture_that_its_config_names() -> None:
    drafters = {pair.name: pair.drafter for pair in SHIPPED}
    assert drafters["qwen3.8-27b"].config["architectures"] == ["DFlash2DraftModel"]
    assert drafters["qwen3.8-27b"].config["block_size"] == 8
    assert "architectures" not in drafters["qwen3.6-27b"].config


# ── edits ───────────────────────────────────────────────────────────────────────────────────────

Edit = Callable[[random.Random, list[str], int], None]


def _delete(dice: random.Random, lines: list[str], at: int) -> None:
    del lines[at]


def _double(dice: random.Random, lines: list[str], at: int) -> None:
    lines.insert(at, lines[at])


def _rename(dice: random.Random, lines: list[str], at: int) -> None:
    key, equals, value = lines[at].partition(" = ")
    cut = dice.randrange(len(key) + 1)
    lines[at] = key[:cut] + dice.choice(string.ascii_lowercase) + key[cut:] + equals + value


def _retype(dice: random.Random, lines: list[str], at: int) -> None:
    values = ("true", '"text"', "-1", "0", "1e300", "nan", "[]", "{}", "1979-05-27", '""', "[[1]]")
    lines[at] = f"{lines[at].partition(' = ')[0]} = {dice.choice(values)}"


def _grow(dice: random.Random, lines: list[str], at: int) -> None:
    digits = dice.choice(("0", "0000000000", "_999_999_999_999", "-", "e9"))
    lines[at] = re.sub(r"(?<=\d)(?=\D*$)", digits, lines[at], count=1)


def _garble(dice: random.Random, lines: list[str], at: int) -> None:
    noise = "".join(dice.choice(string.printable.strip() + "ä\u2028\x00") for _ in range(12))
    cut = dice.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:cut] + noise + lines[at][cut:]


def _swap(dice: random.Random, lines: list[str], at: int) -> None:
    other = dice.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


def _cut_off(dice: random.Random, lines: list[str], at: int) -> None:
    lines[at] = lines[at][: dice.randrange(len(lines[at]) + 1)]
    del lines[at + 1 :]


KINDS: tuple[Edit, ...] = (_delete, _double, _rename, _retype, _grow, _garble, _swap, _cut_off)


@pytest.mark.parametrize("seed", range(EDITS))
def test_an_edit_is_accepted_or_refused_with_file_entry_and_key(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    lines = catalogue.packaged_file().read_text(encoding="utf-8").splitlines()
    at = dice.choice([i for i, line in enumerate(lines) if line and line[0] != "#"])
    KINDS[seed % len(KINDS)](dice, lines, at)
    path = tmp_path / "models.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(catalogue, "packaged_file", lambda: path)
    refusal = refused()
    assert ACCEPTED_OR_NAMED.fullmatch(refusal.replace(str(path), "FILE")), refusal


ACCEPTED_OR_NAMED = re.compile(
    r"|FILE(, pair \d+)?: (key .+ is )?not valid TOML: .+ \(at (line \d+.*|end of document)\)"
    r"|FILE: key 'pair' .+|FILE: key '.*' is not known"
    r"|FILE, pair \d+( \([\w.-]+\))?(, (build|facts) \d+( \([\w.-]+\))?|, [\w ]+)*: key '.*' .+",
    re.S,
)


def refused() -> str:
    """What the catalogue is refused for; "" if it is not."""
    try:
        catalogue.load_catalogue()
    except UsageError as refusal:
        return refusal.message
    return ""


def test_edits_are_seen_by_the_test_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word in a title is accepted, a title that is missing is not."""
    text = catalogue.packaged_file().read_text(encoding="utf-8")
    path = tmp_path / "models.toml"
    monkeypatch.setattr(catalogue, "packaged_file", lambda: path)
    path.write_text(text.replace('title = "Qwen3 8B"', 'title = "Q"'), encoding="utf-8")
    assert "Q" in [pair.title for pair in catalogue.load_catalogue()]
    path.write_text(text.replace('title = "Qwen3 8B"', ""), encoding="utf-8")
    assert re.search(r"pair \d+ \(qwen3-8b\): key 'title' is missing", refused())
    path.write_text(text.replace('title = "Qwen3 8B"', "title = Qwen3"), encoding="utf-8")
    assert re.search(r"pair \d+: key 'title' is not valid TOML: .* \(at line \d+", refused())


# ── a person's own file ─────────────────────────────────────────────────────────────────────────


def load_with(tmp_path: Path, text: str) -> dict[str, Pair]:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return {pair.name: pair for pair in catalogue.load_catalogue(path)}


def test_an_own_entry_may_change_single_keys(tmp_path: Path) -> None:
    before = {pair.name: pair for pair in SHIPPED}["gemma-4-26b-a4b"]
    pair = load_with(
        tmp_path,
        """
        [[pair]]
        name = "gemma-4-26b-a4b"
        based_on = "gemma-4-26b-a4b"
        default = ["fp8"]
        sampling.temperature = 0.5
        drafter.draft_tokens = 7
        [[pair.build]]
        name = "fp8"
        revision = "main"
        """,
    )["gemma-4-26b-a4b"]
    assert (pair.default, pair.drafter.draft_tokens) == (("fp8",), 7)
    assert (pair.sampling.temperature, pair.sampling.top_k) == (0.5, before.sampling.top_k)
    assert (pair.aliases, pair.config) == (before.aliases, before.config)
    assert [build.name for build in pair.builds] == [build.name for build in before.builds]
    assert isinstance(pair.build("fp8").source, HubSource)
    assert pair.build("fp8").source.revision == "main"
    assert pair.build("int4") == before.build("int4")


def test_an_own_pair_may_be_based_on_a_packaged_one(tmp_path: Path) -> None:
    pairs = load_with(
        tmp_path,
        """
        [[pair]]
        name = "my-tune"
        based_on = "qwen3-8b"
        default = ["mine"]
        drafter = { kind = "folder", path = "/my/drafter", block_size = 8 }
        [[pair.build]]
        name = "mine"
        weights = "bf16"
        format = "safetensors"
        kind = "folder"
        path = "/my/tune"
        bytes = 16_000_000_000
        bits = 16
        """,
    )
    mine, base = pairs["my-tune"], pairs["qwen3-8b"]
    assert mine.aliases == (), "they stay with the packaged pair"
    assert mine.config == base.config
    assert [build.name for build in mine.wanted()] == ["mine"]
    assert (mine.drafter.path, mine.drafter.source) == (Path("/my/drafter"), None)
    assert base == {pair.name: pair for pair in SHIPPED}["qwen3-8b"]


OWN_MISTAKES = {
    "base": ('based_on = "qwen"', "key 'based_on' names no packaged pair: 'qwen'"),
    "key": ('based_on = "qwen3-8b"\ntemperature = 1', "pair 1 (mine): key 'temperature' is not"),
    "build": (
        'based_on = "qwen3-8b"\nbuild = [{ name = "fp8", bits = 99 }]',
        "pair 1 (mine), build 2 (fp8): key 'bits' must be from 1 to 32, not 99",
    ),
    "builds": ('based_on = "qwen3-8b"\nbuild = [1]', "key 'build' must be a list of tables"),
    "drafter": ('based_on = "qwen3-8b"\ndrafter = 3', "key 'drafter' must be a table, not 3"),
    "default": ('based_on = "qwen3-8b"\ndefault = ["x"]', "key 'default' names no build: 'x'"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "words"), OWN_MISTAKES.values(), ids=OWN_MISTAKES.keys())
def test_a_mistake_in_an_own_entry_is_named(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_with(tmp_path, f'[[pair]]\nname = "mine"\n{lines}\n')
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message
