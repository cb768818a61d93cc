"""Pairs of published shapes with seeded random weights, for measuring without a download.

Projections are normal with variance 1/K, so that activations neither die nor explode; norms are
near 1. 4- and 8-bit weights are drawn in their packed form. Values mean nothing; shapes, formats
and bytes are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflash_chat.errors import UsageError
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight

QUANTS = ("bf16", "fp8", "int4")
GROUP = 32  # of int4: divides 704 and 2112


@dataclass(frozen=True)
class Shapes:
    """Raw configs as published; `taps` and the rest of the drafter are inside its config."""

    target: dict[str, Any]
    drafter: dict[str, Any]


def _gemma(hidden: int, inner: int, depth: int, heads: int, groups: int, full_groups: int,
           **moe: int | bool) -> dict[str, Any]:  # fmt: skip
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(depth)]
    return {
        "model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": groups,
        "num_global_key_value_heads": full_groups, "head_dim": 256, "global_head_dim": 512,
        "attention_k_eq_v": True, "sliding_window": 1024, "layer_types": kinds,
        "vocab_size": 262144, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144,
        "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
            },
        },
        **moe,
    }  # fmt: skip


def _qwen3(hidden: int, inner: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": tied,
    }  # fmt: skip


def _drafter(target: dict[str, Any], inner: int, mask: int, taps: list[int], sliding: int,
             theta: float = 1e6) -> dict[str, Any]:  # fmt: skip
    depth = 5
    return {
        "hidden_size": target["hidden_size"], "intermediate_size": inner,
        "num_hidden_layers": depth, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": theta, "block_size": 16,
        "vocab_size": target["vocab_size"], "num_target_layers": target["num_hidden_layers"],
        "layer_types": ["sliding_attention"] * sliding + ["full_attention"] * (depth - sliding),
        "sliding_window": 2048,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": taps},
    }  # fmt: skip


def _pairs() -> dict[str, Shapes]:
    moe = {
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    }  # fmt: skip
    gemma26 = _gemma(2816, 2112, 30, 16, 8, 2, **moe)
    gemma31 = _gemma(5376, 21504, 60, 32, 16, 4)
    qwen8, qwen4 = _qwen3(4096, 12288, tied=False), _qwen3(2560, 9728, tied=True)
    qwen_taps = [1, 9, 17, 25, 33]
    return {
        "gemma-4-26b-a4b": Shapes(gemma26, _drafter(gemma26, 5632, 4, [1, 6, 11, 17, 22, 27], 4)),
        "gemma-4-31b": Shapes(gemma31, _drafter(gemma31, 10752, 4, [1, 12, 23, 35, 46, 57], 4)),
        "qwen3-8b": Shapes(qwen8, _drafter(qwen8, 12288, 151669, qwen_taps, 0)),
        "qwen3-4b": Shapes(qwen4, _drafter(qwen4, 9728, 151669, qwen_taps, 0)),
    }


def shapes(name: str) -> Shapes:
    """The published shapes of a pair. Raises UsageError for a name without them."""
    known = _pairs()
    if name not in known:
        raise UsageError(f"no published shapes for {name!r}", f"known: {', '.join(known)}")
    return known[name]


class RandomWeights(Mapping[str, Packed]):
    """Weights made on `device` when they are asked for, the same for the same seed and name.

    On the meta device they are outlines.
    """

    def __init__(
        self, tensors: Mapping[str, tuple[int, ...]], quant: str, device: torch.device,
        dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        self.tensors, self.quant, self.device, self.dtype = tensors, quant, device, dtype
        self._seeds = {name: seed * 100_003 + i for i, name in enumerate(tensors)}

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Packed:
        shape = self.tensors[name]
        generator = None
        if self.device.type != "meta":
            generator = torch.Generator(self.device).manual_seed(self._seeds[name])
        kept = any(part in name for part in ("embed_tokens", "lm_head", "router"))
        if len(shape) > 1 and not kept and self.quant == "int4":
            return self._int4(shape, generator)
        deviation = 0.05 if len(shape) == 1 else shape[-1] ** -0.5
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in made if len(shape) == 3 else [made]:
            part.normal_(0, deviation, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return DenseWeight(made.add_(1).mul_(shape[0] ** -0.25))  # scores of a sane spread
        if len(shape) == 1:
            return DenseWeight(made.add_(1))
        if kept or self.quant == "bf16":
            return DenseWeight(made)
        scale = torch.full((*shape[:-1], 1), 1 / 64, dtype=torch.float32, device=self.device)
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        weight.copy_(made.mul_(64))
        return Float8Weight(weight, scale, (1, shape[-1]), self.dtype)

    def _int4(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Packed:
        *rows, columns = shape
        limits = torch.iinfo(torch.int32)
        packed = torch.empty(*rows, columns // 8, dtype=torch.int32, device=self.device)
        packed.random_(limits.min, limits.max, generator=generator)
        if generator is not None:  # else there are no numbers, and many experts
            for part in packed if len(rows) > 1 else [packed]:
                _balance(part)
        deviation = (columns * 17.5) ** -0.5  # what −7 … 7 and another 0 have as variance
        scale: Tensor = torch.full(
            (*rows, columns // GROUP), deviation, dtype=self.dtype, device=self.device
        )
        return Int4GroupWeight(shape, packed, scale, None, self.dtype)


def _balance(packed: Tensor) -> None:
    """Nibbles of 0, which mean −8, become 8, which mean 0: numbers with a mean would make all rows
    alike but for its sign, which rounding turns.
    """
    some = packed | packed >> 1
    some |= some >> 2
    packed |= (~some & 0x11111111) << 3
