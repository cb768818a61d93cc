"""Packed weights as the CUDA kernels read them: the only copy on a GPU, for blocks and prompts.

A dense weight is its own layout. A quantised one becomes a `KernelWeight` in `to`, and the file's
layout is let go. Imported only where the kernels run: it needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime.kernels import expert_weights, forms, unpack
from dflash_chat.runtime.kernels import linear as linear_kernel
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.quant import Experts, Packed
from dflash_chat.runtime.quant.dense import DenseWeight


@dataclass
class KernelWeight:
    """A quantised weight for bf16 activations.

    `form` is `kernels.linear`'s for a projection, and a MoeWeight for stacked experts.
    """

    form: forms.Fp8 | forms.Int4 | forms.Int8 | MoeWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K)."""
        return self.form.shape if isinstance(self.form, MoeWeight) else forms.shape(self.form)

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return self.form.format if isinstance(self.form, MoeWeight) else forms.kind(self.form)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        if isinstance(self.form, MoeWeight):
            return self.form.nbytes
        return sum(part.nbytes for part in self.form if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[.., N, K], formed in fp32."""
        if isinstance(self.form, MoeWeight):
            return self.form.dequantize().to(dtype)
        return forms.dequantize(self.form).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]."""
        form = self.form
        if isinstance(form, forms.Fp8):
            gathered = form.weight.view(torch.uint8)[ids].view(form.weight.dtype)
            form = forms.Fp8(gathered, form.scale[ids])
        elif isinstance(form, forms.Int8):
            form = forms.Int8(*(part[ids] for part in form))
        elif isinstance(form, forms.Int4):
            zero = None if form.zero is None else form.zero[:, ids]
            form = forms.Int4(form.words[:, ids], form.scale[:, ids], zero)
        else:
            return self.dequantize(torch.bfloat16)[ids]
        return KernelWeight(form).dequantize(torch.bfloat16)

    def expert(self, e: int) -> KernelWeight:
        """The matrix of expert `e`, a view."""
        assert isinstance(self.form, MoeWeight), self.kernel
        one = self.form.expert(e)
        assert not isinstance(one, Tensor), self.kernel
        return KernelWeight(one)

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Already there."""
        assert dtype == torch.bfloat16, dtype
        return self

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]: our kernel for a block's rows, cuBLAS for a prompt's."""
        form = self.form
        assert not isinstance(form, MoeWeight), f"{form.shape} multiplies no rows"
        if len(x) <= linear_kernel.MAX_ROWS:
            return linear_kernel.matmul(x, form)
        if isinstance(form, forms.Fp8 | forms.Int8):
            return F.linear(x, form.weight.to(x.dtype)).mul_(form.scale)
        return F.linear(x, unpack.unpack(form, x.dtype))

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """Weights are joined before `to`."""
        return None


def fp8(weight: Tensor, scale: Tensor) -> KernelWeight:
    """weight e4m3 [.., N, K], scale [.., N, 1]."""
    per_row = scale.squeeze(-1).float().contiguous()
    return KernelWeight((forms.Fp8 if weight.dim() == 2 else MoeWeight)(weight, per_row))


def int8(weight: DenseWeight) -> KernelWeight:
    """A copy of a head [N, K], by which it is screened."""
    return KernelWeight(forms.round_to_int8(weight.weight))


def int4(q: Tensor, scale: Tensor, zero: Tensor | None) -> KernelWeight:
    """q uint8 [N, K] in 0..15, scale and zero [N, G]: w = (q − zero)·scale, zero 8 if None."""
    return KernelWeight(_int4(q, scale, zero))


def int4_experts(experts: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> KernelWeight:
    """The same for each expert, one by one, since a nibble becomes 8 bytes on the way."""
    stacked = expert_weights.stack([MoeWeight(*_int4(*expert)) for expert in experts])
    return KernelWeight(stacked)


def _int4(q: Tensor, scale: Tensor, zero: Tensor | None) -> forms.Int4:
    offset = None if zero is None else (8 - zero.to(scale.dtype)) * scale
    return forms.pack_int4(q, scale, offset)


def linear(weight: Packed) -> forms.Weight:
    """For `kernels.linear`. Nothing is copied."""
    if isinstance(weight, DenseWeight):
        return weight.weight
    if isinstance(weight, KernelWeight) and not isinstance(weight.form, MoeWeight):
        return weight.form
    raise CheckpointError(f"weights of kind {type(weight).__name__} have no CUDA kernel")


def has_experts(weight: Packed | Experts) -> bool:
    """Whether `experts` takes the weight."""
    return isinstance(weight, DenseWeight | KernelWeight)


def experts(weight: Packed | Experts) -> MoeWeight:
    """For `kernels.moe` and `kernels.grouped`: stacked experts [E, N, K], or the projection [N, K]
    beside them.
    """
    if isinstance(weight, DenseWeight):
        return MoeWeight(weight.weight)
    if isinstance(weight, KernelWeight):
        form = weight.form
        assert not isinstance(form, forms.Int8), "of a head alone"
        return form if isinstance(form, MoeWeight) else MoeWeight(*form)
    raise CheckpointError(f"experts of kind {type(weight).__name__} have no CUDA kernel")
