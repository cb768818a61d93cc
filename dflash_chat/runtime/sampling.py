"""How the target's next tokens are chosen, row by row, exactly as plain decoding would choose them.

Verification is sample-and-match: every row draws its own token from the target's final
distribution, and drafted tokens are accepted while they equal the draw. That is lossless for any
draft, and for a deterministic draft it accepts exactly as often as rejection sampling does.

Each answer position owns one uniform number of the seed's stream, so that a given seed yields the
same text with drafting on or off (up to the numerics of wider rows). Order of operations:
penalties → temperature → top-k → top-p → min-p → renormalise.

Knows logits and token ids; knows no caches and no text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_chat.runtime.api import SamplingParams

UNREAD = -1  # choice of a row behind the first mismatch, where that row was not computed
_TOP_P_CANDIDATES = 512  # a full sort of the vocabulary is only needed for flatter distributions


class Sampler:
    """The choices of one answer: parameters, penalty history and the position's random numbers."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self._stream = random.Random(params.seed)
        self._uniforms: list[float] = []
        self._prompt = tuple(prompt)
        self._output: list[int] = []
        self._penalises = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    def choose(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """The token each row chooses, int64 [n]; UNREAD where no caller may look.

        logits: [n, V]; drafted: [n-1], the tokens rows 1.. were fed with. Row k's penalties count
        the answer so far and drafted[:k], which is its true history if row k is reached at all.
        """
        if self._penalises:
            logits = self._penalised(logits.float(), drafted)
        if self.params.temperature <= 0:
            return logits.argmax(-1)
        uniforms = torch.tensor(self._draws(logits.shape[0]), dtype=torch.float64)
        if logits.is_cuda:
            return inverse_cdf(filtered(logits.float(), self.params), uniforms.to(logits.device))
        return self._one_by_one(logits, uniforms, drafted.tolist())

    def _one_by_one(self, logits: Tensor, uniforms: Tensor, drafted: list[int]) -> Tensor:
        """The choices up to the first that contradicts its draft, then UNREAD: nobody looks there.

        On a CPU a row costs its arithmetic, not a launch, and most rows are never reached.
        """
        chosen = torch.full((len(logits),), UNREAD)
        for i in range(len(logits)):
            weights = filtered(logits[i : i + 1].float(), self.params)
            chosen[i] = inverse_cdf(weights, uniforms[i : i + 1])[0]
            if i < len(drafted) and int(chosen[i]) != drafted[i]:
                break
        return chosen

    @property
    def length(self) -> int:
        """Tokens of the answer so far."""
        return len(self._output)

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens now belong to the answer."""
        self._output.extend(tokens)

    def _draws(self, n: int) -> list[float]:
        begin = len(self._output)
        while len(self._uniforms) < begin + n:
            self._uniforms.append(self._stream.random())
        return self._uniforms[begin : begin + n]

    def _penalised(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Repetition penalty (CTRL, arXiv 1909.05858) over prompt and answer; the others,
        answer only.
        """
        n, vocab = logits.shape
        device = logits.device
        output = torch.tensor(self._output, dtype=torch.int64, device=device)
        prompt = torch.tensor(self._prompt, dtype=torch.int64, device=device)
        block = torch.zeros(n, vocab, device=device)  # [n, V] counts of drafted[:k] in row k
        if n > 1:
            block[1:].scatter_(1, drafted[:, None].to(device), 1.0)
            block = block.cumsum(0)
        counts = block + torch.bincount(output, minlength=vocab)[None]
        seen = (counts > 0) | (torch.bincount(prompt, minlength=vocab) > 0)[None]
        penalty = self.params.repetition_penalty
        scaled = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, scaled, logits)
        logits = logits - self.params.frequency_penalty * counts
        return logits - self.params.presence_penalty * (counts > 0)


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Unnormalised probabilities [n, V] in fp32 after temperature, top-k, top-p and min-p."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, -1).values[:, -1:]  # [n, 1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    weights = logits.softmax(-1)
    if params.top_p < 1.0:
        weights = weights.masked_fill(weights < _nucleus_floor(weights, params.top_p), 0.0)
    if params.min_p > 0.0:
        floor = params.min_p * weights.amax(-1, keepdim=True)
        weights = weights.masked_fill(weights < floor, 0.0)
    return weights


def _nucleus_floor(weights: Tensor, top_p: float) -> Tensor:
    """Smallest probability inside the nucleus of each row, [n, 1] (Holtzman et al., arXiv
    1904.09751).
    """
    top = weights.topk(min(_TOP_P_CANDIDATES, weights.shape[-1]), -1).values  # [n, ≤512]
    if not bool((top.sum(-1) >= top_p).all()):
        top = weights.sort(-1, descending=True).values  # [n, V]
    before = top.cumsum(-1) - top  # mass that stands ahead of each candidate
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return top.gather(-1, last.clamp(min=0))


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One index per row drawn from unnormalised weights [n, V] with uniforms [n] in [0, 1)."""
    cdf = weights.double().cumsum(-1)  # [n, V]
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms[:, None] * total, below_total)
    return torch.searchsorted(cdf, target, right=True)[:, 0]


def accepted(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """Length of the longest prefix of `drafted` that the rows' own choices confirm."""
    n = 0
    while n < len(drafted) and drafted[n] == chosen[n]:
        n += 1
    return n
