"""The published drafter layout: config.json beside model.safetensors in bf16, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_chat.errors import WeightsMismatchError
from dflash_chat.training.drafter import Drafter, DrafterShape


def config_of(shape: DrafterShape) -> dict[str, object]:
    """The raw config of a drafter, with the keys that published drafters carry."""
    target = shape.target
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": shape.block,
        "dflash_config": {"mask_token_id": shape.mask_id, "target_layer_ids": list(shape.taps)},
        "dtype": "bfloat16",
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "hidden_size": target.hidden,
        "intermediate_size": target.mlp,
        "layer_types": ["full_attention"] * shape.layers,
        "max_position_embeddings": target.max_positions,
        "model_type": "qwen3",
        "num_attention_heads": target.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": target.kv_heads,
        "num_target_layers": target.layers,
        "rms_norm_eps": target.eps,
        "rope_scaling": None,
        "rope_theta": target.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": target.vocab,
    }


def exported_tensors(drafter: Drafter, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors in bf16 from fp32 weights by name; fc takes raw features again."""
    out = {name: tensor.detach().float().cpu() for name, tensor in flat.items()}
    out["fc.weight"] = out["fc.weight"] / drafter.feature_rms.float().cpu()
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in out.items()}


def write_checkpoint(folder: Path, shape: DrafterShape, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file(dict(tensors), str(part), metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")
    part = folder / "config.json.part"
    part.write_text(json.dumps(config_of(shape), indent=2) + "\n")
    os.replace(part, folder / "config.json")


def read_checkpoint(folder: Path, drafter: Drafter) -> dict[str, Tensor]:
    """Exported weights as fp32 training weights by name, scaled to the drafter's `feature_rms`."""
    tensors = {
        name: tensor.float()
        for name, tensor in load_file(str(folder / "model.safetensors")).items()
    }
    expected = {name: tuple(p.shape) for name, p in drafter.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise WeightsMismatchError(f"{folder} does not fit this drafter: {', '.join(wrong)}")
    tensors["fc.weight"] = tensors["fc.weight"] * drafter.feature_rms.float().cpu()
    return tensors
