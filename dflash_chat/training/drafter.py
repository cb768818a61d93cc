"""The trainable DFlash drafter and its attention over many blocks at once.

Parameter names are the published checkpoint names. Every sequence carries A anchors; a block of B
rows [anchor, MASK × (B − 1)] sees the sequence's features strictly before its anchor, and
itself both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dflash_chat.training.target import Shape, Target, rms_norm, rope_tables, rotate

TILE = 128
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DrafterShape:
    """What the exported config says beyond the target's own numbers."""

    target: Shape
    layers: int
    block: int
    taps: tuple[int, ...]
    mask_id: int


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c, h, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(c, h, bias=False)
        self.k_proj = nn.Linear(c, k, bias=False)
        self.v_proj = nn.Linear(c, k, bias=False)
        self.o_proj = nn.Linear(h, c, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, shape.eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, shape.eps)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)


class Drafter(nn.Module):
    """fc, L layers, norm. `feature_rms` scales fc's inputs in training and is folded on export."""

    feature_rms: Tensor

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.shape = shape
        c = shape.target.hidden
        self.fc = nn.Linear(c * len(shape.taps), c, bias=False)
        self.hidden_norm = nn.RMSNorm(c, shape.target.eps)
        self.layers = nn.ModuleList(Layer(shape.target) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(c, shape.target.eps)
        self.register_buffer("feature_rms", torch.ones(c * len(shape.taps)), persistent=False)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def context(self, features: Tensor) -> Tensor:
        """c [N, S, C] of raw features [N, S, K C]."""
        weight = (self.fc.weight / self.feature_rms).to(features.dtype)
        return rms_norm(F.linear(features, weight), self.hidden_norm.weight, self.shape.target.eps)

    def forward(
        self, features: Tensor, blocks: Tensor, positions: Tensor, tables: Tensor, attend: Attend
    ) -> Tensor:
        """Final hidden states [N, Q, C] of block rows [N, Q, C] at `positions` [N, Q].

        `tables` [2, P, D] holds cos and sin; `attend` maps q [N, H, Q, D], k, v [N, G, S + Q, D] to
        [N, H, Q, D] under the mask.
        """
        shape = self.shape.target
        n, q_rows = positions.shape
        s, d, eps = features.shape[1], shape.head_dim, shape.eps
        context = self.context(features)
        cos, sin = (tables[i][positions][:, None] for i in range(2))  # [N, 1, Q, D]
        ctx_cos, ctx_sin = tables[0, :s], tables[1, :s]  # [S, D]
        x = blocks
        for layer in self._layers():
            a = layer.self_attn
            y = rms_norm(x, layer.input_layernorm.weight, eps)

            def heads(rows: Tensor) -> Tensor:
                return rows.view(n, rows.shape[1], -1, d).transpose(1, 2)

            q = rotate(rms_norm(heads(a.q_proj(y)), a.q_norm.weight, eps), cos, sin)
            k = rotate(rms_norm(heads(a.k_proj(y)), a.k_norm.weight, eps), cos, sin)
            ctx_k = rms_norm(heads(a.k_proj(context)), a.k_norm.weight, eps)
            k = torch.cat([rotate(ctx_k, ctx_cos, ctx_sin), k], dim=2)  # [N, G, S + Q, D]
            v = torch.cat([heads(a.v_proj(context)), heads(a.v_proj(y))], dim=2)
            o = attend(q, k, v).transpose(1, 2).reshape(n, q_rows, -1)
            x = x + a.o_proj(o)
            z = rms_norm(x, layer.post_attention_layernorm.weight, eps)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(z)) * layer.mlp.up_proj(z))
        return rms_norm(x, self.norm.weight, eps)


def block_positions(anchors: Tensor, block: int) -> Tensor:
    """Absolute positions [N, A B] of all block rows of anchors [N, A]."""
    steps = torch.arange(block, device=anchors.device)
    return (anchors[:, :, None] + steps).flatten(1)


def block_inputs(target: Target, tokens: Tensor, anchors: Tensor, shape: DrafterShape) -> Tensor:
    """Embeddings [N, A B, C] of [anchor, MASK × (B − 1)] for every anchor."""
    n, a = anchors.shape
    ids = torch.full((n, a, shape.block), shape.mask_id, dtype=torch.long, device=anchors.device)
    ids[:, :, 0] = tokens.gather(1, anchors).long()
    return F.embedding(ids.view(n, a * shape.block), target.embed)


def dense_mask(anchors: Tensor, context: int, block: int) -> Tensor:
    """True where a key is visible: [N, Q, S + Q]."""
    _, a = anchors.shape
    owner = torch.arange(a, device=anchors.device).repeat_interleave(block)  # [Q]
    keys = torch.arange(context, device=anchors.device)
    before = keys < anchors.repeat_interleave(block, dim=1)[:, :, None]  # [N, Q, S]
    own = (owner[:, None] == owner).expand(anchors.shape[0], -1, -1)
    return torch.cat([before, own], dim=-1)


