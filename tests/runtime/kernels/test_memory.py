"""What is predicted against what is built, on the meta device: every layout, no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.budget import Budget
from dflash_chat.runtime import draft_head, kernels, models, target_head
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.cache import CUDA_PREFILL_CHUNK
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.graphed import GraphedSteps, Passes
from dflash_chat.runtime.memory import META, Pair
from dflash_chat.runtime.models.gemma4 import Target
from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight
from dflash_chat.runtime.random_weights import RandomWeights
from dflash_chat.runtime.step import Step, TargetParts
from tests.runtime.kernels import pairs
from tests.runtime.kernels.test_graphed import eager, on_graphs
from tests.runtime.test_session import Short, answer, refused, session_of

BF16 = torch.bfloat16
CONTEXT, DRAFT_TOKENS = 3000, 5  # beyond window and chunk, so that the rings wrap
WIDE = {"intermediate_size": 128, "head_dim": 32, "moe_intermediate_size": 64}  # int4: 64 columns
DRAFTER = DrafterConfig.from_raw(
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "block_size": 8, "vocab_size": pairs.VOCAB, "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2]},
    }
)  # fmt: skip
OPTIONS = {
    "plain": EngineOptions(),
    "fp8 drafter": EngineOptions(drafter="fp8"),
    "fp8 draft head": EngineOptions(draft_head="fp8"),
    "rows": EngineOptions(draft_rows=20),
    "fp8 rows": EngineOptions(draft_head="fp8", draft_rows=20),
    "fp8 head": EngineOptions(head="fp8", draft_head="fp8"),
    "screened head": EngineOptions(head="screened"),
    "screened head, fp8 drafts": EngineOptions(head="screened", draft_head="fp8"),
}


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "serve", lambda device, dtype: dtype == BF16)


def config_of(kind: str, **changed: object) -> Any:  # noqa: ANN401
    raw = pairs.KINDS[kind] | WIDE | changed
    return models.find(raw["model_type"]).Config.from_hf(raw)


def outline(shapes: dict[str, tuple[int, ...]], quant: str) -> RandomWeights:
    return RandomWeights(shapes, quant, META, BF16)


def build(
    config: Any,  # noqa: ANN401
    packed: RandomWeights | dict[str, Packed],
    options: EngineOptions,
) -> tuple[GraphedSteps, Target]:
    """As a session does, for a GPU."""
    module = models.find("gemma4" if hasattr(config, "num_experts") else "llama")
    target = module.Target(config, packed, CONTEXT, BF16, META)
    target_head.settle(target, options, META, BF16)
    quant = "fp8" if options.drafter == "fp8" else "bf16"
    added = pairs.ADDED
    head = draft_head.of(target.lm_head, options, added, META, BF16, screen=target.screen)
    drafter = Drafter(
        DRAFTER, outline(DRAFTER.tensor_shapes(64), quant), target.embed, head, CONTEXT, BF16, META,
        CUDA_PREFILL_CHUNK,
    )  # fmt: skip
    cache = target.new_cache(CONTEXT, CUDA_PREFILL_CHUNK)
    engine = Engine(target, cache, drafter, DRAFTER.target_layer_ids, DRAFT_TOKENS, frozenset())
    step = Step(TargetParts.of(target), cache, drafter, engine.taps)
    passes = cast(Passes, None)  # nothing is captured
    return GraphedSteps(step, cache, drafter, DRAFT_TOKENS, passes), target


def pair_of(config: Any, packed: Any) -> Pair:  # noqa: ANN401
    drafted = outline(DRAFTER.tensor_shapes(64), "bf16")
    return Pair.of(config, packed, DRAFTER, drafted, BF16, DRAFT_TOKENS, pairs.ADDED)


def plan_of(kind: str, quant: str = "bf16", context: int = CONTEXT) -> Budget:
    config = config_of(kind)
    return pair_of(config, outline(config.tensor_shapes(), quant)).plan(EngineOptions(), context)


def vectors(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * shape[0] for shape in shapes.values() if len(shape) == 1)


def tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All that can be reached from an object."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors(value, seen)
    elif type(thing).__module__.startswith("dflash_chat"):
        yield from tensors(vars(thing), seen)


def held(thing: object) -> int:
    """Bytes of the device's storages behind an object, each counted once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tensors(thing, set())
        if t.device == META
    }
    return sum(storages.values())


