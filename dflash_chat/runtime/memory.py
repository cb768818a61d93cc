"""How much of a GPU's memory a pair takes, known before a byte of it is there, and what would fit.

    target, draft head, drafter, their caches   to the byte, from shapes, formats and options
    tables, buffers                             rotary positions; features and logits of a step
    graphs                                      of which the pool holds logits twice
    workspace                                   the largest moment of a prompt's chunk, `_workspace`
    modules, CUDA context                       constants, as is what the driver keeps of graphs

`bench --random-weights` sets all this against the peak. Norms count once, their copies not at all.
Knows configs and weights without numbers; needs no device but for `available`.
"""

from __future__ import annotations

import gc
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Protocol

import torch

from dflash_chat.errors import DoesNotFitError
from dflash_chat.runtime import draft_head
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.cache import CUDA_PREFILL_CHUNK, Geometry, KVCache
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.kernels.expert_weights import GROUP
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.float_quantized import Float8Weight
from dflash_chat.runtime.quant.pack_quantized import Int4GroupWeight
from dflash_chat.runtime.width import MAX_ROWS

# What only a device can tell. On an H200 with driver 580 and torch 2.11 the benchmark's "memory"
# has `outside_start` 0.55 GB, which is the first, and 0.25 GB more at its end, the driver's share
# of the other two; with them, predictions are within 3 % of the peak.
CUDA_CONTEXT = 500_000_000
MODULES = 300_000_000  # code of kernels, workspaces of cuBLAS, what the allocator rounds up
GRAPHS = 200_000_000  # what the driver keeps of captured passes, and their small tensors

OUTSIDE = CUDA_CONTEXT + MODULES  # of torch's own memory

STEP = 256  # tokens between the contexts that are proposed
LEAST = 1024  # tokens of the smallest one
META = torch.device("meta")

_OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE)


