"""compressed-tensors `pack-quantized` int4: w = (u - 8)·s, or (u - z)·s with zero points.

Source: the library's PackedQuantizationCompressor. u and z are nibbles of int32 words; s belongs to
a group of K/G weights of a row, and G = 1 is one scale per row. Element i of a row lies in word
i // 8 at bit 4·(i mod 8), so that byte j of a row, read as uint8, holds element 2j in its low
nibble and 2j + 1 in its high one. In memory:

    packed  int32 [N, ⌈K/8⌉]   the file's bytes
    scale   [N, G]             in the file's dtype
    zero    uint8 [N, G]       z in 0..15; None if symmetric (z = 8)

Stacked experts have a leading dimension E. Four bits stay four bits, on a device as in the file;
where our kernels run, in their layout instead of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime import kernels
from dflash_chat.runtime.kernels import forms
from dflash_chat.runtime.quant import Packed, Parts, cpu
from dflash_chat.runtime.quant.dense import FLOATS, DenseWeight
from dflash_chat.runtime.quant.scheme import Scheme, scheme

PARTS = {"packed", "scale", "zero_point", "shape", "g_idx"}


@dataclass
class Int4GroupWeight:
    """The tensors of the file's head; `dtype` is that of the activations."""

    shape: tuple[int, ...]
    packed: Tensor  # int32 [.., N, ⌈K/8⌉]
    scale: Tensor  # [.., N, G]
    zero: Tensor | None  # uint8 [.., N, G]
    dtype: torch.dtype = torch.float32

    @property
    def group(self) -> int:
        """Weights per scale; K if there is one scale per row."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def kernel(self) -> str:
        """What multiplies, in a word."""
        return "dequantising"

    @property
    def nbytes(self) -> int:
        """Bytes held now; of the mapped file, where they are views of it."""
        zero = 0 if self.zero is None else self.zero.nbytes
        return self.packed.nbytes + self.scale.nbytes + zero

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[.., N, K], formed in fp32, where only the product is rounded."""
        q = self._q().float().view(*self.scale.shape, self.group)  # [.., N, G, K/G]
        zero = 8 if self.zero is None else self.zero[..., None]
        return q.sub_(zero).mul_(self.scale[..., None]).flatten(-2).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]."""
        zero = None if self.zero is None else self.zero[ids]
        shape = (len(ids), self.shape[-1])
        gathered = Int4GroupWeight(shape, self.packed[ids], self.scale[ids], zero)
        return gathered.dequantize(self.dtype)

    def expert(self, e: int) -> Int4GroupWeight:
        """The matrix of expert `e`, a view."""
        zero = None if self.zero is None else self.zero[e]
        return replace(
            self, shape=self.shape[1:], packed=self.packed[e], scale=self.scale[e], zero=zero
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """Still 4 bits on a device. On a CPU a matrix is made ready for torch's kernels."""
        if device.type == "cpu" and len(self.shape) == 2:
            group = cpu.int4_group(self.group)
            if group and cpu.int4_serves(self.shape, dtype):
                return cpu.Int4Weight.of(self, *self._int4(group))
            if cpu.prepacking_serves(self.shape, dtype):
                return cpu.PrepackedWeight(self, dtype)
            return DenseWeight(self.dequantize(dtype))
        zero = None if self.zero is None else self.zero.to(device)
        packed, scale = self.packed.to(device), self.scale.to(device)
        moved = Int4GroupWeight(self.shape, packed, scale, zero, dtype)
        return moved._for_kernels() if kernels.serve(device, dtype) else moved

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], dequantising each time: correct, never quick."""
        return F.linear(x, self.dequantize(x.dtype))

    def joined(self, others: Sequence[Packed]) -> Packed | None:
        """One weight if all have one K, one group size, one scale dtype and one symmetry."""
        weights = [self]
        for other in others:
            if not isinstance(other, Int4GroupWeight) or other._kind() != self._kind():
                return None
            weights.append(other)
        packed = torch.cat([weight.packed for weight in weights], -2)
        scale = torch.cat([weight.scale for weight in weights], -2)
        zeros = [weight.zero for weight in weights if weight.zero is not None]
        shape = (*packed.shape[:-1], self.shape[-1])
        return Int4GroupWeight(shape, packed, scale, torch.cat(zeros, -2) if zeros else None)

    def _for_kernels(self) -> Packed:
        if not forms.int4_fits(self.shape[-1], self.group):
            return self
        from dflash_chat.runtime.quant import kernel_weights

        if len(self.shape) == 2:
            return kernel_weights.int4(self._q(), self.scale, self.zero)
        return kernel_weights.int4_experts(
            (e._q(), e.scale, e.zero) for e in map(self.expert, range(self.shape[0]))
        )

    def _kind(self) -> tuple[object, ...]:
        of_scale = (self.scale.shape[-1], self.scale.dtype)
        return (self.shape[:-2], self.shape[-1], of_scale, self.zero is None)

    def _q(self) -> Tensor:
        """uint8 [.., N, K] in 0..15."""
        pairs = self.packed.contiguous().view(torch.uint8)  # little-endian
        return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)[..., : self.shape[-1]]

    def _int4(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, scale and zero of w = (q - 8)·scale + zero, for groups of `group`, a divisor."""
        scale = self.scale.float()
        zero = torch.zeros_like(scale) if self.zero is None else (8 - self.zero.float()) * scale
        repeats = self.group // group
        return (
            self._q().contiguous(),
            scale.repeat_interleave(repeats, 1),
            zero.repeat_interleave(repeats, 1),
        )


