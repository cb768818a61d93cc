"""`dflash-chat plan` as it is typed: what is printed, what is refused, how quick it is."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dflash_chat import cards, catalogue, cli, geometry, gpu, plan
from dflash_chat.cards import GIB
from dflash_chat.errors import (
    EXIT_DOES_NOT_FIT,
    EXIT_OK,
    EXIT_UNKNOWN_MODEL,
    EXIT_USAGE,
    UsageError,
)
from dflash_chat.gpu import Gpu, Survey
from tests.published import DRAFTERS, TARGETS

pytestmark = pytest.mark.usefixtures("own_folders")

CARD = Gpu(
    0, "GPU-1", "NVIDIA GeForce RTX 3090", 24 * GIB, 20 * GIB, GIB // 3, (8, 6), "580.1",
    bandwidth_gb_s=936.0, notes="shared with Windows",
)  # fmt: skip


@pytest.fixture(autouse=True)
def surveyed(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """This computer's cards: none, until a test puts one in."""
    cards_here: list[Gpu] = []
    monkeypatch.setattr(
        gpu, "survey", lambda: Survey(tuple(cards_here), "" if cards_here else "there is no driver")
    )
    return cards_here


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = EXIT_OK) -> str:
    assert cli.main(["plan", *argv]) == code
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = EXIT_OK) -> Any:  # noqa: ANN401
    return json.loads(printed(capsys, *argv, "--json", code=code))


def complaint(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> str:
    assert cli.main(["plan", *argv]) == code
    return capsys.readouterr().err


# ── what is printed ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "argv",
    [
        ["--vram", "24G"],
        ["--vram", "8G"],
        ["gemma-4-26b-a4b", "--gpu", "RTX 4090"],
        ["gemma-4-12b@int4", "--gpu", "RTX 3060", "--ctx", "16384"],
        ["qwen3.6-27b", "--vram", "80G"],
        ["smollm2-135m"],
        [],
    ],
)
def test_everything_fits_80_columns(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    for line in printed(capsys, *argv).splitlines():
        assert len(line) <= 80
        assert line == line.rstrip()


def test_a_page_has_parts_choices_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "gemma-4-26b-a4b", "--gpu", "RTX 4090")
    words = " ".join(page.split())
    assert page.startswith("gemma-4-26b-a4b@int4 on RTX 4090 (23.4 GiB free)\n")
    for part in ("target", "drafter cache", "graphs", "workspace", "spare"):
        assert part in page
    for choice in ("build", "context", "drafter", "draft head", "width", "speed"):
        assert f"\n{choice} " in page
    assert "fp8 needs" in words
    assert "a 32 GB card would take fp8" in words
    assert "Estimates: build: bits, resident_bytes." in page
    command = page.splitlines()[-1]
    assert command == "dflash-chat -m gemma-4-26b-a4b@int4"


def test_every_part_that_can_be_seen_has_a_mark_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = " ".join(printed(capsys, "gemma-4-26b-a4b", "--gpu", "RTX 3090").split())
    marks = re.findall(r"([^\w\s·]) [a-z ]+ \d+\.\d\d", page)
    assert len(marks) > 8
    assert len(set(marks)) == len(marks)


def test_a_ranking_recommends_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "--vram", "24G")
    assert "\n›  gemma-4-26b-a4b " in page
    assert "Recommended: gemma-4-26b-a4b@int4" in page
    assert "\nbuild int4: fp8 needs" in page
    assert "not read yet" in page
    for pair in catalogue.load_catalogue():
        assert page.count(f" {pair.name} ") >= 1


def test_json_has_every_figure_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    made = parsed(capsys, "gemma-4-26b-a4b", "--vram", "24G")
    assert made["fits"] is True
    assert made["total_bytes"] == sum(made["bytes"].values()) <= made["free_bytes"]
    assert (made["build"], made["kv_dtype"], made["context_tokens"]) == ("int4", "bf16", 32_768)
    assert made["num_speculative_tokens"] == made["drafts"]["mixed"]
    assert made["tok_s"]["code"] > made["tok_s"]["prose"] > made["tok_s"]["plain"]
    assert {"what", "choice", "because", "instead"} == set(made["why"][0])


def test_json_of_all_pairs_names_the_recommended_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed(capsys, "--vram", "24G")
    assert found["recommended"] == found["plans"][0]["pair"] == "gemma-4-26b-a4b"
    assert len(found["plans"]) == len(catalogue.load_catalogue())


def test_options_are_wishes(capsys: pytest.CaptureFixture[str]) -> None:
    made = parsed(
        capsys, "gemma-4-26b-a4b@int4", "--vram", "24G", "-o", "ctx=4096", "-o", "k=3",
        "-o", "drafter=bf16", "-o", "draft_head=own", "-o", "head=fp8",
    )  # fmt: skip
    assert (made["context_tokens"], made["num_speculative_tokens"]) == (4096, 3)
    assert (made["drafter"], made["draft_head"], made["head"]) == ("bf16", "own", "fp8")
    named = [line["what"] for line in made["why"] if "you named it" in line["because"]]
    assert named == ["build", "context", "drafter", "draft head", "head", "width"]


def test_the_command_repeats_what_was_wished_for(capsys: pytest.CaptureFixture[str]) -> None:
    wished = ["-o", "ctx=4096", "-o", "k=3", "-o", "drafter=bf16", "-o", "draft_head=fp8:16000"]
    page = printed(capsys, "qwen3-4b@bf16", "--vram", "24G", *wished)
    assert page.splitlines()[-1].split() == ["dflash-chat", "-m", "qwen3-4b@bf16", *wished]


