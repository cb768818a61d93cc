"""TARGET+DRAFTER: what folders and repositories become, and what is said of the wrong ones."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dflash_chat import cli, hub, pairs
from dflash_chat.errors import (
    EXIT_ACCESS,
    EXIT_OK,
    EXIT_UNKNOWN_MODEL,
    EXIT_USAGE,
    UnknownModelError,
    UserError,
)
from dflash_chat.pairs import FolderSource
from tests import folders, hub_pairs, hub_server

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return folders.write_pair(tmp_path_factory.mktemp("pair"))


def write_config(folder: Path, config: object) -> Path:
    """A folder that looks like a model from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


# ── folders ─────────────────────────────────────────────────────────────────────────────────────


def test_two_folders_become_a_pair_with_what_their_configs_say(
    pair_folders: tuple[Path, Path],
) -> None:
    target, drafter = pair_folders
    pair = pairs.find(f"{target}+{drafter}")
    (build,) = pair.builds
    assert (pair.kind, pair.architecture, pair.missing) == ("custom", "llama", "")
    assert pair.config["num_hidden_layers"] == folders.SIZES.layers
    assert (build.weights, build.format, build.missing) == ("fp32", "safetensors", "")
    assert build.source == FolderSource(target, (target / "model.safetensors").stat().st_size)
    assert (pair.drafter.path, pair.drafter.block_size) == (drafter, 5)
    assert pair.drafter.config["dflash_config"]["target_layer_ids"] == [0, 2]
    assert pairs.find(pair.name) == pair, "its name finds it again, in any process"
    assert hub.ensure(pair).target == target, "nothing is fetched"


