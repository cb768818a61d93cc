"""A published config.json → what there is to store and to read: parameters, caches, states.

Reads the text part of a target's config and a drafter's config by their published keys, from the
catalogue or from a file, and counts. The counts are those of the checkpoints, exact to the
parameter. Vision and audio towers are no part of it. Knows families of architectures; knows
neither bytes per weight, nor files, nor devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dflash_chat.errors import CheckpointError

_DEEPEST = 1024  # layers; what claims more is no config
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"


class ConfigError(CheckpointError):
    """One key of a config.json that is missing, unusable, or beyond what is counted here."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"config.json: key {key!r} {problem}")
        self.key, self.problem = key, problem


@dataclass(frozen=True)
class Geometry:
    """One layer's keys and values. A row sees `window` positions, its own included; 0: all."""

    kv_heads: int
    head_dim: int
    window: int = 0


def slots(window: int, capacity: int, largest_block: int) -> int:
    """Rows that a layer of this window keeps of `capacity`, blocks being at most so large."""
    return min(capacity, window + largest_block) if window else capacity


@dataclass(frozen=True)
class TargetGeometry:
    """A target, text only. Parameters are counts of numbers, whatever their format.

    `body` is everything but `embedding` and `head`; `head` is 0 where the embedding serves as one.
    `experts` of the body are routed to: `moe_layers` times `num_experts`, of which a token takes
    `top_k_experts`; `routers` choose them and stay in 16 bits in quantised builds. `attention` are
    the layers that keep keys and values. `state_bytes` is one copy of what recurrent layers keep
    instead: fp32 states and bf16 inputs of their convolutions.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    context_limit: int
    attention: tuple[Geometry, ...]
    body: int
    embedding: int
    head: int = 0
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    moe_layers: int = 0
    experts: int = 0
    routers: int = 0
    state_bytes: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.body + self.embedding + self.head

    @property
    def active(self) -> int:
        """Those that one token is multiplied by: the body with its experts alone, and the head."""
        idle = self.experts * (self.num_experts - self.top_k_experts) // max(1, self.num_experts)
        return self.body - idle + (self.head or self.embedding)

    @property
    def kv_values(self) -> int:
        """Numbers that every further token of the context adds, rings being full."""
        return sum(2 * a.kv_heads * a.head_dim for a in self.attention if not a.window)


@dataclass(frozen=True)
class DrafterGeometry:
    """A DFlash drafter. `version` 2 adds convolutions and a candidate selector.

    `context` parameters project the target's features to keys and values; they are among
    `parameters`, and in memory a second time. `matrices` have two dimensions or more, `rows` are
    theirs together.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    attention: tuple[Geometry, ...]
    parameters: int
    context: int
    matrices: int
    rows: int
    version: int = 1

    @property
    def context_rows(self) -> int:
        """Rows of the `context` projections."""
        return len(self.attention) * 2 * self.num_key_value_heads * self.head_dim


