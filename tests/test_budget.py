"""The law on counted configs is the law on weights as they are loaded."""

from __future__ import annotations

import pytest
import torch

from dflash_chat import budget, geometry
from dflash_chat.budget import Demand
from dflash_chat.runtime import models, random_weights
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.memory import META, Pair
from dflash_chat.runtime.random_weights import RandomWeights
from tests.published import DRAFTERS, TARGETS

BF16 = torch.bfloat16
OPTIONS = {
    "plain": EngineOptions(),
    "fp8 drafter": EngineOptions(drafter="fp8"),
    "fp8 head": EngineOptions(head="fp8", draft_head="fp8"),
    "fp8 rows": EngineOptions(draft_head="fp8", draft_rows=16_000),
}


@pytest.fixture(scope="module", params=["gemma-4-26b-a4b", "qwen3-8b"])
def both(request: pytest.FixtureRequest) -> tuple[Pair, Demand]:
    """A pair as it is loaded, and as it is counted."""
    shapes = random_weights.shapes(request.param)
    config = models.find(shapes.target["model_type"]).Config.from_hf(shapes.target)
    drafter = DrafterConfig.from_raw(shapes.drafter)
    loaded = Pair.of(
        config, RandomWeights(config.tensor_shapes(), "bf16", META, BF16), drafter,
        RandomWeights(drafter.tensor_shapes(config.hidden_size), "bf16", META, BF16), BF16, 15,
        range(150_000, 150_010),
    )  # fmt: skip
    counted = geometry.target(shapes.target)
    demand = budget.demand(
        counted, geometry.drafter(shapes.drafter), loaded.target_bytes,
        added=range(150_000, 150_010),
    )  # fmt: skip
    scalars = 2 * counted.num_hidden_layers if counted.family == "gemma4" else 0  # buffers
    assert loaded.target_bytes == 2 * counted.parameters + scalars
    return loaded, demand


@pytest.mark.parametrize("chosen", OPTIONS)
@pytest.mark.parametrize("context", [1024, 40_000])
def test_counted_configs_and_loaded_weights_make_one_budget(
    both: tuple[Pair, Demand], chosen: str, context: int
) -> None:
    loaded, counted = (pair.plan(OPTIONS[chosen], context) for pair in both)
    assert counted == loaded


def test_a_recurrent_state_is_kept_twice() -> None:
    qwen = geometry.target(TARGETS["qwen3.6-27b"])
    demand = budget.demand(qwen, geometry.drafter(DRAFTERS["qwen3.6-27b"]), 2 * qwen.parameters)
    plans = [demand.plan(EngineOptions(), n) for n in (8192, 8193)]
    assert plans[0].state == 2 * qwen.state_bytes
    assert plans[1].target_cache - plans[0].target_cache == 65_536
