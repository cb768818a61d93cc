"""How much of a GPU's memory a pair takes, known before a byte of it is there, and what would fit.

    target, screen, draft head, drafter, caches to the byte, from shapes, formats and options;
                                                the screen is an int8 copy of the head
    state                                       of recurrent layers, live and as the block began
    tables, buffers                             rotary positions; features and logits of a step
    graphs                                      of which the pool holds logits twice
    workspace                                   the largest moment of a prompt's chunk, `_workspace`
    modules, CUDA context                       constants, as is what the driver keeps of graphs

`bench --random-weights` sets all this against the peak. Norms count once, their copies not at all.
The runtime states exact bytes of weights, the planner those of the catalogue; the law is this one.
Knows shapes and byte counts; knows neither files nor devices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Protocol

from dflash_chat.errors import DoesNotFitError
from dflash_chat.geometry import DrafterGeometry, Geometry, TargetGeometry, slots
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.width import MAX_ROWS

# What only a device can tell. On an H200 with driver 580 and torch 2.11 the benchmark's "memory"
# has `outside_start` 0.55 GB, which is the first, and 0.25 GB more at its end, the driver's share
# of the other two; with them, predictions are within 3 % of the peak.
CUDA_CONTEXT = 500_000_000
MODULES = 300_000_000  # code of kernels, workspaces of cuBLAS, what the allocator rounds up
GRAPHS = 200_000_000  # what the driver keeps of captured passes, and their small tensors

CUDA_PREFILL_CHUNK = 2048  # each of 128 experts gets 128 rows where a row goes to 8 of them
OUTSIDE = CUDA_CONTEXT + MODULES  # of torch's own memory
STEP = 256  # tokens between the contexts that are proposed
LEAST = 1024  # tokens of the smallest one
BF16 = 2  # bytes of a number in activations and caches


class TargetShape(Protocol):
    """What every architecture's Config tells, and a TargetGeometry. With experts, it has
    `top_k_experts` and `moe_intermediate_size`, too.
    """

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


class DrafterShape(Protocol):
    """What a drafter's Config tells, and a DrafterGeometry."""

    @property
    def block_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...
    @property
    def attention(self) -> tuple[Geometry, ...]: ...


@dataclass(frozen=True)
class Budget:
    """Bytes by part, in the order of allocation; the workspace comes and goes."""

    cuda_context: int
    target: int
    screen: int
    draft_head: int
    drafter: int
    drafter_cache: int
    target_cache: int
    state: int
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
class Demand:
    """What of a pair decides how much it takes. Bytes are those on the device; `element` is a
    number's in activations and caches.
    """

    target: TargetShape
    drafter: DrafterShape
    element: int
    draft_tokens: int
    added: frozenset[int]  # ids beside the merges
    target_bytes: int
    head_bytes: int  # of them; 0 where the table of embeddings serves as head
    quantised: bool
    drafter_bytes: int
    drafter_fp8_bytes: int
    state_bytes: int = 0  # one copy of what recurrent layers keep

    def plan(self, options: EngineOptions, context: int) -> Budget:
        """Bytes of this pair with room for `context` tokens."""
        t, d, element = self.target, self.drafter, self.element
        target, drafter = self.target_bytes, self.drafter_bytes
        if options.head == "fp8":
            target += rounded_bytes((t.vocab_size, t.hidden_size), element) - self.head_bytes
        if options.drafter == "fp8":
            drafter = self.drafter_fp8_bytes
        room = context + d.block_size
        chunk = CUDA_PREFILL_CHUNK
        turned = context * sum(dim for dim, _ in {(a.head_dim, a.window > 0) for a in t.attention})
        verified = (self.draft_tokens + 1) * t.vocab_size * 4  # logits
        drafted = (d.block_size - 1) * t.vocab_size * 4
        features = MAX_ROWS * (len(d.target_layer_ids) + 1) * t.hidden_size * element
        return Budget(
            cuda_context=CUDA_CONTEXT,
            target=target,
            screen=screen_bytes(t) if options.head == "screened" else 0,
            draft_head=self._draft_head(options),
            drafter=drafter,
            drafter_cache=cache_bytes(d.attention, room, max(chunk, d.block_size), element),
            target_cache=cache_bytes(t.attention, context, chunk, element),
            state=2 * self.state_bytes,
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
            if context := self.largest_context(changed, most, free):
                return f"try {words}-o ctx={context}, or close other programs"
        return "close other programs, take a smaller build of the model, or try -o device=cpu"

    def largest_context(self, options: EngineOptions, most: int, free: int) -> int:
        """The largest context of at most `most` tokens that fits, or 0. `free` is beside a CUDA
        context.
        """
        contexts = range(LEAST, most + 1, STEP)
        fitting = bisect_right(contexts, free, key=lambda n: self.plan(options, n).needed)
        return contexts[fitting - 1] if fitting else 0

    def room(self, options: EngineOptions, most: int, free: int) -> int:
        """`most` tokens, or the largest context that fits; `most` again if none does."""
        if self.plan(options, most).needed <= free:
            return most
        return self.largest_context(options, most, free) or most

    def _draft_head(self, options: EngineOptions) -> int:
        """The copy that drafts are read off, and its ids."""
        if not options.copies_head:
            return 0
        rows, ids = self.target.vocab_size, 0
        if options.draft_rows:
            first = options.draft_rows
            rows = first + sum(first <= i < rows for i in self.added)
            ids = 8 * rows
        shape = rows, self.target.hidden_size
        if options.draft_head == "fp8":
            return ids + rounded_bytes(shape, self.element)
        return ids + prod(shape) * self.element

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


def demand(
    target: TargetGeometry, drafter: DrafterGeometry, target_bytes: int, *,
    head_bits: float = 16, quantised: bool = False, draft_tokens: int = 0,
    added: Iterable[int] = (),
) -> Demand:  # fmt: skip
    """From counted configs and the bytes that a build keeps on the device; the drafter is in bf16.

    `draft_tokens` 0 means the whole block.
    """
    vectors = BF16 * (drafter.parameters - drafter.matrices)
    # keys and values have two homes: in qkv, and in the context's projection
    matrices = drafter.matrices + drafter.context
    scales = 4 * (drafter.rows + drafter.context_rows)
    return Demand(
        target, drafter, BF16, draft_tokens or drafter.block_size - 1, frozenset(added),
        target_bytes, round(target.head * head_bits / 8), quantised,
        BF16 * matrices + vectors, matrices + scales + vectors, target.state_bytes,
    )  # fmt: skip


def cache_bytes(layers: Sequence[Geometry], capacity: int, largest_block: int, element: int) -> int:
    """Keys and values of all layers with room for `capacity` tokens."""
    values = (
        2 * a.kv_heads * a.head_dim * slots(a.window, capacity, largest_block) for a in layers
    )
    return element * sum(values)


def rounded_bytes(shape: tuple[int, ...], element: int) -> int:
    """e4m3 with an fp32 scale per row; vectors stay as they are."""
    if len(shape) == 1:
        return prod(shape) * element
    return prod(shape) + 4 * prod(shape[:-1])


def screen_bytes(target: TargetShape) -> int:
    """int8 with an fp32 scale and an fp32 error per row."""
    return target.vocab_size * (target.hidden_size + 8)


def shortage(what: str, needed: int, free: int) -> str:
    """One sentence."""
    return f"{what} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB of this GPU are free"
