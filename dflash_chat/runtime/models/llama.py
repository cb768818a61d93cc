"""Llama: pre-norm, grouped-query attention, gated SiLU (`model_type` "llama", as transformers
ships it).

Tensor names are the checkpoint's. Knows one forward; knows neither sampling nor drafting, except
that `taps` names the layers whose outputs somebody wants to see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import layers
from dflash_chat.runtime.cache import Geometry, KVCache
from dflash_chat.runtime.parts import LayerParts, pre_norm
from dflash_chat.runtime.quant import Packed, Ready

IGNORED: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """Geometry of one checkpoint. `rope` is the raw rope-scaling object, or empty."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Mapping[str, Any]

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """Read a raw config.json. Raises CheckpointError naming a missing key or unsupported
        value.
        """
        family = raw.get("model_type", "llama")
        for key, supported in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if raw.get(key, supported) != supported:
                raise CheckpointError(f"{family} config: {key} = {raw[key]!r} is not supported")
        try:
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            dim = int(raw.get("head_dim") or hidden // max(1, heads))
            layers.check_geometry(
                heads,
                int(raw["num_key_value_heads"]),
                dim,
                hidden_size=hidden,
                **{
                    key: int(raw[key])
                    for key in (
                        "intermediate_size", "num_hidden_layers", "vocab_size",
                        "max_position_embeddings",
                    )
                },
            )  # fmt: skip
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            return cls(
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw["num_key_value_heads"]),
                head_dim=dim,
                vocab_size=int(raw["vocab_size"]),
                rms_norm_eps=float(raw["rms_norm_eps"]),
                rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"]),
                max_position_embeddings=int(raw["max_position_embeddings"]),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                rope=dict(rope),
            )
        except KeyError as missing:
            raise CheckpointError(f"{family} config: key {missing} is missing") from missing
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{family} config: {error}") from error

    @property
    def attention(self) -> tuple[Geometry, ...]:
        """Every layer's keys and values."""
        return (Geometry(self.num_key_value_heads, self.head_dim),) * self.num_hidden_layers

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows = self.num_attention_heads * self.head_dim
        kv_rows = self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for i in range(self.num_hidden_layers):
            at = f"model.layers.{i}."
            shapes |= {
                at + "input_layernorm.weight": (hidden,),
                at + "post_attention_layernorm.weight": (hidden,),
                at + "self_attn.q_proj.weight": (q_rows, hidden),
                at + "self_attn.k_proj.weight": (kv_rows, hidden),
                at + "self_attn.v_proj.weight": (kv_rows, hidden),
                at + "self_attn.o_proj.weight": (hidden, q_rows),
                at + "mlp.gate_proj.weight": (inner, hidden),
                at + "mlp.up_proj.weight": (inner, hidden),
                at + "mlp.down_proj.weight": (hidden, inner),
            }
        return shapes

    def inverse_frequencies(self) -> Tensor:
        """Rotary frequencies, fp64 [D/2], with Llama 3's long-context scaling where the config
        asks.
        """
        plain = layers.inverse_frequencies(self.head_dim, self.rope_theta)
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind == "default":
            return plain
        if kind != "llama3":
            raise CheckpointError(f"rope scaling {kind!r} is not supported")
        factor, low, high, original = (
            float(self.rope[key])
            for key in (
                "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
            )
        )  # fmt: skip
        turns = original * plain / (2 * math.pi)  # rotations within the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return plain / factor * (1 - blend) + plain * blend