def describe(name: str, parts: Parts) -> tuple[tuple[int, ...], Scheme]:
    """The shape and scheme of weight `name`. Raises ValueError naming the tensor that is wrong.

    Only `shape` and `g_idx` are read; of the others, dtypes and shapes.
    """
    if odd := sorted(parts.keys() - PARTS):
        raise ValueError(f"{_tensor(name, odd[0])} has no place beside {name}_packed")
    packed, scale = parts["packed"], parts.get("scale")
    if packed.dtype != torch.int32 or packed.dim() not in (2, 3) or packed.numel() == 0:
        raise ValueError(f"{name}_packed is {_described(packed)} instead of int32 [N, K/8]")
    if scale is None:
        raise ValueError(f"{name}_packed has no {name}_scale beside it")
    lead, k = tuple(packed.shape[:-1]), packed.shape[-1] * 8
    if "shape" in parts:
        k = _columns(name, parts["shape"], packed)
    groups = scale.shape[-1] if scale.dim() else 0
    fits = tuple(scale.shape[:-1]) == lead and groups > 0 and k % groups == 0
    if scale.dtype not in FLOATS or not fits:
        raise ValueError(f"{name}_scale is {_described(scale)}, which does not divide {(*lead, k)}")
    if "zero_point" in parts:
        zero = parts["zero_point"]
        wanted = (*lead[:-1], -(-lead[-1] // 8), groups)
        if zero.dtype != torch.int32 or tuple(zero.shape) != wanted:
            raise ValueError(f"{name}_zero_point is {_described(zero)} instead of int32 {wanted}")
    if "g_idx" in parts:
        in_order = torch.arange(k) // (k // groups)
        if not torch.equal(parts["g_idx"].flatten().long(), in_order):
            raise ValueError(f"{name}_g_idx puts groups out of order, which is not supported")
    scales = [f"group {k // groups}"] + ["channel"] * (groups == 1)
    return (*lead, k), scheme("4-bit int", "zero_point" not in parts, *scales)


def pack(parts: Parts) -> Packed:
    """parts: `packed`, `scale`, and `zero_point` int32 [⌈N/8⌉, G] and `shape` [.., K] if stored."""
    packed, scale = parts["packed"], parts["scale"]
    k = int(parts["shape"].flatten()[-1]) if "shape" in parts else packed.shape[-1] * 8
    zero = _unpack_rows(parts["zero_point"], packed.shape[-2]) if "zero_point" in parts else None
    return Int4GroupWeight((*packed.shape[:-1], k), packed, scale, zero)


def _columns(name: str, stored: Tensor, packed: Tensor) -> int:
    if stored.dtype not in (torch.int32, torch.int64) or stored.numel() not in (2, packed.dim()):
        raise ValueError(f"{name}_shape is {_described(stored)} instead of int64 [2]")
    shape: list[int] = stored.flatten().tolist()
    rows = list(packed.shape[-len(shape) : -1])
    if shape[:-1] != rows or -(-shape[-1] // 8) != packed.shape[-1]:
        raise ValueError(
            f"{name}_packed is {_described(packed)}, not 4 bits for {name}_shape {shape}"
        )
    return shape[-1]


def _unpack_rows(words: Tensor, rows: int) -> Tensor:
    """int32 [.., ⌈N/8⌉, G] -> uint8 [.., N, G]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]  # [8, 1]
    nibbles = (words[..., None, :] >> shifts & 15).to(torch.uint8)  # [.., ⌈N/8⌉, 8, G]
    return nibbles.flatten(-3, -2)[..., :rows, :].contiguous()


def _tensor(name: str, part: str) -> str:
    return name if part == "weight" else f"{name}_{part}"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
