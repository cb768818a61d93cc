"""Counts against the published ones, and against models that are built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dflash_chat
from dflash_chat import geometry, loads
from dflash_chat.geometry import ConfigError
from tests.published import DRAFTERS, TARGETS

# parameters of the text model; bytes of bf16 keys and values per token beyond the windows
PUBLISHED = {
    "gemma-4-26b-a4b": (25_233_141_760, 20_480),
    "gemma-4-31b": (30_697_345_280, 81_920),
    "smollm2-135m": (134_515_008, 23_040),
    "qwen3.6-27b": (26_895_998_464, 65_536),
    "qwen3.6-35b-a3b": (34_660_610_688, 20_480),
    "qwen3.5-9b": (8_953_803_264, 32_768),
    "qwen3.5-4b": (4_205_751_296, 32_768),
    "qwen3-8b": (8_190_735_360, 147_456),
    "qwen3-4b": (4_022_468_096, 147_456),
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "gpt-oss-20b": (20_914_757_184, 24_576),
}
DRAFTER_PARAMETERS = {
    "gemma-4-26b-a4b": 429_689_088,
    "qwen3.6-27b": 1_730_213_120,
    "qwen3-8b": 1_048_626_432,
    "qwen3-4b": 537_427_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_caches_are_the_published_ones(name: str) -> None:
    counted = geometry.target(TARGETS[name])
    parameters, kv_bytes = PUBLISHED[name]
    assert counted.parameters == parameters
    assert 2 * counted.kv_values == kv_bytes


def test_gemmas_parts_are_the_published_ones() -> None:
    gemma = geometry.target(TARGETS["gemma-4-26b-a4b"])
    assert gemma.embedding == 262_144 * 2816
    assert gemma.head == 0
    assert gemma.experts == 30 * 128 * 3 * 2816 * 704
    assert gemma.active == pytest.approx(3.82e9, rel=2e-3)
    assert gemma.attention.count(geometry.Geometry(8, 256, 1024)) == 25
    assert gemma.attention.count(geometry.Geometry(2, 512)) == 5
    assert gemma.context_limit == 262_144


def test_recurrent_layers_keep_a_state_instead_of_keys_and_values() -> None:
    qwen = geometry.target(TARGETS["qwen3.6-27b"])
    assert len(qwen.attention) == 16
    assert qwen.state_bytes == 48 * (48 * 128 * 128 * 4 + 10_240 * 3 * 2)


@pytest.mark.parametrize("name", DRAFTER_PARAMETERS)
def test_drafters_have_the_published_parameters(name: str) -> None:
    counted = geometry.drafter(DRAFTERS[name])
    assert counted.parameters == DRAFTER_PARAMETERS[name]
    assert counted.block_size == 16


def test_a_second_version_has_convolutions_and_a_selector() -> None:
    raw = {
        **DRAFTERS["qwen3.6-27b"], "architectures": ["DFlash2DraftModel"], "block_size": 8,
        "layer_types": ["sliding_attention"] * 5,
    }  # fmt: skip
    counted = geometry.drafter(raw)
    assert counted.version == 2
    assert 2 * counted.parameters == pytest.approx(3.85e9, rel=2e-3)


def test_the_packaged_drafter_has_the_bytes_of_its_file() -> None:
    folder = Path(dflash_chat.__file__).parent / "drafters" / "smollm2-135m"
    counted = geometry.drafter(json.loads((folder / "config.json").read_text()))
    stored = (folder / "model.safetensors").stat().st_size
    assert 0 <= stored - 2 * counted.parameters < 10_000  # the header


# ── against transformers' own models ────────────────────────────────────────────────────────────

_DENSE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GDN = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA = {
    "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "sliding_window": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 1,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_DENSE, "attention_bias": True},
    "qwen3": {**_DENSE, "tie_word_embeddings": True},
    "qwen3_moe": {**_DENSE, **_MOE},
    "gemma4_text": {**_DENSE, **_GEMMA, "enable_moe_block": False, "attention_k_eq_v": False},
    "gemma4_text with experts": {
        **_DENSE, **_GEMMA, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 48, "tie_word_embeddings": True,
    },
    "qwen3_5_text": {**_DENSE, **_GDN},
    "qwen3_5_moe_text": {**_DENSE, **_GDN, **_MOE, "shared_expert_intermediate_size": 40},
    "gpt_oss": {
        **_DENSE, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16,
    },
    "muse_glimmer_text": {**_DENSE, "sliding_window": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_a_family_counts_what_transformers_builds(name: str) -> None:
    from transformers import AutoConfig, AutoModel

    kind = name.partition(" ")[0]
    config = AutoConfig.for_model(kind, **TINY[name])
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    counted = geometry.target({"model_type": kind, **TINY[name]})
    assert counted.body + counted.embedding == sum(p.numel() for p in built.parameters())
    tied = TINY[name]["tie_word_embeddings"]
    assert counted.head == (0 if tied else 128 * 64)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": None, "num_attention_heads": 65}, "head_dim"),
        ({"model_type": None}, "model_type"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"text_config": "none"}, "text_config"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_its_key(
    changed: Mapping[str, object], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        geometry.target({"model_type": "llama", **_DENSE, **changed})
    assert caught.value.key == key
    assert repr(key) in caught.value.message


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"dflash_config": None}, "dflash_config"),
        ({"dflash_config": {}}, "dflash_config.target_layer_ids"),
        ({"block_size": 1}, "block_size"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["round_attention"] * 5}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
    ],
)
def test_a_drafter_is_refused_by_its_key(changed: Mapping[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        geometry.drafter({**DRAFTERS["gemma-4-26b-a4b"], **changed})
    assert caught.value.key == key


_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(), st.text(max_size=3),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", 1]), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_config_is_counted_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*TINY, "drafter"]))
    raw = {"model_type": name.partition(" ")[0], **TINY.get(name, DRAFTERS["qwen3.6-27b"])}
    for key in data.draw(st.lists(st.sampled_from(sorted(raw)), max_size=3)):
        raw[key] = data.draw(_values)
    count = geometry.drafter if name == "drafter" else geometry.target
    try:
        parameters = count(raw).parameters
    except ConfigError:
        return
    assert parameters > 0


@pytest.mark.parametrize("model_type", loads.ARCHITECTURES)
def test_every_architecture_that_is_loaded_is_counted(model_type: str) -> None:
    raw = {**TINY["gemma4_text"], "model_type": model_type}
    assert geometry.target(raw).parameters > 0


def test_a_multimodal_config_is_read_by_its_text_part() -> None:
    text = TARGETS["gemma-4-26b-a4b"]
    whole = {"model_type": "gemma4", "vision_config": {"hidden_size": 1}, "text_config": text}
    assert geometry.target(whole) == geometry.target(text)
