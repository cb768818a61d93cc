"""Folders that compressed-tensors wrote load as what it wrote; what is odd is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import weights
from dflash_chat.runtime.models import llama
from dflash_chat.runtime.quant import Experts, Packed
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight
from tests.runtime import compressed
from tests.runtime.compressed import compress, fp8, int4, qparams, random_matrix

CPU = torch.device("cpu")

Tensors = dict[str, Tensor]

CASES = {
    **{f"int4 {scales}": int4(scales, True) for scales in compressed.INT4},
    **{f"int4 {scales}, zero points": int4(scales, False) for scales in compressed.INT4},
    **{f"fp8 {scales}": fp8(scales) for scales in compressed.FP8},
}


def quantization(*groups: dict[str, Any] | None, **more: object) -> dict[str, Any]:
    """A quantization_config with these `weights` objects."""
    named = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, **more}


def write(path: Path, tensors: Tensors, described: dict[str, Any] | None) -> weights.Checkpoint:
    """A folder with these tensors and this quantization_config, opened."""
    path.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    config = {} if described is None else {"quantization_config": described}
    (path / "config.json").write_text(json.dumps(config))
    return weights.open_checkpoint(path)


def refused(path: Path, tensors: Tensors, described: dict[str, Any] | None) -> str:
    """The message and hint of the error."""
    with pytest.raises(CheckpointError) as error:
        write(path, tensors, described)
    return f"{error.value.message} {error.value.hint}"


def linear(weights_: dict[str, Any], n: int = 32, k: int = 256, seed: int = 0) -> Tensors:
    """One module `a.q_proj`, quantised by the library."""
    written, _ = compress(random_matrix(n, k, seed=seed), weights_)
    return {f"a.q_proj.{name}": tensor for name, tensor in written.items()}


# ── whole models ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_llama_saved_by_the_library_gives_the_same_logits(tmp_path: Path, case: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=128, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    described = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": CASES[case]}},  # type: ignore[dict-item]
        ignore=["lm_head"],
    )
    apply_quantization_config(model, described)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None):
            scale, zero = qparams(module.weight.data, module.quantization_scheme.weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    config.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")

    checkpoint = weights.open_checkpoint(tmp_path)
    geometry = llama.Config.from_hf(checkpoint.config)
    packed = weights.load_packed(checkpoint, geometry.tensor_shapes())
    target = llama.Target(geometry, packed, 64, torch.float32, CPU)
    ids = torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(0))
    compressor.decompress_model(model)
    with torch.inference_mode():
        truth = model(ids[None]).logits[0]
        hidden, _ = target.forward(ids, target.new_cache(64))
        ours = target.logits(hidden)
    quantised = packed["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(quantised, Int4GroupWeight if "int4" in case else Float8Weight)
    assert isinstance(packed["lm_head.weight"], DenseWeight)
    assert (ours - truth).norm() / truth.norm() < 1e-5


# ── names ───────────────────────────────────────────────────────────────────────────────────────


def expert_modules(weights_: dict[str, Any] | None, experts: int = 3, inner: int = 40) -> Tensors:
    """`experts.{i}.gate_proj.weight…` of one layer; with None, not quantised."""
    made = {}
    for e in range(experts):
        for seed, (projection, shape) in enumerate(
            {"gate": (inner, 128), "up": (inner, 128), "down": (64, 128)}.items()
        ):
            weight = random_matrix(*shape, seed=3 * e + seed)
            written = compress(weight, weights_)[0] if weights_ else {"weight": weight}
            made |= {f"{e}.{projection}_proj.{name}": tensor for name, tensor in written.items()}
    return made


def dequantized(weights_: dict[str, Any] | None) -> dict[str, list[Tensor]]:
    """The truth of each expert by projection, fp32."""
    found: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for e in range(3):
        alone = {}
        for seed, (projection, n) in enumerate({"gate": 40, "up": 40, "down": 64}.items()):
            weight = random_matrix(n, 128, seed=3 * e + seed)
            alone[projection] = compress(weight, weights_)[1] if weights_ else weight
        found["gate_up_proj"].append(torch.cat([alone["gate"], alone["up"]]))
        found["down_proj"].append(alone["down"])
    return found


def check_experts(packed: dict[str, Packed], at: str, weights_: dict[str, Any] | None) -> None:
    for projection, truth in dequantized(weights_).items():
        stack = packed[at + projection]
        assert isinstance(stack, Experts)
        assert stack.shape == (3, *truth[0].shape)
        for e, matrix in enumerate(truth):
            assert torch.equal(stack.expert(e).dequantize(torch.bfloat16), matrix), f"expert {e}"


EXPERTS: dict[str, dict[str, Any] | None] = {"bf16": None} | {
    case: CASES[case]
    for case in ("int4 group 32", "int4 group 32, zero points", "int4 channel", "fp8 channel",
                 "fp8 tensor", "fp8 block")
}  # fmt: skip


@pytest.mark.parametrize("infix", ["experts.", "moe.experts."])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_stored_one_by_one_are_stacked(tmp_path: Path, case: str, infix: str) -> None:
    modules = {f"layers.0.{infix}{name}": t for name, t in expert_modules(EXPERTS[case]).items()}
    checkpoint = write(tmp_path / "m", modules, quantization(EXPERTS[case]))
    expected = {
        "layers.0.experts.gate_up_proj": (3, 80, 128), "layers.0.experts.down_proj": (3, 64, 128),
    }  # fmt: skip
    assert checkpoint.shapes == expected
    packed = weights.load_packed(checkpoint, expected)
    check_experts(packed, "layers.0.experts.", EXPERTS[case])


@pytest.mark.parametrize("case", EXPERTS)
def test_an_outline_has_shapes_and_bytes_but_no_numbers(tmp_path: Path, case: str) -> None:
    modules = {f"a.experts.{name}": t for name, t in expert_modules(EXPERTS[case]).items()}
    checkpoint = write(tmp_path / "m", modules, quantization(EXPERTS[case]))
    packed = weights.load_packed(checkpoint, checkpoint.shapes)
    outlines = weights.outlines(checkpoint, checkpoint.shapes)
    assert outlines.keys() == packed.keys()
    for name, weight in packed.items():
        outline = outlines[name]
        assert type(outline) is type(weight)
        assert (outline.shape, outline.nbytes) == (weight.shape, weight.nbytes)
        assert outline.dequantize().device.type == "meta"


@pytest.mark.parametrize("infix", ["experts.", "moe.experts."])
@pytest.mark.parametrize("case", [c for c in EXPERTS if c not in ("fp8 tensor", "fp8 block")])
def test_experts_stored_as_one_tensor_have_underscores(
    tmp_path: Path, case: str, infix: str
) -> None:
    alone = expert_modules(EXPERTS[case])
    fused: Tensors = {}
    for fused_name, projections in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        for part in {name.partition("_proj.weight")[2] for name in alone} - {"_shape"}:
            fused[f"layers.0.{infix}{fused_name}{part}"] = torch.stack(
                [
                    torch.cat([alone[f"{e}.{p}_proj.weight{part}"] for p in projections])
                    for e in range(3)
                ]
            )
    checkpoint = write(tmp_path / "m", fused, quantization(EXPERTS[case]))
    packed = weights.load_packed(checkpoint, checkpoint.shapes)
    check_experts(packed, "layers.0.experts.", EXPERTS[case])


@pytest.mark.parametrize("shape", [[80, 128], [3, 80, 128]])
def test_stacked_experts_may_state_their_shape(tmp_path: Path, shape: list[int]) -> None:
    tensors = {
        "a.experts.gate_up_proj_packed": torch.zeros(3, 80, 16, dtype=torch.int32),
        "a.experts.gate_up_proj_scale": torch.ones(3, 80, 4),
        "a.experts.gate_up_proj_shape": torch.tensor(shape),
    }
    checkpoint = write(tmp_path / "m", tensors, None)
    assert checkpoint.shapes == {"a.experts.gate_up_proj": (3, 80, 128)}


def test_all_missing_experts_are_named_at_once(tmp_path: Path) -> None:
    modules = {f"a.experts.{name}": t for name, t in expert_modules(int4("group 32", True)).items()}
    kept = {n: t for n, t in modules.items() if ".1.up_proj" not in n and ".2.down_proj" not in n}
    with pytest.raises(WeightsMismatchError) as error:
        write(tmp_path / "m", kept, quantization(int4("group 32", True)))
    assert "missing: a.experts.1.up_proj.weight, a.experts.2.down_proj.weight" in str(error.value)


def test_experts_of_two_kinds_are_refused(tmp_path: Path) -> None:
    modules = {f"a.experts.{name}": t for name, t in expert_modules(int4("group 32", True)).items()}
    del modules["a.experts.1.up_proj.weight_packed"], modules["a.experts.1.up_proj.weight_scale"]
    del modules["a.experts.1.up_proj.weight_shape"]
    modules["a.experts.1.up_proj.weight"] = random_matrix(40, 128)
    message = refused(tmp_path / "m", modules, None)
    assert "a.experts.1.up_proj.weight and a.experts.0.gate_proj.weight_packed are not" in message


def test_experts_stored_twice_are_refused(tmp_path: Path) -> None:
    modules = {f"a.experts.{name}": t for name, t in expert_modules(None).items()}
    modules["a.experts.down_proj"] = torch.zeros(3, 64, 128)
    assert "stored twice" in refused(tmp_path / "m", modules, None)


def test_missing_and_unexpected_quantised_weights_are_named_together(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "m", linear(int4("group 32", True)), None)
    with pytest.raises(WeightsMismatchError) as error:
        weights.load_packed(checkpoint, {"a.k_proj.weight": (32, 256)})
    assert "missing: a.k_proj.weight; unexpected: a.q_proj.weight" in str(error.value)


def test_scales_of_activations_and_caches_are_not_needed(tmp_path: Path) -> None:
    tensors = linear(fp8("tensor")) | {
        name: torch.ones(1)
        for name in ("a.q_proj.input_scale", "a.k_scale", "a.v_scale", "a.experts.x_input_scale")
    }
    assert set(write(tmp_path / "m", tensors, quantization(fp8("tensor"))).shapes) == {
        "a.q_proj.weight"
    }
    assert "a.k_scale" in write(tmp_path / "m", tensors, None).shapes


def test_qwens_own_fp8_needs_no_config_groups(tmp_path: Path) -> None:
    written, truth = compress(random_matrix(256, 384), fp8("block"))
    tensors = {"a.weight": written["weight"], "a.weight_scale_inv": written["weight_scale"]}
    described = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    packed = weights.load_packed(
        write(tmp_path / "m", tensors, described), {"a.weight": (256, 384)}
    )
    assert torch.equal(packed["a.weight"].dequantize(torch.bfloat16), truth)


def test_groups_in_their_own_order_need_no_index(tmp_path: Path) -> None:
    tensors = linear(int4("group 64", True))
    index = torch.arange(256, dtype=torch.int32) // 64
    checkpoint = write(tmp_path / "m", tensors | {"a.q_proj.weight_g_idx": index}, None)
    assert checkpoint.shapes == {"a.q_proj.weight": (32, 256)}
    message = refused(tmp_path / "m", tensors | {"a.q_proj.weight_g_idx": index.flip(0)}, None)
    assert "a.q_proj.weight_g_idx puts groups out of order" in message


# ── what is refused ─────────────────────────────────────────────────────────────────────────────

FOREIGN: dict[str, tuple[str, Tensor]] = {
    "AWQ or GPTQ": ("a.q_proj.qweight", torch.zeros(2, 2, dtype=torch.int32)),
    "NVFP4": ("a.q_proj.weight_scale_2", torch.ones(())),
    "NVFP4 ": ("a.q_proj.weight_global_scale", torch.ones(1)),
    "NVFP4 or MXFP4": ("a.q_proj.weight_packed", torch.zeros(2, 2, dtype=torch.uint8)),
    "MXFP4": ("a.experts.gate_up_proj_blocks", torch.zeros(2, 2, dtype=torch.uint8)),
    "bitsandbytes": ("a.weight.quant_state.bitsandbytes__nf4", torch.zeros(2, dtype=torch.uint8)),
    "int8": ("a.q_proj.weight", torch.zeros(2, 2, dtype=torch.int8)),
    "float8_e5m2": ("a.q_proj.weight", torch.zeros(2, 2).to(torch.float8_e5m2)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("described", [None, quantization()], ids=["no config", "config"])
def test_an_unknown_format_is_refused_by_name(
    tmp_path: Path, kind: str, described: dict[str, Any] | None
) -> None:
    name, tensor = FOREIGN[kind]
    message = refused(tmp_path / "m", {name: tensor}, described)
    assert name in message
    assert f" is {kind.strip()}" in message
    assert "Supported are" in message
    assert "pack-quantized" in message


Change = dict[str, Tensor | None]
INT = linear(int4("group 32", False))
FLOAT = linear(fp8("channel"))
CORRUPT: dict[str, tuple[Tensors, Change]] = {
    "a.q_proj.weight_packed is int64": (INT, {"packed": INT["a.q_proj.weight_packed"].long()}),
    "a.q_proj.weight_packed is int32 (256,)": (INT, {"packed": torch.zeros(256).int()}),
    "a.q_proj.weight_packed is int32 (32, 31)": (INT, {"packed": torch.zeros(32, 31).int()}),
    "not 4 bits for a.q_proj.weight_shape [32, 128]": (INT, {"shape": torch.tensor([32, 128])}),
    "a.q_proj.weight_shape is float32 (2,)": (INT, {"shape": torch.zeros(2)}),
    "a.q_proj.weight_packed has no a.q_proj.weight_scale": (INT, {"scale": None}),
    "a.q_proj.weight_scale is bfloat16 (32, 7)": (INT, {"scale": torch.ones(32, 7).bfloat16()}),
    "a.q_proj.weight_scale is bfloat16 (31, 8)": (INT, {"scale": torch.ones(31, 8).bfloat16()}),
    "a.q_proj.weight_scale is bfloat16 ()": (INT, {"scale": torch.ones(()).bfloat16()}),
    "a.q_proj.weight_scale is int32 (32, 8)": (INT, {"scale": torch.ones(32, 8).int()}),
    "a.q_proj.weight_zero_point is int32 (32, 8)": (INT, {"zero_point": torch.ones(32, 8).int()}),
    "a.q_proj.weight_zero_point is int8 (4, 8)": (
        INT, {"zero_point": torch.ones(4, 8, dtype=torch.int8)},
    ),
    "a.q_proj.weight_scale_inv has no place": (INT, {"scale_inv": torch.ones(1)}),
    "a.q_proj.weight_scale is bfloat16 (31, 1)": (FLOAT, {"scale": torch.ones(31, 1).bfloat16()}),
    "a.q_proj.weight_scale is bfloat16 (2,)": (FLOAT, {"scale": torch.ones(2).bfloat16()}),
    "a.q_proj.weight is FP8 with 0 scales": (FLOAT, {"scale": None}),
    "a.q_proj.weight is FP8 with 2 scales": (FLOAT, {"scale_inv": torch.ones(1)}),
    "a.q_proj.weight_zero_point has no place": (FLOAT, {"zero_point": torch.ones(32, 1).int()}),
    "a.q_proj.weight_scale has no weight": (FLOAT, {"weight": None}),
    "a.q_proj.weight_scale has no place beside the float32": (FLOAT, {"weight": torch.ones(2, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("message", CORRUPT)
def test_a_wrong_tensor_is_one_clear_error(tmp_path: Path, message: str) -> None:
    tensors, changes = dict(CORRUPT[message][0]), CORRUPT[message][1]
    for part, tensor in changes.items():
        name = "a.q_proj.weight" if part == "weight" else f"a.q_proj.weight_{part}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    assert message in refused(tmp_path / "m", tensors, None)


CONTRADICTIONS: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "a.q_proj.weight_packed is group 32, but config.json says group 128": (
        linear(int4("group 32", True)), int4("group 128", True),
    ),
    "a.q_proj.weight_packed is asymmetric, but config.json says symmetric": (
        linear(int4("group 32", False)), int4("group 32", True),
    ),
    "a.q_proj.weight_packed is symmetric, but config.json says asymmetric": (
        linear(int4("group 32", True)), int4("group 32", False),
    ),
    "a.q_proj.weight_packed is 4-bit int, but config.json says 8-bit int": (
        linear(int4("group 32", True)), int4("group 32", True) | {"num_bits": 8},
    ),
    "a.q_proj.weight_packed is 4-bit int, but config.json says 8-bit float": (
        linear(int4("group 32", True)), fp8("channel"),
    ),
    "a.q_proj.weight is channel, but config.json says tensor": (
        linear(fp8("channel")), fp8("tensor"),
    ),
    "a.q_proj.weight is block 128×128, but config.json says block 64×64": (
        linear(fp8("block"), 256), fp8("block") | {"block_structure": [64, 64]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, message: str) -> None:
    tensors, said = CONTRADICTIONS[message]
    assert message in refused(tmp_path / "m", tensors, quantization(said))


def test_a_config_may_have_several_groups(tmp_path: Path) -> None:
    described = quantization(fp8("channel"), int4("group 128", True), int4("group 32", True))
    tensors = linear(int4("group 32", True)) | {
        name.replace("q_proj", "k_proj"): tensor for name, tensor in linear(fp8("channel")).items()
    }
    assert len(write(tmp_path / "m", tensors, described).shapes) == 2


ODD_CONFIGS: dict[str, Any] = {
    "'awq'": {"quant_method": "awq"},
    "supported: 7.": 7,
    "transform_config": quantization(transform_config={"config_groups": {"R1": {}}}),
    "config_groups is '7'": quantization() | {"config_groups": 7},
    "config_groups.x is '7'": quantization() | {"config_groups": {"x": 7}},
}


@pytest.mark.parametrize("message", ODD_CONFIGS)
def test_an_odd_quantization_config_is_refused(tmp_path: Path, message: str) -> None:
    tensors = {"a.weight": torch.ones(2, 2)}
    assert message in refused(tmp_path / "m", tensors, ODD_CONFIGS[message])


def test_what_the_library_leaves_empty_is_accepted(tmp_path: Path) -> None:
    described = quantization(int4("group 32", True), transform_config={}, kv_cache_scheme=None)
    write(tmp_path / "m", linear(int4("group 32", True)), described)
    assert "a.q_proj.weight_packed" in load_file(tmp_path / "m" / "model.safetensors")
