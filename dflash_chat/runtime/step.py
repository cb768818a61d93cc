"""One step of drafting and verifying with everything on the device: tokens, lengths, acceptance.

    draft      features of the rows committed last → drafter's context → block → tokens in ids[1:]
    verify(n)  ids[:n] → target → choices → accepted count → lengths, next anchor, record

Each leaves the state where the other takes it up, so both can be replayed as CUDA graphs without
the host knowing what was accepted. The host reads `record` when it likes.

Knows kernels and static buffers; knows neither text nor sampling beyond the likeliest token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import kernels
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.draft_head import DraftHead
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.fused import Stack, Tables
from dflash_chat.runtime.kernels import accept, heads, linear, norms, rope, screen
from dflash_chat.runtime.kernels.accept import State
from dflash_chat.runtime.kernels.forms import Int8
from dflash_chat.runtime.kernels.norms import Branch
from dflash_chat.runtime.layers import RMSNorm
from dflash_chat.runtime.parts import LayerParts, weight_of
from dflash_chat.runtime.quant import Packed, kernel_weights
from dflash_chat.runtime.quant.dense import DenseWeight
from dflash_chat.runtime.width import MAX_ROWS


@dataclass(frozen=True)
class TargetParts:
    """A target for the fused path. `table` [V, C] holds the input embeddings; `softcap` 0: none;
    `screen` is the int8 copy that greedy choices of `head` are screened by, if they are.
    """

    layers: Sequence[LayerParts]
    norm: Tensor
    table: Tensor
    embed_scale: float
    head: Packed
    softcap: float = 0.0
    screen: Packed | None = None

    @classmethod
    def of(cls, target: Describable) -> TargetParts:
        """An architecture's own description. Raises CheckpointError for a table of another format
        than bf16.
        """
        table = target.embed_tokens
        if not isinstance(table, DenseWeight):
            raise CheckpointError("a table of embeddings that is not dense has no CUDA kernel")
        return cls(
            target.parts(), weight_of(target.norm), table.weight,
            float(getattr(target, "embed_scale", 1.0)), target.lm_head,
            float(getattr(target.config, "final_logit_softcapping", None) or 0.0),
            target.screen,
        )  # fmt: skip


class Describable(Protocol):
    """An architecture (see `models/`) that can say what its layers consist of."""

    config: Any
    norm: RMSNorm
    embed_tokens: Packed
    lm_head: Packed
    screen: Packed | None

    def parts(self) -> list[LayerParts]:
        """All layers in terms of `parts.py`."""


class Step:
    """A target, its drafter and their buffers. `taps` are the layers the drafter observes."""

    def __init__(
        self,
        target: TargetParts,
        cache: KVCache,
        drafter: Drafter | None,
        taps: Sequence[int],
    ) -> None:
        device, dtype = target.table.device, target.table.dtype
        self.target, self.taps, self.pdl = target, tuple(taps), kernels.overlapping(device)
        self.stack = Stack(target.layers, target.norm, cache, cache.capacity, self.pdl)
        self.head = kernel_weights.linear(target.head)
        self.screen: Int8 | None = None
        if target.screen is not None:
            copy = kernel_weights.linear(target.screen)
            assert isinstance(self.head, Tensor), target.head.kernel
            assert isinstance(copy, Int8), target.screen.kernel
            self.screen = copy
        block_size = 1 if drafter is None else drafter.config.block_size
        mask_id = 0 if drafter is None else drafter.config.mask_token_id

        def counter() -> Tensor:
            return torch.zeros(1, dtype=torch.int32, device=device)

        self.state = State(
            ids=torch.zeros(MAX_ROWS, dtype=torch.int64, device=device),
            block=torch.full((block_size,), mask_id, dtype=torch.int64, device=device),
            length=counter(), start=counter(), committed=counter(), step=counter(),
            confidence=torch.zeros(MAX_ROWS, device=device),
        )  # fmt: skip
        width = target.table.shape[1]
        self.features = torch.zeros(MAX_ROWS, len(self.taps) * width, dtype=dtype, device=device)
        self.record = accept.new_record(device)
        self.script: Tensor | None = None
        self.drafting = None if drafter is None else Drafting(drafter, self)

    @property
    def head_shape(self) -> tuple[int, ...]:
        """(V, C)."""
        return self.target.head.shape

    def verify(self, n: int) -> None:
        """Run ids[:n] behind the committed rows, accept, and move on."""
        accept.accept(self.state, self.argmax(self.forward(n)), self.record, self.script)

    def argmax(self, hidden: Tensor) -> Tensor:
        """The likeliest token of each row, int64 [n]."""
        if self.screen is None:
            return heads.argmax(hidden, self.head, pdl=self.pdl)
        assert isinstance(self.head, Tensor)
        return screen.argmax(hidden, self.head, self.screen, pdl=self.pdl)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [n, V], capped."""
        logits, _ = heads.logits_and_argmax(
            hidden, self.head, softcap=self.target.softcap, pdl=self.pdl
        )
        return logits

    def forward(self, n: int) -> Tensor:
        """Final normed hidden states [n, C] of ids[:n]; fills `features`."""
        t, width = self.target, self.target.table.shape[1]
        x, h = norms.embed(
            self.state.ids[:n],
            t.table,
            t.embed_scale,
            self.stack.input_norm,
            self.stack.eps,
            pdl=self.pdl,
        )
        taps = {
            layer: self.features[:n, i * width : (i + 1) * width]
            for i, layer in enumerate(self.taps)
        }
        return self.stack(x, h, self.state.length, taps)

    def draft(self) -> None:
        """Take the rows committed last into the drafter's context, draft, and fill ids[1:]."""
        assert self.drafting is not None
        self.drafting.project()
        self.drafting.propose(*self.drafting.likeliest(self.drafting.forward()))


