"""Translates a GGUF file of architecture "llama" into Hugging Face's names, config and row order.

Sources: llama.cpp `gguf-py/gguf/constants.py` (keys, tensor names) and `convert_hf_to_gguf.py`
(the permutation of Q and K rows). Knows names, keys and rows; does not know block formats or files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.gguf import GGUF, Value

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.weight")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name stays as it is."""
    match = _LAYER_NAME.fullmatch(name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    return _TOP.get(name, name)


def hf_config(gguf: GGUF) -> dict[str, Any]:
    """The keys of a `LlamaConfig`.

    Raises CheckpointError for another architecture, a missing key or an unsupported value.
    """
    keys = _Keys(gguf)
    architecture = keys.text("general.architecture")
    if architecture != "llama":
        keys.refuse(f"architecture {architecture!r:.40} is not supported, only llama is")
    hidden, heads = keys.count("llama.embedding_length"), keys.count("llama.attention.head_count")
    head_dim = keys.count("llama.attention.key_length", hidden // heads)
    keys.must_be("llama.attention.value_length", head_dim)
    keys.must_be("llama.rope.dimension_count", head_dim)
    if "rope_freqs.weight" in gguf.tensors:
        keys.refuse("rope_freqs.weight (scaled rotary frequencies) is not supported")
    vocabulary = gguf.metadata.get("tokenizer.ggml.tokens")
    tokens = len(vocabulary) if isinstance(vocabulary, list) else None
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": hidden,
        "intermediate_size": keys.count("llama.feed_forward_length"),
        "num_hidden_layers": keys.count("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": keys.count("llama.vocab_size", tokens),
        "rms_norm_eps": keys.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "max_position_embeddings": keys.count("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.gguf.metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        keys.refuse(f"rope scaling {kind!r:.40} is not supported")
    return {"rope_type": "linear", "factor": keys.number("llama.rope.scaling.factor")}


def unpermute(name: str, rows: Tensor, config: dict[str, Any]) -> Tensor:
    """Rows of a Q or K projection back in Hugging Face's order; all other tensors as they are.

    rows: [N, anything], weights or packed blocks. llama.cpp stores the rows of a head as
    (0, D/2, 1, D/2 + 1, …), which suits rotation of neighbours; ours rotates halves.
    """
    heads = _permuted_heads(name, config)
    if not heads:
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)  # [H, D/2, 2, _]
    return pairs.transpose(1, 2).reshape(rows.shape)


def check_permuted(path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """Raise CheckpointError unless every Q and K projection has whole heads of even width."""
    for name, shape in shapes.items():
        heads = _permuted_heads(name, config)
        if heads and (shape[0] != heads * config["head_dim"] or config["head_dim"] % 2):
            raise CheckpointError(
                f"{path.name}: {name} has {shape[0]} rows for {heads} heads.",
                "The checkpoint contradicts its own metadata; choose another.",
            )


def _permuted_heads(name: str, config: dict[str, Any]) -> int:
    """How many heads the rows of tensor `name` form, 0 if its rows are not permuted."""
    if name.endswith(".self_attn.q_proj.weight"):
        return int(config["num_attention_heads"])
    if name.endswith(".self_attn.k_proj.weight"):
        return int(config["num_key_value_heads"])
    return 0


class _Keys:
    """Typed reads of the metadata that refuse a missing key or a wrong type by name."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf = gguf

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.gguf.path.name}: {why}.", "Choose another checkpoint.")

    def get(self, key: str, default: Value | None) -> Value:
        value = self.gguf.metadata.get(key, default)
        if value is None:
            self.refuse(f"metadata has no {key}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            self.refuse(f"{key} is {value!r:.40}, not a positive count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            self.refuse(f"{key} is {value!r:.40}, not a positive number")
        return value

    def text(self, key: str) -> str:
        value = self.get(key, None)
        if not isinstance(value, str):
            self.refuse(f"{key} is {value!r:.40}, not a string")
        return value

    def must_be(self, key: str, expected: int) -> None:
        if self.count(key, expected) != expected:
            self.refuse(f"{key} differs from the head dimension {expected}, which is not supported")
