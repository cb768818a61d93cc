"""The frozen target in batches: full forward with features, and lockstep decoding.

Llama architecture only. Every sequence of a batch stands at the same position, so one device scalar
is the whole cache length. Knows no text, no sampling policy and no drafter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.errors import WeightsMismatchError


@dataclass(frozen=True)
class Shape:
    """The numbers of a llama model that the target and the drafter share."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    eps: float
    max_positions: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 64, 49152, 100_000.0, 1e-5, 8192)


def shape_of(config: Mapping[str, object]) -> Shape:
    """Read a HF-style llama config; every key is required but `head_dim`."""

    def number(key: str) -> float:
        value = config.get(key)
        if not isinstance(value, int | float):
            raise WeightsMismatchError(f"the target's config has no number for {key}")
        return value

    rope = config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else config.get("rope_theta")
    if not isinstance(theta, int | float):
        raise WeightsMismatchError("the target's config has no rope_theta")
    hidden, heads = int(number("hidden_size")), int(number("num_attention_heads"))
    return Shape(
        hidden=hidden,
        mlp=int(number("intermediate_size")),
        layers=int(number("num_hidden_layers")),
        heads=heads,
        kv_heads=int(number("num_key_value_heads")),
        head_dim=int(number("head_dim")) if config.get("head_dim") else hidden // heads,
        vocab=int(number("vocab_size")),
        rope_theta=float(theta),
        eps=float(number("rms_norm_eps")),
        max_positions=int(number("max_position_embeddings")),
    )


