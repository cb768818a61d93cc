"""Tiny seeded pairs of every architecture, as the kernels read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dflash_chat.runtime import draft_head, models
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.quant import Packed, kernel_weights
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.random_weights import RandomWeights
from tests.runtime.kernels.conftest import DEVICE

BLOCK, VOCAB = 8, 61
TAPS = (0, 2)
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA: dict[str, Any] = LLAMA | {
    "model_type": "gemma4_text", "num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 5.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
        },
    },
}  # fmt: skip
MOE = GEMMA | {
    "enable_moe_block": True, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip
KINDS = {"llama": LLAMA, "qwen3": LLAMA | {"model_type": "qwen3"}, "gemma4": GEMMA, "moe": MOE}


class Pair(NamedTuple):
    """Target and drafter with empty caches on `DEVICE`."""

    target: Any
    cache: KVCache
    drafter: Drafter


ADDED = (45, 60)  # ids beside the merges


class Widened(Mapping[str, Packed]):
    """The same weights in fp32: what bf16 is measured against."""

    def __init__(self, narrow: Mapping[str, Packed]) -> None:
        self._narrow = narrow

    def __getitem__(self, name: str) -> Packed:
        return DenseWeight(self._narrow[name].dequantize())

    def __iter__(self) -> Iterator[str]:
        return iter(self._narrow)

    def __len__(self) -> int:
        return len(self._narrow)


def tiny(
    kind: str,
    capacity: int,
    options: EngineOptions = EngineOptions(),
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair of `KINDS[kind]`. Call it where `cpu.prepacking_serves` is patched away."""
    raw = KINDS[kind]
    module = models.find(raw["model_type"])
    config = module.Config.from_hf(raw)
    weights = RandomWeights(config.tensor_shapes(), "bf16", DEVICE, dtype)
    target = module.Target(config, weights, capacity, dtype, DEVICE)
    if options.head == "screened":  # the interpreter serves, too
        target.screen = kernel_weights.int8(target.lm_head)
    c = DrafterConfig.from_raw(
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "block_size": BLOCK, "vocab_size": VOCAB,
            "num_target_layers": raw["num_hidden_layers"], "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "dflash_config": {"mask_token_id": 3, "target_layer_ids": list(TAPS)},
        }
    )  # fmt: skip
    quant = "fp8" if options.drafter == "fp8" else "bf16"
    drafted = RandomWeights(c.tensor_shapes(64), quant, DEVICE, dtype, seed=1)
    cap = float(raw.get("final_logit_softcapping", 0.0))
    head = draft_head.of(target.lm_head, options, ADDED, DEVICE, dtype, cap, target.screen)
    drafter = Drafter(c, drafted, target.embed, head, capacity, dtype, DEVICE)
    return Pair(target, target.new_cache(capacity), drafter)
