"""Gemma 4 against transformers' own class: tiny seeded checkpoints, written by it, read by us."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import layers, models, weights
from dflash_chat.runtime.models import gemma4
from tests.runtime import tiny

VOCAB, WINDOW, CAPACITY = 61, 16, 256
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 5.0,
    "max_position_embeddings": 512, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
}  # fmt: skip
MOE = DENSE | {
    "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 12,
}  # fmt: skip
KINDS = {"dense": DENSE, "experts": MOE, "own values": DENSE | {"attention_k_eq_v": False}}
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64,
}  # fmt: skip


@dataclass
class Pair:
    """One checkpoint, read by transformers and by us."""

    reference: nn.Module
    target: gemma4.Target


def _shaken(model: nn.Module) -> nn.Module:
    """Every weight random, norms and scales far from 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            noise = torch.randn(weight.shape, generator=generator)
            flat = weight.dim() == 1 or name.endswith("layer_scalar")
            weight.copy_(0.8 + 0.4 * noise if flat else 0.2 * noise)
    return model.eval()


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> gemma4.Target:
    checkpoint = weights.open_checkpoint(folder)
    config = gemma4.Config.from_hf(checkpoint.config)
    packed = weights.load_packed(checkpoint, config.tensor_shapes(), gemma4.IGNORED)
    return gemma4.Target(config, packed, CAPACITY, dtype, tiny.CPU)


@pytest.fixture(params=KINDS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**KINDS[request.param], attn_implementation="eager")
    reference = _shaken(Gemma4ForCausalLM(config))
    folder = tmp_path_factory.mktemp("gemma4")
    reference.save_pretrained(folder)
    return Pair(reference, _load(folder))


def _prompt(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(seed))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _layer_outputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, V] and the residual stream after every layer, [T, C] each."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0].flatten(0, -2).clone()))
        for layer in model.model.layers
    ]
    logits = model(ids[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_logits_and_every_layer_equal_transformers(pair: Pair) -> None:
    ids = _prompt(5 * WINDOW + 3)
    target = pair.target
    taps = range(target.config.num_hidden_layers)
    with torch.inference_mode():
        truth, states = _layer_outputs(pair.reference, ids)
        hidden, features = target.forward(ids, target.new_cache(CAPACITY), taps)
        assert _relative(target.logits(hidden), truth) < 1e-4
    for ours, theirs in zip(features.chunk(len(taps), -1), states, strict=True):
        assert _relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 24])
def test_chunks_and_blocks_equal_the_whole_prompt(pair: Pair, chunk: int) -> None:
    """The rings of the chunked run wrap; the whole prompt's do not."""
    target, ids = pair.target, _prompt(100, seed=1)
    cache = target.new_cache(CAPACITY, largest_block=24)
    assert cache.slots(WINDOW) == 40
    pieces = []
    with torch.inference_mode():
        whole, _ = target.forward(ids, target.new_cache(CAPACITY))
        for begin in range(0, 100, chunk):
            hidden, _ = target.forward(ids[begin : begin + chunk], cache)
            cache.commit(len(hidden))
            pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", ["experts"], indirect=True)
def test_a_router_fed_the_normed_tensor_would_be_noticed(pair: Pair) -> None:
    """What the parity above is worth: the classic mistake moves the logits far."""
    target, ids = pair.target, _prompt(40)

    def normed(experts: gemma4.Experts) -> gemma4.Router:
        class Wrong(gemma4.Router):
            def __init__(self) -> None:
                vars(self).update(vars(experts.router))

            def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
                return super().__call__(experts.pre_feedforward_layernorm_2(r))

        return Wrong()

    with torch.inference_mode():
        right, _ = target.forward(ids, target.new_cache(CAPACITY))
        kept = []
        for layer in target.layers:
            assert layer.experts is not None
            kept.append((layer.experts, layer.experts.router))
            layer.experts.router = normed(layer.experts)
        wrong, _ = target.forward(ids, target.new_cache(CAPACITY))
        for experts, router in kept:
            experts.router = router
    assert _relative(target.logits(wrong), target.logits(right)) > 0.01


def test_a_multimodal_checkpoint_gives_its_text_model(tmp_path: Path) -> None:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    config = Gemma4Config(text_config=MOE, vision_config=VISION, audio_config=None)
    reference = _shaken(Gemma4ForConditionalGeneration(config))
    reference.save_pretrained(tmp_path)
    ids, target = _prompt(40), _load(tmp_path)
    with torch.inference_mode():
        truth = reference.model.language_model(ids[None]).last_hidden_state[0]
        hidden, _ = target.forward(ids, target.new_cache(CAPACITY))
    assert _relative(hidden, truth) < 1e-5


