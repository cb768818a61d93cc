"""The DFlash drafter (arXiv 2602.06036; z-lab's checkpoint layout) and its context cache.

One forward over [anchor, MASK × (block − 1)] proposes block − 1 tokens. Every layer attends to
keys and values projected from the *target's* hidden states of all committed tokens, plus the block
itself. Only that projected context is ever kept, so a rejected draft never dirties it. The
embedding is the target's, lent by reference; so is the head, unless `draft_head.py` copies it.

The config is read as raw JSON: transformers' Qwen3Config would silently drop the sliding window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import layers
from dflash_chat.runtime.cache import Geometry, KVCache, prefill_chunk
from dflash_chat.runtime.draft_head import DraftHead
from dflash_chat.runtime.parts import LayerParts, pre_norm
from dflash_chat.runtime.quant import Packed, Ready

_IGNORED_KEYS = {
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "max_window_layers", "model_type", "pad_token_id", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "use_sliding_window",
}  # fmt: skip
_KNOWN_KEYS = _IGNORED_KEYS | {
    "attention_bias", "block_size", "dflash_config", "final_logit_softcapping", "head_dim",
    "hidden_act", "hidden_size", "intermediate_size", "is_causal", "layer_types",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "num_target_layers", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "vocab_size",
}  # fmt: skip
_KNOWN_DFLASH_KEYS = {"block_size", "causal", "mask_token_id", "target_layer_ids"}

FEW_BLOCKS = 6  # of pending rows, up to which a CPU projects them block by block


@dataclass(frozen=True)
class Config:
    """Geometry of a drafter. `windows[i]` is layer i's sliding window (0: full attention);
    `causal[i]` says whether its block rows look only backwards."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    num_target_layers: int | None
    vocab_size: int | None
    softcap: float = 0.0  # bounds logits to ±softcap; 0 leaves them

    @property
    def num_hidden_layers(self) -> int:
        """Drafter layers."""
        return len(self.windows)

    @property
    def attention(self) -> tuple[Geometry, ...]:
        """Every layer's keys and values."""
        return tuple(Geometry(self.num_key_value_heads, self.head_dim, w) for w in self.windows)

    @classmethod
    def from_file(cls, path: Path) -> Config:
        """Read config.json. Raises CheckpointError for unreadable JSON and for what `from_raw`
        refuses.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable drafter config ({error})") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: a drafter config must be a JSON object")
        return cls.from_raw(raw)

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Config:
        """Read a published config, refusing unknown keys and unsupported values by name."""
        dflash = raw.get("dflash_config")
        if not isinstance(dflash, dict):
            raise CheckpointError("drafter config: dflash_config is missing")
        unknown = sorted(set(raw) - _KNOWN_KEYS)
        unknown += sorted(f"dflash_config.{key}" for key in set(dflash) - _KNOWN_DFLASH_KEYS)
        if unknown:
            raise CheckpointError(
                f"drafter config: unknown keys {', '.join(unknown)}",
                "a key this runtime does not know may change what the drafter computes",
            )
        if "target_layer_ids" not in dflash:
            raise CheckpointError("drafter config: dflash_config.target_layer_ids is missing")
        try:
            return cls._read(raw, dflash)
        except KeyError as missing:
            raise CheckpointError(f"drafter config: key {missing} is missing") from missing
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"drafter config: {error}") from error

    @classmethod
    def _read(cls, raw: Mapping[str, Any], dflash: Mapping[str, Any]) -> Config:
        for key, supported in (("hidden_act", "silu"), ("attention_bias", False)):
            if raw.get(key, supported) != supported:
                raise ValueError(f"{key} = {raw[key]!r} is not supported")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope scaling {kind!r} is not supported")
        cap = raw.get("final_logit_softcapping")
        if cap is not None and not float(cap) > 0:
            raise ValueError(f"final_logit_softcapping = {cap!r} is out of range")
        layer_types = raw.get("layer_types") or ["full_attention"] * int(raw["num_hidden_layers"])
        if len(layer_types) != int(raw["num_hidden_layers"]):
            raise ValueError("layer_types and num_hidden_layers disagree")
        for name in layer_types:
            if name not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer type {name!r} is not supported")
        windows = tuple(
            int(raw["sliding_window"]) if name == "sliding_attention" else 0 for name in layer_types
        )
        if "sliding_attention" in layer_types and int(raw["sliding_window"]) < 1:
            raise ValueError(f"sliding_window = {raw['sliding_window']} is out of range")
        everywhere = raw.get("is_causal", dflash.get("causal"))
        causal = tuple(w > 0 if everywhere is None else bool(everywhere) for w in windows)
        heads = int(raw["num_attention_heads"])
        taps = tuple(int(i) for i in dflash["target_layer_ids"])
        depth = raw.get("num_target_layers")
        if not taps or min(taps) < 0 or (depth is not None and max(taps) >= int(depth)):
            raise ValueError(f"target_layer_ids {list(taps)} do not fit {depth} target layers")
        block = int(raw["block_size"] if "block_size" in raw else dflash["block_size"])
        if block < 2:
            raise ValueError(f"block_size {block} leaves nothing to draft")
        hidden, inner = int(raw["hidden_size"]), int(raw["intermediate_size"])
        kv_heads = int(raw["num_key_value_heads"])
        dim = int(raw.get("head_dim") or hidden // max(1, heads))
        layers.check_geometry(heads, kv_heads, dim, hidden_size=hidden, intermediate_size=inner)
        return cls(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"]),
            block_size=block,
            mask_token_id=int(dflash["mask_token_id"]),
            target_layer_ids=taps,
            windows=windows,
            causal=causal,
            num_target_layers=None if depth is None else int(depth),
            vocab_size=None if raw.get("vocab_size") is None else int(raw["vocab_size"]),
            softcap=float(cap or 0.0),
        )

    def tensor_shapes(self, target_hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of `model.safetensors`, by its published name."""
        hidden, inner, dim = self.hidden_size, self.intermediate_size, self.head_dim
        q_rows, kv_rows = self.num_attention_heads * dim, self.num_key_value_heads * dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, len(self.target_layer_ids) * target_hidden),
            "hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        for i in range(self.num_hidden_layers):
            at = f"layers.{i}."
            shapes |= {
                at + "input_layernorm.weight": (hidden,),
                at + "post_attention_layernorm.weight": (hidden,),
                at + "self_attn.q_proj.weight": (q_rows, hidden),
                at + "self_attn.k_proj.weight": (kv_rows, hidden),
                at + "self_attn.v_proj.weight": (kv_rows, hidden),
                at + "self_attn.o_proj.weight": (hidden, q_rows),
                at + "self_attn.q_norm.weight": (dim,),
                at + "self_attn.k_norm.weight": (dim,),
                at + "mlp.gate_proj.weight": (inner, hidden),
                at + "mlp.up_proj.weight": (inner, hidden),
                at + "mlp.down_proj.weight": (hidden, inner),
            }
        return shapes


