"""Skinny GEMMs and norms on the GPU: check, sweep a few configurations per shape, print rows.

    python -m tests.bench.kernels_linear [--seconds 75] [--forms bf16,fp8,int4]

GB/s counts weights and scales. Each timing runs over copies of the weight of 400 MB and more in
all. The sweep is at 16 rows, since configurations do not depend on them; where the time is up, the
present configuration stands for the rest. Kernels are compiled by a pool of processes into Triton's
cache first.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dflash_chat.runtime.kernels import heads, linear, norms, tuned
from dflash_chat.runtime.kernels.forms import Fp8, Int4, Weight, dequantize, int4_run, pack_int4
from dflash_chat.runtime.kernels.norms import Branch
from dflash_chat.runtime.kernels.tuned import Config
from tests.bench import gpu

ROWS = (16, 8, 1)
SPREAD_BYTES = 400e6
GROUP = 32

SHAPES = [  # kernel, N, K, where from
    ("linear", 8192, 2816, "gemma qkv"),
    ("linear", 9216, 2816, "gemma qkv full"),
    ("linear", 2816, 4096, "gemma o_proj"),
    ("linear", 2816, 8192, "gemma o_proj full"),
    ("linear", 2816, 2112, "gemma down"),
    ("gated", 4224, 2816, "gemma gate_up"),
    ("linear", 6144, 2816, "drafter qkv"),
    ("gated", 11264, 2816, "drafter gate_up"),
    ("linear", 2816, 5632, "drafter down"),
    ("linear", 2816, 16896, "drafter fc"),
    ("head", 262144, 2816, "gemma head"),
    ("head", 32768, 2816, "gemma draft head"),
    ("linear", 6144, 4096, "qwen qkv"),
    ("linear", 4096, 4096, "qwen o_proj"),
    ("gated", 24576, 4096, "qwen gate_up"),
    ("linear", 4096, 12288, "qwen down"),
    ("head", 151936, 4096, "qwen head"),
]

TILES = {  # form of w: (bn, bk, warps, stages), by promise
    "bf16": [(64, 128, 4, 4), (128, 64, 4, 5), (64, 64, 4, 8), (32, 128, 2, 6), (128, 128, 8, 3)],
    "fp8": [(64, 128, 2, 6), (128, 128, 2, 4), (64, 256, 2, 4), (32, 256, 2, 5)],
    "int4": [(64, 128, 2, 6), (128, 128, 2, 5), (64, 256, 2, 4)],
}


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    kernel: str
    form: str
    n: int
    k: int

    @property
    def bytes(self) -> int:
        """Of the weight and its scales."""
        size = self.n * self.k
        if self.form == "int4":
            return size // 2 + 2 * size // GROUP
        return 2 * size if self.form == "bf16" else size + 2 * self.n

    def call(self, x: Tensor, w: Weight, config: Config) -> object:
        """Run once."""
        if self.kernel == "linear":
            return linear.partials(x, w, config=config)
        if self.kernel == "gated":
            return linear.gated(x, w, "silu", config=config)
        return heads.argmax(x, w, config=config)

    def present(self) -> Config:
        """What `tuned` gives now."""
        pick = {"linear": tuned.linear, "gated": tuned.gated, "head": tuned.head}[self.kernel]
        return pick(self.form, self.n, self.k)

    def candidates(self) -> list[Config]:
        """The present configuration, then tiles by promise with one to three ways to cut K."""
        most = {"linear": (8, 4, 2, 1), "gated": (4, 2, 1), "head": (1,)}[self.kernel]
        found = [self.present()]
        for bn, bk, warps, stages in TILES[self.form]:
            cuts = dict.fromkeys(tuned.splits(self.n, self.k, bn, bk, m) for m in most)
            found += [Config(bn, bk, warps, stages, cut) for cut in list(cuts)[:3]]
        return list(dict.fromkeys(found))


def weights(case: Case, pool: Tensor) -> Iterator[Weight]:
    """Endless weights of a case, cut from `pool` (bf16 noise) without end."""
    scales = torch.rand(case.n * case.k // GROUP, device="cuda").bfloat16()
    size = case.n * case.k // {"bf16": 1, "fp8": 2, "int4": 4}[case.form]
    count = pool.numel() // size
    for i in cycle(range(count)):
        piece = pool[i * size : (i + 1) * size]
        if case.form == "bf16":
            yield piece.view(case.n, case.k)
        elif case.form == "fp8":
            yield Fp8(piece.view(torch.float8_e4m3fn).view(case.n, case.k), scales[: case.n])
        else:
            run = int4_run(case.k)
            words = piece.view(torch.int16).view(case.k // (4 * run), case.n, run)
            yield Int4(words, scales.view(case.k // 64, case.n, 2), None)


def seconds(case: Case, rows: int, config: Config, pool: Tensor) -> float:
    """Per call, over copies that no cache holds."""
    copies = max(2, int(SPREAD_BYTES / case.bytes) + 1)
    x = torch.randn(rows, case.k, device="cuda", dtype=torch.bfloat16)
    stock = weights(case, pool)
    held = [next(stock) for _ in range(copies)]
    return gpu.graph_seconds([lambda w=w: case.call(x, w, config) for w in held], repeats=12)


def compile_one(job: tuple[Case, Config, int]) -> str:
    """Run one configuration once, so that its kernel is in the cache. A worker's task."""
    case, config, rows = job
    n = min(case.n, 8192)
    pool = torch.zeros(n * case.k, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(rows, case.k, device="cuda", dtype=torch.bfloat16)
    small = Case(case.kernel, case.form, n, case.k)
    try:
        small.call(x, next(weights(small, pool)), config)
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, AssertionError, RuntimeError) as error:
        return f"{case} {config}: {error}"
    return ""


