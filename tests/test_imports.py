"""Who may import whom, seen from outside: the heavy packages stay where they belong.

import-linter reads the source; the child processes here also see what is imported late.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dflash_chat

ROOT = Path(dflash_chat.__file__).parent
LIGHT = [
    "dflash_chat.__main__",
    *(
        f"dflash_chat.{name}"
        for name in (
            "access", "bench", "chat", "cli", "completion", "doctor", "errors", "export", "fetch",
            "gpu", "here", "hub", "keeper", "listing", "once", "pairs", "plan", "progress",
            "presence", "pull", "record", "replay", "repository", "runtime.api", "runtime.client",
            "runtime.worker", "sessions", "settings", "store", "sweep",
        )
    ),
    *(f"dflash_chat.ui.{path.stem}" for path in sorted(ROOT.glob("ui/*.py"))),
]  # fmt: skip
HEAVY = {"torch", "transformers", "safetensors", "triton"}
ON_TRITON = {
    "kernels",
    "fused",
    "step",
    "measure",
    "traces",
    "graphed",
    "kernel_weights",
}  # folders and files
RUNTIME = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in sorted(ROOT.glob("runtime/**/*.py"))
    if path.stem != "__init__"
    and (find_spec("triton") or not ON_TRITON & {path.parent.stem, path.stem})
]


def loaded_by(program: str) -> set[str]:
    """Top-level modules in sys.modules at the end of `program`, run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "DFLASH_CHAT_LOG": ""},
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


@pytest.mark.parametrize("module", LIGHT)
def test_the_ui_side_imports_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["list", "--json"],
        ["sessions"],
        ["sessions", "search", "sky"],
        ["show", "gpt-oss"],
        ["plan"],
        ["completion", "bash"],
    ],
)
def test_quick_commands_import_neither_torch_nor_textual(
    argv: list[str], own_folders: Path
) -> None:
    program = f"""
from dflash_chat import cli
try:
    cli.main({argv!r})
except SystemExit as left:
    assert not left.code
"""
    loaded = loaded_by(program)
    assert not loaded & (HEAVY | {"textual", "huggingface_hub", "numpy", "rich"})


def test_the_runtime_never_imports_the_ui() -> None:
    loaded = loaded_by("\n".join(f"import {module}" for module in RUNTIME))
    assert "torch" in loaded
    assert "textual" not in loaded


def test_the_import_contracts_hold() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    command = str(tool) if tool.exists() else shutil.which("lint-imports")
    assert command, "lint-imports comes with the dev extra"
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