def rope_tables(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin in fp32, each [length, head_dim], the half-rotated layout repeated."""
    d = shape.head_dim
    rates = shape.rope_theta ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox rotary embedding over the last dim, in fp32, back in x's dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@dataclass(frozen=True)
class TargetLayer:
    """One layer with fused projections."""

    qkv: Tensor  # [(H + 2 G) D, C]
    o: Tensor  # [C, H D]
    gate_up: Tensor  # [2 I, C]
    down: Tensor  # [C, I]
    input_norm: Tensor  # [C]
    post_norm: Tensor  # [C]


@dataclass(frozen=True)
class Target:
    """Frozen weights; `taps` are the layers whose outputs are the drafter's features, in order."""

    shape: Shape
    taps: tuple[int, ...]
    embed: Tensor  # [V, C]
    head: Tensor  # [V, C]
    norm: Tensor  # [C]
    layers: tuple[TargetLayer, ...]

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def feature_width(self) -> int:
        return len(self.taps) * self.shape.hidden


def build_target(
    shape: Shape,
    tensors: Mapping[str, Tensor],
    taps: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Target:
    """Fuse projections from checkpoint names; the head is the embedding where none is stored."""
    assert all(0 <= tap < shape.layers for tap in taps), f"taps {taps} of {shape.layers} layers"

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise WeightsMismatchError(f"the target has no tensor {name}")
        return tensors[name].to(device=device, dtype=dtype)

    layers = []
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        qkv = torch.cat([take(f"{at}self_attn.{name}_proj.weight") for name in "qkv"])
        gate_up = torch.cat([take(f"{at}mlp.{name}_proj.weight") for name in ("gate", "up")])
        layers.append(
            TargetLayer(
                qkv=qkv,
                o=take(f"{at}self_attn.o_proj.weight").contiguous(),
                gate_up=gate_up,
                down=take(f"{at}mlp.down_proj.weight").contiguous(),
                input_norm=take(f"{at}input_layernorm.weight"),
                post_norm=take(f"{at}post_attention_layernorm.weight"),
            )
        )
    embed = take("model.embed_tokens.weight").contiguous()
    head = take("lm_head.weight") if "lm_head.weight" in tensors else embed
    return Target(shape, tuple(taps), embed, head, take("model.norm.weight"), tuple(layers))


def random_tensors(shape: Shape, seed: int, std: float = 0.04) -> dict[str, Tensor]:
    """A seeded random llama under checkpoint names, for tests and for timing without weights."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=g) * std

    c, h, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out = {
        "model.embed_tokens.weight": matrix(shape.vocab, c),
        "model.norm.weight": torch.ones(c),
    }
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        out[f"{at}self_attn.q_proj.weight"] = matrix(h, c)
        out[f"{at}self_attn.k_proj.weight"] = matrix(k, c)
        out[f"{at}self_attn.v_proj.weight"] = matrix(k, c)
        out[f"{at}self_attn.o_proj.weight"] = matrix(c, h)
        out[f"{at}mlp.gate_proj.weight"] = matrix(shape.mlp, c)
        out[f"{at}mlp.up_proj.weight"] = matrix(shape.mlp, c)
        out[f"{at}mlp.down_proj.weight"] = matrix(c, shape.mlp)
        out[f"{at}input_layernorm.weight"] = torch.ones(c)
        out[f"{at}post_attention_layernorm.weight"] = torch.ones(c)
    return out


def load_target(
    path: Path, taps: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Target:
    """The dequantised GGUF: the same weights that the runtime serves."""
    from dflash_chat.runtime.weights import load_dequantized

    config, tensors = load_dequantized(path, torch.float32)
    return build_target(shape_of(config), tensors, taps, device, dtype)


@torch.no_grad()
def full_forward(target: Target, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Causal forward of [N, T] ids: features [N, T, K C] and the last hidden states [N, T, C]."""
    shape = target.shape
    n, t = tokens.shape
    h, g, d = shape.heads, shape.kv_heads, shape.head_dim
    cos, sin = rope_tables(shape, t, target.device)
    x = F.embedding(tokens, target.embed)  # [N, T, C]
    features = x.new_empty(n, t, target.feature_width)
    slots = {tap: i for i, tap in enumerate(target.taps)}
    for i, layer in enumerate(target.layers):
        qkv = F.linear(rms_norm(x, layer.input_norm, shape.eps), layer.qkv)
        q, k, v = (
            part.view(n, t, -1, d).transpose(1, 2)
            for part in qkv.tensor_split((h * d, (h + g) * d), dim=-1)
        )
        k, v = (part.repeat_interleave(h // g, dim=1) for part in (rotate(k, cos, sin), v))
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).reshape(n, t, h * d), layer.o)
        gate, up = F.linear(rms_norm(x, layer.post_norm, shape.eps), layer.gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer.down)
        if i in slots:
            features[:, :, slots[i] * shape.hidden : (slots[i] + 1) * shape.hidden] = x
    return features, rms_norm(x, target.norm, shape.eps)


@torch.no_grad()
def features_of(target: Target, tokens: Tensor, chunk: int = 64) -> Tensor:
    """Features [N, T, K C] of many sequences, a chunk of rows at a time."""
    return torch.cat([full_forward(target, part.long())[0] for part in torch.split(tokens, chunk)])


class Decoder:
    """Lockstep decoding of `rows` sequences up to `length` positions.

    Owns the KV cache, the token and feature buffers, and the position. `step` reads the tokens at
    the position, stores their K, V and features there, and returns logits; `put` writes the next
    tokens and moves the position.
    """

    def __init__(self, target: Target, rows: int, length: int) -> None:
        shape, device = target.shape, target.device
        self.target = target
        self.rows, self.length = rows, length
        cache = (shape.layers, rows, shape.kv_heads, length, shape.head_dim)
        self.k_cache = torch.zeros(cache, dtype=target.dtype, device=device)
        self.v_cache = torch.zeros(cache, dtype=target.dtype, device=device)
        self.tokens = torch.zeros(rows, length, dtype=torch.int32, device=device)
        self.features = torch.zeros(
            rows, length, target.feature_width, dtype=target.dtype, device=device
        )
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.cos, self.sin = rope_tables(shape, length, device)

    def reset(self) -> None:
        self.position.zero_()

    def step(self) -> Tensor:
        """Logits [N, V] after the tokens at the current position."""
        return self._step_triton() if self.target.device.type == "cuda" else self._step_plain()

    def put(self, tokens: Tensor) -> None:
        """Write the next tokens and move on; no row may be at the end of its buffer."""
        self.position += 1
        self.tokens.index_copy_(1, self.position, tokens[:, None].to(torch.int32))

    def _step_triton(self) -> Tensor:
        from dflash_chat.training import kernels

        target, eps = self.target, self.target.shape.eps
        slots = {tap + 1: i for i, tap in enumerate(target.taps)}
        ids = self.tokens.index_select(1, self.position)[:, 0]
        x = F.embedding(ids, target.embed)  # [N, C], updated in place below
        y: Tensor | None = None
        for i, layer in enumerate(target.layers):
            z = kernels.add_rms_norm(
                x, y, layer.input_norm, eps, position=self.position, slot=slots.get(i, 0),
                features=self.features if i in slots else None,
            )  # fmt: skip
            o = kernels.decode_attention(
                F.linear(z, layer.qkv), self.k_cache[i], self.v_cache[i], self.cos, self.sin,
                self.position,
            )  # fmt: skip
            z = kernels.add_rms_norm(x, F.linear(o, layer.o), layer.post_norm, eps)
            y = F.linear(kernels.silu_mul(F.linear(z, layer.gate_up)), layer.down)
        last = len(target.layers)
        z = kernels.add_rms_norm(
            x, y, target.norm, eps, position=self.position, slot=slots.get(last, 0),
            features=self.features if last in slots else None,
        )  # fmt: skip
        return F.linear(z, target.head)

    def _step_plain(self) -> Tensor:
        target, shape = self.target, self.target.shape
        n, h, g, d = self.rows, shape.heads, shape.kv_heads, shape.head_dim
        t = int(self.position)
        cos, sin = self.cos[t], self.sin[t]
        x = F.embedding(self.tokens[:, t], target.embed)
        slots = {tap: i for i, tap in enumerate(target.taps)}
        for i, layer in enumerate(target.layers):
            qkv = F.linear(rms_norm(x, layer.input_norm, shape.eps), layer.qkv)
            q, k, v = (part.view(n, -1, d) for part in qkv.tensor_split((h * d, (h + g) * d), -1))
            self.k_cache[i, :, :, t] = rotate(k, cos, sin)
            self.v_cache[i, :, :, t] = v
            k, v = self.k_cache[i, :, :, : t + 1], self.v_cache[i, :, :, : t + 1]
            q = rotate(q, cos, sin).view(n, g, h // g, d)
            o = F.scaled_dot_product_attention(q, k, v)
            x = x + F.linear(o.reshape(n, h * d), layer.o)
            gate, up = F.linear(rms_norm(x, layer.post_norm, shape.eps), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
            if i in slots:
                self.features[:, t, slots[i] * shape.hidden : (slots[i] + 1) * shape.hidden] = x
        return F.linear(rms_norm(x, target.norm, shape.eps), target.head)
