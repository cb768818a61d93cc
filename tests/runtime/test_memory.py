"""What is refused, and what is proposed instead."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_chat import hub, pairs
from dflash_chat.errors import EXIT_DOES_NOT_FIT, DoesNotFitError
from dflash_chat.runtime import memory, session, weights
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.memory import META, Pair
from dflash_chat.runtime.models import gemma4, qwen3
from dflash_chat.runtime.random_weights import RandomWeights, shapes

BF16, PLAIN = torch.bfloat16, EngineOptions()
GEMMA, QWEN = "gemma-4-26b-a4b", "qwen3-8b"


def pair(name: str) -> Pair:
    published = shapes(name)
    config = (gemma4 if name == GEMMA else qwen3).Config.from_hf(published.target)
    drafter = DrafterConfig.from_raw(published.drafter)
    drafted = RandomWeights(drafter.tensor_shapes(config.hidden_size), "bf16", META, BF16)
    packed = RandomWeights(config.tensor_shapes(), "int4", META, BF16)
    return Pair.of(config, packed, drafter, drafted, BF16, 15)


@pytest.fixture(scope="module", params=[GEMMA, QWEN])
def published(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


def proposed(hint: str) -> int:
    found = re.search(r"-o ctx=(\d+)", hint)
    assert found, hint
    return int(found[1])


def test_more_context_takes_more_memory(published: Pair) -> None:
    totals = [published.plan(PLAIN, n).total for n in (16, 1024, 3072, 8192, 32768)]
    assert totals == sorted(set(totals))


def test_a_token_takes_the_published_bytes_once_the_rings_are_full() -> None:
    plans = [pair(GEMMA).plan(PLAIN, n) for n in (8192, 8193)]
    assert plans[1].target_cache - plans[0].target_cache == 20_480
    assert plans[1].drafter_cache - plans[0].drafter_cache == 4_096


@pytest.mark.parametrize("spare", [0, 10**6, 500 * 10**6])
def test_the_proposed_context_fits_and_the_next_one_does_not(published: Pair, spare: int) -> None:
    free = published.plan(PLAIN, 4096).needed + spare
    context = proposed(published.what_fits(PLAIN, 32768, free))
    assert context >= 4096
    assert published.plan(PLAIN, context).needed <= free
    assert published.plan(PLAIN, context + memory.STEP).needed > free


def test_what_fits_is_let_through_and_one_byte_less_is_refused(published: Pair) -> None:
    needed = published.plan(PLAIN, 8192).needed
    published.check("Some pair", PLAIN, 8192, needed)
    with pytest.raises(DoesNotFitError) as caught:
        published.check("Some pair", PLAIN, 8192, needed - 1)
    assert caught.value.exit_code == EXIT_DOES_NOT_FIT
    assert re.fullmatch(
        r"Some pair with a context of 8192 needs [\d.]+ GB, [\d.]+ GB of this GPU are free",
        caught.value.message,
    )
    assert 8192 - memory.STEP <= proposed(caught.value.hint) < 8192


def test_a_context_that_nobody_named_is_cut_to_what_fits(published: Pair) -> None:
    free = published.plan(PLAIN, 4096).needed
    assert published.room(PLAIN, 4096, free) == 4096
    assert published.room(PLAIN, 8192, free) == 4096
    assert published.room(PLAIN, 8192, 10**9) == 8192  # nothing fits: `check` says so


def test_where_no_context_helps_a_smaller_drafter_may(published: Pair) -> None:
    free = published.plan(PLAIN, memory.LEAST).needed - 1
    hint = published.what_fits(PLAIN, 8192, free)
    assert "-o drafter=fp8 " in hint
    rounded = replace(PLAIN, drafter="fp8")
    assert published.plan(rounded, proposed(hint)).needed <= free


def test_where_nothing_helps_the_cpu_is_left(published: Pair) -> None:
    hint = published.what_fits(PLAIN, 8192, 10**9)
    assert "ctx" not in hint
    assert "-o device=cpu" in hint


@pytest.mark.weights
@pytest.mark.slow
def test_a_gpu_without_room_is_refused_before_anything_is_loaded(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = pairs.find("smollm2-135m")
    installed = hub.Installed(small, small.builds[0], smollm2_gguf, small.drafter.path, 0)

    def load(free: int) -> None:
        monkeypatch.setattr(memory, "available", lambda: free)
        session.Session.load(installed, EngineOptions("cuda", context_tokens=2048), lambda _: None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(weights, "load_packed", lambda *_: pytest.fail("loaded"))
    with pytest.raises(DoesNotFitError, match=r"needs .* GB, 0\.30 GB of this GPU are free"):
        load(300_000_000)
    with pytest.raises(pytest.fail.Exception):
        load(2_000_000_000)


def test_an_error_behind_an_error_is_found() -> None:
    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("tried to allocate")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    assert memory.ran_out(caught.value)
    assert not memory.ran_out(RuntimeError("operation failed"))
