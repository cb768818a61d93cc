"""Which tensors of a safetensors folder make up one weight, and in which format.

Names are Hugging Face's and compressed-tensors': `x.weight` alone, or with companions such as
`x.weight_scale`; stacked experts as `experts.gate_up_proj` with `experts.gate_up_proj_scale`, or
one by one as `experts.7.gate_proj.weight`, which become the same stacked weight, gate rows before
up rows. What tensors say decides, and config.json must not contradict it. Reads headers, and the
few tensors that hold shapes; layouts are the business of `quant/`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dflash_chat.errors import CheckpointError, WeightsMismatchError
from dflash_chat.runtime import quant
from dflash_chat.runtime.quant import Packed, Parts, float_quantized, pack_quantized, scheme
from dflash_chat.runtime.quant.dense import FLOATS
from dflash_chat.runtime.quant.scheme import Scheme
from dflash_chat.runtime.safetensors_file import SafetensorsFolder, TensorInfo

Shape = tuple[int, ...]
Names = dict[str, str]  # part -> tensor
Infos = Mapping[str, TensorInfo]

METHODS = ("compressed-tensors", "fp8")
SUPPORTED = (
    "Supported are float32, float16 and bfloat16, and compressed-tensors' int4 (pack-quantized) "
    "and FP8 (float-quantized)."
)

_PARTS = "_(packed|scale_inv|scale|zero_point|shape|g_idx)"
_PART = re.compile(rf"(.+\.weight|.+\.experts\.(?:gate_up|down)_proj){_PARTS}")
_EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9]\d{0,5})\.(gate|up|down)_proj\.weight")
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_READ = ("shape", "g_idx")  # parts whose values say what a weight is

# Scales of quantised activations and caches: both keep the activations' dtype here.
_UNUSED = re.compile(r"[._](?:input|output|[qkv])_(?:scale|zero_point)$")

_FOREIGN = {
    "NVFP4": re.compile(r"[._](?:weight_scale_2|(?:weight|input)_global_scale)$"),
    "MXFP4": re.compile(r"_proj_(?:blocks|scales)$"),
    "AWQ or GPTQ": re.compile(r"\.(?:qweight|qzeros|scales)$"),
    "bitsandbytes": re.compile(r"\.(?:SCB|weight\.(?:absmax|quant_map|quant_state\..+))$"),
}


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the folder has it.

    `pieces[projection][expert]` are the tensors of one matrix. Without `stacked` there is one piece
    and the weight is what its tensors are; with it, the pieces' matrices are stacked.
    """

    format: str
    shape: Shape
    pieces: tuple[tuple[Names, ...], ...]
    stacked: bool = False

    def pack(self, files: SafetensorsFolder) -> Packed:
        """The weight; views of the mapped file unless stacked."""
        return self._pack(files.tensor)

    def outline(self, files: SafetensorsFolder) -> Packed:
        """The weight without its numbers, on the meta device."""

        def read(name: str) -> torch.Tensor:
            return files.tensor(name) if name.endswith("_shape") else _empty(files.tensors[name])

        return self._pack(read)

    def _pack(self, read: Callable[[str], torch.Tensor]) -> Packed:
        pack = quant.load_format(self.format).pack
        if not self.stacked:
            return pack({part: read(name) for part, name in self.pieces[0][0].items()})
        return quant.cat([pack(_stack(read, experts)) for experts in self.pieces])


def read(files: SafetensorsFolder, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Every weight of the folder by its model's name.

    Raises CheckpointError naming a tensor that is of an unknown format, has a wrong shape or dtype,
    or contradicts config.json; WeightsMismatchError naming all missing experts.
    """
    infos = files.tensors
    path = files.path
    _refuse_foreign(path, infos)
    quantization = config.get("quantization_config")
    claims = [] if quantization is None else _claims(path, quantization)
    matrices: dict[str, Names] = defaultdict(dict)
    for name in infos:
        if quantization is not None and _UNUSED.search(name):
            continue
        matched = _PART.fullmatch(name)
        stem, part = matched.groups() if matched else (name, "weight")
        matrices[stem][part] = name
    found = {}
    for stem, names in matrices.items():
        try:
            found[stem] = _matrix(stem, names, files, infos, claims)
        except ValueError as fault:
            raise CheckpointError(f"{path.name}: {fault}.", SUPPORTED) from fault
    return _fused(path, found, infos)


def _refuse_foreign(path: Path, infos: Infos) -> None:
    for name, info in infos.items():
        kinds = [kind for kind, ending in _FOREIGN.items() if ending.search(name)]
        if name.endswith("_packed") and info.dtype == torch.uint8:
            kinds.append("NVFP4 or MXFP4")
        if kinds:
            raise CheckpointError(
                f"{path.name}: tensor {name!r} is {kinds[0]}, which is not supported.", SUPPORTED
            )


def _claims(path: Path, quantization: object) -> list[Scheme]:
    """What config.json says; refused by name if it asks for more than formats."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") not in METHODS:
        raise CheckpointError(
            f"{path.name} is quantised in a way that is not supported: {str(quantization)[:80]}.",
            SUPPORTED,
        )
    transform = quantization.get("transform_config")
    if transform and not (isinstance(transform, Mapping) and not transform.get("config_groups")):
        raise CheckpointError(
            f"{path.name} rotates its activations (transform_config), which is not supported.",
            SUPPORTED,
        )
    try:
        return scheme.claimed(quantization)
    except ValueError as fault:
        raise CheckpointError(f"{path.name}: {fault}.", SUPPORTED) from fault