class Drafting:
    """The drafter's half."""

    def __init__(self, drafter: Drafter, step: Step) -> None:
        c = drafter.config
        self.step, self.config, self.cache = step, c, drafter.cache
        norm, self.hidden_norm = drafter.norm.weight, drafter.hidden_norm.weight
        assert norm is not None
        assert self.hidden_norm is not None
        self.fc = kernel_weights.linear(drafter.fc)
        self.pdl = step.pdl
        self.stack = Stack(drafter.parts(), norm, drafter.cache, drafter.cache.capacity, self.pdl)
        self.draft_head = HeadKernels(drafter.head, self.pdl)
        self.context_kv = kernel_weights.linear(drafter.context_kv)
        self.k_norms = torch.stack([layer.k_norm for layer in drafter.layers])  # [L, D]
        self.nothing = torch.zeros(
            MAX_ROWS, c.hidden_size, dtype=step.features.dtype, device=step.features.device
        )
        self.turns: Tables = self.stack.layers[0].attention.turns

    def forward(self) -> Tensor:
        """Final normed hidden states [B − 1, C] of the masks behind the anchor."""
        state, target = self.step.state, self.step.target
        x, h = norms.embed(
            state.block,
            target.table,
            target.embed_scale,
            self.stack.input_norm,
            self.stack.eps,
            pdl=self.pdl,
        )
        return self.stack(x, h, state.length)[1:]

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, int64 [B − 1], and its probability, fp32."""
        return self.draft_head.likeliest(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [B − 1, V], −inf for tokens without a row in the draft head."""
        return self.draft_head.logits(hidden)

    def propose(self, tokens: Tensor, confidence: Tensor) -> None:
        """Fill the rows behind the anchor: int64 [B − 1] and, for the host, fp32 [B − 1]."""
        self.step.state.ids[1 : len(tokens) + 1].copy_(tokens)
        self.step.state.confidence[: len(tokens)].copy_(confidence)

    def project(self) -> None:
        """Context keys and values of the rows committed last, `committed` of them."""
        state, eps = self.step.state, self.config.rms_norm_eps
        projected = Branch(linear.partials(self.step.features, self.fc, pdl=self.pdl))
        assert self.hidden_norm is not None
        _, (context,) = norms.residual_norms(
            self.nothing, [projected], [self.hidden_norm], eps, pdl=self.pdl
        )
        caches = list(zip(self.cache.keys, self.cache.values, strict=True))
        rope.context_write(
            linear.partials(context, self.context_kv, pdl=self.pdl), self.k_norms, self.turns.cos,
            self.turns.sin, caches, state.start, state.committed, eps=eps, pdl=self.pdl,
        )  # fmt: skip


class HeadKernels:
    """A draft head by our kernels."""

    def __init__(self, head: DraftHead, pdl: bool) -> None:
        self.head, self.pdl = head, pdl
        self.weight = kernel_weights.linear(head.weight)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, int64 [T], of normed states [T, C], and their probabilities."""
        return heads.confident(
            hidden, self.weight, softcap=self.head.softcap, ids=self.head.ids, pdl=self.pdl
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, fp32 [T, V]; -inf for tokens without a row."""
        cap = self.head.softcap
        logits, _ = heads.logits_and_argmax(hidden, self.weight, softcap=cap, pdl=self.pdl)
        return self.head.spread(logits, self.head.ids)


class Graphs:
    """Captured passes by name, in one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def capture(self, name: str, run: Callable[[], None]) -> None:
        """Run twice to compile and settle, then record. The runs' effects on the state remain."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._graphs[name] = graph

    def replay(self, name: str) -> None:
        """Launch what was recorded."""
        self._graphs[name].replay()
