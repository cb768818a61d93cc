"""A tiny seeded pair as two folders, in the layouts that the hub has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dflash_chat.runtime.drafter import Config
from dflash_chat.runtime.text import Tokenizer
from tests.runtime import tiny
from tests.runtime.gguf_writer import TinyLlama, hf_weights, tokenizer_metadata, vocabulary

SIZES = TinyLlama()


def target_config() -> dict[str, Any]:
    """config.json of the target."""
    return {
        "model_type": "llama", "hidden_size": SIZES.hidden, "intermediate_size": SIZES.intermediate,
        "num_hidden_layers": SIZES.layers, "num_attention_heads": SIZES.heads,
        "num_key_value_heads": SIZES.kv_heads, "head_dim": SIZES.head_dim,
        "vocab_size": len(vocabulary()), "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": SIZES.context, "tie_word_embeddings": True,
        "torch_dtype": "float32", "eos_token_id": 2,
    }  # fmt: skip


def drafter_config() -> dict[str, Any]:
    """config.json of the drafter."""
    return {
        "architectures": ["DFlashDraftModel"], "hidden_size": SIZES.hidden, "block_size": 5,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "vocab_size": len(vocabulary()), "num_target_layers": SIZES.layers,
        "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0, 2]},
    }  # fmt: skip


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Both halves below `folder`."""
    target, drafter = folder / "target", folder / "drafter"
    target.mkdir()
    drafter.mkdir()
    (target / "config.json").write_text(json.dumps(target_config()))
    save_file(hf_weights(0), target / "model.safetensors")
    Tokenizer.from_gguf(tokenizer_metadata())._fast.save_pretrained(str(target))  # type: ignore[arg-type]
    (drafter / "config.json").write_text(json.dumps(drafter_config()))
    shapes = Config.from_raw(drafter_config()).tensor_shapes(SIZES.hidden)
    made = tiny.weights(shapes, seed=1, scale=0.2)
    tensors = {name: weight.dequantize().to(torch.bfloat16) for name, weight in made.items()}
    save_file(tensors, drafter / "model.safetensors")
    return target, drafter