def test_a_context_beyond_some_pairs_still_ranks_all(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed(capsys, "--vram", "48G", "--ctx", "100000")
    contexts = {made["pair"]: made["context_tokens"] for made in found["plans"]}
    assert contexts["gemma-4-26b-a4b"] == 100_000
    assert contexts["smollm2-135m"] == 8192


# ── which device ────────────────────────────────────────────────────────────────────────────────


def test_the_card_of_this_computer_is_planned_with_what_is_free(
    capsys: pytest.CaptureFixture[str], surveyed: list[Gpu]
) -> None:
    surveyed.append(CARD)
    page = printed(capsys, "gemma-4-26b-a4b")
    assert "on NVIDIA GeForce RTX 3090 (20.0 GiB free; shared with" in page
    made = parsed(capsys, "gemma-4-26b-a4b")
    assert made["free_bytes"] == 20 * GIB
    surveyed[0] = replace(CARD, free=10 * GIB)
    parsed(capsys, "gemma-4-26b-a4b", code=EXIT_DOES_NOT_FIT)


def test_without_a_card_the_cpu_is_planned_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = printed(capsys)
    assert page.startswith("On the CPU (there is no driver):\n")
    assert "Recommended: smollm2-135m@q4_1" in page


def test_a_named_card_may_be_given_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    made = parsed(capsys, "qwen3-4b", "--gpu", "RTX 4060 Ti", "--vram", "8G")
    assert made["gpu"] == "RTX 4060 Ti"
    assert made["free_bytes"] == cards.usable(8 * GIB)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24G", 24 * GIB), ("24", 24 * GIB), ("24GB", 24 * GIB), ("24 GiB", 24 * GIB),
        ("24576M", 24 * GIB), ("24576MiB", 24 * GIB), ("11.5g", 23 * GIB // 2),
    ],
)  # fmt: skip
def test_sizes_are_read_as_cards_are_sold(text: str, count: int) -> None:
    assert plan.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "G", "24X", "-24G", "0", "0.5G", "3000G", "24G24", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan.parse_size(text)
    assert "--vram 24G" in caught.value.hint


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--vram", "24X"], EXIT_USAGE, "--vram 24G"),
        (["--gpu", "RTX 3091"], EXIT_USAGE, "did you mean RTX 3090"),
        (["gemma-4-26b-a4b", "--ctx", "many"], EXIT_USAGE, "ctx=8192"),
        (["gemma-4-26b-a4b", "--vram", "80G", "--ctx", "300000"], EXIT_USAGE, "ctx=262144"),
        (["--quant", "int4"], EXIT_USAGE, "PAIR@BUILD"),
        (["gemma-4-27b"], EXIT_UNKNOWN_MODEL, "gemma-4-2"),
        (["gemma-4-26b-a4b@int5"], EXIT_UNKNOWN_MODEL, "int4"),
        (["gemma-4-26b-a4b", "--vram", "8G"], EXIT_DOES_NOT_FIT, "a 24 GB card would take it"),
        (["gemma-4-26b-a4b@bf16", "--vram", "24G"], EXIT_DOES_NOT_FIT, "an 80 GB card"),
    ],
)
def test_every_refusal_has_its_code_and_says_what_would_do(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert words in complaint(capsys, *argv, code=code)


def test_a_context_that_is_too_long_here_names_one_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = complaint(
        capsys, "gemma-4-26b-a4b@int4", "--vram", "24G", "--ctx", "262144", code=EXIT_DOES_NOT_FIT
    )
    context = words.split("-o ctx=")[1].split()[0]
    assert int(context) > 32_768
    made = parsed(capsys, "gemma-4-26b-a4b@int4", "--vram", "24G", "--ctx", context)
    assert made["fits"] is True


def test_a_card_that_takes_no_pair_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = complaint(capsys, "--vram", "1G", code=EXIT_DOES_NOT_FIT)
    assert "no pair that can be loaded fits a card of 1 GB" in words
    assert parsed(capsys, "--vram", "1G", code=EXIT_DOES_NOT_FIT)["recommended"] is None


def test_two_folders_are_planned_like_any_pair(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    counted = geometry.target(TARGETS["qwen3-4b"])
    for name, config in (("target", TARGETS["qwen3-4b"]), ("drafter", DRAFTERS["qwen3-4b"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(2 * counted.parameters)  # takes no room on the disk
    custom = f"{tmp_path / 'target'}+{tmp_path / 'drafter'}"
    ours, published = (parsed(capsys, name, "--vram", "24G") for name in (custom, "qwen3-4b@bf16"))
    assert ours["pair"] == custom
    differing = {key for key in ours if ours[key] != published[key]}
    assert differing <= {"pair", "build", "approximate", "why"}


def test_a_pair_of_ones_own_without_facts_is_said_and_left_out(
    capsys: pytest.CaptureFixture[str], own_folders: Path
) -> None:
    text = catalogue.packaged_file().read_text(encoding="utf-8")
    first = "[[pair]]" + text.split("[[pair]]")[1]
    begin, _, rest = first.partition("[pair.config]")
    bare = begin.replace("smollm2-135m", "my-own").replace('"smollm2"', '"mine"')
    mine = own_folders / "config" / "dflash-chat" / "models.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text(bare + "[[pair.build]]" + rest.partition("[[pair.build]]")[2])
    assert "Not counted, for want of facts: my-own." in printed(capsys, "--vram", "24G")
    assert "model_type" in complaint(capsys, "my-own", "--vram", "24G", code=1)


# ── quick ───────────────────────────────────────────────────────────────────────────────────────


def test_all_pairs_are_ranked_in_a_moment_without_torch() -> None:
    program = """
import sys
from dflash_chat import cli
assert cli.main(["plan", "--vram", "24G"]) == 0
heavy = {"torch", "transformers", "textual", "huggingface_hub", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Recommended: gemma-4-26b-a4b@int4" in done.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.5, "0.2 s of a processor here"
