"""`TARGET+DRAFTER`: a pair that is in no catalogue, read from its own config.json files.

Each side is a folder (a path that begins with `/`, `.` or `~`; a target may be a GGUF file), or a
hub repository, `org/name` or `org/name@revision`. Knows what a config.json says of weights and of a
drafter; reads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_chat import loads
from dflash_chat.catalogue import REPO, REVISION
from dflash_chat.entries import Build, Drafter, FolderSource, HubSource, Pair
from dflash_chat.errors import UnknownModelError, UsageError

_EXAMPLE = "e.g. org/model+org/drafter, or /folder/of/target+/folder/of/drafter"
_TARGET_HINT = "a target is a folder with config.json and safetensors, or a GGUF file"
_DRAFTER_HINT = "a drafter is a folder with config.json and safetensors, as z-lab publishes it"
_METHODS = {  # quantization_config.quant_method -> the catalogue's word, and the weights
    "fp8": ("fp8", "fp8"),
    "awq": ("autoawq", "int4"),
    "gptq": ("gptq", "int4"),
    "auto-round": ("autoround", "int4"),
    "modelopt": ("modelopt", "nvfp4"),
    "mxfp4": ("mxfp4", "mxfp4"),
}
_BITS = {"fp32": 32.0, "fp8": 8.0, "int4": 4.5, "nvfp4": 4.5, "mxfp4": 4.25}
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class _Side:
    """One half of the pair. `name` is how it is written again, `where` how it is told."""

    name: str
    where: str
    source: FolderSource | HubSource
    config: Mapping[str, Any]


def is_custom(name: str) -> bool:
    """Whether this is TARGET+DRAFTER; no name of the catalogue has a plus."""
    return "+" in name


def find(name: str) -> Pair:
    """The pair TARGET+DRAFTER. Asks the hub for the config.json of a repository.

    UsageError if `name` is not of this shape, UnknownModelError if a side is not what it should
    be, and what the hub answers.
    """
    first, _, second = (part.strip() for part in name.partition("+"))
    if not first or not second or "+" in second:
        raise UsageError(f"{name!r} is not TARGET+DRAFTER", hint=_EXAMPLE)
    target = _gguf(first) or _side(first, _TARGET_HINT)
    drafter = _side(second, _DRAFTER_HINT)
    architecture = str(target.config.get("model_type", ""))
    if not architecture:
        raise UnknownModelError(f"{target.where}: config.json has no model_type", _TARGET_HINT)
    return Pair(
        name=f"{target.name}+{drafter.name}",
        title=f"{Path(first).name} with {Path(second).name}",
        licence="not known",
        architecture=architecture,
        builds=(_build(target, architecture),),
        drafter=_drafter(drafter),
        config=_text_config(target.config),
        missing=loads.missing_architecture(architecture),
        kind="custom",
    )


def _side(name: str, hint: str) -> _Side:
    if name[0] in "/.~":
        return _folder(Path(name).expanduser().absolute(), hint)
    repo, at, revision = name.partition("@")
    revision = revision if at else "main"
    if not REPO.fullmatch(repo) or not REVISION.fullmatch(revision):
        raise UsageError(f"{name!r} is neither a folder nor a hub repository", hint=_EXAMPLE)
    from dflash_chat import repository

    found = repository.describe(repo, revision)
    return _Side(name, repo, HubSource(repo, revision, found.bytes), found.config)


def _gguf(name: str) -> _Side | None:
    """A GGUF file. What it holds is in its header, which the runtime reads, of one kind only."""
    path = Path(name).expanduser().absolute()
    if path.suffix != ".gguf" or not path.is_file():
        return None
    config = {"model_type": loads.GGUF_ARCHITECTURES[0]}
    return _Side(str(path), str(path), FolderSource(path, path.stat().st_size), config)


def _folder(path: Path, hint: str) -> _Side:
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        lack = "is no folder" if not path.is_dir() else "has no config.json"
        raise UnknownModelError(f"{path} {lack}", hint=hint)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownModelError(f"{file} cannot be read: {error}", hint=hint) from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"{file} holds no JSON object", hint=hint)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not weights:
        raise UnknownModelError(f"{path} has no safetensors", hint=hint)
    return _Side(str(path), str(path), FolderSource(path, weights), config)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A target's keys, those of its text model where it has others, too."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(config)
    outer = ("model_type", "tie_word_embeddings")
    return {key: config[key] for key in outer if key in config} | dict(text)


def _build(target: _Side, architecture: str) -> Build:
    if isinstance(target.source, FolderSource) and target.source.path.suffix == ".gguf":
        form, weights, missing = "gguf", "gguf", ""
    else:
        form, weights = _stored(target.config)
        missing = loads.missing_format(architecture, form, weights)
    bits = _BITS.get(weights, 16.0)
    return Build(
        name=weights,
        weights=weights,
        format=form,
        source=target.source,
        resident_bytes=target.source.bytes,
        bits=bits,
        missing=missing,
        approximate=("resident_bytes", "bits", "embedding_bits", "head_bits"),
    )


def _stored(config: Mapping[str, Any]) -> tuple[str, str]:
    """Format and weights, in the catalogue's words; another quantiser's name as it is."""
    text = _text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(quantization, Mapping):
        dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype"))
        return "safetensors", _DTYPES.get(dtype.removeprefix("torch."), "bf16")
    method = str(quantization.get("quant_method"))
    if method != "compressed-tensors":
        return _METHODS.get(method, (method, method))
    form = str(quantization.get("format"))
    if form.startswith(("nvfp4", "mxfp4")):
        return method, form[:5]
    return method, "fp8" if form.startswith("float") else "int4"


def _drafter(side: _Side) -> Drafter:
    own = side.config.get("dflash_config")
    if not isinstance(own, Mapping):
        raise UnknownModelError(
            f"{side.where} is no DFlash drafter: its config.json has no dflash_config",
            hint="the target comes first, the drafter after the plus",
        )
    block_size = side.config.get("block_size", own.get("block_size"))
    if type(block_size) is not int or not 2 <= block_size <= 64:
        raise UnknownModelError(
            f"{side.where}: block_size {block_size!r} in config.json is not from 2 to 64"
        )
    names = side.config.get("architectures")
    version = 2 if isinstance(names, list) and "DFlash2DraftModel" in names else 1
    local = isinstance(side.source, FolderSource)
    return Drafter(
        path=side.source.path if isinstance(side.source, FolderSource) else None,
        block_size=block_size,
        draft_tokens=block_size - 1,
        kind="folder" if local else "hub",
        source=None if isinstance(side.source, FolderSource) else side.source,
        bytes=side.source.bytes,
        version=version,
        missing=loads.missing_drafter(version),
        config=dict(side.config),
    )
