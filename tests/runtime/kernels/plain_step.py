"""`step.Step` in plain torch, for tests of what is around it: interpreted kernels take seconds.

The kernels' own step is compared with the plain target and drafter in `test_step.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.kernels import accept
from dflash_chat.runtime.kernels.accept import State
from dflash_chat.runtime.width import MAX_ROWS
from tests.runtime.kernels.conftest import DEVICE
from tests.runtime.kernels.pairs import Pair


class PlainStep:
    """The same state, buffers and passes."""

    def __init__(self, pair: Pair, taps: Sequence[int]) -> None:
        def counter() -> Tensor:
            return torch.zeros(1, dtype=torch.int32, device=DEVICE)

        self.target, self.cache, self.taps = pair.target, pair.cache, taps
        size, mask = pair.drafter.config.block_size, pair.drafter.config.mask_token_id
        self.state = State(
            torch.zeros(MAX_ROWS, dtype=torch.int64), torch.full((size,), mask), counter(),
            counter(), counter(), counter(), torch.zeros(MAX_ROWS),
        )  # fmt: skip
        self.features = torch.zeros(MAX_ROWS, len(taps) * pair.drafter.config.hidden_size)
        self.record, self.script = accept.new_record(DEVICE), None
        self.head_shape = pair.target.lm_head.shape
        self.drafting = PlainDrafting(pair.drafter, self)

    def forward(self, n: int) -> Tensor:
        cache = _at(self.cache, int(self.state.length))
        hidden, self.features[:n] = self.target.forward(self.state.ids[:n], cache, self.taps)
        return hidden

    def argmax(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden).argmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.target.logits(hidden).float()


class PlainDrafting:
    """The drafter's half."""

    def __init__(self, drafter: Drafter, step: PlainStep) -> None:
        self._drafter, self._step = drafter, step

    def project(self) -> None:
        state = self._step.state
        drafter = self._view(int(state.start))
        if rows := int(state.committed):
            drafter._project(self._step.features[:rows])

    def forward(self) -> Tensor:
        """The logits themselves: the plain drafter goes no other way."""
        state = self._step.state
        drafter = self._view(int(state.length))
        return drafter.draft(int(state.block[0]), len(state.block) - 1)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        best = hidden.float().softmax(-1).max(-1)
        return best.indices, best.values

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.float()

    def propose(self, tokens: Tensor, confidence: Tensor) -> None:
        self._step.state.ids[1 : len(tokens) + 1] = tokens
        self._step.state.confidence[: len(tokens)] = confidence

    def _view(self, length: int) -> Drafter:
        """The drafter over the same tensors, with the device's length and nothing pending."""
        view = copy.copy(self._drafter)
        view.cache, view._pending = _at(view.cache, length), []
        return view


def _at(cache: KVCache, length: int) -> KVCache:
    view = copy.copy(cache)
    view.length, view.provisional = length, 0
    return view
