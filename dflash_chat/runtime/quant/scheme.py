"""How a weight is quantised, in words that its tensors and its config.json have in common.

Tensors decide. What config.json says is held against them, for all its groups at once: which group
a weight belongs to is the quantiser's business. Does not know any layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Words = frozenset[str]


class Scheme(NamedTuple):
    """Three traits. Tensors may fit several words of a trait; a config says one of each."""

    kind: Words  # "4-bit int", "8-bit float"
    symmetry: Words  # "symmetric", "asymmetric"
    scales: Words  # "group 32", "channel", "tensor", "block 128×128"


def scheme(kind: str, symmetric: bool, *scales: str) -> Scheme:
    """A scheme with one kind, one symmetry and any of `scales`."""
    symmetry = "symmetric" if symmetric else "asymmetric"
    return Scheme(frozenset({kind}), frozenset({symmetry}), frozenset(scales))


def claimed(config: Mapping[str, Any]) -> list[Scheme]:
    """What a `quantization_config` says of weights. Raises ValueError if it cannot be read."""
    if config.get("quant_method") == "fp8":  # as Qwen and DeepSeek ship it
        block = config.get("weight_block_size")
        return [scheme("8-bit float", True, _block(block) if block else "tensor")]
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"quantization_config.config_groups is {str(groups)[:80]!r}")
    claims = []
    for title, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if weights is None:
            continue  # a group of activations or caches
        if not isinstance(weights, Mapping):
            raise ValueError(f"quantization_config.config_groups.{title} is {str(group)[:80]!r}")
        kind = f"{weights.get('num_bits')}-bit {weights.get('type', 'int')}"
        claims.append(scheme(kind, bool(weights.get("symmetric", True)), _scales(weights)))
    return claims


def contradiction(found: Scheme, claims: Sequence[Scheme]) -> str:
    """The first trait no claim shares with the tensors, both values named; "" if there is none."""
    for trait, has in enumerate(found):
        said = {word for claim in claims for word in claim[trait]}
        claims = [claim for claim in claims if claim[trait] & has]
        if said and not claims:
            return f"is {_either(has)}, but config.json says {_either(said)}"
    return ""


def _scales(weights: Mapping[str, Any]) -> str:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size else "tensor")
    if strategy == "block":
        return _block(weights.get("block_structure"))
    if strategy == "group":
        return "channel" if size == -1 else f"group {size}"
    return str(strategy)


def _block(sides: object) -> str:
    return "block " + "×".join(map(str, sides if isinstance(sides, Sequence) else [sides]))


def _either(words: set[str] | Words) -> str:
    return " or ".join(sorted(words))
