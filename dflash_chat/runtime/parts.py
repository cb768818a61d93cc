"""What one decoder layer consists of, for whoever runs it in another way than its own `__call__`.

Every architecture describes its layers in these terms, the drafter too; `fused.py` runs them with
our kernels. Knows names and tensors; computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dflash_chat.runtime.layers import RMSNorm
from dflash_chat.runtime.quant import Experts, Packed


@dataclass(frozen=True)
class AttentionParts:
    """Attention of one layer. qkv's rows are [q heads | k heads | v heads] × D, or without the v
    heads if `values_are_keys`; `frequencies` are the rotary ones, fp64 [D/2].
    """

    qkv: Packed
    o_proj: Packed
    q_norm: Tensor | None  # [D], with k_norm
    k_norm: Tensor | None
    v_norm: bool  # an RMSNorm without weight on values
    values_are_keys: bool
    frequencies: Tensor
    scale: float
    window: int  # 0: full attention
    causal: bool


@dataclass(frozen=True)
class MoeParts:
    """Routed experts beside the dense MLP. `router_norm` holds every factor between the residual's
    weight-less norm and `proj`.
    """

    router_norm: Tensor  # [C]
    proj: Tensor  # [E, C]
    per_expert_scale: Tensor  # fp32 [E]
    top_k: int
    input_norm: Tensor  # [C]
    output_norm: Tensor  # [C]
    dense_output_norm: Tensor  # [C]
    gate_up: Experts  # [E, 2I, C]
    down: Experts  # [E, C, I]


@dataclass(frozen=True)
class LayerParts:
    """x → r = x + n(attention(n(x))) → (r + n(mlp(n(r)))) · scalar; what is None is left out."""

    attention: AttentionParts
    gate_up: Packed
    down: Packed
    activation: str  # "silu" or "gelu_tanh"
    input_norm: Tensor  # [C]
    attention_output_norm: Tensor | None
    mlp_input_norm: Tensor
    mlp_output_norm: Tensor | None
    scalar: Tensor | None  # one element
    moe: MoeParts | None
    eps: float


class PreNormLayer(Protocol):
    """What the layers of Llama, Qwen3 and the drafter have in common."""

    qkv: Packed
    o_proj: Packed
    gate_up: Packed
    down_proj: Packed
    head_dim: int
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    @property
    def q_norm(self) -> Tensor | None:
        """[D], or None without such norms."""

    @property
    def k_norm(self) -> Tensor | None:
        """[D], or None without such norms."""


def pre_norm(
    layer: PreNormLayer, frequencies: Tensor, window: int = 0, causal: bool = True
) -> LayerParts:
    """Such a layer: two norms, gated SiLU, scores over √D."""
    return LayerParts(
        attention=AttentionParts(
            qkv=layer.qkv,
            o_proj=layer.o_proj,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            v_norm=False,
            values_are_keys=False,
            frequencies=frequencies,
            scale=layer.head_dim**-0.5,
            window=window,
            causal=causal,
        ),
        gate_up=layer.gate_up,
        down=layer.down_proj,
        activation="silu",
        input_norm=weight_of(layer.input_layernorm),
        attention_output_norm=None,
        mlp_input_norm=weight_of(layer.post_attention_layernorm),
        mlp_output_norm=None,
        scalar=None,
        moe=None,
        eps=layer.input_layernorm.eps,
    )


def weight_of(norm: RMSNorm) -> Tensor:
    """The weight of a norm that has one."""
    assert norm.weight is not None
    return norm.weight
