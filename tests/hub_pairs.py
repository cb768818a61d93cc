"""Two tiny pairs on the loopback hub, and the real command run against it.

"duo" has two builds of safetensors and two of GGUF files in one repository; "twin" shares its
drafter and its target with duo. The hub's client reads its settings when it is imported, so
everything that talks to it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.hub_server import Hub, Repo

TOKEN = "hf_secret"
_RANDOM = random.Random(0)
WEIGHTS = {name: _RANDOM.randbytes(size) for name, size in (("a", 400_000), ("b", 500_000))}
DRAFTER = _RANDOM.randbytes(200_000)
GGUF = {name: _RANDOM.randbytes(150_000) for name in ("x.gguf", "y.gguf")}
DRAFTER_CONFIG = b'{"block_size": 8, "dflash_config": {"mask_token_id": 4}}'
TARGET_CONFIG = b'{"model_type": "llama"}'
PIECES = b"pieces"
ALL_BYTES = sum(map(len, [*WEIGHTS.values(), DRAFTER, DRAFTER_CONFIG, TARGET_CONFIG, PIECES]))
TARGET_FILES = ["config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.model"]


def hub() -> Hub:
    """A hub with the repositories of both pairs."""
    target = {
        "config.json": TARGET_CONFIG,
        "tokenizer.model": PIECES,
        "model-1.safetensors": WEIGHTS["a"],
        "model-2.safetensors": WEIGHTS["b"],
        "pytorch_model.bin": b"never",
        "original/params.json": b"never",
        "onnx/model.safetensors": b"never",
        "other.gguf": b"never",
        "README.md": b"never",
    }
    drafter = {"config.json": DRAFTER_CONFIG, "model.safetensors": DRAFTER}
    return Hub(
        repos={
            "me/target": Repo(target, "a" * 40),
            "me/drafter": Repo(drafter, "d" * 40),
            "me/gguf": Repo({"config.json": b"{}", **GGUF}, "e" * 40),
        }
    )


def write_catalogue(folder: Path) -> None:
    """Both pairs in the user's own models.toml below `folder`, the root of `own_folders`."""
    shape = [
        "hidden_size = 64", "intermediate_size = 128", "num_hidden_layers = 4", "head_dim = 16",
        "num_attention_heads = 4", "num_key_value_heads = 2", "vocab_size = 1000",
    ]  # fmt: skip
    config = ["[pair.config]", *shape, "max_position_embeddings = 8192"]
    drafter = [
        "[pair.drafter]", 'kind = "hub"', 'repo = "me/drafter"', f'revision = "{"d" * 40}"',
        "bytes = 200002", "block_size = 8",
        "[pair.drafter.config]", *shape, "num_target_layers = 4",
        "dflash_config = { mask_token_id = 4, target_layer_ids = [1, 2] }",
    ]  # fmt: skip
    ggufs = [_build(name[0], "q4_1", "gguf", "me/gguf", "e", [name]) for name in GGUF]
    safe = _build("bf16", "bf16", "safetensors", "me/target", "a")
    lines = []
    for name, builds in (("duo", [safe, *ggufs]), ("twin", [safe])):
        lines += ["[[pair]]", f'name = "{name}"', 'title = "Tiny"', 'licence = "MIT"']
        lines += ['architecture = "llama"', *(line for build in builds for line in build)]
        lines += [*config, *drafter]
    path = folder / "config" / "dflash-chat" / "models.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _build(
    name: str, weights: str, form: str, repo: str, commit: str, patterns: list[str] | None = None
) -> list[str]:
    lines = [
        "[[pair.build]]", f'name = "{name}"', f'weights = "{weights}"', f'format = "{form}"',
        'kind = "hub"', f'repo = "{repo}"', f'revision = "{commit * 40}"', "bytes = 900000",
        "bits = 16",
    ]  # fmt: skip
    return [*lines, f"patterns = {json.dumps(patterns)}"] if patterns else lines


def environment(server: Hub, **more: str) -> dict[str, str]:
    """The environment of a process that talks to this hub alone."""
    own = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return {**os.environ, **own, **more}


def start(server: Hub, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The real command, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "dflash_chat", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(server, **more),
    )


def run(server: Hub, *arguments: str, **more: str) -> tuple[int, str, str]:
    """The real command to its end: exit code, stdout, stderr. The token appears in neither."""
    child = start(server, *arguments, **more)
    out, errors = child.communicate(timeout=60)
    assert TOKEN not in out + errors
    assert "Traceback" not in errors
    return child.returncode, out, errors


def blobs(folder: Path) -> list[Path]:
    """Every blob of the hub's cache, partial ones included."""
    return sorted(folder.glob("hf/hub/*/blobs/*"))