def dense_attend(anchors: Tensor, context: int, block: int) -> Attend:
    """Attention through torch's SDPA with a dense mask."""
    mask = dense_mask(anchors, context, block)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


class FlexAttend:
    """Attention through flex_attention; anchors live in one buffer so that nothing is recompiled.

    Needs anchors sorted along each row, and context and A·B in whole tiles.
    """

    def __init__(
        self, n: int, anchors: int, context: int, block: int, device: torch.device
    ) -> None:
        q_rows = anchors * block
        assert context % TILE == 0, f"context {context} is not in tiles of {TILE}"
        assert q_rows % TILE == 0, f"{anchors} blocks of {block} are not in tiles of {TILE}"
        self.anchors = torch.zeros(n, anchors, dtype=torch.int64, device=device)
        self.context, self.block = context, block
        held = self.anchors

        def visible(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
            mine = q // block
            before = (key < context) & (key < held[b, mine])
            own = (key >= context) & ((key - context) // block == mine)
            return before | own

        self._visible = visible
        self._diagonal = torch.eye(q_rows // TILE, dtype=torch.bool, device=device)
        self._edges = torch.arange(context // TILE, device=device) * TILE
        self.mask: Any = None

    def update(self, anchors: Tensor) -> None:
        """Take this step's anchors and work out which tiles are empty, partial or full."""
        from torch.nn.attention.flex_attention import BlockMask

        self.anchors.copy_(anchors)
        n, a = anchors.shape
        tiles = anchors.view(n, -1, TILE // self.block)  # [N, Q tiles, anchors of a tile]
        last, first = tiles.amax(-1, keepdim=True), tiles.amin(-1, keepdim=True)
        full = self._edges + TILE <= first  # [N, Q tiles, S tiles]
        partial = (self._edges < last) & ~full
        own = self._diagonal.expand(n, -1, -1)
        some = torch.cat([partial, own], dim=-1)[:, None].to(torch.int32)
        every = torch.cat([full, torch.zeros_like(own)], dim=-1)[:, None].to(torch.int32)

        def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
            order = tiles.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
            return tiles.sum(-1, dtype=torch.int32), order

        q_rows = a * self.block
        mask = BlockMask.from_kv_blocks(
            *listed(some), *listed(every), BLOCK_SIZE=(TILE, TILE), mask_mod=self._visible,
            seq_lengths=(q_rows, self.context + q_rows),
        )  # fmt: skip
        if self.mask is None:
            self.mask = mask
            return
        for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            getattr(self.mask, name).copy_(getattr(mask, name))
            getattr(self.mask, f"full_{name}").copy_(getattr(mask, f"full_{name}"))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        out: Any = flex_attention(q, k, v, block_mask=self.mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out


def tables(shape: Shape, length: int, device: torch.device) -> Tensor:
    """cos and sin stacked, [2, length, D]."""
    return torch.stack(rope_tables(shape, length, device))


@torch.no_grad()
def initialise(drafter: Drafter, target: Target | None, feature_rms: Tensor, seed: int) -> None:
    """Fresh weights: seeded noise, or the target's last layers behind the last tap."""
    g = torch.Generator().manual_seed(seed)
    drafter.feature_rms.copy_(feature_rms)
    depth = drafter.shape.layers
    for name, p in drafter.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
            continue
        std = 1.0 / math.sqrt(p.shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * depth)
        p.copy_((torch.randn(p.shape, generator=g) * std).to(p.device))
    if target is None:
        return
    shape = target.shape
    h, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sources = target.layers[-depth:]
    for layer, source in zip(drafter._layers(), sources, strict=True):
        a, mlp = layer.self_attn, layer.mlp
        q_w, k_w, v_w = torch.tensor_split(source.qkv, (h, h + k))
        gate, up = source.gate_up.chunk(2)
        pairs: tuple[tuple[Any, Tensor], ...] = (
            (a.q_proj, q_w), (a.k_proj, k_w), (a.v_proj, v_w), (a.o_proj, source.o),
            (mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, source.down),
            (layer.input_layernorm, source.input_norm),
            (layer.post_attention_layernorm, source.post_norm),
        )  # fmt: skip
        for module, weight in pairs:
            module.weight.copy_(weight)
    drafter.norm.weight.copy_(target.norm)
    drafter.hidden_norm.weight.copy_(sources[min(1, depth - 1)].input_norm)
    tail = feature_rms[-shape.hidden :]
    drafter.fc.weight.mul_(0.1 * tail.mean())
    drafter.fc.weight[:, -shape.hidden :] += torch.diag(tail)
