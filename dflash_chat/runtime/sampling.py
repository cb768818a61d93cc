"""How the target's next tokens are chosen, row by row, exactly as plain decoding would choose them.

Verification is sample-and-match: every row draws its own token from the target's final
distribution, and drafted tokens are accepted while they equal the draw. That is lossless for any
draft.

A draw is the argmax of log p + g, where the Gumbel noise g is a hash of (seed, position, token).
The drafter's guess is the argmax of log q + g with the *same* g, so it lands on the token that the
target will draw as often as the two distributions allow without rejection (Daliri, Musco, Suresh,
"Coupling without communication", arXiv 2408.07978), and a seed yields the same text with drafting
on or off, up to the numerics of wider rows. Order of operations: penalties → temperature → top-k →
top-p → min-p → renormalise.

Knows logits and token ids; knows no caches and no text.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_chat.runtime.api import SamplingParams

UNREAD = -1  # choice of a row behind the first mismatch, where that row was not computed
_TOP_P_CANDIDATES = 512  # a full sort of the vocabulary is only needed for flatter distributions
_MASK = 0xFFFFFFFF  # one 32-bit word
_NEVER = -80.0  # log-odds
_SUMS_ERR = 1e-4  # more than fp32 sums of a vocabulary are off
_BLOCK = 64  # tokens of which a CPU looks at the largest first
HEAD = 64  # tokens with noise of their own; the rest of the vocabulary competes as one
SHARPNESS = 0.8  # turns perturbed scores into doubts, whose roots are; found on the default pair


class Sampler:
    """The choices of one answer: parameters, penalty history and the position's random numbers."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        seed = secrets.randbits(32) if params.seed is None else params.seed
        self.seed_key = int(mix(torch.tensor(seed & _MASK)))
        self._prompt = tuple(prompt)
        self._output: list[int] = []
        self.penalises = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @property
    def greedy(self) -> bool:
        """Whether a row's choice is its likeliest token and nothing else."""
        return self.params.temperature <= 0 and not self.penalises

    def choose(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """The token each row chooses, int64 [n]; UNREAD where no caller may look.

        logits: [n, V]; drafted: [n-1], the tokens rows 1.. were fed with. Row 0 stands behind the
        answer so far. Row k's penalties count the answer so far and drafted[:k], which is its true
        history if row k is reached at all.
        """
        if self.penalises:
            logits = self._penalised(logits.float(), drafted)
        if self.params.temperature <= 0:
            # on a CPU argmax takes twice as long as max, and of bf16 four times
            return logits.float().max(-1).indices
        keys = self.keys(len(logits), logits.device)
        if logits.is_cuda:
            return self._draw(logits, keys)
        return self._one_by_one(logits, drafted.tolist(), keys)

    def guess(
        self, logits: Tensor, ids: Tensor | None = None, before: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What the target will choose, as far as the drafter's logits [n, N] of tokens `ids`,
        int64 [N], tell; None: of every token in order.

        Row 0 stands `before` rows behind where `choose`'s does. Returns the tokens, int64 [n], and
        for each a rough chance that it is right, fp32 [n].
        """
        logits = logits.float()
        if self.params.temperature <= 0:
            best = logits.max(-1)
            tokens = best.indices if ids is None else ids[best.indices]
            return tokens, (logits - best.values[:, None]).exp().sum(-1).reciprocal()
        top, at = largest(logits, min(HEAD, logits.shape[-1]))
        tokens = at if ids is None else ids[at]
        noise = gumbel(self.keys(len(tokens), tokens.device, before)[:, None], tokens)
        scores = filtered(top, self.params).log() + noise
        best = scores.max(-1)
        against = ((scores - best.values[:, None]) * SHARPNESS).exp().sum(-1)
        chance = 1.0 - ((against - 1.0) / against).sqrt()
        return tokens.gather(-1, best.indices[:, None])[:, 0], chance

    def _one_by_one(self, logits: Tensor, drafted: list[int], keys: Tensor) -> Tensor:
        """The choices up to the first that contradicts its draft, then UNREAD: nobody looks there.

        On a CPU a row costs its arithmetic, not a launch, and most rows are never reached.
        """
        chosen = [UNREAD] * len(logits)
        for i in range(len(logits)):
            row, key = logits[i : i + 1].float(), keys[i : i + 1]
            few = draw_of_few(row, self.params, key)
            chosen[i] = int(draw(filtered(row, self.params), key)) if few is None else few
            if i < len(drafted) and chosen[i] != drafted[i]:
                break
        return torch.tensor(chosen)

    def _draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        """One token per row."""
        return draw(filtered(logits.float(), self.params), keys)

    def keys(self, n: int, device: torch.device, before: int = 0) -> Tensor:
        """One key per position, from `before` behind the answer's end on, int64 [n]."""
        first = len(self._output) + before
        positions = torch.arange(n, dtype=torch.int64, device=device) + first
        return mix(positions * 0x9E3779B1 + self.seed_key)

    @property
    def length(self) -> int:
        """Tokens of the answer so far."""
        return len(self._output)

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens now belong to the answer."""
        self._output.extend(tokens)

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


def filtered(logits: Tensor, params: SamplingParams, whole: Tensor | None = None) -> Tensor:
    """Unnormalised probabilities [n, V] in fp32 after temperature, top-k, top-p and min-p.

    With `whole`, fp32 [n, 1], these are but the largest of more logits, and it is the logarithm of
    the sum of all their exponentials, the temperature applied.
    """
    logits = _scaled(logits, params)
    if 0 < params.top_k < logits.shape[-1]:
        kth = largest(logits, params.top_k)[0][:, -1:]  # [n, 1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    weights = logits.softmax(-1) if whole is None else (logits - whole).exp()
    if params.top_p < 1.0:
        few = 0 < params.top_k <= _TOP_P_CANDIDATES
        weights = weights.masked_fill(weights < _nucleus_floor(weights, params.top_p, few), 0.0)
    if params.min_p > 0.0:
        floor = params.min_p * weights.amax(-1, keepdim=True)
        weights = weights.masked_fill(weights < floor, 0.0)
    return weights


def _scaled(logits: Tensor, params: SamplingParams) -> Tensor:
    """By the temperature. A CPU takes ten times as long for exponentials that fp32 can hardly hold,
    so there what never wins keeps a weight of e⁻⁸⁰.
    """
    logits = logits / params.temperature
    if logits.is_cuda:
        return logits
    return logits.maximum(logits.amax(-1, keepdim=True) + _NEVER)


def _nucleus_floor(weights: Tensor, top_p: float, few: bool) -> Tensor:
    """Smallest probability inside the nucleus of each row, [n, 1] (Holtzman et al., arXiv
    1904.09751). `few` says that no more tokens than the candidates have any weight.
    """
    top = weights.topk(min(_TOP_P_CANDIDATES, weights.shape[-1]), -1).values  # [n, ≤512]
    # a GPU would have to be waited for to know whether the candidates suffice
    if not few and (weights.is_cuda or not bool((top.sum(-1) >= top_p).all())):
        top = weights.sort(-1, descending=True).values  # [n, V]
    before = top.cumsum(-1) - top  # mass that stands ahead of each candidate
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return top.gather(-1, last.clamp(min=0))


def draw(weights: Tensor, keys: Tensor) -> Tensor:
    """One index per row of unnormalised weights [n, V], by Gumbel-max with the keys' noise, [n].

    The likeliest tokens carry noise of their own, fewer than `HEAD` if the next one is as likely.
    The others compete as one, whose weight is their sum (the maximum of Gumbels is a Gumbel); if it
    wins, one of them is drawn by inverse CDF.
    """
    vocab = weights.shape[-1]
    top, ids = largest(weights, min(HEAD + 1, vocab))
    next_best = top[:, -1:] if vocab > HEAD else torch.zeros_like(top[:, -1:])
    own = top.masked_fill(top <= next_best, 0.0)
    scores = own.log() + gumbel(keys[:, None], ids)
    best = scores.max(-1)
    chosen = ids.gather(-1, best.indices[:, None])[:, 0]
    number = torch.full_like(keys, vocab)
    rest_noise = gumbel(keys, number)
    if not weights.is_cuda:  # mostly the rest need not be weighed to know that they lose
        at_most = weights.sum(-1) * (1.0 + _SUMS_ERR) - own.sum(-1)
        if bool((best.values >= at_most.log() + rest_noise).all()):
            return chosen
    rest = weights.masked_fill(weights > next_best, 0.0)
    loses = best.values >= rest.sum(-1).log() + rest_noise
    return torch.where(loses, chosen, inverse_cdf(rest, uniform(keys, number + 1)))


def draw_of_few(logits: Tensor, params: SamplingParams, key: Tensor) -> int | None:
    """What `draw` of the `filtered` logits [1, V] gives, if no more than `HEAD` tokens pass the
    filters; else None. A fifth of the time, since the others are never weighed.
    """
    filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    if not filters or params.top_k > HEAD or logits.shape[-1] <= HEAD:
        return None
    top, ids = largest(logits, HEAD + 1)
    whole = None if params.top_k else _scaled(logits, params).logsumexp(-1, keepdim=True)
    weights = filtered(top, params, whole)
    passed = int((weights > 0).sum())
    if passed > HEAD:
        return None
    if passed == 1:
        return int(ids[0, 0])
    return int(ids[0, (weights.log() + gumbel(key[:, None], ids)).argmax()])


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row of x [n, V], the first first, and where they are.

    A CPU looks for them where the k blocks stand whose own largest are the largest: a third of the
    time that `topk` takes for the whole row.
    """
    blocks = x.shape[-1] // _BLOCK
    if x.is_cuda or x.shape[-1] % _BLOCK or 2 * k > blocks:
        top = x.topk(k, -1)
        return top.values, top.indices
    tiles = x.view(len(x), blocks, _BLOCK)
    which = tiles.amax(-1).topk(k, -1).indices  # [n, k]
    few = tiles.gather(1, which[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    top = few.topk(k, -1)
    ids = which.gather(-1, top.indices // _BLOCK) * _BLOCK + top.indices % _BLOCK
    return top.values, ids


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise in fp32, a function of key and token alone."""
    return -(-uniform(keys, tokens).log()).log().float()


def uniform(keys: Tensor, tokens: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64, a function of key and token alone."""
    return (mix(mix(tokens * 0x85EBCA77 + keys) ^ keys).double() + 0.5) / (_MASK + 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose every output bit hangs on every input bit, int64 → int64
    (the finaliser of MurmurHash3).
    """
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


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
