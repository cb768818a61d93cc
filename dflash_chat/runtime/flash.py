"""Attention of a prompt's chunks: by our kernel, or by flash-attn where that measures faster.

flash-attn is an option that nobody needs. Two packages are tried where they are installed:
`flash-attn-4`, which compiles itself when it is first called, and `flash-attn` 2. Both take keys
and values with any strides, so the cache is read where it lies unless a ring's end lies between;
both show the last row the last key. Which attention reads the long chunks of a kind of layer is
decided once in a process, from times on the device at that layer's shape. What computes something
else than our kernel is not used, and a tie is ours.

A drafter has nothing to gain from it: its context is projected and attends to nothing, and its
blocks have at most 17 rows. Knows caches, packages and how to call them; knows no models.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dflash_chat.budget import CUDA_PREFILL_CHUNK
from dflash_chat.runtime import kernels
from dflash_chat.runtime.cache import Geometry, KVCache
from dflash_chat.runtime.timing import quickest_ms

log = logging.getLogger(__name__)

PACKAGES = {"flash-attn-4": "flash_attn.cute", "flash-attn": "flash_attn"}  # modules by pip's names
MIN_ROWS = 1024  # of a long chunk; shorter ones are soon read by either
HEAD_DIMS = (64, 128, 256)  # that our kernel and both packages have
KEYS = (2048, 8192)  # that a chunk is timed over
CALLS = 4  # timed in a row, so that the host runs ahead as it does in a prompt
MARGIN = 1.05  # what is not quicker by that is as quick
AGREES = 0.01  # relative: bf16 alone makes 0.003, a window that is one key off 0.03

Function = Callable[..., Any]  # flash_attn_func
Attention = Callable[[Tensor, KVCache, int, float], Tensor]


class Choice(NamedTuple):
    """What reads a kind of layer's long chunks; and why, in words."""

    attention: Attention
    words: str


def chunk_attention(q: Tensor, cache: KVCache, layer: int, scale: float) -> Tensor:
    """Causal attention of a chunk that was just written to the cache: [T, H, D] → [T, H·D]."""
    geometry = cache.geometries[layer]
    if not serves(geometry, len(q)):
        return by_our_kernel(q, cache, layer, scale)
    return choice(q.device, q.dtype, q.shape[1], geometry).attention(q, cache, layer, scale)


def by_our_kernel(q: Tensor, cache: KVCache, layer: int, scale: float) -> Tensor:
    """As `chunk_attention`; wants the queries in a row."""
    from dflash_chat.runtime.kernels import prefill

    return prefill.chunk_attention(
        q.contiguous(), cache.keys[layer], cache.values[layer], cache.length,
        window=cache.geometries[layer].window, scale=scale,
    )  # fmt: skip


def by_flash_attn(
    function: Function, q: Tensor, cache: KVCache, layer: int, scale: float
) -> Tensor:
    """As `chunk_attention`, by the `flash_attn_func` of either package."""
    window = cache.geometries[layer].window
    k, v = (x.transpose(0, 1)[None] for x in cache.seen(layer, len(q)))  # [1, S, G, D]
    local = {"window_size": (window - 1, 0)} if window else {}
    out = function(q[None], k, v, softmax_scale=scale, causal=True, **local)
    out = out[0] if isinstance(out, tuple) else out  # version 4 adds the log-sum-exp
    return torch.flatten(out[0], 1)


# ── choosing ────────────────────────────────────────────────────────────────────────────────────


def serves(geometry: Geometry, rows: int) -> bool:
    """Whether there is a choice for chunks of `rows` rows in such a layer."""
    return rows >= MIN_ROWS and geometry.head_dim in HEAD_DIMS


@functools.cache
def choice(device: torch.device, dtype: torch.dtype, heads: int, geometry: Geometry) -> Choice:
    """What reads long chunks in layers of this shape, from the first question on.

    Takes seconds where a package is there: it is imported and perhaps compiled.
    """
    found = installed()
    if not found:
        return Choice(by_our_kernel, "own kernel (no flash-attn)")
    started = time.perf_counter()
    name, words = decide(*measured(device, dtype, heads, geometry))
    took = time.perf_counter() - started
    log.info("long chunks in %s: %s, found in %.1f s", geometry, words, took)
    return Choice(partial(by_flash_attn, load(found[name])) if name else by_our_kernel, words)


