"""What a plan promises on any card: room, order, and a reason for every choice."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat import budget, cards, catalogue, geometry, planner, reasons
from dflash_chat.calibration import Key, Known
from dflash_chat.candidates import COMFORTABLE, MARGIN, Why
from dflash_chat.cards import GIB
from dflash_chat.entries import Build, Drafter, HubSource, Pair
from dflash_chat.errors import UnknownModelError, UsageError
from dflash_chat.geometry import ConfigError
from dflash_chat.gpu import Gpu
from dflash_chat.planner import Plan, Wishes
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.speed import CURVES, Costs, Survival
from tests.published import DRAFTERS, TARGETS

SIZES = (8, 12, 16, 24, 32, 48, 80, 141)
CATALOGUE = catalogue.load_catalogue()
NAMES = [pair.name for pair in CATALOGUE]


def gpu(gib: float, capability: tuple[int, int] | None = (8, 9), speed: float = 936.0) -> Gpu:
    total = round(gib * GIB)
    free = cards.usable(total)
    return Gpu(0, "", f"{gib:g} GB", total, free, capability=capability, bandwidth_gb_s=speed)


def build(name: str, bits: float, target: str, missing: str = "") -> Build:
    counted = geometry.target(TARGETS[target])
    rest = 2 * (counted.embedding + counted.head)
    held = round(counted.body * bits / 8) + rest
    source = HubSource("a/b", "main", held)
    return Build(name, name, "compressed-tensors", source, held, bits, missing=missing)


def pair(name: str, *builds: Build, missing: str = "") -> Pair:
    drafter = Drafter(None, 16, 15, kind="hub", config=DRAFTERS[name])
    return Pair(name, name, "", "", builds, drafter, config=TARGETS[name], missing=missing)


@cache
def gemma() -> Pair:
    name = "gemma-4-26b-a4b"
    lack = "NVFP4 is not read yet"
    return pair(
        name, build("bf16", 16, name), build("fp8", 8, name), build("int4", 4.5, name),
        build("nvfp4", 6.1, name, lack),
    )  # fmt: skip


def quality(made: Plan) -> float:
    return made.build.bits if made.fits else 0.0


def room(made: Plan) -> int:
    return made.context_tokens if made.fits else 0


def why(made: Plan, what: str) -> Why:
    return next(line for line in made.why if line.what == what)


# ── on every card ───────────────────────────────────────────────────────────────────────────────

_wishes = st.builds(
    EngineOptions,
    context_tokens=st.sampled_from([0, 0, 1024, 8000]),
    draft_tokens=st.sampled_from([0, 0, 3]),
    drafter=st.sampled_from(["auto", "bf16", "fp8"]),
    draft_head=st.sampled_from(["auto", "own", "fp8"]),
    head=st.sampled_from(["auto", "own", "fp8", "screened"]),
)
_capabilities = st.sampled_from([None, (7, 5), (8, 6), (9, 0)])


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.sampled_from(CATALOGUE),
    sizes=st.tuples(st.floats(1, 200), st.floats(1, 200)).map(sorted),
    options=_wishes,
    capability=_capabilities,
)
def test_a_bigger_card_never_gets_a_worse_build_or_a_shorter_context(
    chosen: Pair, sizes: list[float], options: EngineOptions, capability: tuple[int, int] | None
) -> None:
    small, large = (
        planner.plan(chosen, Wishes(options=options), gpu(size, capability)) for size in sizes
    )
    assert large.fits >= small.fits
    assert quality(large) >= quality(small)
    assert room(large) >= room(small)


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.sampled_from(CATALOGUE),
    size=st.floats(1, 200),
    options=_wishes,
    capability=_capabilities,
)
def test_parts_sum_up_and_nothing_planned_exceeds_what_is_free(
    chosen: Pair, size: float, options: EngineOptions, capability: tuple[int, int] | None
) -> None:
    made = planner.plan(chosen, Wishes(options=options), gpu(size, capability))
    assert sum(asdict(made.budget).values()) == made.budget.total
    assert min(asdict(made.budget).values()) >= 0
    assert made.fits == (made.budget.total <= made.free)
    assert made.spare == made.free - made.budget.total
    # what was asked for is what is planned
    for asked, planned in zip(asdict(options).items(), asdict(made.options).values(), strict=True):
        assert asked[1] in ("auto", 0, planned)
    assert "auto" not in (made.options.drafter, made.options.draft_head, made.options.head)
    assert 1 <= made.num_speculative_tokens < chosen.drafter.block_size


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_has_a_plan_for_every_size_and_the_cpu(name: str) -> None:
    chosen = CATALOGUE[NAMES.index(name)]
    for size in SIZES:
        made = planner.plan(chosen, gpu=gpu(size))
        assert made.fits or reasons.remedy(made)
        assert made.recommendable == (made.fits and made.build in chosen.loadable)
        assert [line for line in made.why if not (line.choice and line.because)] == []
    on_cpu = planner.plan(chosen, ram=200 * GIB)
    assert on_cpu.fits
    assert on_cpu.budget.cuda_context == 0


# ── choices ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "name"), [(24, "int4"), (32, "fp8"), (48, "fp8"), (80, "bf16"), (141, "bf16")]
)
def test_the_best_build_with_room_for_a_conversation_is_taken(size: int, name: str) -> None:
    made = planner.plan(gemma(), gpu=gpu(size))
    assert (made.build.name, made.context_tokens) == (name, COMFORTABLE)


def test_what_would_change_the_build_is_said() -> None:
    made = planner.plan(gemma(), gpu=gpu(24))
    line = why(made, "build")
    assert "fp8 needs" in line.because
    assert line.instead == "a 32 GB card would take fp8"
    assert planner.plan(gemma(), gpu=gpu(32)).build.name == "fp8"


@pytest.mark.parametrize(
    ("needed", "free", "words"),
    [
        (24.04, 23.4, "needs 24.0 GiB, 23.4 GiB are free"),
        (23.44, 23.38, "needs 23.44 GiB, 23.38 GiB are free"),
    ],
)
def test_what_is_needed_never_reads_like_what_is_free(
    needed: float, free: float, words: str
) -> None:
    assert reasons.of_free(round(needed * GIB), round(free * GIB)) == words


def test_a_build_that_cannot_be_loaded_is_named_and_never_taken() -> None:
    made = planner.plan(gemma(), gpu=gpu(24))
    assert made.build.name == "int4"
    assert "nvfp4" in why(made, "build").because
    assert "NVFP4 is not read yet" in why(made, "build").because


def test_a_pair_that_cannot_be_loaded_is_planned_and_not_recommended() -> None:
    name = "qwen3.6-27b"
    other = pair(name, build("int4", 4.5, name), missing="GDN is not there yet")
    made = planner.plan(other, gpu=gpu(80))
    assert made.fits
    assert made.missing == "GDN is not there yet"
    assert not made.recommendable
    assert planner.rank([made, planner.plan(gemma(), gpu=gpu(80))])[0].pair == gemma()


def test_a_context_is_cut_to_what_fits_with_the_smallest_build_only() -> None:
    name = "qwen3-8b"
    chosen = pair(name, build("bf16", 16, name), build("int4", 4.5, name))
    made = planner.plan(chosen, gpu=gpu(12))
    assert made.build.name == "int4"
    assert made.fits
    assert made.context_tokens < COMFORTABLE
    longer = replace(made.options, context_tokens=made.context_tokens + 1024)
    assert not planner.plan(chosen, Wishes("int4", longer), gpu(11.6)).fits


def test_the_longest_context_named_as_fitting_fits() -> None:
    made = planner.plan(gemma(), gpu=gpu(24))
    words = why(made, "context").instead
    assert words.startswith("-o ctx=")
    longest = int(words.removeprefix("-o ctx=").split()[0])
    assert longest > made.context_tokens
    options = replace(made.options, context_tokens=longest)
    assert planner.plan(gemma(), Wishes("int4", options), gpu(24)).fits


def test_what_does_not_fit_says_what_would() -> None:
    options = EngineOptions(context_tokens=262_144)
    made = planner.plan(gemma(), Wishes("bf16", options), gpu(48))
    assert not made.fits
    assert "24.0" not in reasons.shortage(made)
    assert f"{made.free / GIB:.1f} GiB" in reasons.shortage(made)
    assert reasons.remedy(made) == "an 80 GB card would take it"
    assert planner.plan(gemma(), Wishes("bf16", options), gpu(80)).fits


def test_where_nothing_fits_the_least_is_told() -> None:
    made = planner.plan(gemma(), gpu=gpu(12))
    assert not made.fits
    assert (made.build.name, made.context_tokens) == ("int4", budget.LEAST)
    assert made.options.drafter == "fp8"


def test_a_drafter_is_rounded_for_speed_where_that_is_measured_and_for_room_anywhere() -> None:
    assert planner.plan(gemma(), gpu=gpu(24, (8, 9))).options.drafter == "fp8"
    old = planner.plan(gemma(), gpu=gpu(24, (8, 6)))
    assert (old.options.drafter, old.options.draft_head) == ("bf16", "own")
    tight = next(
        made
        for size in range(160, 240)
        if (made := planner.plan(gemma(), gpu=gpu(size / 10, (8, 6)))).fits
    )
    assert tight.options.drafter == "fp8"
    assert "takes least" in why(tight, "drafter").because


# ── the screened head ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=100, deadline=None)
@given(
    chosen=st.sampled_from(CATALOGUE), size=st.floats(1, 200), context=st.sampled_from([0, 8000])
)
def test_a_screen_costs_no_context_and_no_better_build(
    chosen: Pair, size: float, context: int
) -> None:
    auto, own = (
        planner.plan(chosen, Wishes(options=EngineOptions(context_tokens=context, head=head)),
                     gpu(size))
        for head in ("auto", "own")
    )  # fmt: skip
    assert (auto.build, auto.context_tokens, auto.fits) == (
        own.build, own.context_tokens, own.fits,
    )  # fmt: skip
    if auto.options.head == "screened":
        assert auto.costs is not None
        assert own.costs is not None
        assert auto.costs.plain > own.costs.plain
        assert auto.tok_s() > own.tok_s()


def test_a_head_is_screened_by_a_copy_that_drafts_are_read_off_too() -> None:
    made = planner.plan(gemma(), gpu=gpu(80))
    assert (made.options.head, made.options.draft_head) == ("screened", "screened")
    assert made.budget.screen == 262_144 * (2816 + 8)
    assert made.budget.draft_head == 0
    assert reasons.gib(made.budget.screen) in why(made, "head").because
    assert "same answers" in why(made, "head").because
    assert why(made, "head").instead == "-o head=own"
    assert "screens the target's" in why(made, "draft head").because


def test_drafts_are_read_off_what_was_named_beside_a_screened_head() -> None:
    for name, held in (("own", 0), ("fp8", 262_144 * (2816 + 4))):
        wishes = Wishes(options=EngineOptions(draft_head=name))
        made = planner.plan(gemma(), wishes, gpu(80))
        assert (made.options.head, made.options.draft_head) == ("screened", name)
        assert made.budget.draft_head == held


@pytest.mark.parametrize("named", ["own", "fp8"])
def test_a_head_that_was_named_is_not_screened(named: str) -> None:
    made = planner.plan(gemma(), Wishes(options=EngineOptions(head=named)), gpu(80))
    assert made.options.head == named
    assert made.budget.screen == 0


def test_a_screen_is_taken_from_the_byte_on_that_it_fits() -> None:
    least = EngineOptions(drafter="fp8", draft_head="own", head="screened")
    needed = planner.plan(gemma(), Wishes("int4", least), gpu(24)).budget.total
    around = needed * MARGIN // (MARGIN - 1)
    free = next(n for n in range(around - 2, around + 3) if n - n // MARGIN >= needed)
    for bytes_free, head in ((free, "screened"), (free - 1, "own")):
        made = planner.plan(gemma(), Wishes("int4"), replace(gpu(24), free=bytes_free))
        assert (made.options.head, made.context_tokens) == (head, COMFORTABLE)


def test_a_quantised_head_is_left_as_it_is() -> None:
    chosen = gemma()
    halved = replace(chosen, builds=(replace(chosen.build("int4"), head_bits=8),))
    made = planner.plan(halved, gpu=gpu(80))
    assert (made.options.head, made.budget.screen) == ("own", 0)


def test_on_a_cpu_and_on_cards_without_kernels_nothing_is_screened() -> None:
    for card in (None, gpu(80, (7, 5)), gpu(80, (8, 6))):
        made = planner.plan(gemma(), gpu=card, ram=200 * GIB)
        assert (made.options.head, made.budget.screen) == ("own", 0)


def test_experts_in_8_bits_go_without_kernels_on_older_cards() -> None:
    made = planner.plan(gemma(), gpu=gpu(48, (8, 6)))
    assert made.build.name == "int4"
    named = planner.plan(gemma(), Wishes("fp8"), gpu(48, (8, 6)))
    assert named.costs is None
    assert "8.9" in why(named, "speed").because


def test_without_kernels_nothing_is_said_of_speed() -> None:
    made = planner.plan(gemma(), gpu=gpu(24, (7, 5)))
    assert made.costs is None
    assert made.tok_s() == 0
    assert made.num_speculative_tokens == 15


@pytest.mark.parametrize(
    ("card", "speed", "source"),
    [
        (gpu(24, speed=700.0), 700, "by its clock and bus"),
        (replace(gpu(24), name="NVIDIA GeForce RTX 3090", bandwidth_gb_s=None), 936, "data sheet"),
        (replace(gpu(24), bandwidth_gb_s=None), 896, "a guess"),
    ],
    ids=["driver", "sheet", "guess"],
)
def test_a_bandwidth_says_where_it_comes_from(card: Gpu, speed: int, source: str) -> None:
    line = why(planner.plan(gemma(), gpu=card), "speed")
    assert f"{speed} GB/s" in line.because
    assert source in line.because


def test_experts_get_a_smaller_width_for_prose_than_a_dense_target() -> None:
    sparse = planner.plan(gemma(), gpu=gpu(24))
    dense = planner.plan(pair("qwen3-8b", build("fp8", 8, "qwen3-8b")), gpu=gpu(24))
    assert sparse.drafts["prose"] < sparse.drafts["code"]
    assert sparse.drafts["prose"] < dense.drafts["prose"]
    assert sparse.num_speculative_tokens == sparse.drafts["mixed"]
    assert "128 experts" in why(sparse, "width").because


def test_measured_costs_replace_estimates() -> None:
    asked: list[Key] = []
    measured = Costs({1: 10.0, 2: 10.1, 4: 20.0, 16: 80.0}, 1.0)

    def read(key: Key) -> Known:
        asked.append(key)
        return Known(measured)

    card = replace(gpu(24), driver="580.1")
    made = planner.plan(gemma(), gpu=card, measured=read)
    assert asked == [Key("24 GB", "580.1", "gemma-4-26b-a4b", "int4")]
    assert made.measured
    assert set(made.drafts.values()) == {1}
    assert made.costs is not None
    assert made.costs.plain == 100
    assert "measured on this card" in why(made, "speed").because


def test_a_width_that_was_asked_for_is_the_one_whose_speed_is_told() -> None:
    for k in (1, 6, 15):
        wishes = Wishes(options=EngineOptions(draft_tokens=k))
        made = planner.plan(gemma(), wishes, gpu(24))
        assert set(made.drafts.values()) == {k}
        assert made.costs is not None
        assert made.tok_s("code") == made.costs.drafted(CURVES["code"], k)
    unmeasured = planner.plan(
        gemma(), wishes, gpu(24), measured=lambda _: Known(Costs({1: 10.0, 2: 10.1}, 1.0))
    )
    assert not unmeasured.measured


@pytest.mark.parametrize(("shares", "best"), [((0.9, 0.1, 0.0), 1), ((0.9, 0.85, 0.8), 3)])
def test_measured_acceptance_replaces_the_usual_curves(
    shares: tuple[float, ...], best: int
) -> None:
    costs, survival = Costs({1: 10.0, 2: 11.0, 4: 13.0, 16: 40.0}, 1.0), Survival(shares, 4321)
    made = planner.plan(gemma(), gpu=gpu(24), measured=lambda _: Known(costs, survival))
    assert made.drafts == {"here": best}
    assert made.num_speculative_tokens == best
    assert made.tok_s() == costs.drafted(survival, best)
    assert "measured on 4321 tokens here" in why(made, "width").instead
    assert "measured on 4321 tokens here" in why(made, "speed").because
    estimated = planner.plan(gemma(), gpu=gpu(24), measured=lambda _: Known(None, survival))
    assert not estimated.measured
    assert estimated.tok_s() > 0
    assert "estimated" in why(estimated, "speed").because
    assert "measured on 4321 tokens here" in why(estimated, "speed").because


def test_on_a_cpu_there_are_speeds_once_they_were_measured() -> None:
    asked: list[Key] = []

    def read(key: Key) -> Known:
        asked.append(key)
        return Known(Costs({1: 10.0, 2: 11.0, 4: 13.0}, 3.0), Survival((0.9, 0.7, 0.6), 99))

    small = next(pair for pair in CATALOGUE if pair.name == "smollm2-135m")
    made = planner.plan(small, measured=read)
    assert asked == [Key("", "", "smollm2-135m", "q4_1")]
    assert (made.measured, made.num_speculative_tokens) == (True, 3)
    assert "measured on 99 tokens here" in why(made, "width").instead
    assert "this processor" in why(made, "speed").because
    unmeasured = planner.plan(small)
    assert {line.what for line in unmeasured.why} == {"build", "context"}
    assert unmeasured.num_speculative_tokens == small.drafter.draft_tokens


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        (Wishes("int5"), UnknownModelError),
        (Wishes(options=EngineOptions(context_tokens=262_145)), UsageError),
        (Wishes(options=EngineOptions(draft_tokens=16)), UsageError),
    ],
)
def test_what_the_pair_has_not_is_refused(wishes: Wishes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        planner.plan(gemma(), wishes, gpu(80))
    assert getattr(caught.value, "hint", "")


def test_a_pair_without_a_config_names_the_missing_key() -> None:
    with pytest.raises(ConfigError, match="model_type"):
        planner.plan(replace(gemma(), config={}), gpu=gpu(24))


def test_block_formats_take_the_bytes_of_bf16_on_a_gpu_and_their_own_on_a_cpu() -> None:
    small = next(pair for pair in CATALOGUE if pair.name == "smollm2-135m")
    counted = geometry.target(small.config)
    on_gpu, on_cpu = (planner.plan(small, Wishes("q4_1"), card) for card in (gpu(8), None))
    assert on_gpu.budget.target == 2 * counted.parameters
    assert on_cpu.budget.target == small.build("q4_1").resident_bytes


# ── for the engine ──────────────────────────────────────────────────────────────────────────────


def test_the_engine_gets_its_options_filled_in_and_chooses_the_width_itself() -> None:
    chosen = gemma()
    filled = planner.plan_for(chosen, chosen.build("int4"), EngineOptions(), gpu(24))
    assert filled.context_tokens == COMFORTABLE
    assert (filled.drafter, filled.draft_head) == ("fp8", "screened")
    assert filled.draft_tokens == 0
    assert filled.head == "screened"


def test_what_somebody_set_stays() -> None:
    chosen, asked = gemma(), EngineOptions(
        context_tokens=4096, draft_tokens=3, drafter="bf16", draft_head="own", threads=2,
        head="own",
    )  # fmt: skip
    assert planner.plan_for(chosen, chosen.build("int4"), asked, gpu(24)) == asked


def test_what_does_not_fit_or_cannot_be_counted_is_left_to_the_runtime() -> None:
    chosen, asked = gemma(), EngineOptions()
    assert planner.plan_for(chosen, chosen.build("bf16"), asked, gpu(24)) == asked
    uncounted = replace(chosen, config={})
    assert planner.plan_for(uncounted, chosen.build("int4"), asked, gpu(24)) == asked


# ── ranking ─────────────────────────────────────────────────────────────────────────────────────


def ranked(size: int) -> list[Plan]:
    return planner.rank(planner.plan(chosen, gpu=gpu(size)) for chosen in CATALOGUE)


def test_every_pair_is_ranked_and_what_cannot_be_used_comes_last() -> None:
    for size in SIZES:
        plans = ranked(size)
        assert sorted(made.pair.name for made in plans) == sorted(NAMES)
        usable = [made.recommendable for made in plans]
        assert usable == sorted(usable, reverse=True)


def test_the_recommended_pair_is_big_and_quick() -> None:
    assert ranked(24)[0].pair.name == "gemma-4-26b-a4b"
    assert ranked(141)[0].pair.name == "gemma-4-26b-a4b"
    for size in SIZES:
        best, *others = ranked(size)
        assert best.context_tokens >= 8192
        rivals = [made for made in others if made.recommendable and made.tok_s() >= 30]
        for made in rivals:
            bigger = planner.parameters(made) > 1.5 * planner.parameters(best)
            assert not bigger or made.context_tokens < 8192


def test_a_cpu_gets_the_smallest_pair() -> None:
    plans = planner.rank(planner.plan(chosen, ram=64 * GIB) for chosen in CATALOGUE)
    assert plans[0].pair.name == "smollm2-135m"
