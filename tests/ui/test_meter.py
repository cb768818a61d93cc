"""Every number of the panel, from hand-made steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dflash_chat.runtime.api import Finished, Prefill, Spec, StepStats, Timing, Tokens, Usage
from dflash_chat.ui.meter import BlockMs, Meter
from tests.ui.fake_client import INFO


def step(committed: int, ms: float = 10.0, context: int = 100) -> Tokens:
    """A pass of `ms` milliseconds: 20 % drafting, 60 % verifying, 10 % each for the rest."""
    stats = StepStats(7, committed - 1, committed, ms * 0.2, ms * 0.6, ms * 0.1, ms * 0.1, context)
    return Tokens(1, "x", committed, stats)


def test_tau_counts_the_bonus_token() -> None:
    meter = Meter()
    for committed in (1, 3, 4):
        meter.take(step(committed), 0.0)

    assert meter.spec.tau == pytest.approx(8 / 3)
    assert meter.spec.histogram == (1, 0, 1, 1)


def test_the_token_of_prefill_is_no_verify_pass() -> None:
    meter = Meter()
    meter.take(Tokens(1, "x", 1, None), 0.0)

    assert meter.spec.steps == 0
    assert meter.answer_tok_s == 0


def test_answer_rate_is_tokens_over_seconds_not_a_mean_of_rates() -> None:
    meter = Meter()
    meter.take(step(1, ms=100.0), 0.0)  # 10 tok/s
    meter.take(step(4, ms=10.0), 0.1)  # 400 tok/s

    assert meter.answer_tok_s == pytest.approx(5 / 0.110)


def test_the_rate_now_forgets_what_left_the_window() -> None:
    meter = Meter()
    meter.take(step(1, ms=100.0), 0.0)
    meter.take(step(4, ms=10.0), 2.0)

    assert meter.now_tok_s(2.0) == pytest.approx(400)
    assert meter.now_tok_s(9.0) == 0


def test_block_ms_is_the_mean_of_each_part() -> None:
    meter = Meter()
    meter.take(step(2, ms=10.0), 0.0)
    meter.take(step(2, ms=30.0), 0.0)

    parts = meter.block_ms

    assert parts.draft == pytest.approx(4)
    assert parts.verify == pytest.approx(12)
    assert parts.total == pytest.approx(20)


def test_context_follows_prefill_then_the_commits() -> None:
    meter = Meter()
    meter.read(Prefill(1, 40, 60, 61))
    assert meter.context_tokens == 60

    meter.take(step(2, context=63), 0.0)
    assert meter.context_tokens == 63


def test_rates_are_one_per_half_second() -> None:
    meter = Meter()
    for now in (0.0, 0.4, 0.6, 1.2):
        meter.take(step(2, ms=20.0), now)

    assert meter.rates == [pytest.approx(100)] * 3


def test_the_engines_own_sums_replace_ours_at_the_end() -> None:
    meter = Meter()
    meter.take(step(2), 0.0)
    spec = Spec(5, 35, 5, (0, 5))
    meter.finish(Finished(1, "stop", Usage(9, 0, 11), spec, Timing(0, 0.1, 0.5, 22.0)))

    assert meter.answer_tok_s == 22.0
    assert meter.spec == spec
    assert meter.now_tok_s(0.0) == 0


def test_a_new_answer_starts_from_nothing_but_keeps_the_context() -> None:
    meter = Meter()
    meter.take(step(2, context=63), 0.0)
    meter.begin()

    assert meter.spec == Spec()
    assert meter.block_ms == BlockMs()
    assert meter.context_tokens == 63


def test_a_new_chat_forgets_everything() -> None:
    meter = Meter()
    meter.take(step(2, context=63), 0.0)
    meter.clear()

    assert meter.context_tokens == 0
    assert meter.rates == []


def test_speed_up_is_the_answers_rate_over_a_plain_pass_of_the_same_chat() -> None:
    meter = Meter()
    assert meter.speedup == 0
    meter.loaded(replace(INFO, plain_ms=12.5, plain_context=512))
    meter.take(step(3, ms=10.0), 0.0)
    assert meter.speedup == pytest.approx(300 / 80)
    assert meter.plain_age_s(5.0) is None

    plain = StepStats(0, 0, 1, 0.0, 18.0, 1.0, 1.0, 600, "plain, to compare", probe=True)
    meter.take(Tokens(1, "x", 1, plain), 2.0)
    assert meter.plain is not None
    assert (meter.plain.ms, meter.plain.context_tokens) == (20.0, 600)
    assert meter.plain_age_s(5.0) == 3.0
    assert meter.speedup == pytest.approx(4 / 0.030 / 50)

    meter.begin()
    assert meter.plain.ms == 20.0, "it is the engine's, not the answer's"


def test_the_engines_own_speed_up_replaces_ours_at_the_end() -> None:
    meter = Meter()
    meter.loaded(INFO)
    meter.take(step(2), 0.0)
    timing = Timing(tok_s=22.0, ar_tok_s=11.0, speedup=2.0)
    meter.finish(Finished(1, "stop", Usage(9, 0, 11), Spec(), timing))
    assert meter.speedup == 2.0
    assert meter.plain is not None
    assert meter.plain.tok_s == pytest.approx(11.0)


def test_prefill_counts_what_was_not_cached() -> None:
    meter = Meter()
    meter.read(Prefill(1, 4812, 4873, 4873))
    assert (meter.read_tokens, meter.ttft_s, meter.prefill_tok_s) == (61, 0, 0)
    meter.take(Tokens(1, "x", 1, None, (1,), Timing(ttft_s=0.1, prefill_s=0.05)), 0.0)
    assert (meter.ttft_s, meter.prefill_tok_s) == (0.1, 61 / 0.05)


def test_the_last_pass_says_its_width_until_the_next_answer() -> None:
    meter = Meter()
    meter.take(step(2), 0.0)
    assert meter.last is not None
    assert meter.last.width == 8
    meter.begin()
    assert meter.last is None