def test_a_folder_may_be_relative_or_in_the_home_folder(
    pair_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair_folders
    monkeypatch.chdir(target.parent)
    monkeypatch.setenv("HOME", str(target.parent))
    assert pairs.find("./target+~/drafter") == pairs.find(f"{target}+{drafter}")


def test_two_folders_answer_and_drafting_changes_no_word(
    pair_folders: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, drafter = pair_folders
    monkeypatch.setattr(sys, "stdin", None)
    asked = ["-m", f"{target}+{drafter}", "--once", "hello there", "--json", "--max-tokens", "24"]
    options = ["-o", "device=cpu", "-o", "dtype=fp32", "-o", "k=4", "-o", "ctx=256"]
    answers = []
    for flags in ([], ["--no-draft"]):
        assert cli.main([*asked, *options, *flags]) == EXIT_OK
        answers.append(json.loads(capfd.readouterr().out))
    drafted, plain = answers
    assert drafted["text"] == plain["text"]
    assert drafted["usage"]["completion"] > 1
    assert drafted["pair"] == f"{target}+{drafter}"
    assert drafted["spec"]["drafted"] > plain["spec"]["drafted"] == 0


def test_a_folder_that_is_gone_counts_as_absent_and_is_never_deleted(
    pair_folders: tuple[Path, Path],
    own_folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, drafter = pair_folders
    assert cli.main(["rm", f"{target}+{drafter}", "--yes"]) == EXIT_UNKNOWN_MODEL
    assert (target / "model.safetensors").exists()
    own = own_folders / "config" / "dflash-chat" / "models.toml"
    own.parent.mkdir(parents=True)
    own.write_text(OWN_FOLDERS)
    assert cli.main(["list"]) == EXIT_OK
    assert re.search(r"^mine +here .* not installed$", capsys.readouterr().out, re.M)
    with pytest.raises(UnknownModelError, match="mine@here: there is nothing at /no/target"):
        hub.ensure(pairs.find("mine"))


OWN_FOLDERS = """
[[pair]]
name = "mine"
title = "Mine"
licence = "MIT"
architecture = "llama"
drafter = { kind = "folder", path = "/no/drafter", block_size = 8 }
[[pair.build]]
name = "here"
weights = "bf16"
format = "safetensors"
kind = "folder"
path = "/no/target"
bytes = 9
bits = 16
"""


@pytest.mark.weights
def test_a_gguf_file_may_be_the_target(smollm2_gguf: Path) -> None:
    drafter = pairs.find("smollm2").drafter.path
    pair = pairs.find(f"{smollm2_gguf}+{drafter}")
    assert [build.format for build in pair.loadable] == ["gguf"]
    assert hub.ensure(pair).target == smollm2_gguf


QUANTISED: dict[str, tuple[dict[str, Any], tuple[str, str], bool]] = {
    "int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ("compressed-tensors", "int4"), True,
    ),
    "fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ("compressed-tensors", "fp8"), True,
    ),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        ("compressed-tensors", "nvfp4"), False,
    ),
    "official fp8": ({"quant_method": "fp8"}, ("fp8", "fp8"), True),
    "awq": ({"quant_method": "awq", "bits": 4}, ("autoawq", "int4"), False),
    "unheard of": ({"quant_method": "hqq"}, ("hqq", "hqq"), False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("quantization", "stored", "loads"), QUANTISED.values(), ids=QUANTISED.keys()
)
def test_the_format_is_read_and_what_cannot_be_loaded_says_so(
    tmp_path: Path, quantization: dict[str, Any], stored: tuple[str, str], loads: bool
) -> None:
    config = {"model_type": "qwen3", "quantization_config": quantization}
    target = write_config(tmp_path / "target", config)
    drafter = write_config(tmp_path / "drafter", folders.drafter_config())
    pair = pairs.find(f"{target}+{drafter}")
    assert (pair.builds[0].format, pair.builds[0].weights) == stored
    assert bool(pair.loadable) is loads
    if not loads:
        with pytest.raises(UnknownModelError, match="are not read yet"):
            hub.ensure(pair)


def test_the_text_part_of_a_multimodal_config_counts(tmp_path: Path) -> None:
    text = {"model_type": "gemma4_text", "hidden_size": 64}
    config = {"model_type": "gemma4", "tie_word_embeddings": True, "text_config": text}
    target = write_config(tmp_path / "target", config)
    drafter = write_config(tmp_path / "drafter", folders.drafter_config())
    pair = pairs.find(f"{target}+{drafter}")
    assert (pair.architecture, pair.config) == ("gemma4", text | {"tie_word_embeddings": True})


def test_a_dflash2_drafter_is_known_as_one_and_not_loaded(tmp_path: Path) -> None:
    target = write_config(tmp_path / "target", folders.target_config())
    config = folders.drafter_config() | {"architectures": ["DFlash2DraftModel"]}
    pair = pairs.find(f"{target}+{write_config(tmp_path / 'drafter', config)}")
    assert pair.drafter.version == 2
    with pytest.raises(UnknownModelError, match="DFlash2 drafters are not read yet"):
        hub.ensure(pair)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _broken(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _no_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _huge_block(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(folders.drafter_config() | {"block_size": 999}))


WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no config": ("target", _no_config, "target has no config.json"),
    "no weights": ("target", _no_weights, "target has no safetensors"),
    "broken json": ("drafter", _broken, "config.json cannot be read"),
    "no object": ("drafter", _a_list, "config.json holds no JSON object"),
    "no type": ("target", _no_type, "config.json has no model_type"),
    "no drafter": ("drafter", _no_type, "drafter is no DFlash drafter"),
    "block": ("drafter", _huge_block, "block_size 999 in config.json is not from 2 to 64"),
}


@pytest.mark.parametrize(("side", "spoil", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_folder_gets_one_clear_sentence(
    tmp_path: Path, side: str, spoil: Callable[[Path], None], words: str
) -> None:
    sides = {
        "target": write_config(tmp_path / "target", folders.target_config()),
        "drafter": write_config(tmp_path / "drafter", folders.drafter_config()),
    }
    spoil(sides[side])
    with pytest.raises(UnknownModelError, match=words):
        pairs.find("{target}+{drafter}".format(**sides))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("/nowhere+/nowhere", EXIT_UNKNOWN_MODEL, "/nowhere is no folder"),
        ("/nowhere+", EXIT_USAGE, "is not TARGET+DRAFTER"),
        ("a/b+c/d+e/f", EXIT_USAGE, "is not TARGET+DRAFTER"),
        ("qwen3-8b+c/d", EXIT_USAGE, "'qwen3-8b' is neither a folder nor a hub repository"),
        ("a/b@+c/d", EXIT_USAGE, "'a/b@' is neither a folder nor a hub repository"),
    ],
)
def test_what_is_no_pair_is_refused(name: str, code: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        pairs.find(name)
    assert words in caught.value.message
    assert caught.value.exit_code == code


# ── repositories ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server() -> Iterator[hub_server.Hub]:
    """A hub with a target and a drafter."""
    repos = {}
    for name, config in (
        ("target", folders.target_config()), ("drafter", folders.drafter_config()),
    ):  # fmt: skip
        files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": b"never"}
        repos[f"me/{name}"] = hub_server.Repo({**files, "model.safetensors": b"weights"})
    with hub_server.serve(hub_server.Hub(repos)) as running:
        yield running


def show(server: hub_server.Hub, name: str, **environment: str) -> tuple[int, str, str]:
    """`show NAME --json`, as a process of its own."""
    return hub_pairs.run(server, "show", name, "--json", **environment)


def test_two_repositories_are_known_by_their_small_files_later_without_the_hub_too(
    server: hub_server.Hub,
) -> None:
    code, out, errors = show(server, "me/target+me/drafter@main")
    assert code == EXIT_OK, errors
    pair = json.loads(out)
    (build,) = pair["builds"]
    config = len(json.dumps(folders.target_config()))
    assert (build["source"]["repo"], build["source"]["bytes"]) == ("me/target", 7 + config)
    assert (pair["drafter"]["kind"], pair["drafter"]["block_size"]) == ("hub", 5)
    assert pair["drafter"]["source"]["repo"] == "me/drafter"
    assert not any("safetensors" in path for path in server.log), "no weights were fetched"

    code, out, errors = show(server, "me/target+me/drafter@main", HF_HUB_OFFLINE="1")
    assert code == EXIT_OK, errors
    assert json.loads(out)["config"] == pair["config"]


def test_a_folder_and_a_repository_may_be_mixed(server: hub_server.Hub, tmp_path: Path) -> None:
    target = write_config(tmp_path / "target", folders.target_config())
    code, out, errors = show(server, f"{target}+me/drafter")
    assert code == EXIT_OK, errors
    pair = json.loads(out)
    assert pair["builds"][0]["source"] == {"path": str(target), "bytes": 7, "kind": "folder"}
    assert pair["drafter"]["source"]["repo"] == "me/drafter"


def test_what_the_hub_refuses_is_said(server: hub_server.Hub) -> None:
    server.repos["me/target"].gated = "auto"
    server.repos["me/target"].refusal = hub_server.NOT_ASKED
    code, out, errors = show(server, "me/target+me/drafter")
    assert (code, out) == (EXIT_ACCESS, "")
    assert "huggingface.co/me/target" in errors
