"""Qwen3, dense: Llama with an RMSNorm on every head of q and k (`model_type` "qwen3").

Knows only that difference; the rest is llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import layers
from dflash_chat.runtime.models import llama
from dflash_chat.runtime.quant import Ready

IGNORED = llama.IGNORED


class Config(llama.Config):
    """Geometry of one checkpoint."""

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """As Llama's; refuses sliding windows, which no dense Qwen3 ships with."""
        if raw.get("use_sliding_window"):
            raise CheckpointError("qwen3 config: use_sliding_window = True is not supported")
        return super().from_hf(raw)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold."""
        shapes = super().tensor_shapes()
        for i in range(self.num_hidden_layers):
            for name in ("q_norm", "k_norm"):
                shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (self.head_dim,)
        return shapes


class Layer(llama.Layer):
    """Llama's layer with normed queries and keys."""

    def __init__(self, config: llama.Config, weights: Ready) -> None:
        super().__init__(config, weights)
        self.q_norm, self.k_norm = (weights.vector(f"self_attn.{n}_norm.weight") for n in "qk")
        self.qk_norm = layers.RMSNorm.of_heads(
            [(self.q_norm, self.heads), (self.k_norm, self.groups)], config.rms_norm_eps
        )

    def normed(self, heads: Tensor) -> Tensor:
        """Queries and keys [T, H+G, D], each head by its own norm."""
        return self.qk_norm(heads)


class Target(llama.Target):
    """A loaded Qwen3."""

    layer_class = Layer