def _matrix(
    name: str, names: Names, files: SafetensorsFolder, infos: Infos, claims: list[Scheme]
) -> StoredWeight:
    """One weight as stored. Raises ValueError naming the tensor that is wrong."""
    parts = {
        part: files.tensor(stored) if part in _READ else _empty(infos[stored])
        for part, stored in names.items()
    }
    format_name, shape, found = _describe(name, parts)
    if found and (fault := scheme.contradiction(found, claims)):
        raise ValueError(f"{names.get('packed', name)} {fault}")
    return StoredWeight(format_name, shape, ((names,),))


def _describe(name: str, parts: Parts) -> tuple[str, Shape, Scheme | None]:
    """Format, shape and, if quantised, scheme."""
    others = sorted(parts.keys() - {"weight"})
    if "packed" in parts:
        return "pack_quantized", *pack_quantized.describe(name, parts)
    if "weight" not in parts:
        raise ValueError(f"{name}_{others[0]} has no weight beside it")
    weight = parts["weight"]
    if weight.dtype == torch.float8_e4m3fn:
        return "float_quantized", *float_quantized.describe(name, parts)
    kind = str(weight.dtype).removeprefix("torch.")
    if weight.dtype not in FLOATS:
        raise ValueError(f"{name} is {kind}, which is not supported")
    if others:
        raise ValueError(f"{name}_{others[0]} has no place beside the {kind} weight {name}")
    return "dense", tuple(weight.shape), None


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


# ── experts ─────────────────────────────────────────────────────────────────────────────────────


def _fused(path: Path, found: dict[str, StoredWeight], infos: Infos) -> dict[str, StoredWeight]:
    """The same weights with experts stacked, under the model's names."""
    stored: list[tuple[str, StoredWeight]] = []
    layers: dict[str, dict[str, dict[int, StoredWeight]]] = defaultdict(lambda: defaultdict(dict))
    for name, weight in found.items():
        if matched := _EXPERT.fullmatch(name):
            experts, number, projection = matched.groups()
            layers[experts][projection][int(number)] = weight
        else:
            stored.append((name, weight))
    _check_complete(path, layers)
    for experts, by_projection in layers.items():
        for fused, projections in _FUSED.items():
            rows = [[by_projection[p][e] for e in sorted(by_projection[p])] for p in projections]
            stored.append((f"{experts}.{fused}", _stacked(path, rows, infos)))
    named = {name.replace(".moe.experts.", ".experts."): weight for name, weight in stored}
    if len(named) != len(stored):
        raise CheckpointError(f"{path.name}: experts are stored twice.", SUPPORTED)
    return named


def _check_complete(path: Path, layers: Mapping[str, Mapping[str, Mapping[int, object]]]) -> None:
    missing = []
    for experts, by_projection in layers.items():
        count = len({number for numbers in by_projection.values() for number in numbers})
        missing += [
            f"{experts}.{number}.{projection}_proj.weight"
            for number in range(count)
            for projection in ("gate", "up", "down")
            if number not in by_projection.get(projection, {})
        ]
    if missing:
        raise WeightsMismatchError(
            f"{path.name} does not fit its model; missing: {', '.join(missing)}.",
            "The checkpoint is incomplete.",
        )


def _stacked(path: Path, rows: list[list[StoredWeight]], infos: Infos) -> StoredWeight:
    """One weight of the matrices rows[projection][expert], which must be alike."""
    first = rows[0][0]
    pieces = tuple(tuple(weight.pieces[0][0] for weight in experts) for experts in rows)
    for names in (names for experts in pieces for names in experts):
        if len(first.shape) != 2 or _kind(names, infos) != _kind(first.pieces[0][0], infos):
            one, other = (n.get("packed") or n["weight"] for n in (names, first.pieces[0][0]))
            raise CheckpointError(
                f"{path.name}: {one} and {other} are not matrices of one kind.", SUPPORTED
            )
    n, k = first.shape
    return replace(first, shape=(len(rows[0]), len(rows) * n, k), pieces=pieces, stacked=True)


def _kind(names: Names, infos: Infos) -> dict[str, tuple[torch.dtype, Shape]]:
    return {part: (infos[name].dtype, infos[name].shape) for part, name in names.items()}


def _stack(read: Callable[[str], torch.Tensor], experts: tuple[Names, ...]) -> Parts:
    return {part: torch.stack([read(names[part]) for names in experts]) for part in experts[0]}