def decide(ours_ms: float, tried: Mapping[str, float | str]) -> tuple[str, str]:
    """The package to use, "" for our kernel, and that in words; from what `measured` returns."""
    times = {name: ms for name, ms in tried.items() if not isinstance(ms, str)}
    if times:
        best = min(times, key=times.__getitem__)
        factor = ours_ms / times[best]
        if factor > MARGIN:
            return best, f"{best} ({factor:.2f}× our kernel)"
        return "", f"own kernel ({best}: {factor:.2f}×)"
    return "", "own kernel ({})".format("; ".join(f"{name}: {why}" for name, why in tried.items()))


def words(cache: KVCache, heads: int) -> str:
    """What attends in a prompt's long chunks; "" where there is nothing to choose."""
    device, kinds = cache.keys[0].device, dict.fromkeys(cache.geometries)
    rows, said = min(cache.largest_block, cache.capacity), []
    for geometry in kinds:
        if kernels.serve(device, cache.dtype) and serves(geometry, rows):
            where = f" at head dim {geometry.head_dim}" if len(kinds) > 1 else ""
            said.append(choice(device, cache.dtype, heads, geometry).words + where)
    return "long prompts by " + ", ".join(said) if said else ""


# ── trying ──────────────────────────────────────────────────────────────────────────────────────


def installed() -> dict[str, str]:
    """The module of each installed package by its name and version."""
    found = {}
    for name, module in PACKAGES.items():
        with suppress(metadata.PackageNotFoundError):
            found[f"{name} {metadata.version(name)}"] = module
    return found


def load(module: str) -> Function:
    """A package's entry; whatever its import raises comes through."""
    function: Function = import_module(module).flash_attn_func
    return function


def measured(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    geometry: Geometry,
    rows: int = CUDA_PREFILL_CHUNK,
    keys: Iterable[int] = KEYS,
) -> tuple[float, dict[str, float | str]]:
    """Milliseconds of our kernel for a chunk over each number of keys, its own included, added up;
    and for each installed package the same, or why it cannot be used.
    """
    chunks = [_chunk(device, dtype, heads, geometry, rows, n) for n in keys]
    wanted = [chunk(by_our_kernel) for chunk in chunks]
    tried: dict[str, float | str] = {}
    usable: dict[str, Attention] = {}
    for name, module in installed().items():
        try:
            theirs = partial(by_flash_attn, load(module))
            errors = [_error(chunk(theirs), w) for chunk, w in zip(chunks, wanted, strict=True)]
        except Exception as problem:  # of a compiler or a driver: ours is right, perhaps slower
            log.exception("%s cannot be used", name)
            first_line = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            tried[name] = shorten(first_line, 80, placeholder=" …")
            continue
        if all(error <= AGREES for error in errors):
            usable[name] = theirs
        else:
            tried[name] = f"differs by {max(errors):.1%}"
            log.warning("%s is not used for %s: its output %s", name, geometry, tried[name])

    def read(attention: Attention) -> None:
        for _ in range(CALLS):
            for chunk in chunks:
                chunk(attention)

    passes = [partial(read, attention) for attention in (by_our_kernel, *usable.values())]
    ours_ms, *theirs_ms = (ms / CALLS for ms in quickest_ms(passes, device))
    return ours_ms, tried | dict(zip(usable, theirs_ms, strict=True))


def trial(device: torch.device) -> dict[str, str]:
    """Why each installed package cannot be used on a device, "" if it can; from a small block."""
    shape = Geometry(kv_heads=1, head_dim=128)
    _, tried = measured(device, torch.bfloat16, 4, shape, rows=64, keys=[128])
    return {name: why if isinstance(why, str) else "" for name, why in tried.items()}


def _chunk(
    device: torch.device, dtype: torch.dtype, heads: int, geometry: Geometry, rows: int, n: int
) -> Callable[[Attention], Tensor]:
    """A chunk of random rows, laid out as a layer hands them over, as the last of n positions."""
    cache = KVCache([geometry], n, dtype, device, rows)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache.length = n - rows
    shape = (rows, heads + geometry.kv_heads, geometry.head_dim)
    q = torch.randn(shape, device=device, dtype=dtype)[:, :heads]
    scale = geometry.head_dim**-0.5
    return lambda attention: attention(q, cache, 0, scale)


def _error(out: Tensor, wanted: Tensor) -> float:
    """Relative."""
    return float((out.float() - wanted.float()).norm() / wanted.float().norm())