def target(config: Mapping[str, Any]) -> TargetGeometry:
    """Count a target's config.json, a multimodal one or a text model's.

    Raises ConfigError for a key that is missing or unusable, and for an unknown `model_type`.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        outer = {k: config[k] for k in ("model_type", "tie_word_embeddings") if k in config}
        config = {**outer, **nested}
    elif nested is not None:
        raise ConfigError("text_config", f"must be an object, not {nested!r}")
    keys = _Keys(config)
    kind = keys.text("model_type").removesuffix("_text")
    if kind not in _FAMILIES:
        raise ConfigError("model_type", f"is {kind!r}; known: {', '.join(sorted(_FAMILIES))}")
    tied, count = _FAMILIES[kind]
    layers = count(keys)
    hidden, vocab = keys.whole("hidden_size"), keys.whole("vocab_size")
    moe = layers.num_experts > 0
    return TargetGeometry(
        family=kind,
        hidden_size=hidden,
        intermediate_size=layers.inner,
        num_hidden_layers=keys.whole("num_hidden_layers"),
        num_attention_heads=keys.whole("num_attention_heads"),
        vocab_size=vocab,
        context_limit=keys.whole("max_position_embeddings"),
        attention=tuple(layers.attention),
        body=layers.parameters + hidden,  # the last norm
        embedding=vocab * hidden,
        head=0 if keys.flag("tie_word_embeddings", tied) else vocab * hidden,
        num_experts=layers.num_experts,
        top_k_experts=layers.top_k if moe else 0,
        moe_intermediate_size=layers.expert_inner,
        moe_layers=layers.moe_layers,
        experts=layers.experts,
        routers=layers.routers,
        state_bytes=layers.state_bytes,
    )


def drafter(config: Mapping[str, Any], target_hidden: int = 0) -> DrafterGeometry:
    """Count a drafter's config.json; `target_hidden` 0 means its own hidden size.

    Raises ConfigError for a key that is missing or unusable.
    """
    keys = _Keys(config)
    own = keys.table("dflash_config")
    inside = _Keys(own)
    hidden, inner = keys.whole("hidden_size"), keys.whole("intermediate_size")
    heads, groups = keys.whole("num_attention_heads"), keys.whole("num_key_value_heads")
    dim = keys.whole("head_dim", hidden // heads)
    depth = keys.whole("num_hidden_layers", high=_DEEPEST)
    taps = own.get("target_layer_ids")
    if not isinstance(taps, list) or not taps or not all(type(i) is int and i >= 0 for i in taps):
        raise ConfigError("dflash_config.target_layer_ids", f"must be a list of layers: {taps!r}")
    block = keys.whole("block_size", low=2) if "block_size" in config else inside.whole(
        "block_size", low=2
    )  # fmt: skip
    windows = keys.windows(depth)
    names = config.get("architectures") or [""]
    version = 2 if "DFlash2DraftModel" in names else 1
    projections = [heads * dim, groups * dim, groups * dim, hidden, inner, inner, hidden]
    wide = 2 * hidden * heads * dim + 2 * hidden * groups * dim + 3 * hidden * inner
    matrices = len(taps) * (target_hidden or hidden) * hidden + depth * wide
    rows = hidden + depth * sum(projections)
    vectors = 2 * hidden + depth * (2 * hidden + 2 * dim)
    if version == 2:  # two 2-tap convolutions a layer, their coefficients per 16 channels
        taps_of, rank = 2, inside.whole("selector_rank", 256)
        convolution = 2 * taps_of * hidden, 2 * taps_of * (hidden // 16) * hidden
        matrices += depth * 2 * sum(convolution) + rank * (hidden + 2 * keys.whole("vocab_size"))
        rows += depth * 2 * (2 * taps_of + 2 * taps_of * (hidden // 16))
        rows += rank + 2 * keys.whole("vocab_size")
    return DrafterGeometry(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=dim, block_size=block, target_layer_ids=tuple(taps),
        attention=tuple(Geometry(groups, dim, window) for window in windows),
        parameters=matrices + vectors, context=depth * 2 * groups * dim * hidden,
        matrices=matrices, rows=rows, version=version,
    )  # fmt: skip


# ── reading keys ────────────────────────────────────────────────────────────────────────────────


class _Keys:
    """A config that is read key by key; what cannot be used is refused by its name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def whole(
        self, key: str, default: int | None = None, low: int = 1, high: int = 2**31
    ) -> int:  # fmt: skip
        value = self.values.get(key, default)
        value = default if value is None else value
        if value is None:
            raise ConfigError(key, "is missing")
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(key, f"must be a whole number from {low} to {high}, not {value!r}")
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise ConfigError(key, "is missing" if value is None else f"must be text: {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(key, f"must be true or false, not {value!r}")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise ConfigError(key, "is missing" if value is None else "must be an object")
        return value

    def kinds(self, depth: int, default: Callable[[int], str], *known: str) -> list[str]:
        """`layer_types`, or the family's own pattern where the key is absent."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return [default(i) for i in range(depth)]
        if not isinstance(kinds, list) or len(kinds) != depth:
            raise ConfigError("layer_types", f"must name {depth} layers")
        for kind in kinds:
            if kind not in known:
                raise ConfigError("layer_types", f"has an unknown kind: {kind!r}")
        return kinds

    def windows(self, depth: int, default: Callable[[int], str] = lambda _: _FULL) -> list[int]:
        """The window of every layer, 0 where it sees everything."""
        kinds = self.kinds(depth, default, _FULL, _SLIDING)
        return [self.whole("sliding_window") if kind == _SLIDING else 0 for kind in kinds]


# ── families ────────────────────────────────────────────────────────────────────────────────────


class _Layers:
    """What a family adds up, layer after layer."""

    def __init__(self, keys: _Keys, inner: int) -> None:
        self.keys, self.inner = keys, inner
        self.hidden, self.heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
        self.depth = keys.whole("num_hidden_layers", high=_DEEPEST)
        self.attention: list[Geometry] = []
        self.parameters = self.experts = self.routers = self.state_bytes = 0
        self.num_experts = self.top_k = self.expert_inner = self.moe_layers = 0

    def head_dim(self) -> int:
        return self.keys.whole("head_dim", self.hidden // self.heads)

    def attend(self, groups: int, dim: int, window: int = 0, *, queries: int = 1, values: int = 1,
               vectors: int = 0, biased: bool = False) -> None:  # fmt: skip
        """q, k, v and o; `queries` 2 with a gate as wide as q; `values` 0 where k serves as v."""
        self.attention.append(Geometry(groups, dim, window))
        q, kv = queries * self.heads * dim, (1 + values) * groups * dim
        self.parameters += self.hidden * (q + kv + self.heads * dim) + vectors
        if biased:
            self.parameters += q + kv + self.hidden

    def feed(self, inner: int) -> None:
        """gate, up and down."""
        self.parameters += 3 * self.hidden * inner

    def route(self, experts: int, top_k: int, inner: int, biased: bool = False) -> None:
        """A router and the experts behind it."""
        if top_k > experts:
            raise ConfigError("num_experts_per_tok", f"is {top_k} of {experts} experts")
        own = experts * 3 * self.hidden * inner
        router = experts * self.hidden
        if biased:
            own += experts * (2 * inner + self.hidden)
            router += experts
        self.num_experts, self.top_k, self.expert_inner = experts, top_k, inner
        self.moe_layers += 1
        self.experts += own
        self.routers += router
        self.parameters += own + router


def _llama(keys: _Keys, head_norms: bool = False) -> _Layers:
    layers = _Layers(keys, keys.whole("intermediate_size"))
    dim, groups = layers.head_dim(), keys.whole("num_key_value_heads")
    biased = keys.flag("attention_bias")
    if keys.flag("mlp_bias"):
        raise ConfigError("mlp_bias", "is true, which is not counted")
    for _ in range(layers.depth):
        norms = 2 * layers.hidden + (2 * dim if head_norms else 0)
        layers.attend(groups, dim, vectors=norms, biased=biased)
        layers.feed(layers.inner)
    return layers


def _qwen3(keys: _Keys) -> _Layers:
    if keys.flag("use_sliding_window"):
        raise ConfigError("use_sliding_window", "is true, which is not counted")
    return _llama(keys, head_norms=True)


def _qwen3_moe(keys: _Keys) -> _Layers:
    if keys.whole("decoder_sparse_step", 1) != 1 or keys.values.get("mlp_only_layers"):
        raise ConfigError("mlp_only_layers", "asks for dense layers, which are not counted")
    inner = keys.whole("moe_intermediate_size")
    layers = _Layers(keys, inner)
    dim, groups = layers.head_dim(), keys.whole("num_key_value_heads")
    for _ in range(layers.depth):
        layers.attend(groups, dim, vectors=2 * layers.hidden + 2 * dim)
        layers.route(keys.whole("num_experts"), keys.whole("num_experts_per_tok"), inner)
    return layers


def _gemma4(keys: _Keys) -> _Layers:
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if keys.whole(key, 0, low=0):
            raise ConfigError(key, "is not 0, which is not counted")
    layers = _Layers(keys, keys.whole("intermediate_size"))
    shared, moe = keys.flag("attention_k_eq_v"), keys.flag("enable_moe_block")
    groups, dim = keys.whole("num_key_value_heads"), keys.whole("head_dim")
    full_dim = keys.whole("global_head_dim")
    full_groups = keys.whole("num_global_key_value_heads", groups) if shared else groups
    for window in keys.windows(layers.depth, lambda i: _SLIDING if (i + 1) % 6 else _FULL):
        norms = 4 * layers.hidden  # layer_scalar is no parameter, but a buffer
        if window:
            layers.attend(groups, dim, window, vectors=norms + 2 * dim)
        else:
            norms += 2 * full_dim
            layers.attend(full_groups, full_dim, values=0 if shared else 1, vectors=norms)
        layers.feed(layers.inner)
        if moe:
            experts = keys.whole("num_experts")
            layers.route(experts, keys.whole("top_k_experts"), keys.whole("moe_intermediate_size"))
            layers.parameters += 4 * layers.hidden + experts  # three norms, the router's scales
    return layers


def _qwen3_5(keys: _Keys) -> _Layers:
    moe = keys.whole("num_experts", 0, low=0) > 0
    inner = keys.whole("moe_intermediate_size" if moe else "intermediate_size")
    layers = _Layers(keys, inner)
    dim, groups = layers.head_dim(), keys.whole("num_key_value_heads")
    every = keys.whole("full_attention_interval", 4)
    kinds = keys.kinds(
        layers.depth, lambda i: _LINEAR if (i + 1) % every else _FULL, _FULL, _LINEAR
    )
    for kind in kinds:
        layers.parameters += 2 * layers.hidden
        if kind == _FULL:  # half of q is the output's gate
            layers.attend(groups, dim, queries=2, vectors=2 * dim)
        else:
            _gated_delta_net(layers)
        if moe:
            layers.route(keys.whole("num_experts"), keys.whole("num_experts_per_tok"), inner)
            layers.feed(keys.whole("shared_expert_intermediate_size"))
            layers.parameters += layers.hidden  # the shared expert's gate
        else:
            layers.feed(inner)
    return layers


def _gated_delta_net(layers: _Layers) -> None:
    """One recurrent layer: a state [key dim, value dim] per value head, and a short convolution."""
    whole = layers.keys.whole
    key_dim, value_dim = whole("linear_key_head_dim"), whole("linear_value_head_dim")
    heads, taps = whole("linear_num_value_heads"), whole("linear_conv_kernel_dim")
    values = heads * value_dim
    channels = 2 * whole("linear_num_key_heads") * key_dim + values
    layers.parameters += layers.hidden * (channels + 2 * values + 2 * heads)  # qkv, z, out, b, a
    layers.parameters += channels * taps + 2 * heads + value_dim  # conv1d, A_log, dt_bias, norm
    layers.state_bytes += 4 * heads * key_dim * value_dim + 2 * channels * (taps - 1)


def _gpt_oss(keys: _Keys) -> _Layers:
    layers = _Layers(keys, keys.whole("intermediate_size"))
    dim, groups = layers.head_dim(), keys.whole("num_key_value_heads")
    experts = keys.whole("num_local_experts")
    biased = keys.flag("attention_bias", True)
    for window in keys.windows(layers.depth, lambda i: _FULL if i % 2 else _SLIDING):
        vectors = 2 * layers.hidden + layers.heads  # norms, sinks
        layers.attend(groups, dim, window, vectors=vectors, biased=biased)
        layers.route(experts, keys.whole("num_experts_per_tok"), layers.inner, biased=True)
    return layers


def _muse_glimmer(keys: _Keys) -> _Layers:
    layers = _Layers(keys, keys.whole("intermediate_size"))
    dim, groups, last = layers.head_dim(), keys.whole("num_key_value_heads"), layers.depth - 1
    for window in keys.windows(layers.depth, lambda i: _SLIDING if (last - i) % 4 else _FULL):
        layers.attend(groups, dim, window, queries=2, vectors=4 * layers.hidden)
        layers.feed(layers.inner)
    return layers


# model_type without its "_text" → whether the head is the embedding unless told, and the layers
_FAMILIES: dict[str, tuple[bool, Callable[[_Keys], _Layers]]] = {
    "llama": (False, _llama),
    "qwen3": (False, _qwen3),
    "qwen3_moe": (False, _qwen3_moe),
    "gemma4": (True, _gemma4),
    "gemma4_unified": (True, _gemma4),
    "qwen3_5": (False, _qwen3_5),
    "qwen3_5_moe": (False, _qwen3_5),
    "gpt_oss": (False, _gpt_oss),
    "muse_glimmer": (False, _muse_glimmer),
}
