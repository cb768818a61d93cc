"""Both kinds of checkpoint open under one set of names, and loading is strict both ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import weights
from tests.runtime.gguf_writer import (
    hf_weights,
    llama_metadata,
    llama_tensors,
    raw_f32,
    write_gguf,
    write_tiny_llama,
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", seed=3)


def write_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    save_file(hf_weights(3), path / "model.safetensors")
    described = {"model_type": "llama", "tie_word_embeddings": True, **config}
    (path / "config.json").write_text(json.dumps(described))
    return path


def test_a_gguf_file_has_hugging_face_names_and_rows(tiny: Path) -> None:
    """Within half a 4-bit step, so a Q or K row out of place would show."""
    _, loaded = weights.load_dequantized(tiny)
    written = hf_weights(3)
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert loaded[name].shape == tensor.shape
        torch.testing.assert_close(
            loaded[name], tensor, rtol=0, atol=0.1 if tensor.dim() == 2 else 0
        )


def test_a_gguf_files_config_has_hugging_face_keys(tiny: Path) -> None:
    config = weights.open_checkpoint(tiny).config
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 16
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2
    assert math.isclose(config["rms_norm_eps"], 1e-5, rel_tol=1e-6)


def test_a_folder_loads_as_it_is(tmp_path: Path) -> None:
    config, loaded = weights.load_dequantized(write_folder(tmp_path / "m"), torch.float32)
    assert config["model_type"] == "llama"
    assert all(torch.equal(loaded[name], tensor) for name, tensor in hf_weights(3).items())


def test_loaded_weights_outlive_the_checkpoint(tiny: Path) -> None:
    checkpoint = weights.open_checkpoint(tiny)
    packed = weights.load_packed(checkpoint, checkpoint.shapes)
    checkpoint.close()
    tiny.unlink()
    assert packed["model.embed_tokens.weight"].rows(torch.tensor([5])).isfinite().all()


def test_all_wrong_names_are_named_at_once(tiny: Path) -> None:
    checkpoint = weights.open_checkpoint(tiny)
    expected = dict(checkpoint.shapes)
    del expected["model.norm.weight"], expected["model.layers.1.mlp.up_proj.weight"]
    expected["model.layers.0.self_attn.q_proj.weight"] = (64, 32)
    expected |= {"model.layers.7.extra.weight": (1,), "model.layers.8.extra.weight": (1,)}
    with pytest.raises(WeightsMismatchError) as refused:
        weights.load_packed(checkpoint, expected)
    for fault in (
        "missing: model.layers.7.extra.weight, model.layers.8.extra.weight",
        "unexpected: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "wrong shape: model.layers.0.self_attn.q_proj.weight (64, 64) instead of (64, 32)",
    ):
        assert fault in refused.value.message


def test_a_tied_head_may_be_absent(tiny: Path) -> None:
    checkpoint = weights.open_checkpoint(tiny)
    expected = {**checkpoint.shapes, weights.HEAD: checkpoint.shapes["model.embed_tokens.weight"]}
    assert weights.HEAD not in weights.load_packed(checkpoint, expected)


def test_a_head_of_its_own_is_required(tmp_path: Path) -> None:
    checkpoint = weights.open_checkpoint(write_folder(tmp_path / "m", tie_word_embeddings=False))
    with pytest.raises(WeightsMismatchError, match="missing: lm_head"):
        weights.load_packed(checkpoint, {**checkpoint.shapes, weights.HEAD: (1, 1)})


def test_an_untied_gguf_file_says_so(tmp_path: Path) -> None:
    written = hf_weights(3)
    written[weights.HEAD] = written["model.embed_tokens.weight"]
    path = write_gguf(tmp_path / "x.gguf", llama_metadata(), llama_tensors(written))
    checkpoint = weights.open_checkpoint(path)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert weights.HEAD in checkpoint.shapes


CHANGES: dict[str, tuple[str, object]] = {
    "architecture 'gemma4' is not": ("general.architecture", "gemma4"),
    "block_count is 0": ("llama.block_count", 0),
    "embedding_length is 'x'": ("llama.embedding_length", "x"),
    "rope.freq_base is nan": ("llama.rope.freq_base", float("nan")),
    "rope scaling 'yarn'": ("llama.rope.scaling.type", "yarn"),
    "rope.dimension_count differs": ("llama.rope.dimension_count", 8),
    "rows for 3 heads": ("llama.attention.head_count_kv", 3),
    "has no general.architecture": ("general.architecture", None),
}


@pytest.mark.parametrize("message", CHANGES)
def test_unsupported_metadata_is_refused_by_name(tmp_path: Path, message: str) -> None:
    key, value = CHANGES[message]
    metadata = {**llama_metadata(), key: value}
    if value is None:
        del metadata[key]
    path = write_gguf(tmp_path / "x.gguf", metadata, llama_tensors(hf_weights(0)))
    with pytest.raises(CheckpointError) as refused:
        weights.open_checkpoint(path)
    assert message in refused.value.message


def test_scaled_rotary_frequencies_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        **llama_tensors(hf_weights(0)),
        "rope_freqs.weight": ("F32", (8,), raw_f32(torch.ones(8))),
    }
    path = write_gguf(tmp_path / "x.gguf", llama_metadata(), tensors)
    with pytest.raises(CheckpointError, match="rope_freqs"):
        weights.open_checkpoint(path)


def test_an_unknown_gguf_tensor_keeps_its_name_and_is_unexpected(tmp_path: Path) -> None:
    tensors = {**llama_tensors(hf_weights(0)), "blk.0.odd.weight": ("F32", (1,), bytes(4))}
    path = write_gguf(tmp_path / "x.gguf", llama_metadata(), tensors)
    checkpoint = weights.open_checkpoint(path)
    expected = {n: s for n, s in checkpoint.shapes.items() if n != "blk.0.odd.weight"}
    with pytest.raises(WeightsMismatchError, match=r"unexpected: blk\.0\.odd\.weight"):
        weights.load_packed(checkpoint, expected)


def test_a_quantised_folder_is_refused_by_name(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="awq"):
        weights.open_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path / "m") / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        weights.open_checkpoint(tmp_path / "m")


@pytest.mark.weights
@pytest.mark.slow
def test_the_real_file_answers_as_transformers_does(smollm2_gguf: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tensors = weights.load_dequantized(smollm2_gguf)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    faults = model.load_state_dict(tensors, strict=False)
    assert (faults.missing_keys, faults.unexpected_keys) == ([weights.HEAD], [])
    model.tie_weights()
    ids = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :]
    assert answer.tolist() == PARIS


PARIS = [504, 3575, 282, 4649, 314, 7042, 30]  # "The capital of France is Paris."
