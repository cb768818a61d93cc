"""What `list` and `show` say of pairs that are there, could be, and cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat import cli, hub, listing, pairs
from dflash_chat.errors import EXIT_OK, EXIT_UNKNOWN_MODEL
from dflash_chat.hub import Installed

pytestmark = pytest.mark.usefixtures("own_folders")

CATALOGUE = pairs.load_catalogue()


@pytest.mark.parametrize("width", [24, 61, 62, 73, 74, 80, 120])
def test_a_table_fits_its_terminal_and_names_every_pair(width: int) -> None:
    lines = listing.table(listing.rows(CATALOGUE), width).splitlines()
    longest = max(len(pair.name) for pair in CATALOGUE)
    assert max(map(len, lines)) <= max(width, longest + 2 + listing._LEAST)
    assert [line.split()[0] for line in lines[1:]] == [pair.name for pair in CATALOGUE]
    assert ("BUILD" in lines[0], "LICENCE" in lines[0]) == (width >= 62, width >= 74)
    assert lines[0].split()[-1] == "STATE"


def test_without_a_terminal_nothing_is_cut() -> None:
    text = listing.table(listing.rows(CATALOGUE), 0)
    assert "…" not in text
    assert "muse_glimmer is not read yet" in text


def test_the_size_is_what_a_pull_fetches_of_the_build_that_would_be_taken() -> None:
    gemma = pairs.find("gemma-4-26b-a4b")
    (row,) = listing.rows([gemma])
    assert (row["build"], row["bytes"]) == ("int4", gemma.build("int4").source.bytes)
    assert row["drafter_bytes"] == gemma.drafter.bytes
    assert listing.rows([pairs.find("smollm2")])[0]["drafter_bytes"] == 0, "it is in the package"


def test_a_build_that_cannot_be_loaded_gives_way_to_one_that_can() -> None:
    gemma = replace(pairs.find("gemma-4-31b"), default=("nvfp4", "fp8"))
    assert listing.best(gemma).name == "fp8"
    assert listing.why_not(gemma) == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt-oss", "gpt_oss is not read yet"),
        ("qwen3.8-27b", "qwen3_5 is not read yet"),
        ("smollm2", ""),
    ],
)
def test_why_a_pair_cannot_be_loaded_is_said(name: str, why: str) -> None:
    assert listing.why_not(pairs.find(name)) == why


def test_the_drafter_or_the_builds_may_be_the_reason() -> None:
    pair = pairs.find("qwen3-8b")
    second = replace(pair, drafter=replace(pair.drafter, missing="DFlash2 drafters are not read"))
    assert listing.why_not(second) == "DFlash2 drafters are not read"
    only_awq = replace(pair, builds=(pair.build("awq"),), default=("awq",))
    assert listing.why_not(only_awq) == "autoawq int4 weights are not read yet"


def test_what_is_installed_is_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.find("qwen3-8b")
    fp8 = pair.build("fp8")
    found = Installed(pair, fp8, Path("/weights"), Path("/drafter"), 9_000_000_000)
    monkeypatch.setattr(hub, "installed", lambda _: found)
    (row,) = listing.rows([pair])
    assert (row["build"], row["bytes"], row["path"]) == ("fp8", 9_000_000_000, "/weights")
    assert "installed" in listing.table([row], 80).splitlines()[1]


def test_show_tells_builds_revisions_block_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "gemma-4-26b"]) == EXIT_OK
    out = capsys.readouterr().out
    pair = pairs.find("gemma-4-26b-a4b")
    for build in pair.builds:
        assert any(line.split()[0].rstrip("*") == build.name for line in out.splitlines() if line)
        assert build.source.repo in out  # type: ignore[union-attr]
    assert "@4033b162" in out
    assert "block of 16" in out
    assert "Apache-2.0" in out
    assert all(fact.what in out and fact.source in out for fact in pair.facts)
    assert "~17.0 GB" in out, "an estimate"


def test_show_of_a_named_build_leaves_the_others_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "qwen3-8b@fp8"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "Qwen/Qwen3-8B-FP8@main" in out
    assert "Qwen3-8B-AWQ@" not in out
    assert "fp8: bytes on disk" in out, "whose fact it is"
    assert "drafter: licence MIT" in out
    assert "awq: " not in out


def test_show_json_has_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "qwen3.8-27b", "--json"]) == EXIT_OK
    known = json.loads(capsys.readouterr().out)
    assert known["drafter"]["version"] == 2
    assert known["drafter"]["missing"] == "DFlash2 drafters are not read yet"
    assert known["loadable"] == []
    assert known["builds"][0]["facts"][0].keys() == {"what", "date", "source"}


@pytest.mark.parametrize("command", [["show"], ["pull"], ["rm"], ["--once", "hi", "-m"]])
def test_a_misspelt_pair_gets_the_nearest_names_everywhere(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*command, "gema-4"]) == EXIT_UNKNOWN_MODEL
    error = capsys.readouterr().err
    assert "no pair named 'gema-4'" in error
    assert "did you mean gemma-4-" in error


def test_a_misspelt_build_gets_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "gemma-4-26b@int8"]) == EXIT_UNKNOWN_MODEL
    assert "did you mean int4" in capsys.readouterr().err


def test_what_cannot_be_loaded_is_not_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "gpt-oss-20b", "--yes"]) == EXIT_UNKNOWN_MODEL
    assert "gpt-oss-20b cannot be loaded: gpt_oss is not read yet" in capsys.readouterr().err
    assert cli.main(["pull", "gemma-4-31b@nvfp4", "--yes"]) == EXIT_UNKNOWN_MODEL
    assert "what can be: bf16 or fp8 or int4" in capsys.readouterr().err