class Layer:
    """One decoder layer with fused q/k/v and gate/up projections."""

    q_norm: Tensor | None = None  # [D], where an architecture has them
    k_norm: Tensor | None = None

    def __init__(self, config: Config, weights: Ready) -> None:
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.qkv = weights.linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = weights.linear("self_attn.o_proj")
        self.gate_up = weights.linear("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = weights.linear("mlp.down_proj")
        self.input_layernorm = layers.RMSNorm(
            weights.vector("input_layernorm.weight"), config.rms_norm_eps
        )
        self.post_attention_layernorm = layers.RMSNorm(
            weights.vector("post_attention_layernorm.weight"), config.rms_norm_eps
        )

    def __call__(self, x: Tensor, turn: layers.Turn, attend: layers.Causal, index: int) -> Tensor:
        """x: [T, C] → [T, C]; writes the block's keys and values into the cache."""
        x = x + self._attention(self.input_layernorm(x), turn, attend, index)
        gate_up = self.gate_up.matmul(self.post_attention_layernorm(x))  # [T, 2I]
        return x + self.down_proj.matmul(layers.gated_silu(gate_up))

    def _attention(self, x: Tensor, turn: layers.Turn, attend: layers.Causal, index: int) -> Tensor:
        """Normed [T, C] → [T, C]; lets go of its heads before the MLP needs room."""
        qkv = self.qkv.matmul(x).view(len(x), -1, self.head_dim)  # [T, H+2G, D]
        turned = turn(self.normed(qkv[:, : self.heads + self.groups]))  # [T, H+G, D]
        q, k = turned[:, : self.heads], turned[:, self.heads :]
        v = qkv[:, self.heads + self.groups :]  # [T, G, D]
        return self.o_proj.matmul(attend(index, q, k, v))

    def normed(self, heads: Tensor) -> Tensor:
        """Queries and keys [T, H+G, D] before they are rotated: what Qwen3 norms."""
        return heads


class Target:
    """A loaded Llama."""

    layer_class: type[Layer] = Layer

    def __init__(
        self,
        config: Config,
        packed: Mapping[str, Packed],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        weights = Ready(packed, device, dtype)
        self.embed_tokens = weights.linear("model.embed_tokens")
        self.lm_head = (
            self.embed_tokens if config.tie_word_embeddings else weights.linear("lm_head")
        )
        self.screen: Packed | None = None
        self.layers = [
            self.layer_class(config, weights.below(f"model.layers.{i}"))
            for i in range(config.num_hidden_layers)
        ]
        self.norm = layers.RMSNorm(weights.vector("model.norm.weight"), config.rms_norm_eps)
        self.rope = layers.Rope(config.inverse_frequencies(), capacity, dtype, device)

    @property
    def kernels(self) -> str:
        """What multiplies, in words."""
        return f"{self.layers[0].qkv.kernel} body, {self.lm_head.kernel} head"

    @property
    def nbytes(self) -> int:
        """Resident bytes of the projections, embedding and head, and of a copy of it."""
        parts = [self.embed_tokens]
        if self.lm_head is not self.embed_tokens:
            parts.append(self.lm_head)
        if self.screen is not None:
            parts.append(self.screen)
        for layer in self.layers:
            parts += [layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj]
        return sum(part.nbytes for part in parts)

    def parts(self) -> list[LayerParts]:
        """All layers in terms of `parts.py`."""
        frequencies = self.config.inverse_frequencies()
        return [pre_norm(layer, frequencies) for layer in self.layers]

    def new_cache(self, capacity: int, largest_block: int | None = None) -> KVCache:
        """An empty cache for this geometry."""
        return KVCache(self.config.attention, capacity, self.dtype, self.device, largest_block)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [T, C] of ids [T]."""
        return self.embed_tokens.rows(ids)

    def forward(
        self, ids: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Run a block behind the committed rows; the caller decides what to commit.

        ids: [T]. Returns the final normed hidden states [T, C] and the tapped features [T, K·C]:
        the residual stream after each whole layer of `taps`, in that order.
        """
        x = self.embed(ids)  # [T, C]
        attend = layers.Causal(cache, len(ids), self.config.num_attention_heads)
        turn = self.rope.at(cache.length, len(ids))
        tapped: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, attend, i)
            if i in taps:
                tapped[i] = x
        features = torch.cat([tapped[i] for i in taps], -1) if taps else x[:, :0]
        return self.norm(x), features

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [T, V] of normed hidden states [T, C]."""
        return self.lm_head.matmul(hidden)
