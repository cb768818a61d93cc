"""`bench --sweep`: every way gets its turn, says what it did, and teaches the next plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from dflash_chat import bench, calibration, cli, sweep
from dflash_chat.bench import Way
from dflash_chat.errors import EXIT_OK, EXIT_USAGE
from dflash_chat.runtime.api import Event, Generate, ModelInfo, SamplingParams, Spec
from dflash_chat.runtime.session import Session
from dflash_chat.speed import Survival
from dflash_chat.sweep import CONTROLLER, PLAIN, Tally
from tests.folders import write_pair
from tests.runtime.test_session import engine, session_of

PROMPTS = ["5 9 2 33 17 8", "40 1 12"]
WAYS = [PLAIN, 1, 2, 3, 4, CONTROLLER]
INFO = ModelInfo("a-pair", "", "", "CPU", "bf16", "torch", 0, 0, 4, 0, 0, 0, 0.0)


class Watched(Session):
    """A tiny session that remembers what it was asked, and with which controller."""

    def __init__(self) -> None:
        made = session_of(engine())
        super().__init__(made.engine, made.tokenizer, made.info)
        self.engine.measure()
        self.loaded = self.engine.controller
        self.asked: list[tuple[str, int]] = []

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Event]:
        way = (request.draft_tokens or CONTROLLER) if request.draft else PLAIN
        self.asked.append((request.messages[0].content, way))
        return super().generate(request, cancelled)


@cache
def _swept(temperature: float = 0.0) -> tuple[Watched, dict[int, Tally]]:
    session = Watched()
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=24)
    return session, sweep.measure(session, PROMPTS, sampling, lambda _: None)


def test_every_way_answers_every_prompt_and_the_order_turns_round() -> None:
    session, tallies = _swept()
    assert list(tallies) == WAYS
    assert session.asked == [
        (prompt, way)
        for number, prompt in enumerate(PROMPTS)
        for way in (WAYS[::-1] if number % 2 else WAYS)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_fixed_way_verifies_that_many_and_no_way_changes_an_answer(temperature: float) -> None:
    _, tallies = _swept(temperature)
    for way, tally in tallies.items():
        widths = tally.way.spec.widths
        assert tally.identical == len(PROMPTS)
        assert tally.way.decoded == len(PROMPTS) * 23
        assert sum(i * n for i, n in enumerate(tally.way.spec.histogram, 1)) == tally.way.decoded
        assert tally.way.step_ms > 0
        if way != CONTROLLER:
            assert [n for n, count in enumerate(widths, 1) if count] == [way + 1]


def test_the_controller_learns_from_its_own_answers_alone() -> None:
    session, tallies = _swept()
    controller = session.engine.controller
    assert controller is session.loaded
    own = tallies[CONTROLLER].way
    assert sum(controller.histogram.values()) == own.spec.steps
    assert own.why == controller.reason
    assert own.ar_tok_s > 0


def test_the_acceptance_that_is_kept_is_that_of_the_widest_passes() -> None:
    _, tallies = _swept()
    widest = tallies[4].way
    survival = sweep.survival_of(tallies)
    assert survival is not None
    assert (survival.shares, survival.tokens) == (widest.spec.survival, widest.decoded)
    assert survival.committed(4) == pytest.approx(widest.spec.tau)
    nothing = {PLAIN: Tally(), 4: Tally(), CONTROLLER: Tally()}
    assert sweep.survival_of(nothing) is None


def _report(plain: float, fixed: float, controller: float) -> dict[str, object]:
    def tally(tok_s: float) -> Tally:
        return Tally(Way(Spec(10, 5, 4, (6, 4), (5, 5)), 100, 100 / tok_s, 1.0, "because"), 2)

    tallies = {PLAIN: tally(plain), 1: tally(10), 2: tally(fixed), CONTROLLER: tally(controller)}
    report = sweep.as_json(INFO, 3, SamplingParams(), tallies)
    return report | {"acceptance": Survival((0.5, 0.2), 100).to_dict(), "kept": True}


@pytest.mark.parametrize(
    ("rates", "recommended", "advice"),
    [
        ((50, 80, 90), "controller", "leave the width to the controller"),
        ((50, 80, 79), "controller", "leave the width to the controller"),
        ((50, 80, 70), "k = 2", "-o k=2 was faster than the controller"),
        ((90, 80, 70), "plain", "--no-draft was faster than the controller"),
    ],
)
def test_the_advice_follows_the_rates(
    rates: tuple[float, float, float], recommended: str, advice: str
) -> None:
    report = _report(*rates)
    assert report["recommended"] == recommended
    assert report["best_fixed"] == 2
    assert report["controller_to_best_fixed"] == pytest.approx(rates[2] / rates[1], abs=1e-4)
    words = sweep.in_words(report)
    assert f"advice      {advice}" in words
    assert "the acceptance of 100 tokens" in words
    rows = [line.split() for line in words.splitlines()[2:6]]
    assert [row[-4] for row in rows] == [f"{r:.1f}" for r in (rates[0], 10, *rates[1:])]
    assert [row[-3] for row in rows] == [f"{r / rates[0]:.3f}" for r in (rates[0], 10, *rates[1:])]


def test_a_pair_in_two_folders_is_swept_and_planned_by_what_was_found(
    own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = write_pair(own_folders)
    prompts = own_folders / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    name = f"{target}+{drafter}"
    options = ["-m", name, "--max-tokens", "12", "-o", "device=cpu", "-o", "dtype=fp32", "--json"]
    assert cli.main(["bench", "--sweep", "--prompts", str(prompts), *options]) == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in report["ways"]] == [
        "plain", "k = 1", "k = 2", "k = 3", "k = 4", "controller",
    ]  # fmt: skip
    assert all(row["identical"] == 2 for row in report["ways"])
    assert report["kept"]
    tokens = report["acceptance"]["tokens"]
    assert tokens == report["ways"][-2]["tokens"]
    (key,) = json.loads(calibration.file().read_text())
    assert key.startswith(f"{calibration.processor()} |  | ")

    assert cli.main(["plan", name, "--json"]) == EXIT_OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["acceptance"] == report["acceptance"]
    assert plan["tok_s"]["measured"]
    (width,) = [line for line in plan["why"] if line["what"] == "width"]
    assert f"measured on {tokens} tokens here" in width["instead"]


def test_a_number_that_was_named_cannot_be_swept(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--sweep", "-o", "k=3"]) == EXIT_USAGE
    assert "-o k" in capsys.readouterr().err


def test_bench_says_what_the_drafted_answers_knew_of_plain_decoding() -> None:
    session = Watched()
    drafted, plain = Way(), Way()
    for draft in (False, True):
        _, finished = bench.answer(session, PROMPTS[0], SamplingParams(max_tokens=40), draft)
        drafted, plain = (
            (drafted.plus(finished), plain) if draft else (drafted, plain.plus(finished))
        )
    report = bench.as_json(INFO, 1, SamplingParams(), drafted, plain, 1)
    assert report["timing"]["ar_tok_s"] == round(drafted.ar_tok_s, 2)
    assert report["timing"]["speedup"] == round(drafted.tok_s / drafted.ar_tok_s, 4)
    assert report["why"] == session.engine.controller.reason
    assert report["spec"]["widths"] == list(drafted.spec.widths)
    assert f"the last: {report['why']}" in bench.in_words(report)
