"""Sums over passes, by their definitions; and every message survives the wire."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dflash_chat.runtime import api
from dflash_chat.runtime.api import Spec, StepStats

STATS = StepStats(7, 3, 4, 2.4, 31.2, 0.6, 0.9, 1234, "commits most per second")
INFO = api.ModelInfo(
    "pair", "target", "drafter", "CPU", "bf16", "torch", 2048, 8, 7, 1, 2, 3, 0.5, {"torch": "2"},
    4, 5.5, 6,
)  # fmt: skip
MESSAGES = [
    api.Load("pair", "hub", api.EngineOptions(draft_tokens=3, head="fp8")),
    api.Load("pair"),
    api.Generate(
        3, (api.Message("user", "é\n😀"),), api.SamplingParams(0.7, seed=0, stop=("a", "b")), False
    ),
    api.Cancel(3),
    api.Shutdown(),
    api.Hello("1.0", 2, 99),
    api.Progress("reading", 1, 2),
    api.Ready(INFO),
    api.Prefill(1, 2, 3, 4),
    api.Tokens(1, "", 2),
    api.Tokens(1, "a\u2028b", 4, STATS, (1, 0, 2), api.Timing(ttft_s=0.1, prefill_s=0.05)),
    api.Finished(
        1, "stop", api.Usage(1, 2, 3), Spec(2, 7, 3, (1, 0, 0, 1), (1, 1), 1), api.Timing(1, 2, 3)
    ),
    api.Finished(1, "length", api.Usage(0, 0, 0), Spec(), api.Timing()),
    api.Failed(1, "message", "hint", 5, "trace"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_comes_back_as_it_was(message: api.Request | api.Event) -> None:
    line = api.encode(message)
    assert line.count(b"\n") == 1
    assert api.decode(line) == message


def test_a_pass_takes_few_bytes() -> None:
    line = api.encode(api.Tokens(3, " a step's text", 4, STATS, (2, 4, 2, 6)))
    assert len(line) < 300
    assert "probe" not in json.loads(line)["stats"]


def steps(*passes: tuple[int, int]) -> Spec:
    """Passes of so many drafts, of which so many were accepted."""
    spec = Spec()
    for drafted, accepted in passes:
        spec = spec.add(StepStats(drafted, accepted, accepted + 1, 1, 2, 3, 4, 9))
    return spec


def test_sums_of_passes() -> None:
    spec = steps((3, 0), (3, 3), (1, 1), (3, 1), (0, 0))
    assert (spec.steps, spec.drafted, spec.accepted) == (5, 10, 5)
    assert spec.histogram == (2, 2, 0, 1)
    assert spec.widths == (1, 1, 0, 3)
    assert spec.full == 2
    assert spec.tau == 2.0
    assert spec.full_blocks == 0.5
    assert (spec.lookups, spec.copied) == (0, 0)


def test_what_was_found_in_the_text_is_counted_apart() -> None:
    found = replace(StepStats(7, 5, 6, 0, 2, 3, 4, 9), found=True)
    spec = steps((3, 3), (0, 0)).add(found).add(replace(found, accepted=0, committed=1))
    assert (spec.drafted, spec.accepted, spec.lookups, spec.copied) == (17, 8, 2, 5)
    assert spec.merge(spec).copied == 10
    assert (spec.to_json()["lookups"], spec.to_json()["copied"]) == (2, 5)


def test_survival_adds_up_to_the_accepted_tokens_of_a_pass_with_drafts() -> None:
    spec = steps((3, 0), (3, 3), (1, 1), (3, 1), (0, 0))
    assert spec.survival == (3 / 4, 1 / 4, 1 / 4)
    assert sum(spec.survival) == spec.accepted / 4
    assert steps((3, 0)).survival == (0, 0, 0)
    assert steps((0, 0)).survival == ()
    assert Spec().survival == ()


def test_pooled_sums_equal_the_sums_of_all_passes() -> None:
    a, b = [(3, 0), (7, 7)], [(2, 1), (0, 0), (3, 3)]
    assert steps(*a).merge(steps(*b)) == steps(*a, *b)


def test_without_drafting_tau_is_exactly_one_and_no_block_is_full() -> None:
    spec = steps((0, 0), (0, 0))
    assert (spec.tau, spec.full_blocks, spec.accept_rate) == (1.0, 0.0, 0.0)


def test_every_number_has_a_definition_without_a_full_stop() -> None:
    assert all(words and not words.endswith(".") for words in api.GLOSSARY.values())
