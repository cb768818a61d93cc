"""Llama against transformers' own class, tiny and seeded in fp32, and its config reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.models import llama
from tests.runtime import tiny

RAW: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain rope", "llama3 rope"])
def test_logits_and_every_layer_equal_transformers(
    tied: bool, scaling: dict[str, Any] | None
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = RAW | {"tie_word_embeddings": tied, "rope_scaling": scaling}
    config = llama.Config.from_hf(raw)
    packed = tiny.weights(config.tensor_shapes(), seed=3, scale=0.2)
    reference = LlamaForCausalLM(LlamaConfig(**raw)).eval()
    state = {name: weight.dequantize() for name, weight in packed.items()}
    loaded = reference.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    target = llama.Target(config, packed, 256, torch.float32, tiny.CPU)
    ids = torch.randint(0, 61, (130,), generator=torch.Generator().manual_seed(0))
    taps = (0, 1)
    with torch.inference_mode():
        truth = reference(ids[None], output_hidden_states=True)
        hidden, features = target.forward(ids, target.new_cache(256), taps)
        assert _relative(target.logits(hidden), truth.logits[0]) < 1e-5
    for tap, ours in zip(taps, features.chunk(len(taps), -1), strict=True):
        assert _relative(ours, truth.hidden_states[tap + 1][0]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_the_whole_prompt(chunk: int) -> None:
    target = tiny.target()
    ids = torch.randint(0, tiny.VOCAB, (100,), generator=torch.Generator().manual_seed(1))
    cache = target.new_cache(256)
    pieces = []
    with torch.inference_mode():
        whole, _ = target.forward(ids, target.new_cache(256))
        for begin in range(0, 100, chunk):
            hidden, _ = target.forward(ids[begin : begin + chunk], cache)
            cache.commit(len(hidden))
            pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "many"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        llama.Config.from_hf(RAW | change).inverse_frequencies()


@pytest.mark.parametrize("key", ["hidden_size", "rope_theta", "max_position_embeddings"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        llama.Config.from_hf({k: v for k, v in RAW.items() if k != key})
