"""Qwen3 against transformers' own class, tiny and seeded in fp32, and its config reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import weights
from dflash_chat.runtime.models import qwen3
from tests.runtime import tiny

RAW: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 61,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 512,
}  # fmt: skip
TAPS = (0, 1)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_logits_and_every_layer_equal_transformers(tied: bool, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    reference = Qwen3ForCausalLM(Qwen3Config(**RAW, tie_word_embeddings=tied)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in reference.state_dict().values():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.8 + 0.4 * noise if weight.dim() == 1 else 0.2 * noise)
    reference.save_pretrained(tmp_path)
    checkpoint = weights.open_checkpoint(tmp_path)
    config = qwen3.Config.from_hf(checkpoint.config)
    packed = weights.load_packed(checkpoint, config.tensor_shapes(), qwen3.IGNORED)
    target = qwen3.Target(config, packed, 256, torch.float32, tiny.CPU)
    ids = torch.randint(0, 61, (130,), generator=generator)
    cache, pieces = target.new_cache(256), []
    with torch.inference_mode():
        truth = reference(ids[None], output_hidden_states=True)
        hidden, features = target.forward(ids, target.new_cache(256), TAPS)
        for piece in ids.split(9):
            block, _ = target.forward(piece, cache)
            cache.commit(len(piece))
            pieces.append(block)
        assert _relative(target.logits(hidden), truth.logits[0]) < 1e-5
    assert _relative(torch.cat(pieces), hidden) < 1e-5
    for tap, ours in zip(TAPS, features.chunk(len(TAPS), -1), strict=True):
        assert _relative(ours, truth.hidden_states[tap + 1][0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "millions"),
    [
        ({"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}, 4022),
        ({"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}, 8191),
    ],
    ids=["4B", "8B"],
)
def test_the_published_sizes_come_out_of_the_shapes(change: dict[str, Any], millions: int) -> None:
    published = RAW | change | {
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    shapes = qwen3.Config.from_hf(published).tensor_shapes()
    assert round(sum(map(math.prod, shapes.values())) / 1e6) == millions


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "qwen3 config: attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        qwen3.Config.from_hf(RAW | change).inverse_frequencies()
