"""Gemma 4 text models without per-layer embeddings: 26B-A4B (experts), 31B and 12B (dense).

Most layers see a sliding window; every few, one sees everything, with heads of another size and
one projection for keys and values. Each layer, with r the residual after attention:

    r = x + norm(attention(norm(x)))
    x = (r + norm(f(r))) · layer_scalar
    f = mlp(norm(r))                                      dense
    f = norm(mlp(norm(r))) + norm(experts(norm(r)))       routed by r itself, not by its norm

Attention is not scaled, the embeddings are, and the logits are capped. Tensor names are the
checkpoint's. Knows one forward; knows neither sampling nor drafting, except that `taps` names the
layers whose outputs somebody wants to see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import layers
from dflash_chat.runtime.cache import Geometry, KVCache
from dflash_chat.runtime.parts import AttentionParts, LayerParts, MoeParts, weight_of
from dflash_chat.runtime.quant import Packed, Ready

IGNORED = (
    "model.vision_tower.", "model.vision_embedder.", "model.embed_vision.", "model.audio_tower.",
    "model.embed_audio.",
)  # fmt: skip

_SUPPORTED: dict[str, tuple[Any, ...]] = {  # the first is meant where the key is absent
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "use_bidirectional_attention": (None, "vision"),
}


@dataclass(frozen=True)
class Config:
    """Geometry of one checkpoint. `attention[i]` is layer i's; `num_experts` 0 means dense.

    Full layers turn only the share `rotated` of their heads. `prefix` begins the names of all text
    tensors but the head.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    final_logit_softcapping: float | None
    attention_k_eq_v: bool
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    attention: tuple[Geometry, ...]
    sliding_theta: float
    full_theta: float
    rotated: float
    prefix: str

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return len(self.attention)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Config:
        """Read a raw config.json, a multimodal one or a text model's.

        Raises CheckpointError naming a missing key or unsupported value.
        """
        text = raw.get("text_config")
        try:
            if text is None:
                return cls._read(raw, "model.")
            tied = raw.get("tie_word_embeddings", True)
            return cls._read({"tie_word_embeddings": tied, **text}, "model.language_model.")
        except KeyError as missing:
            raise CheckpointError(f"gemma4 config: key {missing} is missing") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"gemma4 config: {error}") from error

    @classmethod
    def _read(cls, raw: Mapping[str, Any], prefix: str) -> Config:
        for key, supported in _SUPPORTED.items():
            if raw.get(key, supported[0]) not in supported:
                raise ValueError(f"{key} = {raw[key]!r} is not supported")
        moe = bool(raw.get("enable_moe_block", False))
        experts, top_k, expert_rows = (
            int(raw[key]) if moe else 0
            for key in ("num_experts", "top_k_experts", "moe_intermediate_size")
        )
        if moe and not 1 <= top_k <= experts:
            raise ValueError(f"top_k_experts = {top_k} of {experts} experts")
        sliding, full = (
            raw["rope_parameters"][kind] for kind in ("sliding_attention", "full_attention")
        )
        for rope, kind in ((sliding, "default"), (full, "proportional")):
            if rope["rope_type"] != kind or rope.get("factor", 1.0) != 1.0:
                raise ValueError(f"rope_parameters {rope} are not supported")
        cap = raw.get("final_logit_softcapping")
        config = cls(
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_attention_heads=int(raw["num_attention_heads"]),
            vocab_size=int(raw["vocab_size"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
            final_logit_softcapping=None if cap is None else float(cap),
            attention_k_eq_v=bool(raw["attention_k_eq_v"]),
            num_experts=experts,
            top_k_experts=top_k,
            moe_intermediate_size=expert_rows,
            attention=_attention(raw),
            sliding_theta=float(sliding["rope_theta"]),
            full_theta=float(full["rope_theta"]),
            rotated=float(full.get("partial_rotary_factor", 1.0)),
            prefix=prefix,
        )
        config._check()
        return config

    def _check(self) -> None:
        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_hidden_layers": self.num_hidden_layers,
        }
        if self.num_experts:
            sizes["moe_intermediate_size"] = self.moe_intermediate_size
        for a in set(self.attention):
            layers.check_geometry(self.num_attention_heads, a.kv_heads, a.head_dim, **sizes)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold."""
        shapes: dict[str, tuple[int, ...]] = {
            self.prefix + "embed_tokens.weight": (self.vocab_size, self.hidden_size),
            self.prefix + "norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for i in range(self.num_hidden_layers):
            layer = self._layer_shapes(self.attention[i])
            shapes |= {f"{self.prefix}layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _layer_shapes(self, attention: Geometry) -> dict[str, tuple[int, ...]]:
        hidden, inner, dim = self.hidden_size, self.intermediate_size, attention.head_dim
        q_rows, kv_rows = self.num_attention_heads * dim, attention.kv_heads * dim
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "post_feedforward_layernorm.weight": (hidden,),
            "layer_scalar": (1,),
        }
        if self.values_are_keys(attention):
            del shapes["self_attn.v_proj.weight"]
        if self.num_experts:
            experts, rows = self.num_experts, self.moe_intermediate_size
            shapes |= {
                "router.proj.weight": (experts, hidden),
                "router.scale": (hidden,),
                "router.per_expert_scale": (experts,),
                "experts.gate_up_proj": (experts, 2 * rows, hidden),
                "experts.down_proj": (experts, hidden, rows),
                "post_feedforward_layernorm_1.weight": (hidden,),
                "pre_feedforward_layernorm_2.weight": (hidden,),
                "post_feedforward_layernorm_2.weight": (hidden,),
            }
        return shapes

    def inverse_frequencies(self, attention: Geometry) -> Tensor:
        """Rotary frequencies of such a layer, fp64 [D/2]."""
        if attention.window:
            return layers.inverse_frequencies(attention.head_dim, self.sliding_theta)
        return layers.inverse_frequencies(attention.head_dim, self.full_theta, self.rotated)

    def values_are_keys(self, attention: Geometry) -> bool:
        """Whether such a layer has no v_proj and takes k_proj's output for both."""
        return self.attention_k_eq_v and attention.window == 0


def _attention(raw: Mapping[str, Any]) -> tuple[Geometry, ...]:
    """Every layer's geometry.

    That of full layers is published as `global_head_dim` and `num_global_key_value_heads`, or as
    `per_layer_config`, which names what differs by layer number.
    """
    kinds = raw["layer_types"]
    if len(kinds) != int(raw["num_hidden_layers"]):
        raise ValueError("layer_types and num_hidden_layers disagree")
    common = {"head_dim": raw["head_dim"], "num_key_value_heads": raw["num_key_value_heads"]}
    full = dict(common)
    if "per_layer_config" not in raw:
        full["head_dim"] = raw["global_head_dim"]
        if raw["attention_k_eq_v"] and raw.get("num_global_key_value_heads") is not None:
            full["num_key_value_heads"] = raw["num_global_key_value_heads"]
    made = []
    for i, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer type {kind!r} is not supported")
        own = raw.get("per_layer_config", {}).get(str(i), {})
        if unknown := set(own) - set(common):
            raise ValueError(f"per_layer_config: {', '.join(sorted(unknown))} is not supported")
        numbers = (full if kind == "full_attention" else common) | own
        window = 0 if kind == "full_attention" else int(raw["sliding_window"])
        if kind == "sliding_attention" and window < 1:
            raise ValueError(f"sliding_window = {window} is out of range")
        made.append(Geometry(int(numbers["num_key_value_heads"]), int(numbers["head_dim"]), window))
    return tuple(made)


class Attention:
    """Attention of one layer: normed queries, keys and values of its own geometry, unscaled."""

    def __init__(self, config: Config, geometry: Geometry, weights: Ready) -> None:
        self.heads, self.groups = config.num_attention_heads, geometry.kv_heads
        self.head_dim, self.window = geometry.head_dim, geometry.window
        values = [] if config.values_are_keys(geometry) else ["v_proj"]
        self.qkv = weights.linear("q_proj", "k_proj", *values)
        self.o_proj = weights.linear("o_proj")
        self.q_norm, self.k_norm = (weights.vector(f"{n}_norm.weight") for n in "qk")  # [D]
        self.qk_norm = layers.RMSNorm.of_heads(
            [(self.q_norm, self.heads), (self.k_norm, self.groups)], config.rms_norm_eps
        )
        self.values_are_keys = config.values_are_keys(geometry)
        self.frequencies = config.inverse_frequencies(geometry)
        self.v_norm = layers.RMSNorm(None, config.rms_norm_eps)

    def __call__(self, x: Tensor, turn: layers.Turn, attend: layers.Causal, index: int) -> Tensor:
        """x: [T, C] → [T, C]; writes the block's keys and values into the cache."""
        heads = self.qkv.matmul(x).view(len(x), -1, self.head_dim)  # [T, H+2G or H+G, D]
        turned = turn(self.qk_norm(heads[:, : self.heads + self.groups]))  # [T, H+G, D]
        q, k = turned[:, : self.heads], turned[:, self.heads :]
        v = self.v_norm(heads[:, -self.groups :])  # v_proj's output, or else k_proj's
        return self.o_proj.matmul(attend(index, q, k, v))

    def parts(self) -> AttentionParts:
        """The same in terms of `parts.py`."""
        return AttentionParts(
            qkv=self.qkv,
            o_proj=self.o_proj,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            v_norm=True,
            values_are_keys=self.values_are_keys,
            frequencies=self.frequencies,
            scale=1.0,
            window=self.window,
            causal=True,
        )


class Router:
    """Which experts a row goes to, and by what shares."""

    def __init__(self, config: Config, weights: Ready) -> None:
        self.norm = layers.RMSNorm(weights.vector("scale"), config.rms_norm_eps)
        self.proj = weights.linear("proj")
        self.per_expert_scale = weights.vector("per_expert_scale").float()
        self.root_size, self.top_k = config.hidden_size**-0.5, config.top_k_experts

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Raw residual [T, C] → chosen experts int64 [T, k] and their shares fp32 [T, k].

        The shares of a row sum to 1 before the scales of its experts.
        """
        scores = self.proj.matmul(self.norm(r)).float() * self.root_size  # [T, E]
        top = scores.softmax(-1).topk(self.top_k)
        shares = top.values / top.values.sum(-1, keepdim=True)
        return top.indices, shares * self.per_expert_scale[top.indices]


class Experts:
    """The routed half of a feed-forward block, between its own two norms."""

    def __init__(self, config: Config, weights: Ready) -> None:
        self.router = Router(config, weights.below("router"))
        self.gate_up_proj = weights.experts("experts.gate_up_proj")
        self.down_proj = weights.experts("experts.down_proj")
        self.pre_feedforward_layernorm_2, self.post_feedforward_layernorm_2 = (
            layers.RMSNorm(
                weights.vector(f"{n}_feedforward_layernorm_2.weight"), config.rms_norm_eps
            )
            for n in ("pre", "post")
        )

    def __call__(self, r: Tensor) -> Tensor:
        """Raw residual [T, C] → [T, C]."""
        chosen, shares = self.router(r)
        x = self.pre_feedforward_layernorm_2(r)
        x = layers.gated_gelu_experts(x, chosen, shares, self.gate_up_proj, self.down_proj)
        return self.post_feedforward_layernorm_2(x)

    def parts(self, dense_output_norm: Tensor) -> MoeParts:
        """The same in terms of `parts.py`."""
        router = self.router
        return MoeParts(
            router_norm=weight_of(router.norm) * router.root_size,
            proj=router.proj.dequantize(dense_output_norm.dtype),
            per_expert_scale=router.per_expert_scale,
            top_k=router.top_k,
            input_norm=weight_of(self.pre_feedforward_layernorm_2),
            output_norm=weight_of(self.post_feedforward_layernorm_2),
            dense_output_norm=dense_output_norm,
            gate_up=self.gate_up_proj,
            down=self.down_proj,
        )


class Layer:
    """One decoder layer with fused q/k/v and gate/up projections; `experts` None if dense."""

    def __init__(self, config: Config, geometry: Geometry, weights: Ready) -> None:
        def norm(name: str) -> layers.RMSNorm:
            return layers.RMSNorm(weights.vector(f"{name}.weight"), config.rms_norm_eps)

        self.self_attn = Attention(config, geometry, weights.below("self_attn"))
        self.gate_up = weights.linear("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = weights.linear("mlp.down_proj")
        self.input_layernorm = norm("input_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self.experts: Experts | None = None
        if config.num_experts:
            self.experts = Experts(config, weights)
            self.post_feedforward_layernorm_1 = norm("post_feedforward_layernorm_1")
        self.layer_scalar = weights.vector("layer_scalar")  # [1]

    def __call__(self, x: Tensor, turn: layers.Turn, attend: layers.Causal, index: int) -> Tensor:
        """x: [T, C] → [T, C]; writes the block's keys and values into the cache."""
        attended = self.self_attn(self.input_layernorm(x), turn, attend, index)
        r = x + self.post_attention_layernorm(attended)
        gate_up = self.gate_up.matmul(self.pre_feedforward_layernorm(r))  # [T, 2I]
        fed = self.down_proj.matmul(layers.gated_gelu(gate_up))
        if self.experts is not None:
            fed = self.post_feedforward_layernorm_1(fed) + self.experts(r)
        return (r + self.post_feedforward_layernorm(fed)) * self.layer_scalar

    def parts(self) -> LayerParts:
        """The layer in terms of `parts.py`."""
        moe = None
        if self.experts is not None:
            moe = self.experts.parts(weight_of(self.post_feedforward_layernorm_1))
        return LayerParts(
            attention=self.self_attn.parts(),
            gate_up=self.gate_up,
            down=self.down_proj,
            activation="gelu_tanh",
            input_norm=weight_of(self.input_layernorm),
            attention_output_norm=weight_of(self.post_attention_layernorm),
            mlp_input_norm=weight_of(self.pre_feedforward_layernorm),
            mlp_output_norm=weight_of(self.post_feedforward_layernorm),
            scalar=self.layer_scalar,
            moe=moe,
            eps=self.input_layernorm.eps,
        )

    @property
    def nbytes(self) -> int:
        """Resident bytes of the projections."""
        parts = [self.self_attn.qkv, self.self_attn.o_proj, self.gate_up, self.down_proj]
        stacks = []
        if self.experts is not None:
            parts.append(self.experts.router.proj)
            stacks = [self.experts.gate_up_proj, self.experts.down_proj]
        return sum(part.nbytes for part in parts) + sum(stack.nbytes for stack in stacks)


class Target:
    """A loaded Gemma 4."""

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
        text = Ready(packed, device, dtype, config.prefix)
        self.embed_tokens = text.linear("embed_tokens")
        self.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype).item()
        self.lm_head = (
            self.embed_tokens if config.tie_word_embeddings else weights.linear("lm_head")
        )
        self.screen: Packed | None = None
        self.layers = [
            Layer(config, geometry, text.below(f"layers.{i}"))
            for i, geometry in enumerate(config.attention)
        ]
        self.norm = layers.RMSNorm(text.vector("norm.weight"), config.rms_norm_eps)
        self.ropes = {
            a: layers.Rope(config.inverse_frequencies(a), capacity, dtype, device)
            for a in set(config.attention)
        }

    @property
    def kernels(self) -> str:
        """What multiplies, in words."""
        body = self.layers[0].self_attn.qkv.kernel
        experts = self.layers[0].experts
        routed = "" if experts is None else f", {experts.gate_up_proj.kernel} experts"
        return f"{body} body{routed}, {self.lm_head.kernel} head"

    @property
    def nbytes(self) -> int:
        """Resident bytes of the projections, embedding and head, and of a copy of it."""
        head = 0 if self.lm_head is self.embed_tokens else self.lm_head.nbytes
        head += 0 if self.screen is None else self.screen.nbytes
        return self.embed_tokens.nbytes + head + sum(layer.nbytes for layer in self.layers)

    def parts(self) -> list[LayerParts]:
        """All layers in terms of `parts.py`."""
        return [layer.parts() for layer in self.layers]

    def new_cache(self, capacity: int, largest_block: int | None = None) -> KVCache:
        """An empty cache for this geometry."""
        return KVCache(self.config.attention, capacity, self.dtype, self.device, largest_block)

    def embed(self, ids: Tensor) -> Tensor:
        """Scaled input embeddings [T, C] of ids [T]."""
        return self.embed_tokens.rows(ids) * self.embed_scale

    def forward(
        self, ids: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Run a block behind the committed rows; the caller decides what to commit.

        ids: [T]. Returns the final normed hidden states [T, C] and the tapped features [T, K·C]:
        the residual stream after each whole layer of `taps`, in that order.
        """
        rows = len(ids)
        x = self.embed(ids)  # [T, C]
        turns = {a: rope.at(cache.length, rows) for a, rope in self.ropes.items()}
        attend = layers.Causal(cache, rows, self.config.num_attention_heads, scale=1.0)
        tapped: dict[int, Tensor] = {}
        for i, (layer, a) in enumerate(zip(self.layers, self.config.attention, strict=True)):
            x = layer(x, turns[a], attend, i)
            if i in taps:
                tapped[i] = x
        features = torch.cat([tapped[i] for i in taps], -1) if taps else x[:, :0]
        return self.norm(x), features

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [T, V] of normed hidden states [T, C], capped."""
        logits = self.lm_head.matmul(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else layers.softcap(logits, cap)
