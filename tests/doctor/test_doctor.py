"""The command as people type it: its lines, its object, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dflash_chat import __version__, cli, doctor
from dflash_chat.doctor import compute, machine
from dflash_chat.doctor.line import Line, State, fail, ok, skipped, warn
from dflash_chat.errors import EXIT_OK, EXIT_OTHER

CHECKS = [
    "python", "packages", "config", "settings", "terminal", "hub cache", "own cache", "pair",
    "leftovers", "token", "access", "driver", "torch", "kernels", "attention",
]  # fmt: skip


def typed(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dflash_chat", "doctor", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """The lines that every check together comes to."""
    lines: list[Line] = []
    monkeypatch.setattr(doctor, "examine", lambda: iter(lines))
    return lines


def test_the_real_thing_with_the_real_torch(own_folders: Path) -> None:
    done = typed("--json")
    found = json.loads(done.stdout)
    seen = [line["check"] for line in found["lines"]]
    assert [check for check in seen if check in CHECKS] == CHECKS
    failed = [line for line in found["lines"] if line["state"] == "fail"]
    assert done.returncode == (EXIT_OTHER if failed else EXIT_OK)
    (torch,) = [line for line in found["lines"] if line["check"] == "torch"]
    assert torch["text"].startswith(f"{metadata.version('torch')}, "), torch


def test_a_broken_torch_is_one_failing_line_among_all_the_others(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folders / "torch").mkdir()
    (own_folders / "torch" / "__init__.py").write_text("raise ImportError('libc10.so is broken')")
    path = os.pathsep.join([str(own_folders), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)
    done = typed()
    assert done.returncode == EXIT_OTHER
    assert "fail      torch        torch cannot be loaded: ImportError: libc10.so" in done.stdout
    assert "→ pip install --force-reinstall" in done.stdout
    for check in CHECKS:
        assert f" {check} " in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([ok("a", "fine")], EXIT_OK),
        ([warn("a", "slow", "do this"), skipped("b", "no card")], EXIT_OK),
        ([ok("a", "fine"), fail("b", "broken", "do that")], EXIT_OTHER),
    ],
)
def test_the_exit_code_is_1_if_a_line_fails(
    given: list[Line], lines: list[Line], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given += lines
    assert cli.main(["doctor"]) == code
    assert cli.main(["doctor", "--json"]) == code


def test_lines_for_people(given: list[Line], capsys: pytest.CaptureFixture[str]) -> None:
    given += [ok("a", "fine"), warn("b", "slow", "do this"), fail("c", "broken\nthere", "do that")]
    cli.main(["doctor"])
    assert capsys.readouterr().out.splitlines() == [
        "ok        a            fine",
        "warn      b            slow",
        "                       → do this",
        "fail      c            broken there",
        "                       → do that",
        "1 failed, 1 could be better, 3 in all",
    ]


def test_a_narrow_terminal_wraps_the_text_and_never_the_fix() -> None:
    fix = "a command that is longer than the terminal is wide"
    shown = doctor.in_words(warn("disk", "one two three four five six seven", fix), columns=43)
    assert shown.splitlines() == [
        "warn      disk         one two three four",
        "                       five six seven",
        f"                       → {fix}",
    ]


def test_one_object_for_scripts(given: list[Line], capsys: pytest.CaptureFixture[str]) -> None:
    given += [ok("a", "fine"), fail("b", "broken", "do that")]
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "version": __version__,
        "ok": False,
        "failed": 1,
        "warnings": 0,
        "lines": [
            {"check": "a", "state": "ok", "text": "fine", "fix": ""},
            {"check": "b", "state": "fail", "text": "broken", "fix": "do that"},
        ],
    }


def test_one_cause_fails_once(given: list[Line], capsys: pytest.CaptureFixture[str]) -> None:
    given += [fail("a", "no TOML", "mend it"), fail("b", "no TOML", "x"), fail("c", "other", "y")]
    cli.main(["doctor", "--json"])
    states = [line["state"] for line in json.loads(capsys.readouterr().out)["lines"]]
    assert states == ["fail", "skipped", "fail"]


def test_a_check_that_breaks_hides_no_other(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> list[Line]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(machine, "packages", breaks)
    monkeypatch.setattr(compute.Probe, "found", lambda self: compute.Found(torch="2.13.0"))
    lines = {line.check: line for line in doctor.examine()}
    assert set(CHECKS) <= set(lines)
    assert lines["packages"].state is State.FAIL
    assert "ZeroDivisionError: division by zero" in lines["packages"].text
    assert lines["packages"].fix
