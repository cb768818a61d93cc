"""Sampled tokens of a block of rows in two launches: `sampling.filtered`, then `sampling.draw`.

    w = exp((logit − largest) / temperature)        row i stands at position length − first + i
    kept: w ≥ least, which top-k, top-p and min-p raise one after the other
    head: the 64 largest w, fewer if the 65th ties with them; rest: all others that are kept
    token = argmax over the head of log w + gumbel(position, token), unless log Σ rest +
    gumbel(position, V) is larger: then one of the rest by inverse CDF, in the order of the ids

    logits fp32 [n, V] → int64 [n].  params fp64 [6] holds a request (see `write`), length int32 [1]
    the committed rows, so that a CUDA graph serves every request and every step.

Every filter is a threshold on w, hence a bisection on its bits: nothing is sorted. The first kernel
reads the logits once, one warp a tile, and keeps the tile's largest few as candidates, and its sum
of w. A tile's ids are strided, since likely tokens have neighbouring ids, as digits have. The
second, one program a row, has all candidates in registers. They are complete above the largest of
the tiles' last candidates; where a threshold lies below that, or the rest wins, it reads the row's
logits again, once per halving: slow, rare, and without the host.

`guess` is the drafter's side: the same noise, but filters and choice see the head alone.

Bound by latency: about a dozen halvings, each a reduction over the program. Noise is the torch
path's, bit by bit (32-bit hash, fp64 logarithms); weights are fp32 and sums of another order, so
the same logits may yield another token only where two scores, or a threshold and a cumulated sum,
agree to the last bits.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202 (Triton takes no annotations but its own)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_chat.runtime import sampling
from dflash_chat.runtime.sampling import Sampler

_TILES = 512  # at most, of a row
_RUN = tl.constexpr(4)  # neighbouring ids in a tile; of 8, digits filled its candidates
_ONE = tl.constexpr(0x3F800000)  # bits of the largest weight


class Config(NamedTuple):
    """Logits of a tile, candidates it keeps, logits read at once when a row is read again, and
    warps that do so.
    """

    tile: int
    top: int = 8
    block: int = 4096
    warps: int = 8


class Candidates(NamedTuple):
    """The largest logits of each tile, in order, their ids, and the tile's sum of
    exp((logit − its largest) / temperature).
    """

    logits: Tensor  # fp32 [n, top, tiles]
    ids: Tensor  # int32 [n, top, tiles]
    sums: Tensor  # fp32 [n, tiles]


def default_config(vocab: int) -> Config:
    """Tiles so many that the second kernel has 16 candidates a thread."""
    return Config(max(32, triton.next_power_of_2(triton.cdiv(vocab, _TILES))))


def reference(logits: Tensor, sampler: Sampler) -> Tensor:
    """int64 [n], row 0 behind the answer so far; weights are of the logits' dtype."""
    keys = sampler.keys(len(logits), logits.device)
    return sampling.draw(sampling.filtered(logits, sampler.params), keys)


