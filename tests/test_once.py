"""What `--once --stats` and `--json` say of an answer."""

from __future__ import annotations

from dataclasses import replace

from dflash_chat import once
from dflash_chat.runtime.api import Finished, ModelInfo, Spec, Timing, Usage

SPEC = Spec(9, 12, 8, (4, 3, 1, 1), (3, 0, 6), 2)
TIMING = Timing(0.0, 0.1, 1.0, 20.0, 0.05, 10.0, 2.0, 1.26, 312)
WHY = "most tokens per millisecond: 3 rows, 2.1 tokens in 12.00 ms; plain 1 in 9.80"
INFO = ModelInfo("a-pair", "", "", "CPU", "bf16", "torch", 0, 0, 2, 0, 0, 0, 0.0)


def _answer(timing: Timing = TIMING, spec: Spec = SPEC, why: str = WHY) -> Finished:
    return Finished(1, "stop", Usage(7, 0, 18), spec, timing, why)


def test_the_figures_have_the_widths_the_baseline_with_its_age_and_the_reason() -> None:
    lines = once.in_words(_answer(), 0.5).splitlines()
    assert lines[2] == (
        "passes by rows 1: 3, 3: 6 · plain 10.0 tok/s, measured 1.3 s of decoding before the end, "
        "behind 312 tokens"
    )
    assert lines[3] == f"last step: {WHY}"


def test_what_was_found_in_the_text_is_told_where_something_was() -> None:
    assert "accepted 8 of 12 · " in once.in_words(_answer(), 0.5)
    found = replace(SPEC, lookups=2, copied=5)
    assert "accepted 8 of 12, 5 found in the text · " in once.in_words(_answer(spec=found), 0.5)


def test_what_was_not_measured_is_not_claimed() -> None:
    unknown = once.in_words(_answer(Timing(), Spec(), ""), 0.5).splitlines()
    assert unknown[2:] == ["passes by rows none", "last step: there was none"]
    at_load = Timing(ar_tok_s=10.0, ar_context_tokens=64)
    assert "measured at load, behind 64 tokens" in once.in_words(_answer(at_load), 0.5)


def test_the_first_code_is_extracted_and_thoughts_are_none() -> None:
    answer = "<think>```\nno\n```</think>So:\n\n```sh\nls\n```\n\n```\nsecond\n```"
    assert once.first_code(answer) == "ls\n"
    assert once.first_code("<think>hm</think>No code.") == "No code."


def test_json_has_the_same() -> None:
    told = once.as_json("x", _answer(), INFO, 0.5)
    assert told["why"] == WHY
    assert told["timing"] == {
        "load_s": 0.5, "ttft_s": 0.1, "decode_s": 1.0, "tok_s": 20.0, "prefill_s": 0.05,
        "ar_tok_s": 10.0, "speedup": 2.0, "ar_age_s": 1.26, "ar_context_tokens": 312,
    }  # fmt: skip
    timing = once.as_json("x", _answer(Timing()), INFO, 0.5)["timing"]
    assert isinstance(timing, dict)
    assert timing["ar_age_s"] is None
