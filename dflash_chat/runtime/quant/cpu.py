"""CPU matmuls: 4-bit weights by torch's int4 kernel, all others by oneDNN's prepacked linear.

Which kernel serves which weight is fixed by dtype, shape and CPU, and never tuned at run time. A
row's result does not depend on the rows beside it (up to `INT4_MAX_ROWS` rows), so that verifying
a block gives bit for bit what decoding its tokens one by one gives:

- int4 sums each output over K in one order, whatever the number of rows;
- oneDNN does so from two rows on, so a single row is padded to two, which costs nothing measurable.

Drafts need no such care: `Int8Copy` rounds all rows of a call together, for fbgemm.

Knows kernels and their layouts. Does not know block formats: they hand over q, scale and zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime.quant import Packed

INT4_GROUPS = (256, 128, 64, 32)
ROUNDED_AT_ONCE = 4096  # rows: bounds what `Int8Copy` needs while it is made
INT4_MAX_ROWS = 96  # beyond, dequantising once per call and one bf16 matmul are faster


def int4_serves(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the int4 kernel takes this weight; it is vectorised for AVX2 and AVX-512 only."""
    fits = len(shape) == 2 and shape[0] % 16 == 0 and shape[1] % INT4_GROUPS[-1] == 0
    return _vectorised() and fits and dtype == torch.bfloat16


def int4_group(group: int) -> int | None:
    """The largest group of the int4 kernel that divides `group`, if any does."""
    return next((served for served in INT4_GROUPS if group % served == 0), None)


def int8_serves(dtype: torch.dtype) -> bool:
    """Whether fbgemm multiplies drafts by int8 weights."""
    built = "fbgemm" in torch.backends.quantized.supported_engines
    return built and _vectorised() and dtype == torch.bfloat16


def prepacking_serves(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether oneDNN takes this weight."""
    if len(shape) != 2 or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@dataclass
class Int4Weight:
    """4-bit groups of `INT4_GROUPS` for bf16 activations: w = (q - 8)·scale + zero.

    scale and zero are bf16, each weight is formed in fp32 and never rounded. `source` is the exact
    weight, which serves long prompts and embeddings.
    """

    source: Packed
    nibbles: Tensor  # uint8 [N, K/2], in the kernel's own order
    scales_and_zeros: Tensor  # bf16 [G, N, 2]

    @classmethod
    def of(cls, source: Packed, q: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """q: uint8 [N, K] in 0..15; scale, zero: fp32 [N, G]."""
        nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        pairs = torch.stack((scale, zero), dim=-1).transpose(0, 1)  # [G, N, 2]
        return cls(source, nibbles, pairs.bfloat16().contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.source.shape

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "int4"

    @property
    def nbytes(self) -> int:
        """Bytes of the kernel's copy and of the source, which may be a view of the mapped file."""
        return self.source.nbytes + self.nibbles.nbytes + self.scales_and_zeros.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] of the source, exact in fp32."""
        return self.source.dequantize(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> bf16 [T, K]."""
        return self.source.rows(ids).bfloat16()

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Made ready again from the source."""
        return self.source.to(device, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x: bf16 [T, K] -> bf16 [T, N]."""
        assert x.dtype == torch.bfloat16, f"x {x.dtype}"
        if x.shape[0] > INT4_MAX_ROWS:
            return F.linear(x, self.source.dequantize(torch.bfloat16))
        group = self.shape[1] // self.scales_and_zeros.shape[0]
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.nibbles, group, self.scales_and_zeros
        )
        return result

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """The kernel's layout does not join; join before `to`."""
        return None


@dataclass
class Int8Copy:
    """A copy that only drafts: int8 with a scale per row, as fbgemm lays it out.

    A call rounds its activations to 7 bits with one scale for all rows: without VNNI sums of more
    would not fit. So a row's result depends on the rows beside it.
    """

    shape: tuple[int, ...]
    layout: torch.ScriptObject = field(repr=False)

    @classmethod
    def of(cls, source: Packed) -> Self:
        """Rounded from a weight [N, K], which it does not keep."""
        rows = torch.split(torch.arange(source.shape[0]), ROUNDED_AT_ONCE)
        q, scale = zip(*(_rounded(source.rows(chunk).float()) for chunk in rows), strict=True)
        scales = torch.cat(scale)
        chosen = torch.backends.quantized.engine
        with warnings.catch_warnings():
            # torch is about to drop tensors of this kind, not fbgemm; nothing else packs for it
            warnings.filterwarnings("ignore", ".*quantize", UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(torch.cat(q), scales, zeros, 0)
            try:
                torch.backends.quantized.engine = "fbgemm"
                return cls(source.shape, torch.ops.quantized.linear_prepack(weight, None))
            finally:
                torch.backends.quantized.engine = chosen

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, and of each row's scale, zero point and sum."""
        return self.shape[0] * (self.shape[1] + 12)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], exact in fp32."""
        weight, _ = torch.ops.quantized.linear_unpack(self.layout)
        exact: Tensor = weight.dequantize()
        return exact.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> bf16 [T, K]."""
        return self.dequantize(torch.bfloat16)[ids]

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """The same: it serves a CPU's bf16 only."""
        return self

    def matmul(self, x: Tensor) -> Tensor:
        """x: bf16 [T, K] -> bf16 [T, N]."""
        assert x.dtype == torch.bfloat16, f"x {x.dtype}"
        wide: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.layout, True)
        return wide.bfloat16()

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """The kernel's layout does not join; join before `of`."""
        return None


@dataclass
class PrepackedWeight:
    """A dense fp32 or bf16 copy in oneDNN's layout, made by the first matmul.

    An embedding that is never multiplied by therefore costs nothing beyond its source.
    """

    source: Packed
    dtype: torch.dtype
    _prepacked: Tensor | None = field(default=None, repr=False)  # [N, K], opaque

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.source.shape

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "oneDNN"

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, if made, and of the source, which may be a view of the mapped file."""
        return self.source.nbytes + (0 if self._prepacked is None else self._prepacked.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] of the source, exact in fp32."""
        return self.source.dequantize(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]."""
        return self.source.rows(ids).to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Made ready again from the source."""
        return self.source.to(device, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]; the first call packs."""
        assert x.dtype == self.dtype, f"x {x.dtype}, weight {self.dtype}"
        if self._prepacked is None:
            dense = self.source.dequantize(self.dtype).contiguous()
            self._prepacked = torch.ops.mkldnn._reorder_linear_weight(dense, 8)
        single = x.shape[0] == 1
        rows = F.pad(x, (0, 0, 0, 1)) if single else x.contiguous()
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._prepacked, None, "none", [], ""
        )
        return result[:1] if single else result

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """oneDNN's layout does not join; join before `to`."""
        return None


def _vectorised() -> bool:
    """Whether this CPU has AVX2 or more, and torch uses it."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _rounded(wide: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and fp32 scales [N] of rows [N, K]."""
    scale = wide.abs().amax(1).clamp(min=1e-30) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale
