"""A block's forward from our own kernels: 1 to 17 rows, static shapes, lengths on the device.

Nothing here waits for the device or depends on what it computes, so a CUDA graph can capture it.
A layer is eight launches for a few rows, with one more each for many or wide heads and where
several rows choose experts:

    qkv → rope, cache write, attention → its shares merged → o_proj → add and norms
        → gate_up → down → add and norms                       (experts beside the dense MLP)

Many rows or wide heads have rope and cache write as a launch of their own. The router's logits come
with the norms; gate_up finds a single row's experts itself.

Split GEMMs leave partial sums that the next kernel adds up in fp32: those of qkv in fp32, all
others, which norms wait for, in the activations' type, which is half as much to read. Knows the
order of the kernels; knows no architecture (`parts.py` describes the layers), no checkpoint and no
sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.kernels import attention, linear, moe, norms, rope, rope_attention, router
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.norms import Branch, Router
from dflash_chat.runtime.parts import AttentionParts, LayerParts
from dflash_chat.runtime.quant import kernel_weights


@dataclass(frozen=True)
class Tables:
    """cos and sin, fp32 [positions, D/2]."""

    cos: Tensor
    sin: Tensor


def tables(frequencies: Tensor, positions: int, device: torch.device) -> Tables:
    """Rotary tables of every position. frequencies: fp64 [D/2]."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies.double().cpu())
    return Tables(angles.cos().float().to(device), angles.sin().float().to(device))


