"""`-o key=value`: what is taken, what is refused, and in which words."""

from __future__ import annotations

import pytest

from dflash_chat.errors import UsageError
from dflash_chat.runtime.api import EngineOptions, SamplingParams
from dflash_chat.settings import KEYS, Settings, parse_options


def test_every_key_lands_where_it_belongs() -> None:
    settings = parse_options(
        [
            "temperature=0.7",
            "top_k=40",
            "top-p=0.9",
            "min_p=0.05",
            "repetition_penalty=1.1",
            "presence_penalty=-0.5",
            "frequency_penalty=0.5",
            "seed=7",
            "max_tokens=64",
            "stop=END",
            "stop=\\n\\n",
            "device=CPU",
            "dtype=fp32",
            "ctx=4096",
            "k=5",
            "threads=2",
            "drafter=fp8",
            "draft_head=FP8:16000",
            "head=fp8",
            "lookup=off",
            "quant=Bf16",
        ]
    )
    assert settings == Settings(
        SamplingParams(0.7, 40, 0.9, 0.05, 1.1, -0.5, 0.5, 7, 64, ("END", "\n\n")),
        EngineOptions("cpu", "fp32", 4096, 5, 2, "fp8", "fp8", 16000, "fp8", "off"),
        "bf16",
    )


def test_without_options_decoding_is_greedy() -> None:
    assert parse_options([]).sampling.temperature == 0


def test_options_change_the_given_defaults_and_the_last_one_wins() -> None:
    settings = parse_options(["temperature=1", "temperature=0.5"], SamplingParams(top_p=0.9))
    assert (settings.sampling.temperature, settings.sampling.top_p) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("value", "kind", "rows"),
    [
        ("fp8", "fp8", 0),
        ("24000", "auto", 24000),
        ("fp8:24000", "fp8", 24000),
        ("auto:24000", "auto", 24000),
        ("auto", "auto", 0),
    ],
)
def test_a_draft_head_is_rounded_or_trimmed_or_both(value: str, kind: str, rows: int) -> None:
    engine = parse_options(["draft_head=fp8:7", f"draft_head={value}"]).engine
    assert (engine.draft_head, engine.draft_rows) == (kind, rows)


@pytest.mark.parametrize("head", ["auto", "own", "fp8", "screened"])
def test_a_head_stays_or_is_rounded_or_screened(head: str) -> None:
    assert parse_options(["head=fp8", f"head={head}"]).engine.head == head
    with pytest.raises(UsageError, match="auto, own, fp8, screened"):
        parse_options([f"head={head}:16000"])


@pytest.mark.parametrize(
    "value", ["", "int8", "0", "-5", "1.5", "fp8:", "fp8:0", "fp8:all", ":9", "16000:fp8"]
)
def test_a_draft_head_that_makes_no_sense_is_refused_with_an_example(value: str) -> None:
    with pytest.raises(
        UsageError, match="expected own, fp8, a number of rows, or fp8:rows"
    ) as caught:
        parse_options([f"draft_head={value}"])
    assert caught.value.hint == "e.g. draft_head=16000, or draft_head=fp8:16000"


@pytest.mark.parametrize(
    "option",
    [
        "temperature=-1",
        "temperature=nan",
        "temperature=hot",
        "top_k=1.5",
        "top_p=0",
        "top_p=1.1",
        "min_p=2",
        "repetition_penalty=0",
        "seed=-1",
        "max_tokens=0",
        "ctx=0",
        "k=0",
        "threads=0",
        "device=tpu",
        "dtype=int8",
        "quant=/tmp",
        "drafter=int8",
        "head=bf16",
        "stop=",
        "temperature",
        "=1",
    ],
)
def test_what_makes_no_sense_is_refused(option: str) -> None:
    with pytest.raises(UsageError):
        parse_options([option])


def test_a_misspelt_key_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="'temprature'") as caught:
        parse_options(["temprature=1"])
    assert caught.value.hint == "did you mean temperature?"


def test_a_far_off_key_gets_all_of_them() -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(["zzz=1"])
    assert all(key in caught.value.hint for key in KEYS)
