"""Rope, block attention and chunk attention on this GPU, beside torch's SDPA.

    python -m tests.bench.kernels_attention [--seconds 60] [--pdl]

First a check against the reference, then one row per (shape, rows, context): µs, GB/s of the
visible keys and values, % of a copy's bandwidth measured in the same run; with --pdl also rope,
attention and merge as a chain, with and without. Then a short sweep around the default config, in
order of promise, until --seconds are over; it prints the best of each.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from dflash_chat.runtime.kernels import attention, prefill, rope
from dflash_chat.runtime.kernels.attention import Config
from tests.bench.gpu import copy_bandwidth, graph_seconds, machine
from tests.runtime.kernels.truth import assert_as_good

L2_BYTES = 400e6  # what the calls of one measurement read together
COPIES = 128  # at most, for small caches
SPARE = 32  # slots beyond the visible rows


class Shape(NamedTuple):
    """One kind of layer and what is measured of it."""

    name: str
    heads: int
    groups: int
    dim: int
    window: int
    causal: bool
    rows: tuple[int, ...]
    contexts: tuple[int, ...]

    def visible(self, rows: int, context: int) -> int:
        """Keys that the block sees."""
        return (min(context, self.window - 1) if self.window else context) + rows


ALL_ROWS, CONTEXTS = (1, 4, 8, 16), (2048, 8192, 32768)
SHAPES = (
    Shape("gemma sliding", 16, 8, 256, 1024, True, ALL_ROWS, (2048,)),
    Shape("gemma full", 16, 2, 512, 0, True, ALL_ROWS, CONTEXTS),
    Shape("qwen3", 32, 8, 128, 0, True, ALL_ROWS, CONTEXTS),
    Shape("drafter full", 32, 8, 128, 0, False, (16,), CONTEXTS),
    Shape("smollm2", 9, 3, 64, 0, True, ALL_ROWS, (2048, 8192)),
)
FAILURES = (RuntimeError, TritonError)  # does not compile, does not fit, cannot be captured


class Case:
    """A shape at one number of rows and one context: inputs, and calls that rotate the caches."""

    def __init__(self, shape: Shape, rows: int, context: int, pdl: bool, copies: int = 0) -> None:
        self.shape, self.rows, self.context, self.pdl = shape, rows, context, pdl
        self.visible = shape.visible(rows, context)
        slots = (shape.window or context) + SPARE
        self.bytes = 2 * (2 * shape.groups * self.visible + 2 * rows * shape.heads) * shape.dim
        copies = copies or min(COPIES, math.ceil(L2_BYTES / self.bytes))
        self.scale = shape.dim**-0.5
        self.q = randn(rows, shape.heads, shape.dim)
        self.caches = randn(copies, 2, shape.groups, slots, shape.dim)
        self.length = torch.tensor([context], dtype=torch.int32, device="cuda")
        self.default = attention.default_config(
            len(self.q), self.q.shape[1], self.caches[0, 0], shape.window
        )

    def call(self, cache: Tensor, config: Config | None = None, q: Tensor | None = None) -> Tensor:
        return attention.block_attention(
            self.q if q is None else q, *cache, self.length, window=self.shape.window,
            causal=self.shape.causal, scale=self.scale, config=config, pdl=self.pdl,
        )  # fmt: skip

    def seconds(self, config: Config | None = None) -> float:
        return graph_seconds([lambda c=cache: self.call(c, config) for cache in self.caches])

    def sdpa_seconds(self) -> float:
        s, mask = self.shape, None
        if s.causal and self.rows > 1:
            mask = mask_of(self.rows, self.visible, s.window).repeat(s.heads // s.groups, 1)
        calls = [
            lambda c=cache: sdpa(self.q, *c[:, :, : self.visible], mask) for cache in self.caches
        ]
        return timed_or_nan(lambda: [call() for call in calls]) / len(calls)

    def check(self) -> None:
        keys, values = self.caches[0]
        rest = (keys, values, self.context, self.shape.window, self.shape.causal, self.scale)
        plain, truth = (attention.reference(q, *rest) for q in (self.q, self.q.double()))
        assert_as_good(self.call(self.caches[0]), plain, truth)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def mask_of(rows: int, visible: int, window: int) -> Tensor:
    """Which of `visible` keys the last `rows` positions see, causally: bool [T, S]."""
    p = torch.arange(visible - rows, visible, device="cuda")[:, None]
    n = torch.arange(visible, device="cuda")[None]
    return (n <= p) & (n > p - (window or visible + 1))


def sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention with the query heads of a group as rows of its kv head."""
    rows, _, dim = q.shape
    groups = keys.shape[0]
    packed = q.view(rows, groups, -1, dim).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    return F.scaled_dot_product_attention(packed, keys[None], values[None], mask)