class Attention:
    """q, k and v of a block, written to the cache and attended to."""

    def __init__(self, parts: AttentionParts, turns: Tables, eps: float, pdl: bool) -> None:
        self.parts, self.turns, self.eps, self.pdl = parts, turns, eps, pdl
        self.qkv = kernel_weights.linear(parts.qkv)
        self.o_proj = kernel_weights.linear(parts.o_proj)

    def __call__(self, h: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
        """h: normed [T, C] → partial sums of the output, [S, T, C] in h's dtype."""
        p = self.parts
        qkv = linear.partials(h, self.qkv, pdl=self.pdl)
        turned = qkv, p.q_norm, p.k_norm, self.turns.cos, self.turns.sin, keys, values, length
        if self._in_one(len(h), qkv.shape[2], keys):
            out = rope_attention.rope_attention(
                *turned, eps=self.eps, v_norm=p.v_norm, k_eq_v=p.values_are_keys,
                window=p.window, causal=p.causal, scale=p.scale, pdl=self.pdl,
            )  # fmt: skip
        else:
            q = rope.qk_rope_write(
                *turned, eps=self.eps, v_norm=p.v_norm, k_eq_v=p.values_are_keys, pdl=self.pdl
            )
            out = attention.block_attention(
                q, keys, values, length,
                window=p.window, causal=p.causal, scale=p.scale, pdl=self.pdl,
            )  # fmt: skip
        return linear.partials(out, self.o_proj, dtype=h.dtype, pdl=self.pdl)

    def _in_one(self, rows: int, width: int, keys: Tensor) -> bool:
        """Whether one launch does for rope and attention."""
        groups, _, dim = keys.shape
        heads = width // dim - groups * (1 if self.parts.values_are_keys else 2)
        return rope_attention.fits(rows, heads, groups, dim)


class Layer:
    """One decoder layer. The norm of its input is the previous layer's last act."""

    def __init__(self, parts: LayerParts, turns: Tables, pdl: bool) -> None:
        self.parts, self.pdl = parts, pdl
        self.attention = Attention(parts.attention, turns, parts.eps, pdl)
        self.experts = None if parts.moe is None else Experts(parts, pdl)
        if self.experts is None:
            self.gate_up = kernel_weights.linear(parts.gate_up)
            self.down = kernel_weights.linear(parts.down)

    def __call__(
        self, x: Tensor, h: Tensor, next_norm: Tensor, cache: tuple[Tensor, Tensor],
        length: Tensor, tap: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x: residual [T, C], h: x normed for this layer → both for the next one."""
        p = self.parts
        attended = Branch(self.attention(h, *cache, length), norm=p.attention_output_norm)
        if self.experts is not None:
            return self.experts(x, attended, next_norm, tap)
        pdl = self.pdl
        r, (h,) = norms.residual_norms(x, [attended], [p.mlp_input_norm], p.eps, pdl=pdl)
        inner = linear.gated(h, self.gate_up, p.activation, pdl=pdl)
        fed = linear.partials(inner, self.down, dtype=x.dtype, pdl=pdl)
        branch = Branch(fed, norm=p.mlp_output_norm)
        x, (h,) = norms.residual_norms(
            r, [branch], [next_norm], p.eps, scale=p.scalar, tap=tap, pdl=pdl
        )
        return x, h


class Experts:
    """The feed-forward half with routed experts beside the dense MLP (Gemma 4)."""

    def __init__(self, parts: LayerParts, pdl: bool) -> None:
        assert parts.moe is not None
        self.parts, self.moe, self.pdl = parts, parts.moe, pdl
        self.dense_gate_up = kernel_weights.experts(parts.gate_up)
        self.dense_down = kernel_weights.experts(parts.down)
        self.gate_up: MoeWeight = kernel_weights.experts(parts.moe.gate_up)
        self.down: MoeWeight = kernel_weights.experts(parts.moe.down)
        device = parts.moe.proj.device
        self.active = torch.zeros(1, dtype=torch.int32, device=device)  # experts of the last block
        self.dictated: Tensor | None = None  # [17, C] for the router instead of its own input

    def __call__(
        self, x: Tensor, attended: Branch, next_norm: Tensor, tap: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual and its norm for the next layer."""
        p, m, pdl = self.parts, self.moe, self.pdl
        routed_by = Router(m.router_norm, m.proj, self.dictated)
        r, (h_dense, h_moe), logits = norms.residual_norms_and_logits(
            x, [attended], [p.mlp_input_norm, m.input_norm], p.eps, routed_by, pdl=pdl
        )
        choice, at_once = None, moe.at_once(self.gate_up, len(x))
        if len(x) == 1:
            routing = router.unmade(1, len(m.proj), m.top_k, x.device, at_once)
            choice = moe.Choice(logits, m.per_expert_scale)
        else:
            routing = router.select(
                logits, m.per_expert_scale, top_k=m.top_k, at_once=at_once, pdl=pdl
            )
        self.active = routing.active
        dense, routed = moe.gate_up(
            h_dense, self.dense_gate_up, h_moe, self.gate_up, routing, choice=choice, pdl=pdl
        )
        dense, routed = moe.down(dense, self.dense_down, routed, self.down, routing, pdl=pdl)
        branches = [
            Branch(dense, norm=m.dense_output_norm),
            Branch(routed, routing.weights, m.output_norm),
        ]
        x, (h,) = norms.residual_norms(
            r, branches, [next_norm], p.eps,
            post=p.mlp_output_norm, scale=p.scalar, tap=tap, pdl=pdl,
        )  # fmt: skip
        return x, h


class Stack:
    """All layers of a target or a drafter over one cache.

    With `pdl` every kernel is launched while its predecessor still runs, and waits for it itself.
    Its own successor may start only behind that wait: three kernels deep, the programs of a GEMM
    would stand where the last one happens to leave room, and not evenly.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        norm: Tensor,
        cache: KVCache,
        positions: int,
        pdl: bool = False,
    ) -> None:
        turns: dict[tuple[float, ...], Tables] = {}  # by frequencies: few, and shared by layers
        self.cache, self.norm, self.eps = cache, norm, layers[0].eps
        self.layers = []
        for parts in layers:
            frequencies = parts.attention.frequencies
            key = tuple(frequencies.tolist())
            if key not in turns:
                turns[key] = tables(frequencies, positions, norm.device)
            self.layers.append(Layer(parts, turns[key], pdl))
        self.input_norm = layers[0].input_norm

    def __call__(
        self, x: Tensor, h: Tensor, length: Tensor, taps: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Embedded rows x [T, C] and their first norm h → final normed hidden states [T, C].

        `taps` maps layer numbers to [T, C] tensors that take those layers' outputs.
        """
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            next_norm = self.norm if last else self.layers[i + 1].parts.input_norm
            memory = self.cache.keys[i], self.cache.values[i]
            x, h = layer(x, h, next_norm, memory, length, (taps or {}).get(i))
        return h
