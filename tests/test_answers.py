"""`--once` and `bench` as real programs with the real pair: what reaches stdout, what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.weights, pytest.mark.slow]

COMMAND = [sys.executable, "-m", "dflash_chat"]


def _run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_once_prints_the_answer_and_nothing_else(smollm2_gguf: Path) -> None:
    done = _run("--once", "What is the capital of France?", "--stats")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n")
    assert "tok/s" not in done.stdout
    assert "tau" in done.stderr
    assert "passes by rows 1: " in done.stderr
    assert "last step: " in done.stderr


def test_json_is_one_object_whose_sums_agree(smollm2_gguf: Path) -> None:
    done = _run("--once", "Count:", "--json", "--max-tokens", "40", stdin="one two three")
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert set(answer) == {
        "text", "finish_reason", "usage", "spec", "timing", "why", "pair", "versions",
    }  # fmt: skip
    assert set(answer["usage"]) == {"prompt", "cached", "completion"}
    assert set(answer["timing"]) == {
        "load_s", "ttft_s", "decode_s", "tok_s", "prefill_s", "ar_tok_s", "speedup",
        "ar_age_s", "ar_context_tokens",
    }  # fmt: skip
    assert " ms" in answer["why"]
    assert answer["timing"]["ar_context_tokens"] > 0
    spec = answer["spec"]
    assert set(spec) == {
        "steps", "drafted", "accepted", "tau", "accept_rate", "histogram", "survival",
        "full_blocks", "widths", "lookups", "copied",
    }  # fmt: skip
    assert sum(spec["widths"]) == spec["steps"]
    assert sum(i * count for i, count in enumerate(spec["widths"])) == spec["drafted"]
    committed = sum((i + 1) * count for i, count in enumerate(spec["histogram"]))
    assert sum(spec["histogram"]) == spec["steps"]
    assert committed == answer["usage"]["completion"] - 1  # the first token is prefill's
    assert spec["tau"] == pytest.approx(committed / spec["steps"], abs=1e-3)
    assert answer["pair"] == "smollm2-135m"


def test_without_drafting_every_pass_commits_one_token(smollm2_gguf: Path) -> None:
    done = _run("--once", "Hi", "--json", "--no-draft", "--max-tokens", "12")
    spec = json.loads(done.stdout)["spec"]
    assert (spec["drafted"], spec["accepted"], spec["tau"]) == (0, 0, 1.0)


def test_bench_compares_both_ways(smollm2_gguf: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is rain?"}\n{"turns": ["Name a colour.", "Another."]}\n')
    options = ("--max-tokens", "16", "--json", "-o", "dtype=fp32")
    done = _run("bench", "-m", "smollm2-135m", "--prompts", str(prompts), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompts"] == report["identical"] == 2
    assert report["spec"]["tau"] > 1
    assert report["speedup"] == pytest.approx(
        report["drafted_tok_s"] / report["plain_tok_s"], rel=1e-3
    )


def test_the_first_interrupt_prints_what_there_is(smollm2_gguf: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "--once", "Write a very long story.", "--max-tokens", "4000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    began = child.stdout.read(20)
    os.kill(child.pid, signal.SIGINT)
    asked = time.monotonic()
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert time.monotonic() - asked < 5
    assert (began + rest).endswith("\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("line", "named"),
    [("{", "line 1"), ('{"other": 1}', "line 1"), ('{"prompt": 3}', "line 1"), ("", "no prompts")],
)
def test_a_broken_prompt_file_is_one_clear_line(tmp_path: Path, line: str, named: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    done = _run("bench", "--prompts", str(prompts))
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