@pytest.mark.parametrize("quant", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("kind", list(pairs.KINDS))
@pytest.mark.parametrize("tied", [True, False])
def test_a_part_has_the_bytes_of_what_is_built(kind: str, quant: str, tied: bool) -> None:
    config = config_of(kind, tie_word_embeddings=tied)
    shapes = config.tensor_shapes()
    packed = outline(shapes, quant)
    steps, target = build(config, packed, EngineOptions())
    plan = pair_of(config, packed).plan(EngineOptions(), CONTEXT)
    assert plan.target == target.nbytes + vectors(shapes)
    drafter = steps.drafter
    assert drafter is not None
    assert plan.drafter == drafter.nbytes + vectors(DRAFTER.tensor_shapes(64))
    assert plan.target_cache == steps.cache.nbytes
    assert plan.drafter_cache == drafter.cache.nbytes


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
@pytest.mark.parametrize("chosen", list(OPTIONS))
@pytest.mark.parametrize("tied", [True, False])
def test_options_change_the_parts_as_they_change_what_is_built(
    kind: str, chosen: str, tied: bool
) -> None:
    options, config = OPTIONS[chosen], config_of(kind, tie_word_embeddings=tied)
    shapes = config.tensor_shapes()
    packed = outline(shapes, "bf16")
    steps, target = build(config, packed, options)
    plan = pair_of(config, packed).plan(options, CONTEXT)
    drafter = steps.drafter
    assert drafter is not None
    ids = 0 if drafter.head.ids is None else drafter.head.ids.nbytes
    assert plan.target + plan.screen == target.nbytes + vectors(shapes)
    assert (plan.screen > 0) == (options.head == "screened")
    assert plan.draft_head == drafter.head.nbytes + ids
    own = drafter.nbytes - drafter.head.nbytes
    assert plan.drafter == own + vectors(DRAFTER.tensor_shapes(64))


@pytest.mark.parametrize("kind", list(pairs.KINDS))
def test_tables_and_buffers_are_those_of_the_steps(kind: str) -> None:
    config = config_of(kind)
    steps, target = build(config, outline(config.tensor_shapes(), "bf16"), EngineOptions())
    plan = plan_of(kind)
    drafter, step = steps.drafter, steps.step
    assert drafter is not None
    assert step.drafting is not None
    ropes = getattr(target, "ropes", None) or target.rope
    turns = [layer.attention.turns for layer in (*step.stack.layers, *step.drafting.stack.layers)]
    assert plan.tables == held([ropes, drafter.rope, turns])
    buffers = [steps._logits, step.features, step.drafting.nothing]
    assert plan.buffers == held(buffers)


@pytest.mark.parametrize("quant", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("kind", list(pairs.KINDS))
def test_nothing_of_size_is_left_out(kind: str, quant: str) -> None:
    config = config_of(kind)
    packed = outline(config.tensor_shapes(), quant)
    steps, target = build(config, packed, EngineOptions())
    plan = pair_of(config, packed).plan(EngineOptions(), CONTEXT)
    stays = (
        plan.target + plan.draft_head + plan.drafter + plan.target_cache + plan.drafter_cache
        + plan.tables + plan.buffers
    )  # fmt: skip
    assert stays == pytest.approx(held([steps, target]), rel=0.02)  # norms have copies


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["gemma4", "moe"])
def test_int4_with_zero_points_counts_as_the_kernels_lay_it_out(kind: str, group: int) -> None:
    config = config_of(kind)
    made: dict[str, Packed] = dict(outline(config.tensor_shapes(), "bf16"))
    for name, weight in made.items():
        if any(part in name for part in ("self_attn.", "mlp.", "experts.")):
            *rows, k = weight.shape
            if rows:
                made[name] = Int4GroupWeight(
                    weight.shape,
                    torch.empty(*rows, k // 8, dtype=torch.int32, device=META),
                    torch.empty(*rows, k // group, dtype=BF16, device=META),
                    torch.empty(*rows, k // group, dtype=torch.uint8, device=META),
                )
    _, target = build(config, made, EngineOptions())
    plan = pair_of(config, made).plan(EngineOptions(), CONTEXT)
    assert plan.target == target.nbytes + vectors(config.tensor_shapes())


@pytest.mark.parametrize("name", ["forward 4", "draft", "choose 4"])
def test_steps_go_on_after_memory_ran_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "serve", lambda *_: False)
    monkeypatch.setattr(cpu, "prepacking_serves", lambda *_: False)
    truth, _ = answer(session_of(eager("moe")))
    engine = on_graphs("moe")
    session, graphed = session_of(engine), engine.graphed
    assert graphed is not None
    answer(session)
    replay = graphed.passes.replay
    failing = Short(replay, 3, torch.OutOfMemoryError("CUDA"))
    monkeypatch.setattr(
        graphed.passes, "replay", lambda passed: (failing if passed == name else replay)(passed)
    )
    refused(session)
    text, finished = answer(session)
    assert (text, finished.usage.cached) == (truth, 0)
