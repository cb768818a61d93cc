"""The blocks that every architecture and the drafter are composed of. Batch 1: no batch dimension.

Letters: T tokens of the block, S visible rows, H query heads, G kv heads, D head dim, C hidden.
Knows arithmetic only; caches and weights come in as arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm:
    """x · w / rms(x) over the last dimension, accumulated in fp32.

    On the CPU it is written as the layer norm of [x, −x], whose mean is zero and whose variance is
    x's mean square: one fused kernel instead of the ten that `rms_norm` decomposes into there.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight  # [C], or [heads, C] for one weight per head
        self.eps = eps
        self._shared = weight if weight.dim() == 1 else None
        self._twice = torch.cat([weight, weight]) if weight.dim() == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        size = x.shape[-1]
        if x.is_cuda:
            out = F.rms_norm(x, (size,), self._shared, self.eps)
        else:
            both = torch.cat([x, -x], -1)
            out = F.layer_norm(both, (2 * size,), self._twice, None, self.eps)[..., :size]
        return out if self._shared is not None else out * self.weight


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


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """Plain rotary frequencies, fp64 [D/2]."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def block_mask(
    rows: int,
    past: int,
    window: int,
    causal: bool,
    share: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """What the rows of a block may not see, added to their scores: 0 or −inf, [share·T, past+T].

    None when every row sees everything. A row at position p sees positions ≥ p − (window − 1), all
    of them if `window` is 0, and with `causal` none after p. `share` is the number of query heads
    per kv head, which `attention` stacks as rows.
    """  # fmt: skip
    if (rows == 1 or not causal) and (window == 0 or past + rows <= window):
        return None
    query = torch.arange(past, past + rows, device=device)[:, None]
    key = torch.arange(past + rows, device=device)[None]
    hidden = key > query if causal else torch.zeros_like(key > query)
    if window:
        hidden = hidden | (key <= query - window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask.repeat(share, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of one block. q: [T, H, D]; k, v: [G, S, D]; returns [T, H·D].

    The query heads of a group are stacked as rows of that group's kv head, so that keys and values
    are read once and never repeated. `mask` is `block_mask`'s.
    """
    rows, heads, dim = q.shape
    groups = k.shape[0]
    share = heads // groups
    if rows == 1:  # the same without a transpose
        one = F.scaled_dot_product_attention(q.view(1, groups, share, dim), k[None], v[None], mask)
        return one.reshape(1, heads * dim)
    packed = q.view(rows, groups, share, dim).permute(1, 2, 0, 3)  # [G, H/G, T, D]
    out = F.scaled_dot_product_attention(
        packed.reshape(1, groups, share * rows, dim), k[None], v[None], attn_mask=mask
    )
    out = out.view(groups, share, rows, dim).permute(2, 0, 1, 3)  # [T, G, H/G, D]
    return out.reshape(rows, heads * dim)


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a fused projection: [T, 2I] → [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
