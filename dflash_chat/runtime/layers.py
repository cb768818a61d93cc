"""The blocks that every architecture and the drafter are composed of. Batch 1: no batch dimension.

Letters: T tokens of the block, S visible rows, H query heads, G kv heads, D head dim, C hidden.
Knows arithmetic only; caches and weights come in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime import flash, kernels
from dflash_chat.runtime.cache import Geometry, KVCache, barred
from dflash_chat.runtime.quant import Experts
from dflash_chat.runtime.width import MAX_ROWS

GRAIN = 64  # slots that a CPU's attention is shown at a time
QUERIES = 4  # that it is given at a time, …
WIDE_QUERIES = 16  # … in fp32 and heads of more than 64, where Intel's MKL has two orders of sums


class RMSNorm:
    """x · w / rms(x) over the last dimension, accumulated in fp32; without a weight, x / rms(x).

    On the CPU it is written as the layer norm of [x, −x], whose mean is zero and whose variance is
    x's mean square: one fused kernel instead of the ten that `rms_norm` decomposes into there.
    """

    def __init__(self, weight: Tensor | None, eps: float) -> None:
        self.weight = weight  # [C], or [heads, C] for one weight per head
        self.eps = eps
        self._per_head = weight if weight is not None and weight.dim() == 2 else None
        self._shared = weight if self._per_head is None else None
        self._twice = None if self._shared is None else torch.cat([self._shared, self._shared])

    @classmethod
    def of_heads(cls, weights: Sequence[tuple[Tensor, int]], eps: float) -> RMSNorm:
        """One norm over the heads of several projections, from each one's weight [D] and number
        of heads.
        """
        return cls(torch.cat([weight.expand(heads, -1) for weight, heads in weights]), eps)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        size = x.shape[-1]
        if x.is_cuda:
            out = F.rms_norm(x, (size,), self._shared, self.eps)
        else:
            both = torch.cat([x, -x], -1)
            out = F.layer_norm(both, (2 * size,), self._twice, None, self.eps)[..., :size]
        return out if self._per_head is None else out * self._per_head


class Rope:
    """Rotary positions, half-rotate over the whole head dimension (Su et al., arXiv 2104.09864).

    The tables hold every position up to the capacity: cos and signed sin, [S, 1, D]. The sign of
    the rotated half is folded into the sine, so that applying them is a roll and a fused
    multiply-add.
    """

    def __init__(
        self, inv_freq: Tensor, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(capacity, dtype=torch.float64), inv_freq.double())
        sign = torch.cat([-torch.ones_like(inv_freq), torch.ones_like(inv_freq)])
        self.cos = angles.cos().repeat(1, 2)[:, None].to(device, dtype)  # [S, 1, D]
        self.sin = (angles.sin().repeat(1, 2) * sign)[:, None].to(device, dtype)  # [S, 1, D]

    def at(self, start: int, rows: int) -> Turn:
        """The rotation of a block whose first row stands at position `start`."""
        end = start + rows
        return Turn(self.cos[start:end], self.sin[start:end], self.cos.shape[-1] // 2)


class Turn(NamedTuple):
    """One block's rotation: cos and signed sin [T, 1, D]."""

    cos: Tensor
    sin: Tensor
    half: int

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [T, heads, D]."""
        return torch.addcmul(x * self.cos, x.roll(self.half, -1), self.sin)


def check_geometry(heads: int, kv_heads: int, head_dim: int, **sizes: int) -> None:
    """Raise ValueError naming what no model can have: sizes below 1, heads that do not form
    groups.
    """
    for name, value in (
        sizes | {"heads": heads, "kv heads": kv_heads, "head_dim": head_dim}
    ).items():
        if not 1 <= value < 2**31:
            raise ValueError(f"{name} = {value} is out of range")
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"{heads} heads on {kv_heads} kv heads of {head_dim} do not fit together")


def inverse_frequencies(head_dim: int, theta: float, rotated: float = 1.0) -> Tensor:
    """Plain rotary frequencies, fp64 [D/2]; of which only the share `rotated` is not zero."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies[int(rotated * head_dim // 2) :] = 0
    return frequencies


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Grouped-query attention of one block. q: [T, H, D]; k, v: [G, S, D]; returns [T, H·D].

    The query heads of a group are stacked as rows of that group's kv head, so that keys and values
    are read once and never repeated. `mask` is `KVCache.mask`'s; `scale` None is 1/√D.

    On a CPU a small stack is filled up to whole `QUERIES` or `WIDE_QUERIES`: torch has another
    order of sums for what may be left over.
    """
    rows, heads, dim = q.shape
    groups = k.shape[0]
    share = heads // groups
    if rows == 1:
        queries = q.view(groups, share, dim)
    else:
        queries = q.view(rows, groups, share, dim).permute(1, 2, 0, 3)  # [G, H/G, T, D]
        queries = queries.reshape(groups, share * rows, dim)
    whole = WIDE_QUERIES if q.dtype == torch.float32 and dim > 64 else QUERIES
    missing = -share * rows % whole if q.device.type == "cpu" and rows <= MAX_ROWS else 0
    if missing:
        queries = F.pad(queries, (0, 0, 0, missing))
        if mask is not None and len(mask) > 1:
            mask = F.pad(mask, (0, 0, 0, missing))
    out = F.scaled_dot_product_attention(queries[None], k[None], v[None], mask, scale=scale)[0]
    if missing:
        out = out[:, : share * rows]
    if rows > 1:
        out = out.view(groups, share, rows, dim).permute(2, 0, 1, 3)  # [T, G, H/G, D]
    return out.reshape(rows, heads * dim)


class Span(NamedTuple):
    """Rows [first, last) of a block, the slots they are shown and what they may not see of them."""

    first: int
    last: int
    shown: int
    mask: Tensor | None


class Causal:
    """Causal attention of one block in layer after layer, whatever their windows.

    Our kernel for a prompt where it serves, or flash-attn's where that is quicker; else torch's
    with a mask per kind of layer. Torch's sums on a CPU hang on how many slots it is shown. So
    there a row of a verify block is shown whole grains up to its own, and computes what it would
    alone, whatever stands behind it.
    """

    def __init__(self, cache: KVCache, rows: int, heads: int, scale: float | None = None) -> None:
        self.cache, self.rows, self.heads, self.scale = cache, rows, heads, scale
        self._spans: dict[Geometry, list[Span]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H, D]; k, v: [T, G, D], which go to the cache; returns [T, H·D]."""
        cache, geometry = self.cache, self.cache.geometries[layer]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if kernels.serve(q.device, q.dtype):
            from dflash_chat.runtime.kernels import prefill

            if self.rows >= prefill.MIN_ROWS and geometry.head_dim in prefill.CONFIGS:
                cache.write(layer, k, v)
                scale = geometry.head_dim**-0.5 if self.scale is None else self.scale
                return flash.chunk_attention(q, cache, layer, scale)
        spans = self._spans.get(geometry)
        if spans is None:
            spans = self._spans[geometry] = self._cut(geometry)
        keys, values = cache.write(layer, k, v, spans[-1].shown)
        if len(spans) == 1:
            return attention(q, keys, values, spans[0].mask, self.scale)
        parts = [
            attention(q[first:last], keys[:, :shown], values[:, :shown], mask, self.scale)
            for first, last, shown, mask in spans
        ]
        return torch.cat(parts)

    def _cut(self, geometry: Geometry) -> list[Span]:
        """The block in one span, or where grains end."""
        cache, window, share = self.cache, geometry.window, self.heads // geometry.kv_heads
        begin, end, slots = cache.length, cache.length + self.rows, cache.slots(geometry.window)
        if cache.device.type != "cpu" or self.rows > MAX_ROWS or end > slots:  # a ring is full
            mask = cache.mask(self.rows, window, True, share)
            return [Span(0, self.rows, min(end, slots), mask)]
        spans: list[Span] = []
        while (done := spans[-1].last if spans else 0) < self.rows:
            shown = (begin + done) // GRAIN * GRAIN + GRAIN
            last = min(self.rows, shown - begin)
            shown = min(shown, slots)
            slot = torch.arange(shown, device=cache.device)[None]
            position = torch.arange(begin + done, begin + last, device=cache.device)[:, None]
            mask = barred(position, slot, window, True, cache.dtype)
            spans.append(
                Span(done, last, shown, mask if last - done == 1 else mask.repeat(share, 1))
            )
        return spans


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a fused projection: [T, 2I] → [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gated_gelu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up of a fused projection, gelu by its tanh formula: [T, 2I] → [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def gated_gelu_experts(
    x: Tensor, chosen: Tensor, shares: Tensor, gate_up_proj: Experts, down_proj: Experts
) -> Tensor:
    """Each row through its chosen experts, summed by their shares in fp32.

    x: [T, C]; chosen: int64 [T, k]; shares: fp32 [T, k]. A row's sum does not depend on what the
    other rows choose.
    """
    if kernels.serve(x.device, x.dtype):
        from dflash_chat.runtime.kernels import grouped
        from dflash_chat.runtime.quant import kernel_weights

        stacks = gate_up_proj, down_proj
        if all(map(kernel_weights.has_experts, stacks)):
            return grouped.routed_experts(x, chosen, shares, *map(kernel_weights.experts, stacks))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in torch.unique(chosen).tolist():
        row, place = (chosen == e).nonzero(as_tuple=True)
        inner = gated_gelu(gate_up_proj.expert(e).matmul(x[row]))  # [rows of e, I]
        out[row] += down_proj.expert(e).matmul(inner) * shares[row, place, None]
    return out.to(x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): logits that cannot leave ±cap."""
    return torch.tanh(x / cap) * cap