def candidates(case: Case) -> Iterator[Config]:
    """Neighbours of the default config, most promising first."""
    c = case.default
    yield c
    yield c._replace(warps=12 - c.warps)
    yield c._replace(block_n=c.block_n // 2, splits=2 * c.splits, warps=max(2, c.warps // 2))
    yield c._replace(splits=max(1, c.splits // 2), stages=3)
    yield c._replace(splits=2 * c.splits)
    yield c._replace(block_n=c.block_n // 2, stages=c.stages + 1)


def compile_all(calls: Sequence[Callable[[], object]]) -> list[bool]:
    """Run once in threads, since Triton compiles mostly outside Python's lock; says who can run."""

    def runs(call: Callable[[], object]) -> bool:
        try:
            call()
        except FAILURES as error:
            say(f"# {type(error).__name__}: {str(error)[:100]}")
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        able = list(pool.map(runs, calls))
    torch.cuda.synchronize()
    return able


def timed_or_nan(call: Callable[[], object]) -> float:
    """Seconds of a torch call; nan where torch has no kernel for it or cannot capture it."""
    try:
        return graph_seconds([call], 10)
    except FAILURES:
        return math.nan


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def block_rows(roof: float, pdl: bool) -> None:
    for shape in SHAPES:
        for context in shape.contexts:
            for rows in shape.rows:
                case = Case(shape, rows, context, pdl)
                ours, theirs = case.seconds(), case.sdpa_seconds()
                rate = case.bytes / ours
                say(
                    f"{shape.name:14s} T {rows:2d} context {context:5d} {ours * 1e6:8.1f} µs "
                    f"{rate / 1e9:6.0f} GB/s {100 * rate / roof:4.0f} %   "
                    f"SDPA {theirs * 1e6:8.1f} µs   {tuple(case.default)}"
                )


def sweep(deadline: float, pdl: bool) -> None:
    for shape in SHAPES:
        for context in (shape.contexts[0], shape.contexts[-1])[: len(shape.contexts)]:
            for rows in (shape.rows[0], shape.rows[-1])[: len(shape.rows)]:
                if time.monotonic() > deadline:
                    say("# out of time")
                    return
                case = Case(shape, rows, context, pdl)
                configs = list(candidates(case))
                able = compile_all(
                    [lambda c=c, case=case: case.call(case.caches[0], c) for c in configs]
                )
                timed = [(case.seconds(c), c) for c, ok in zip(configs, able, strict=True) if ok]
                line = "  ".join(f"{tuple(c)} {s * 1e6:.1f}" for s, c in sorted(timed))
                say(f"{shape.name} T {rows} context {context}: {line}")


def chain_rows() -> None:
    """Rope, attention and merge in a row, launched plainly and programmatically dependent."""
    for shape in SHAPES:
        for rows in (1, 16):
            plain, dependent = (
                graph_seconds(chain(Case(shape, rows, CONTEXTS[0], pdl))) * 1e6
                for pdl in (False, True)
            )
            say(
                f"rope, attention, merge {shape.name:14s} T {rows:2d} context {CONTEXTS[0]} "
                f"{plain:8.1f} µs   PDL {dependent:8.1f} µs"
            )


def chain(case: Case) -> list[Callable[[], object]]:
    """One call for each of the case's caches."""
    shape = case.shape
    cos, sin = torch.rand(2, CONTEXTS[0] + SPARE, shape.dim // 2, device="cuda")
    qkv = torch.randn(4, case.rows, (shape.heads + 2 * shape.groups) * shape.dim, device="cuda")
    norm = randn(shape.dim)

    def step(cache: Tensor) -> Tensor:
        q = rope.qk_rope_write(
            qkv, norm, norm, cos, sin, *cache, case.length, eps=1e-6, pdl=case.pdl
        )
        return case.call(cache, q=q)

    return [lambda c=cache: step(c) for cache in case.caches]


def chunk_rows(rows: int = 2048) -> None:
    for shape in SHAPES:
        if not shape.causal:
            continue
        for length in (0, 8192):
            end = length + rows
            q, cache = randn(rows, shape.heads, shape.dim), randn(2, shape.groups, end, shape.dim)
            seen = mask_of(rows, end, shape.window)
            flops = 4 * int(seen.sum()) * shape.heads * shape.dim
            plain = length == 0 and not shape.window  # torch's own causal flag will do
            turned, seen = q.transpose(0, 1)[None], None if plain else seen
            ours = graph_seconds([
                lambda q=q, c=cache, n=length, w=shape.window, s=shape.dim**-0.5:
                prefill.chunk_attention(q, *c, n, window=w, scale=s)
            ], 10)  # fmt: skip
            theirs = timed_or_nan(
                lambda q=turned, c=cache, m=seen, p=plain: F.scaled_dot_product_attention(
                    q, c[:1], c[1:], m, is_causal=p, enable_gqa=True
                )
            )
            say(
                f"chunk {shape.name:14s} T {rows} context {length:5d} {ours * 1e6:8.0f} µs "
                f"{flops / ours / 1e12:5.0f} TFLOP/s   SDPA {theirs * 1e6:8.0f} µs"
            )


def rope_rows(pdl: bool) -> None:
    table = torch.rand(2, 4096, 256, device="cuda")
    for shape in SHAPES:
        cos, sin = table[:, :, : shape.dim // 2].contiguous()
        length = torch.tensor([2000], dtype=torch.int32, device="cuda")
        norm = None if shape.name == "smollm2" else randn(shape.dim)
        gemma = shape.name.startswith("gemma")
        shared = shape.name == "gemma full"
        width = (shape.heads + shape.groups * (1 if shared else 2)) * shape.dim
        caches = randn(32, 2, shape.groups, 2080, shape.dim)
        for rows in (1, 16):
            qkv = torch.randn(4, rows, width, device="cuda")
            seconds = graph_seconds([
                lambda c=c, qkv=qkv, cos=cos, sin=sin, norm=norm, gemma=gemma, shared=shared,
                length=length: rope.qk_rope_write(
                    qkv, norm, norm, cos, sin, *c, length, eps=1e-6, v_norm=gemma, k_eq_v=shared,
                    pdl=pdl,
                )
                for c in caches
            ])  # fmt: skip
            say(f"rope {shape.name:14s} T {rows:2d} {seconds * 1e6:8.1f} µs (4 partials)")
    kv = torch.randn(4, 16, 2 * 5 * 8 * 128, device="cuda")
    caches = randn(5, 2, 8, 2080, 128)
    cos, sin = table[:, :, :64].contiguous()
    count = torch.tensor([7], dtype=torch.int32, device="cuda")
    layers = [(keys, values) for keys, values in caches]
    norm = randn(5, 128)

    def write() -> None:
        rope.context_write(kv, norm, cos, sin, layers, length, count, eps=1e-6, pdl=pdl)

    say(f"context write 5 layers T 16 {graph_seconds([write] * 32) * 1e6:8.1f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pdl", action="store_true", help="launch programmatically dependent")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    checks = [Case(shape, t, 2048, args.pdl, copies=1) for shape in SHAPES for t in shape.rows]
    compile_all([lambda c=case: c.call(c.caches[0]) for case in checks])
    for case in checks:
        case.check()
    roof = copy_bandwidth()
    say(f"{machine()}; copy {roof / 1e9:.0f} GB/s; PDL {'on' if args.pdl else 'off'}")
    block_rows(roof, args.pdl)
    rope_rows(args.pdl)
    if args.pdl:
        chain_rows()
    chunk_rows()
    sweep(deadline, args.pdl)


if __name__ == "__main__":
    main()