class TargetConfig(Protocol):
    """What every architecture's Config tells."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def attention(self) -> tuple[Geometry, ...]: ...


@dataclass(frozen=True)
class Plan:
    """Bytes by part, in the order of allocation; the workspace comes and goes."""

    cuda_context: int
    target: int
    draft_head: int
    drafter: int
    drafter_cache: int
    target_cache: int
    tables: int
    buffers: int
    graphs: int
    modules: int
    workspace: int

    @property
    def total(self) -> int:
        """What the device will have in use for us at most."""
        return sum(asdict(self).values())

    @property
    def needed(self) -> int:
        """What must be free: whoever can ask how much is free has a CUDA context already."""
        return self.total - self.cuda_context

    def __str__(self) -> str:
        parts = (f"{name.replace('_', ' ')} {n / 1e9:.2f}" for name, n in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB ({', '.join(parts)})"


@dataclass(frozen=True)
class Pair:
    """What of a pair decides how much it takes. Bytes are those on the device."""

    target: TargetConfig
    drafter: DrafterConfig
    dtype: torch.dtype
    draft_tokens: int
    added: frozenset[int]  # ids beside the merges
    target_bytes: int
    head_bytes: int  # of them; 0 where the table of embeddings serves as head
    quantised: bool
    drafter_bytes: int
    drafter_fp8_bytes: int

    @classmethod
    def of(
        cls, target: TargetConfig, weights: Mapping[str, Packed], drafter: DrafterConfig,
        drafter_weights: Mapping[str, Packed], dtype: torch.dtype, draft_tokens: int,
        added: Collection[int] = (),
    ) -> Pair:  # fmt: skip
        """From weights as they are loaded, or on the meta device."""
        sizes, quantised = {}, False
        beside = any(name.endswith("experts.down_proj") for name in weights)
        for name, weight in weights.items():
            quantised |= isinstance(weight, Int4GroupWeight | Float8Weight)
            sizes[name] = _resident(weight, dtype, beside and ".mlp." in name)
        # the drafter's keys and values have two homes: in qkv, and in the context's projection
        drafted = [
            (1 + name.endswith(("k_proj.weight", "v_proj.weight")), weight)
            for name, weight in drafter_weights.items()
        ]
        return cls(
            target, drafter, dtype, draft_tokens, frozenset(added), sum(sizes.values()),
            sizes.get("lm_head.weight", 0), quantised,
            sum(homes * _resident(weight, dtype) for homes, weight in drafted),
            sum(homes * _rounded(weight.shape, dtype) for homes, weight in drafted),
        )  # fmt: skip

    def plan(self, options: EngineOptions, context: int) -> Plan:
        """Bytes of this pair with room for `context` tokens."""
        t, d, element = self.target, self.drafter, self.dtype.itemsize
        head = t.vocab_size, t.hidden_size
        target, drafter = self.target_bytes, self.drafter_bytes
        if options.head == "fp8":
            target += _rounded(head, self.dtype) - self.head_bytes
        if options.drafter == "fp8":
            drafter = self.drafter_fp8_bytes
        room = context + d.block_size
        chunk = CUDA_PREFILL_CHUNK
        largest = max(chunk, d.block_size)
        turned = context * sum(dim for dim, _ in {(a.head_dim, a.window > 0) for a in t.attention})
        verified = (self.draft_tokens + 1) * t.vocab_size * 4  # logits
        drafted = (d.block_size - 1) * t.vocab_size * 4
        features = MAX_ROWS * (len(d.target_layer_ids) + 1) * t.hidden_size * element
        return Plan(
            cuda_context=CUDA_CONTEXT,
            target=target,
            draft_head=self._draft_head(options),
            drafter=drafter,
            drafter_cache=KVCache(d.attention, room, self.dtype, META, largest).nbytes,
            target_cache=KVCache(t.attention, context, self.dtype, META, chunk).nbytes,
            # cos and sin twice: [positions, D] for prompts, fp32 [positions, D/2] for blocks
            tables=(turned + room * d.head_dim) * (2 * element + 4),
            buffers=verified + features,
            graphs=GRAPHS + 2 * (verified + drafted),
            modules=MODULES,
            workspace=self._workspace() * element,
        )

    def check(self, name: str, options: EngineOptions, context: int, free: int) -> None:
        """Raise DoesNotFitError with what would fit if `free` bytes do not suffice."""
        needed = self.plan(options, context).needed
        if needed > free:
            raise DoesNotFitError(
                shortage(f"{name} with a context of {context}", needed, free),
                self.what_fits(options, context - 1, free),
            )

    def what_fits(self, options: EngineOptions, most: int, free: int) -> str:
        """What to try with `free` bytes, the context being at most `most` tokens."""
        for words, changed in (
            ("", options),
            ("-o drafter=fp8 ", replace(options, drafter="fp8")),
        ):
            if context := self._largest(changed, most, free):
                return f"try {words}-o ctx={context}, or close other programs"
        return "close other programs, take a smaller build of the model, or try -o device=cpu"

    def _largest(self, options: EngineOptions, most: int, free: int) -> int:
        """The largest context that fits, or 0."""
        contexts = range(LEAST, most + 1, STEP)
        fitting = bisect_right(contexts, free, key=lambda n: self.plan(options, n).needed)
        return contexts[fitting - 1] if fitting else 0

    def _draft_head(self, options: EngineOptions) -> int:
        """The copy that drafts are read off, and its ids."""
        if not draft_head.copies(options):
            return 0
        rows, ids = self.target.vocab_size, 0
        if options.draft_rows:
            rows = len(draft_head.kept(options.draft_rows, self.added, rows))
            ids = 8 * rows
        shape = rows, self.target.hidden_size
        if options.draft_head == "fp8":
            return ids + _rounded(shape, self.dtype)
        return ids + prod(shape) * self.dtype.itemsize

    def _workspace(self) -> int:
        """Numbers that the largest moment of a chunk holds.

        While a layer runs, the features of this chunk and of the one before are held. Attention
        holds queries and keys up to four times: projected and normed, and on the way to being
        turned. Experts hold a row and its gated half for each of its places.
        """
        t, d = self.target, self.drafter
        c, inner, heads = t.hidden_size, t.intermediate_size, t.num_attention_heads
        features = len(d.target_layer_ids) * c
        attention = 2 * c + max((5 * heads + 6 * a.kv_heads) * a.head_dim for a in t.attention)
        feed_forward = 4 * c + 4 * inner
        if top_k := getattr(t, "top_k_experts", 0):
            gated = getattr(t, "moe_intermediate_size", 0)
            routed = 8 * c + 2 * inner + top_k * (2 * gated + c)
            feed_forward = max(feed_forward, routed)
        keys = 2 * len(d.attention) * d.num_key_value_heads * d.head_dim
        moments = (
            c + 2 * features + max(attention, feed_forward),
            3 * c + 3 * features,  # when the features are joined
            3 * c + 2 * features + 3 * keys,  # when the drafter's context is projected
        )
        widened = 0  # a quantised projection multiplies a prompt in full width
        if self.quantised:
            widened = c * max(
                2 * inner, *((heads + 2 * a.kv_heads) * a.head_dim for a in t.attention)
            )
        return CUDA_PREFILL_CHUNK * max(moments) + widened


def available() -> int:
    """Free bytes of the current device, once what nobody refers to any more is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def shortage(what: str, needed: int, free: int) -> str:
    """One sentence."""
    return f"{what} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB of this GPU are free"


def ran_out(error: BaseException) -> bool:
    """Whether a device's memory did not suffice, whoever says so: torch, CUDA, cuBLAS or Triton.

    An error that ends a graph's capture hides the one before it.
    """
    return any(
        isinstance(cause, torch.OutOfMemoryError)
        or (isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause)) is not None)
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _resident(weight: Packed, dtype: torch.dtype, beside_experts: bool = False) -> int:
    """Bytes of a weight in the kernels' layout; block formats become dense."""
    if isinstance(weight, Int4GroupWeight):
        scales = weight.scale.nbytes
        if beside_experts or len(weight.shape) == 3:
            scales = prod(weight.shape) // GROUP * 2
        return weight.packed.nbytes + scales * (1 if weight.zero is None else 2)
    if isinstance(weight, Float8Weight):
        per_row = weight.block == (1, weight.shape[-1])
        return _rounded(weight.shape, dtype) if per_row else weight.nbytes
    return prod(weight.shape) * dtype.itemsize


def _rounded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """e4m3 with an fp32 scale per row; vectors stay as they are."""
    if len(shape) == 1:
        return prod(shape) * dtype.itemsize
    return prod(shape) + 4 * prod(shape[:-1])
