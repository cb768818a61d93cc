"""Packed weights as the CUDA kernels read them. Imported only where those run: it needs Triton."""

from __future__ import annotations

import torch

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.kernels import expert_weights, forms
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.quant import Experts, Packed
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight


def linear(weight: Packed) -> forms.Weight:
    """For `kernels.linear`. A dense weight is lent, not copied."""
    if isinstance(weight, DenseWeight):
        return weight.weight
    if isinstance(weight, Float8Weight):
        rows, columns = weight.block
        assert (rows, columns) == (1, weight.shape[-1]), f"fp8 blocks {weight.block}"
        return forms.Fp8(weight.weight, weight.scale.flatten().float())
    if isinstance(weight, Int4GroupWeight):
        return forms.pack_int4(*_nibbles(weight))
    raise CheckpointError(f"weights of kind {type(weight).__name__} have no CUDA kernel")


def experts(weight: Packed | Experts) -> MoeWeight:
    """For `kernels.moe`: stacked experts [E, N, K], or the dense MLP beside them [N, K]."""
    if isinstance(weight, DenseWeight):
        return MoeWeight(weight.weight)
    if isinstance(weight, Float8Weight):
        assert weight.block == (1, weight.shape[-1]), f"fp8 blocks {weight.block}"
        return MoeWeight(weight.weight, weight.scale.squeeze(-1).float())
    if isinstance(weight, Int4GroupWeight):
        q, scale, zero = _nibbles(weight)
        offset = None if zero is None else (8 - zero.to(scale.dtype)) * scale
        return expert_weights.pack_int4_experts(q, scale, offset)
    raise CheckpointError(f"experts of kind {type(weight).__name__} have no CUDA kernel")


def _nibbles(weight: Int4GroupWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q uint8 [.., N, K], scale and, unless it is symmetric, zero [.., N, G]."""
    as_bytes = weight.packed.view(torch.uint8)  # [.., N, K/2], low nibble first
    q = torch.stack([as_bytes & 15, as_bytes >> 4], -1).flatten(-2)
    return q[..., : weight.shape[-1]], weight.scale, weight.zero