@triton.jit
def _token(j, tile, TILES: tl.constexpr):
    """The id of a tile's j-th logit."""
    return (j // _RUN * TILES + tile) * _RUN + j % _RUN


@triton.jit
def _candidates_kernel(
    logits_ptr, params_ptr, best_ptr, ids_ptr, sums_ptr,
    VOCAB: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, TILE)
    at = _token(j, tile, TILES)
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    x = tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf"))
    temperature = tl.load(params_ptr).to(tl.float32)
    largest = tl.maximum(tl.max(x, axis=0), -1e30)  # finite, though all be forbidden
    w = _weight(x, largest, temperature)
    tl.store(sums_ptr + row * TILES + tile, tl.sum(w, axis=0))
    out = row * TOP * TILES + tile
    for i in tl.static_range(TOP):
        best, where = tl.max(x, axis=0, return_indices=True)
        tl.store(best_ptr + out + i * TILES, best)
        tl.store(ids_ptr + out + i * TILES, _token(where, tile, TILES))
        x = tl.where(j == where, float("-inf"), x)


@triton.jit
def _weight(x, largest, temperature):
    return tl.exp(tl.div_rn(x, temperature) - tl.div_rn(largest, temperature))


@triton.jit
def _bits(w):
    """Weights as integers of the same order."""
    return w.to(tl.int32, bitcast=True)


@triton.jit
def _mix(x):
    """`sampling.mix` on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _uniform(key, token):
    return (_mix(_mix(token * 0x85EBCA77 + key) ^ key).to(tl.float64) + 0.5) / 4294967296.0


@triton.jit
def _gumbel(key, token):
    return (-tl.log(-tl.log(_uniform(key, token)))).to(tl.float32)


@triton.jit
def _read(row_ptr, at, largest, temperature, VOCAB: tl.constexpr):
    """Weights of the row's tokens `at`, 0 beyond the vocabulary."""
    x = tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf"))
    return _weight(x, largest, temperature)


@triton.jit
def _from(row_ptr, least, largest, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Count and sum of the row's weights from `least` up."""
    count = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, VOCAB, BLOCK, num_stages=3):
        w = _read(row_ptr, begin + tl.arange(0, BLOCK), largest, temperature, VOCAB)
        kept = _bits(w) >= least
        count += tl.where(kept, 1.0, 0.0)
        mass += tl.where(kept, w, 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _split(
    w, known, target, lowest, MASS: tl.constexpr,
    row_ptr, largest, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bits between which no weight lies: those from `low` up reach `target` (a count, or a sum
    with MASS), those from `high` up do not. w: the candidates, complete above `known`. Those from
    `lowest` up surely reach it; 0, if even all together may not.
    """
    bits = _bits(w)
    low, high = lowest, _ONE + 1
    more, fewer = tl.sum(tl.where(bits > 0, 1.0, 0.0), axis=0), 0.0
    while (high - low > 1) & (more - fewer > 1):
        middle = low + (high - low) // 2
        count = tl.sum(tl.where(bits >= middle, 1.0, 0.0), axis=0)
        mass = count
        if MASS:
            mass = tl.sum(tl.where(bits >= middle, w, 0.0), axis=0)
        reached = mass >= target
        low, more = tl.where(reached, middle, low), tl.where(reached, count, more)
        high, fewer = tl.where(reached, high, middle), tl.where(reached, fewer, count)
    if (low <= known) & (known > 0):  # the candidates cannot tell
        high = tl.maximum(high, known + 1)
        low, more = lowest, VOCAB * 1.0
        fewer = tl.sum(tl.where(bits >= high, 1.0, 0.0), axis=0)
        while (high - low > 1) & (more - fewer > 1):
            middle = low + (high - low) // 2
            count, mass = _from(row_ptr, middle, largest, temperature, VOCAB, BLOCK)
            reached = (mass if MASS else count) >= target
            low, more = tl.where(reached, middle, low), tl.where(reached, count, more)
            high, fewer = tl.where(reached, high, middle), tl.where(reached, fewer, count)
    return low, high


@triton.jit
def _mass(
    w, total, known, least,
    row_ptr, largest, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of all weights from `least` up."""
    mass = tl.sum(tl.where(_bits(w) >= least, w, 0.0), axis=0)
    if least == 0:
        mass = total
    elif least <= known:
        _, mass = _from(row_ptr, least, largest, temperature, VOCAB, BLOCK)
    return mass


@triton.jit
def _gather(w, ids, chosen, head_ptr, head_ids_ptr, begin):
    """Append the chosen to the head's list; how many it then has."""
    to = begin + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(head_ptr + to, w, mask=chosen)
    tl.store(head_ids_ptr + to, ids, mask=chosen)
    return begin + tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _inverse_cdf(
    row_ptr, least, high, uniform,
    largest, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token whose weight is from `least` up and below `high`; −1 if there is none."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, VOCAB, BLOCK):
        w = _read(row_ptr, begin + i, largest, temperature, VOCAB)
        sums += tl.where((_bits(w) >= least) & (_bits(w) < high), w, 0.0).to(tl.float64)
    target = uniform * tl.sum(sums, axis=0)
    running, before, start = target * 0, target * 0, 0
    for begin in range(0, VOCAB, BLOCK):
        w = _read(row_ptr, begin + i, largest, temperature, VOCAB)
        rest = tl.where((_bits(w) >= least) & (_bits(w) < high), w, 0.0).to(tl.float64)
        running += tl.sum(rest, axis=0)
        before = tl.where(running <= target, running, before)
        start = tl.where(running <= target, begin + BLOCK, start)
    w = _read(row_ptr, start + i, largest, temperature, VOCAB)
    rest = tl.where((_bits(w) >= least) & (_bits(w) < high), w, 0.0).to(tl.float64)
    beyond = (before + tl.cumsum(rest, 0) > target) & (rest > 0)
    first = tl.min(tl.where(beyond, start + i, VOCAB), axis=0)
    last = tl.max(tl.where(rest > 0, start + i, -1), axis=0)  # if rounding left none beyond
    return tl.minimum(first, last)


@triton.jit
def _choose_kernel(
    logits_ptr, params_ptr, length_ptr, best_ptr, ids_ptr, sums_ptr, head_ptr, head_ids_ptr,
    out_ptr, chance_ptr,
    VOCAB: tl.constexpr, TILES: tl.constexpr, TOP: tl.constexpr, ALL: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, GUESS: tl.constexpr, SHARPNESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    temperature = tl.load(params_ptr).to(tl.float32)
    top_k = tl.load(params_ptr + 1).to(tl.float32)
    top_p = tl.load(params_ptr + 2).to(tl.float32)
    min_p = tl.load(params_ptr + 3).to(tl.float32)
    seed = tl.load(params_ptr + 4).to(tl.int64).to(tl.uint32)
    first = tl.load(params_ptr + 5).to(tl.int32)
    position = (tl.load(length_ptr) - first + row).to(tl.uint32)
    key = _mix(position * 0x9E3779B1 + seed)

    c = tl.arange(0, ALL)  # a tile's largest candidates come first, its last ones last
    in_ptr = row * TOP * TILES + c
    x = tl.load(best_ptr + in_ptr, mask=c < TOP * TILES, other=float("-inf"))
    ids = tl.load(ids_ptr + in_ptr, mask=c < TOP * TILES, other=0)
    sums = tl.load(sums_ptr + row * TILES + c, mask=c < TILES, other=0.0)
    largest = tl.max(x, axis=0)
    w = _weight(x, largest, temperature)
    total = tl.sum(sums * w, axis=0)
    known = tl.max(tl.where(c >= (TOP - 1) * TILES, _bits(w), 0), axis=0)

    high = 1
    if VOCAB > HEAD:
        _, high = _split(
            w, known, HEAD + 1, 0, False, row_ptr, largest, temperature, VOCAB, BLOCK
        )  # fmt: skip
        few = tl.sum(tl.where(_bits(w) > 0, 1, 0), axis=0) <= HEAD
        high = tl.where((known == 0) & few, 1, high)  # the head takes all there are
    head_ptr += row * HEAD
    head_ids_ptr += row * HEAD
    if high > known:
        members = _gather(w, ids, _bits(w) >= high, head_ptr, head_ids_ptr, 0)
    else:
        members = 0
        for begin in range(0, VOCAB, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            v = _read(row_ptr, at, largest, temperature, VOCAB)
            members = _gather(v, at, _bits(v) >= high, head_ptr, head_ids_ptr, members)
    tl.debug_barrier()  # other threads have stored what is loaded here
    h = tl.arange(0, HEAD)
    head_w = tl.load(head_ptr + h, mask=h < members, other=0.0, cache_modifier=".cg")
    head_ids = tl.load(head_ids_ptr + h, mask=h < members, other=0, cache_modifier=".cg")
    if GUESS:  # the head is all there is
        w = head_w
        total = tl.sum(w, axis=0)
        known = 0

    least = 0
    if (top_k > 0) & (top_k < (HEAD if GUESS else VOCAB)):
        least, _ = _split(w, known, top_k, 0, False, row_ptr, largest, temperature, VOCAB, BLOCK)
    if top_p < 1:
        mass = _mass(w, total, known, least, row_ptr, largest, temperature, VOCAB, BLOCK)
        target = top_p * mass
        lowest = _bits((mass - target) / VOCAB)  # all below it together are not missed
        floor, _ = _split(
            w, known, target, lowest, True, row_ptr, largest, temperature, VOCAB, BLOCK
        )  # fmt: skip
        least = tl.maximum(least, floor)
    least = tl.maximum(least, _bits(min_p))

    head_w = tl.where(_bits(head_w) >= least, head_w, 0.0)
    scores = tl.log(head_w) + _gumbel(key, head_ids.to(tl.uint32))
    score, where = tl.max(scores, axis=0, return_indices=True)
    token = tl.sum(tl.where(h == where, head_ids, 0), axis=0)
    if GUESS:
        against = tl.sum(tl.exp(SHARPNESS * (scores - score)), axis=0)
        tl.store(chance_ptr + row, 1 - tl.sqrt((against - 1) / against))
    else:
        mass = _mass(w, total, known, least, row_ptr, largest, temperature, VOCAB, BLOCK)
        rest = mass - tl.sum(head_w, axis=0)
        if rest > 0:
            none = tl.zeros([1], tl.uint32) + VOCAB
            noise = tl.sum(_gumbel(key, none), axis=0)
            if tl.log(rest) + noise > score:
                u = tl.sum(_uniform(key, none + 1), axis=0)
                drawn = _inverse_cdf(
                    row_ptr, least, high, u, largest, temperature, VOCAB, BLOCK
                )  # fmt: skip
                token = tl.where(drawn >= 0, drawn, token)
    tl.store(out_ptr + row, token.to(tl.int64))


def new_params(device: torch.device) -> Tensor:
    """Room for a request, fp64 [6]; temperature 1 and no filter until `write`."""
    return torch.tensor([1.0, 0, 1, 0, 0, 0], dtype=torch.float64, device=device)


def write(params: Tensor, sampler: Sampler, first: int) -> None:
    """Make `params` those of `sampler`; its answer's first token has position `first` of the
    cache.
    """
    p = sampler.params
    request = [p.temperature, p.top_k, p.top_p, p.min_p, sampler.seed_key, first]
    params.copy_(torch.tensor(request, dtype=torch.float64))


def sample(logits: Tensor, length: Tensor, params: Tensor, config: Config | None = None) -> Tensor:
    """The token that each row draws."""
    return _choose(logits, length, params, config, None)


def guess(
    logits: Tensor, length: Tensor, params: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """What the target will draw, as far as the drafter's logits tell, and how likely it is right,
    fp32 [n]: `Sampler.guess`.
    """
    chances = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    return _choose(logits, length, params, config, chances), chances


def candidates(logits: Tensor, params: Tensor, config: Config) -> Candidates:
    """The likeliest tokens of every tile."""
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32, f"logits {logits.dtype}"
    assert logits.is_contiguous(), f"logits {logits.stride()}"
    assert params.dtype == torch.float64, f"params {params.dtype}"
    tiles = triton.cdiv(vocab, config.tile)
    best = torch.empty(rows, config.top, tiles, dtype=torch.float32, device=logits.device)
    found = Candidates(
        best, torch.empty_like(best, dtype=torch.int32), torch.empty_like(best[:, 0])
    )
    _candidates_kernel[(tiles, rows)](
        logits, params, *found,
        VOCAB=vocab, TILES=tiles, TILE=config.tile, TOP=config.top, num_warps=1,
    )  # fmt: skip
    return found


def _choose(
    logits: Tensor, length: Tensor, params: Tensor, config: Config | None, chances: Tensor | None
) -> Tensor:
    rows, vocab = logits.shape
    config = config or default_config(vocab)
    found = candidates(logits, params, config)
    tiles = found.sums.shape[1]
    head = torch.empty(rows, sampling.HEAD, dtype=torch.float32, device=logits.device)
    head_ids = torch.empty_like(head, dtype=torch.int32)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _choose_kernel[(rows,)](
        logits, params, length, *found, head, head_ids, out, chances,
        VOCAB=vocab, TILES=tiles, TOP=config.top, ALL=triton.next_power_of_2(config.top * tiles),
        HEAD=sampling.HEAD, BLOCK=config.block, GUESS=chances is not None,
        SHARPNESS=sampling.SHARPNESS, num_warps=config.warps,
    )  # fmt: skip
    return out
