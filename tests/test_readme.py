"""The README's promises: its commands work as written, and agree with --help and .ci/run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_chat import cli, completion, errors
from dflash_chat.settings import KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)


def test_the_first_two_blocks_are_one_line_each() -> None:
    assert [len(block.splitlines()) for block in BLOCKS[:2]] == [1, 1]


def test_the_first_command_creates_installs_and_asks() -> None:
    steps = BLOCKS[0].strip().split(" && ")
    assert steps[0] == "python3 -m venv .venv"
    assert ".venv/bin/pip install -e ." in steps
    assert steps[-1] == '.venv/bin/dflash-chat --once "What is the capital of France?"'


def test_the_second_command_installs_dev_and_tests() -> None:
    steps = BLOCKS[1].strip().split(" && ")
    assert steps == ['.venv/bin/pip install -e ".[dev]"', ".venv/bin/python -m pytest -n 2"]


def test_ci_installs_torch_as_the_readme_does_and_runs_its_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (torch,) = re.findall(r'"(torch[^"]+)"', BLOCKS[0])
    assert f'install --quiet "{torch}"' in script
    assert f'"{torch}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extract,) = re.findall(r"awk '[^']+' README\.md", script)
    found = subprocess.run(
        ["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert found == BLOCKS[1]


@pytest.mark.parametrize(
    "line",
    [line for block in BLOCKS for line in block.splitlines() if "dflash-chat" in line],
)
def test_every_command_shown_can_be_typed(line: str) -> None:
    command = re.search(r'\bdflash-chat((?: +(?:"[^"]*"|[^\s"#|)]+))*)', line)
    assert command, line
    _, unknown = cli.build_parser().parse_known_args(shlex.split(command[1]))
    assert not unknown


def test_the_options_and_commands_named_are_those_there_are() -> None:
    (sentence,) = re.findall(r"^`-o` takes (.*?)\.", README, re.M | re.S)
    assert set(re.findall(r"`(\w+)`", sentence)) == set(KEYS)
    commands = [word for word in completion.words(cli.build_parser()) if word[0] != "-"]
    for command in set(commands) - {"ls"}:
        assert re.search(rf"\b{command}\b", BLOCKS[2]), command


def test_the_exit_codes_are_all_there() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    assert listed == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_every_file_of_the_map_exists() -> None:
    (plan,) = re.findall(r"^```\n(models\.toml.*?)^```", README, re.M | re.S)
    folders = [ROOT, ROOT / "dflash_chat", ROOT]  # by depth
    for line in plan.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [name for name in re.findall(r"\b[\w.]+(?:\.py|/)(?!\S)", line) if "→" not in name]
        for name in names:
            assert (folders[depth] / name).exists(), name
            if depth == 1:
                folders[2] = folders[1] / name


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_this_python_is_one_the_readme_promises() -> None:
    assert sys.version_info >= (3, 11)
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