class Layer:
    """One drafter layer's block half; its context half lives in `Drafter._project`."""

    def __init__(self, config: Config, weights: Ready, window: int, causal: bool) -> None:
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.causal = config.head_dim, window, causal
        self.qkv = weights.linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = weights.linear("self_attn.o_proj")
        self.gate_up = weights.linear("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = weights.linear("mlp.down_proj")
        eps = config.rms_norm_eps
        self.input_layernorm = layers.RMSNorm(weights.vector("input_layernorm.weight"), eps)
        self.post_attention_layernorm = layers.RMSNorm(
            weights.vector("post_attention_layernorm.weight"), eps
        )
        self.q_norm, self.k_norm = (weights.vector(f"self_attn.{n}_norm.weight") for n in "qk")
        self.qk_norm = layers.RMSNorm.of_heads(
            [(self.q_norm, self.heads), (self.k_norm, self.groups)], eps
        )

    def __call__(
        self, x: Tensor, turn: layers.Turn, cache: KVCache, index: int, mask: Tensor | None
    ) -> Tensor:
        """x: [B, C] → [B, C]; the block's keys and values stay provisional for good."""
        rows = x.shape[0]
        qkv = self.qkv.matmul(self.input_layernorm(x)).view(rows, -1, self.head_dim)  # [B, H+2G, D]
        turned = turn(self.qk_norm(qkv[:, : self.heads + self.groups]))  # [B, H+G, D]
        q, k = turned[:, : self.heads], turned[:, self.heads :]
        v = qkv[:, self.heads + self.groups :]
        keys, values = cache.write(index, k.transpose(0, 1), v.transpose(0, 1))
        x = x + self.o_proj.matmul(layers.attention(q, keys, values, mask))
        gate_up = self.gate_up.matmul(self.post_attention_layernorm(x))
        return x + self.down_proj.matmul(layers.gated_silu(gate_up))


class Drafter:
    """Proposes blocks; follows the target's committed tokens through `observe`.

    `embed` maps ids [T] to the target's (scaled) input embeddings. At most `largest_block` rows are
    projected into the context at once.
    """

    def __init__(
        self,
        config: Config,
        packed: Mapping[str, Packed],
        embed: Callable[[Tensor], Tensor],
        head: DraftHead,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        largest_block: int | None = None,
    ) -> None:
        self.config, self.embed, self.head = config, embed, head
        weights = Ready(packed, device, dtype)
        self.layers = [
            Layer(config, weights.below(f"layers.{i}"), window, causal)
            for i, (window, causal) in enumerate(zip(config.windows, config.causal, strict=True))
        ]
        self.fc = weights.linear("fc")
        self.hidden_norm = layers.RMSNorm(weights.vector("hidden_norm.weight"), config.rms_norm_eps)
        self.norm = layers.RMSNorm(weights.vector("norm.weight"), config.rms_norm_eps)
        self.context_kv = weights.linear(  # keys and values of every layer in one projection
            *(
                f"layers.{i}.self_attn.{name}"
                for name in ("k_proj", "v_proj")
                for i in range(config.num_hidden_layers)
            )
        )
        self.context_k_norm = layers.RMSNorm.of_heads(
            [(layer.k_norm, layer.groups) for layer in self.layers], config.rms_norm_eps
        )
        frequencies = layers.inverse_frequencies(config.head_dim, config.rope_theta)
        room = capacity + config.block_size  # a whole block stands behind the last context row
        self.rope = layers.Rope(frequencies, room, dtype, device)
        self.cache = KVCache(
            config.attention,
            room,
            dtype,
            device,
            max(largest_block or prefill_chunk(device), config.block_size),
        )
        self._pending: list[Tensor] = []  # observed features that are not projected yet
        self._block = torch.full((config.block_size,), config.mask_token_id, device=device)

    def round_block(self, rounded: Callable[[Packed], Packed]) -> None:
        """Let drafts go through coarser matrices, the `rounded` ones of every layer. What projects
        the context stays as it is.
        """
        for layer in self.layers:
            layer.qkv, layer.o_proj = rounded(layer.qkv), rounded(layer.o_proj)
            layer.gate_up, layer.down_proj = rounded(layer.gate_up), rounded(layer.down_proj)

    def parts(self) -> list[LayerParts]:
        """All layers in terms of `parts.py`."""
        frequencies = layers.inverse_frequencies(self.config.head_dim, self.config.rope_theta)
        return [pre_norm(layer, frequencies, layer.window, layer.causal) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Resident bytes of the drafter's own matrices and of a head copied for it."""
        parts = [self.fc, self.context_kv]
        for layer in self.layers:
            parts += [layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj]
        return sum(part.nbytes for part in parts) + self.head.nbytes

    @property
    def length(self) -> int:
        """Tokens observed: the context cache's rows and those waiting for projection."""
        return self.cache.length + sum(len(features) for features in self._pending)

    def observe(self, features: Tensor) -> None:
        """The next committed tokens' tapped hidden states, [T, K·C], in order and without a hole.

        Projection waits for the next `draft` or `flush`, so that plain decoding does not pay for
        it.
        """
        self._pending.append(features)

    def flush(self) -> None:
        """Project everything observed into the context cache.

        A CPU's matmul is compiled for every number of rows, which takes as long as 30 rows. So what
        a few passes have left goes there in blocks, whose numbers of rows have been seen before.
        """
        if self._pending:
            pending, self._pending = torch.cat(self._pending), []
            block, most = self.config.block_size, self.cache.largest_block
            if self.cache.device.type == "cpu" and len(pending) <= FEW_BLOCKS * block:
                most = block
            for features in torch.split(pending, most):
                self._project(features)

    def rewindable(self, n: int) -> int:
        """The longest prefix of at most n tokens that `truncate` can cut back to: n or nothing."""
        return n if n >= self.cache.length else self.cache.rewindable(n)

    def truncate(self, n: int) -> None:
        """Forget every token from n on; n must be `rewindable`."""
        waiting = max(0, n - self.cache.length)
        self._pending = [torch.cat(self._pending)[:waiting]] if waiting else []
        self.cache.truncate(min(n, self.cache.length))

    def read(self, ids: Sequence[int]) -> None:
        """The text goes on with these tokens, which may come again; nothing else hangs on them."""
        self.head.read(ids)

    def draft(self, anchor: int | Tensor, n: int) -> Tensor:
        """Logits [n, V] of the n ≤ block − 1 tokens that follow `anchor`."""
        return self.head.logits(self.forward(anchor, n))

    def candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of rows [T, C] that `forward` gave, and their tokens: `DraftHead.candidates`."""
        return self.head.candidates(hidden)

    def forward(self, anchor: int | Tensor, n: int) -> Tensor:
        """Final normed hidden states [n, C] of the n ≤ block − 1 tokens that follow `anchor`.

        The whole trained block is always run, since a shorter one shifts the distribution.
        """
        c = self.config
        self.flush()
        self._block[0] = anchor
        x = self.embed(self._block)  # [B, C]
        turn = self.rope.at(self.cache.length, len(x))
        masks = {
            kind: self.cache.mask(len(x), *kind, c.num_attention_heads // c.num_key_value_heads)
            for kind in set(zip(c.windows, c.causal, strict=True))
        }
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, self.cache, i, masks[layer.window, layer.causal])
        return self.norm(x[1 : n + 1])

    def _project(self, features: Tensor) -> None:
        """Context keys and values of all layers from features [T, K·C], committed at once."""
        c, rows = self.config, len(features)
        shape = (rows, c.num_hidden_layers, c.num_key_value_heads, c.head_dim)
        context = self.hidden_norm(self.fc.matmul(features))  # [T, C]
        k, v = self.context_kv.matmul(context).view(rows, -1, c.head_dim).chunk(2, 1)  # [T, L·G, D]
        k = self.rope.at(self.cache.length, rows)(self.context_k_norm(k)).view(shape)
        v = v.reshape(shape)
        for i in range(c.num_hidden_layers):
            self.cache.write(i, k[:, i].transpose(0, 1), v[:, i].transpose(0, 1))
        self.cache.commit(rows)
