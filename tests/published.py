"""Geometry keys of published configs, as in the text part of each config.json.

For tests that need them beside the catalogue, or whatever the catalogue says.
"""

from __future__ import annotations

from typing import Any


def _gemma(hidden: int, inner: int, depth: int, heads: int, groups: int, full_groups: int,
           **moe: int | bool) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": groups,
        "num_global_key_value_heads": full_groups, "head_dim": 256, "global_head_dim": 512,
        "attention_k_eq_v": True, "sliding_window": 1024, "vocab_size": 262144,
        "max_position_embeddings": 262144, "tie_word_embeddings": True, **moe,
    }  # fmt: skip


def _qwen3(hidden: int, inner: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen35(hidden: int, depth: int, heads: int, groups: int, values: int,
            **more: int | bool | str) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "qwen3_5_text", "hidden_size": hidden, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 256,
        "full_attention_interval": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_conv_kernel_dim": 4,
        "vocab_size": 248320, "max_position_embeddings": 262144, "tie_word_embeddings": False,
        **more,
    }  # fmt: skip


TARGETS: dict[str, dict[str, Any]] = {
    "gemma-4-26b-a4b": _gemma(
        2816, 2112, 30, 16, 8, 2, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gemma-4-31b": _gemma(5376, 21504, 60, 32, 16, 4),
    "qwen3.6-27b": _qwen35(5120, 64, 24, 4, 48, intermediate_size=17408),
    "qwen3.6-35b-a3b": _qwen35(
        2048, 40, 16, 2, 32, model_type="qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=512, shared_expert_intermediate_size=512,
    ),
    "qwen3.5-9b": _qwen35(4096, 32, 16, 4, 32, intermediate_size=12288),
    "qwen3.5-4b": _qwen35(2560, 32, 16, 4, 32, intermediate_size=9216, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, tied=False),
    "qwen3-4b": _qwen3(2560, 9728, tied=True),
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "vocab_size": 201088, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def _drafter(name: str, inner: int, taps: list[int], sliding: int,
             **changed: int | list[str]) -> dict[str, Any]:  # fmt: skip
    """Five layers, 32 query and 8 kv heads of 128, block 16: what most published drafters are."""
    target = TARGETS[name]
    return {
        "hidden_size": target["hidden_size"], "intermediate_size": inner, "num_hidden_layers": 5,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "block_size": 16,
        "vocab_size": target["vocab_size"], "num_target_layers": target["num_hidden_layers"],
        "layer_types": ["sliding_attention"] * sliding + ["full_attention"] * (5 - sliding),
        "sliding_window": 2048, "dflash_config": {"mask_token_id": 4, "target_layer_ids": taps},
        **changed,
    }  # fmt: skip


DRAFTERS: dict[str, dict[str, Any]] = {
    "gemma-4-26b-a4b": _drafter("gemma-4-26b-a4b", 5632, [1, 6, 11, 17, 22, 27], 4),
    # widths and heads that have the published size: 3.07 GB
    "gemma-4-31b": _drafter(
        "gemma-4-31b", 10752, [1, 12, 23, 35, 46, 57], 4, num_attention_heads=64
    ),
    "qwen3.6-27b": _drafter("qwen3.6-27b", 17408, [1, 16, 31, 46, 61], 4),
    # a width that has the stated 0.4 B parameters
    "qwen3.6-35b-a3b": _drafter(
        "qwen3.6-35b-a3b",
        10368,
        [1, 10, 19, 28, 37],
        4,
        num_key_value_heads=4,
        sliding_window=4096,
    ),
    "qwen3.5-9b": _drafter("qwen3.5-9b", 12288, [1, 8, 15, 22, 29], 0),
    "qwen3.5-4b": _drafter("qwen3.5-4b", 9728, [1, 8, 15, 22, 29], 0),
    "qwen3-8b": _drafter("qwen3-8b", 12288, [1, 9, 17, 25, 33], 0),
    "qwen3-4b": _drafter("qwen3-4b", 9728, [1, 9, 17, 25, 33], 0),
    # heads and a width that have the published size: 1.57 GB
    "gpt-oss-20b": _drafter(
        "gpt-oss-20b",
        7680,
        [1, 6, 11, 16, 21],
        0,
        num_hidden_layers=8,
        num_attention_heads=64,
        head_dim=64,
        block_size=8,
        layer_types=["full_attention"] * 8,
    ),
    # a width that has the size of Qwen3-8B's, as the table of plans takes it
    "llama-3.1-8b": _drafter("llama-3.1-8b", 12288, [1, 8, 15, 22, 29], 0),
}