def compile_all(cases: list[Case]) -> list[str]:
    """Every kernel of the sweep, once per variant. Before CUDA starts in this process."""
    jobs = {}
    for case in cases:
        for config in case.candidates():
            for rows in (16,) if case.form == "bf16" else (16, 8):
                even = case.k % config.bk == 0
                reduced = config.splits if case.kernel == "gated" else 0
                key = (case.kernel, case.form, config[:4], reduced, even, rows)
                jobs.setdefault(key, (case, config, rows))
    workers = min(12, max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return [line for line in pool.imap_unordered(compile_one, jobs.values()) if line]


def check() -> None:
    """Every form against plain torch, at the shapes of a Gemma layer. Stops where one is off."""
    torch.manual_seed(0)
    n, k = 4224, 2816
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    q = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scale = torch.rand(n, k // GROUP, device="cuda").bfloat16() / 400
    zero = torch.rand_like(scale) / 100
    dense = torch.randn(n, k, device="cuda") / k**0.5
    forms: dict[str, Weight] = {
        "bf16": dense.bfloat16(),
        "fp8 channel": Fp8((dense * 8).to(torch.float8_e4m3fn), torch.rand(n, device="cuda")),
        "fp8 block": Fp8((dense * 8).to(torch.float8_e4m3fn), torch.rand(34, 22, device="cuda")),
        "int4": pack_int4(q, scale),
        "int4 with zeros": pack_int4(q, scale, zero),
    }
    for name, w in forms.items():
        truth = x.double() @ dequantize(w).double().T
        halves = x.double() @ dequantize(w, 2).double().T
        gate, up = halves.chunk(2, -1)
        found = {
            "partials": (linear.partials(x, w).sum(0), linear.reference(x, w), truth),
            "matmul": (linear.matmul(x, w), linear.reference(x, w), truth),
            "gated": (
                linear.gated(x, w, "silu"),
                linear.gated_reference(x, w, "silu"),
                F.silu(gate) * up,
            ),
        }
        for kernel, (out, plain, true) in found.items():
            ours, theirs = (float((y - true).norm() / true.norm()) for y in (out, plain))
            if not ours <= 2 * theirs + 1e-6:
                raise SystemExit(f"{kernel}, {name}: error {ours:.3g}, plain torch {theirs:.3g}")
        best = heads.argmax(x, w)
        if not torch.equal(best, truth.argmax(-1)):
            raise SystemExit(f"head, {name}: {best.tolist()} {truth.argmax(-1).tolist()}")
    print("check: every form agrees with plain torch")


def bench_linear(
    cases: list[Case], names: dict[tuple[int, int], str], deadline: float, copy: float
) -> None:
    """Sweep at 16 rows, then print all row counts with the winner."""
    pool = torch.empty(int(0.75e9), device="cuda", dtype=torch.bfloat16).normal_()
    torch_seconds: dict[tuple[int, int, int], float] = {}
    rows_of_table = []
    for case in cases:
        timed: dict[Config, float] = {}
        for config in case.candidates():
            if timed and time.monotonic() > deadline:
                break
            try:
                timed[config] = seconds(case, 16, config, pool)
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                print(f"# {case} {config}: {str(error).splitlines()[0]}")
        best = min(timed, key=timed.__getitem__)
        gain = 1 - timed[best] / timed[case.present()] if case.present() in timed else 1.0
        line = f'    ("{case.kernel}", "{case.form}", {case.n}, {case.k}): {best!r},'
        rows_of_table.append(f"{line}  # {gain:.0%} better" if gain > 0.01 else "")
        ranked = sorted(timed.items(), key=lambda item: item[1])
        print("#", *(f"{tuple(config)} {t * 1e6:.1f}" for config, t in ranked))
        for rows in ROWS:
            took = timed[best] if rows == 16 else seconds(case, rows, best, pool)
            key = (case.n, case.k, rows)
            if key not in torch_seconds:
                torch_seconds[key] = plain_seconds(case, rows, pool)
            print(
                f"{names[case.n, case.k]:18} {case.kernel:6} {case.form:4} {case.n:6} × {case.k:5}"
                f"  T {rows:2}  {took * 1e6:7.1f} µs  {case.bytes / took / 1e9:5.0f} GB/s"
                f"  {case.bytes / took / copy:4.0%}   torch {torch_seconds[key] * 1e6:7.1f} µs",
                flush=True,
            )
    print("\n".join(["proposed rows:", *filter(None, rows_of_table)]))


def plain_seconds(case: Case, rows: int, pool: Tensor) -> float:
    """`F.linear` in bf16, on copies that no cache holds."""
    dense = Case("linear", "bf16", case.n, case.k)
    x = torch.randn(rows, case.k, device="cuda", dtype=torch.bfloat16)
    stock = weights(dense, pool)
    held = [next(stock) for _ in range(max(2, int(SPREAD_BYTES / dense.bytes) + 1))]
    return gpu.graph_seconds([lambda w=w: F.linear(x, w) for w in held], repeats=12)


def bench_norms() -> None:
    """The three uses of `residual_norms`, inputs in the L2 cache, as in a step."""
    for rows in ROWS:
        for name, width, splits in (("llama", 4096, 2), ("gemma A", 2816, 4), ("gemma B", 2816, 4)):
            ours, plain = norm_case(name, rows, width, splits)
            took = gpu.graph_seconds([ours] * 50) * 1e6
            theirs = gpu.graph_seconds([plain] * 50) * 1e6
            print(f"norms {name:8} C {width}  T {rows:2}  {took:5.2f} µs   torch {theirs:6.2f} µs")


def norm_case(
    name: str, rows: int, width: int, splits: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Ours and plain torch."""

    def noise(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device="cuda", dtype=dtype)

    x = noise(rows, width, dtype=torch.bfloat16)
    w = [noise(width, dtype=torch.bfloat16) for _ in range(6)]
    branches = [Branch(noise(splits, rows, width), None, None if name == "llama" else w[3])]
    outs = w[:3] if name == "gemma A" else w[:1]
    options: dict[str, Tensor] = {}
    if name == "gemma B":
        branches.append(Branch(noise(8, rows, width), noise(rows, 8).softmax(-1), w[4]))
        options = {"post": w[5], "scale": noise(1, dtype=torch.bfloat16)}
    return (
        lambda: norms.residual_norms(x, branches, outs, 1e-6, **options),
        lambda: norms.reference(x, branches, outs, 1e-6, **options),
    )


def bench_overlap(pool: Tensor) -> None:
    """o_proj → norms → qkv of Gemma, 60 times over, without and with dependent launch."""
    out, back = Case("linear", "bf16", 2816, 4096), Case("linear", "bf16", 8192, 2816)
    outs, backs = weights(out, pool), weights(back, pool)
    layers = [(next(outs), next(backs)) for _ in range(60)]
    inner = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(16, 2816, device="cuda", dtype=torch.bfloat16)
    norm = torch.ones(2816, device="cuda", dtype=torch.bfloat16)

    def layer(w: tuple[Weight, Weight], pdl: bool) -> None:
        parts = linear.partials(inner, w[0], pdl=pdl)
        _, (y,) = norms.residual_norms(x, [Branch(parts, None, norm)], [norm], 1e-6, pdl=pdl)
        linear.partials(y, w[1], pdl=pdl)

    for pdl in (False, True):
        took = gpu.graph_seconds([lambda w=w, pdl=pdl: layer(w, pdl) for w in layers])
        print(
            f"o_proj, norms, qkv: {took * 1e6:.1f} µs with{'' if pdl else 'out'} dependent launch"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75, help="after these, no more sweeping")
    parser.add_argument("--forms", default="bf16,fp8,int4")
    options = parser.parse_args()
    began = time.monotonic()
    cases = [
        Case(kernel, form, n, k) for form in options.forms.split(",") for kernel, n, k, _ in SHAPES
    ]
    names = {(n, k): name for _, n, k, name in SHAPES}
    failed = compile_all(cases)
    print(*failed, f"compiled in {time.monotonic() - began:.0f} s", sep="\n", flush=True)
    print(gpu.machine())
    check()
    copy = gpu.copy_bandwidth()
    print(f"copy: {copy / 1e12:.2f} TB/s")
    bench_norms()
    bench_overlap(torch.empty(int(0.5e9), device="cuda", dtype=torch.bfloat16).normal_())
    bench_linear(cases, names, began + options.seconds, copy)


if __name__ == "__main__":
    main()