def test_a_unified_checkpoint_gives_its_text_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.gemma4_unified", reason="this transformers lacks it")
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = {k: v for k, v in DENSE.items() if k != "hidden_size_per_layer_input"}
    vision = {"patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 16, "mm_posemb_size": 8}
    config = Gemma4UnifiedConfig(
        text_config=text,
        vision_config=vision | {"output_proj_dims": 16},
        audio_config={"audio_embed_dim": 16},
    )
    reference = _shaken(Gemma4UnifiedForConditionalGeneration(config))
    reference.save_pretrained(tmp_path)
    ids, target = _prompt(40), _load(tmp_path)
    with torch.inference_mode():
        truth = reference.model.language_model(ids[None]).last_hidden_state[0]
        hidden, _ = target.forward(ids, target.new_cache(CAPACITY))
    assert _relative(hidden, truth) < 1e-5


def test_a_tensor_outside_the_towers_is_not_skipped(tmp_path: Path) -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    model = Gemma4ForCausalLM(Gemma4TextConfig(**DENSE))
    extra = {"model.layers.0.extra.weight": torch.zeros(1)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | extra)
    with pytest.raises(WeightsMismatchError, match=r"unexpected: model\.layers\.0\.extra"):
        _load(tmp_path)


@pytest.mark.parametrize("pair", ["dense", "own values"], indirect=True)
def test_bf16_stays_near_fp32(pair: Pair, tmp_path: Path) -> None:
    """At most twice the error of transformers' own bf16. Experts would choose by rounded scores."""
    pair.reference.save_pretrained(tmp_path)
    ids, target = _prompt(60), _load(tmp_path, torch.bfloat16)
    with torch.inference_mode():
        truth = pair.reference(ids[None]).logits[0]
        theirs = copy.deepcopy(pair.reference).bfloat16()(ids[None]).logits[0]
        hidden, _ = target.forward(ids, target.new_cache(CAPACITY))
        ours = target.logits(hidden)
    assert _relative(ours, truth) < 2 * _relative(theirs, truth)


# ── configs ─────────────────────────────────────────────────────────────────────────────────────

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
RAW = MOE | {
    "model_type": "gemma4_text", "rms_norm_eps": 1e-6, "rope_parameters": ROPE,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
PUBLISHED = RAW | {"vocab_size": 262144, "sliding_window": 1024, "head_dim": 256,
                   "global_head_dim": 512, "final_logit_softcapping": 30.0}  # fmt: skip


def _pattern(depth: int) -> dict[str, Any]:
    period = ["sliding_attention"] * 5 + ["full_attention"]
    return {"num_hidden_layers": depth, "layer_types": period * (depth // 6)}


GEMMA_26B = PUBLISHED | _pattern(30) | {
    "hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "num_experts": 128,
    "top_k_experts": 8, "moe_intermediate_size": 704,
}  # fmt: skip
GEMMA_31B = PUBLISHED | _pattern(60) | {
    "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_key_value_heads": 16, "num_global_key_value_heads": 4, "enable_moe_block": False,
}  # fmt: skip
GEMMA_12B = PUBLISHED | _pattern(48) | {
    "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 1, "enable_moe_block": False,
}  # fmt: skip


def _parameters(raw: dict[str, Any]) -> int:
    """Numbers in all tensors but the layer scalars, which are buffers."""
    shapes = gemma4.Config.from_hf(raw).tensor_shapes()
    return sum(math.prod(s) for name, s in shapes.items() if not name.endswith("layer_scalar"))


def test_the_published_sizes_come_out_of_the_shapes() -> None:
    assert _parameters(GEMMA_26B) == 25_233_141_760
    assert _parameters(GEMMA_31B) == 30_697_345_280
    assert round(_parameters(GEMMA_12B) / 1e9, 2) == 11.91


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"])
def test_every_published_type_finds_this_file(name: str) -> None:
    assert models.find(name) is gemma4


@pytest.mark.parametrize("name", ["gemma3", "", "..quant", "a b"])
def test_another_type_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        models.find(name)


def test_published_shapes_of_26b() -> None:
    config = gemma4.Config.from_hf({"model_type": "gemma4", "text_config": GEMMA_26B})
    shapes = config.tensor_shapes()
    at = "model.language_model.layers."
    assert shapes[at + "4.self_attn.k_proj.weight"] == (2048, 2816)
    assert shapes[at + "5.self_attn.q_proj.weight"] == (8192, 2816)
    assert shapes[at + "5.self_attn.k_proj.weight"] == (1024, 2816)
    assert at + "5.self_attn.v_proj.weight" not in shapes
    assert shapes[at + "0.experts.gate_up_proj"] == (128, 1408, 2816)
    frequencies = config.inverse_frequencies(config.attention[5])
    assert frequencies.shape == (256,)
    assert frequencies.nonzero().numel() == 64


def test_both_ways_to_say_what_full_layers_have_are_read_alike() -> None:
    keys = ("global_head_dim", "num_global_key_value_heads")
    other = {key: value for key, value in RAW.items() if key not in keys}
    full = {"head_dim": 16, "num_key_value_heads": 1}
    other["per_layer_config"] = {"1": full, "3": full}
    assert gemma4.Config.from_hf(other) == gemma4.Config.from_hf(RAW)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"rope_parameters": ROPE | {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"top_k_experts": 7}, "top_k_experts"),
        ({"hidden_size": "many"}, "many"),
        ({"rope_parameters": None}, "gemma4 config"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        gemma4.Config.from_hf(RAW | change)


@pytest.mark.parametrize("key", ["hidden_size", "layer_types", "attention_k_eq_v", "num_experts"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        gemma4.Config.from_hf({k: v for k, v in RAW.items() if k != key})


def test_a_full_head_turns_only_its_rotated_share() -> None:
    frequencies = layers.inverse_frequencies(16, 1e6, 0.25)
    whole = layers.inverse_frequencies(16, 1e6)
    assert torch.equal(frequencies[:2], whole[:2])
    assert not frequencies[2:].any()
