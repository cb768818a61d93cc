"""gate_up and down at Gemma-4-26B-A4B's shapes beside the copy bandwidth.

    python -m tests.bench.kernels_moe [--seconds 60] [--formats plain,fp8,int4] [--pdl]

Every call has a layer and a uniformly random routing of its own, the worst case for a block: bytes
are those of the distinct experts and of the dense MLP, scales included. A first pass compares each
format with the reference and stops at a difference. Then every candidate configuration is timed at
a few T, until --seconds have passed, and the fastest alone at the T that follow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.runtime.kernels import moe, router
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import int4_run
from dflash_chat.runtime.kernels.moe import MoeConfig
from dflash_chat.runtime.kernels.router import Routing
from tests.bench.gpu import copy_bandwidth, graph_seconds, machine
from tests.runtime.kernels.routes import slots_of

EXPERTS, TOP_K, WIDTH, DENSE, INNER = 128, 8, 2816, 2112, 704
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
SWEPT = (1, 4, 8, 16)
CALLS = 24  # of one graph
LAYERS = {"plain": 3, "fp8": 5, "int4": 10}  # 4 GB each: no weight survives in L2 until its turn

GATE_UP = {
    "plain": [
        (16, 128, 4, 6), (16, 128, 4, 4), (16, 256, 4, 4), (32, 64, 4, 6), (32, 128, 4, 5),
        (64, 64, 4, 5),
    ],
    "fp8": [
        (32, 128, 4, 4), (32, 128, 4, 5), (32, 128, 2, 6), (16, 256, 2, 4), (32, 256, 4, 3),
        (64, 128, 4, 4),
    ],
    "int4": [
        (64, 128, 4, 5), (32, 128, 2, 7), (16, 128, 2, 8), (32, 256, 2, 4), (64, 64, 2, 8),
    ],
}  # fmt: skip
DOWN = {
    "plain": [
        (64, 64, 4, 8), (64, 64, 4, 5), (32, 64, 4, 8), (32, 128, 4, 5), (128, 64, 4, 5),
    ],
    "fp8": [
        (64, 64, 4, 8), (64, 128, 4, 5), (128, 64, 4, 6), (64, 128, 2, 5), (64, 64, 2, 8),
    ],
    "int4": [
        (128, 64, 4, 8), (64, 64, 2, 8), (64, 128, 2, 5), (32, 64, 2, 8), (32, 128, 2, 6),
    ],
}  # fmt: skip


def say(*cells: object) -> None:
    """One row of the table."""
    sys.stdout.write("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    sys.stdout.flush()


def random_weight(format_name: str, *shape: int) -> MoeWeight:
    """[E, N, K] or [N, K] of the order of 1/√K."""
    if format_name == "int4":
        *experts, rows, columns = shape
        run = int4_run(columns)
        words = (*experts, columns // (4 * run), rows, run)
        data = torch.randint(-(2**15), 2**15, words, dtype=torch.int16, device="cuda")
        scale = torch.rand(*experts, columns // 64, rows, 2, dtype=torch.bfloat16, device="cuda")
        return MoeWeight(data, scale / (4 * columns**0.5))
    data = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    if format_name == "fp8":
        scale = torch.full(shape[:-1], shape[-1] ** -0.5, dtype=torch.float32, device="cuda")
        return MoeWeight(data.to(torch.float8_e4m3fn), scale)
    return MoeWeight(data.mul_(shape[-1] ** -0.5))


def random_routing(rows: int, at_once: int) -> Routing:
    """Top-8 of 128, uniform, each row on its own."""
    logits = torch.rand(rows, EXPERTS, device="cuda")
    scale = torch.ones(EXPERTS, dtype=torch.bfloat16, device="cuda")
    return router.select(logits, scale, at_once=at_once, top_k=TOP_K)


def act(*shape: int) -> Tensor:
    """Random activations."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def check(name: str, out: Tensor, truth: Tensor) -> None:
    """Stop if they differ by more than bf16's rounding."""
    error = float((out.float() - truth).norm() / truth.norm())
    assert error < 1e-2, f"{name}: relative error {error:.3g}"


def self_check(format_name: str, gate_up: list[MoeWeight], down: list[MoeWeight]) -> None:
    """Every row's output of both launches, at one, seven and sixteen rows."""
    wide = [w.dequantize() for w in (*gate_up, *down)]
    for rows in (1, 7, 16):
        routing, h = random_routing(rows, moe.at_once(gate_up[1], rows)), act(rows, WIDTH)
        slots = slots_of(routing)
        dense_act, expert_act = moe.gate_up(h, gate_up[0], h, gate_up[1], routing)
        dense, routed = moe.down(dense_act, down[0], expert_act, down[1], routing)
        acts = moe.reference_gate_up(h.float(), wide[0], h.float(), wide[1], slots)
        outs = moe.reference_down(acts[0], wide[2], acts[1], wide[3], slots)
        check(f"{format_name} dense activation, T = {rows}", dense_act, acts[0])
        check(f"{format_name} dense, T = {rows}", dense.sum(0), outs[0])
        check(f"{format_name} experts, T = {rows}", routed, outs[1])


def torch_seconds(h: Tensor, dense: list[MoeWeight], experts: list[MoeWeight], rows: int) -> float:
    """F.linear of the dense weight and of each distinct expert, all rows, without activation."""

    def call(layer: int, chosen: list[int]) -> Callable[[], object]:
        def run() -> None:
            F.linear(h, dense[layer].data)
            for e in chosen:
                F.linear(h, experts[layer].data[e])

        return run

    lists = [slots_of(random_routing(rows, 32)) for _ in range(6)]
    chosen = [slots.unique().tolist() for slots in lists]
    return graph_seconds([call(i % len(dense), c) for i, c in enumerate(chosen)], repeats=5)


def bench_launch(
    name: str, format_name: str, dense: list[MoeWeight], experts: list[MoeWeight], copy: float,
    deadline: float, pdl: bool,
) -> None:  # fmt: skip
    """Rows of one launch in one format."""
    candidates = [MoeConfig(*c) for c in (GATE_UP if name == "gate_up" else DOWN)[format_name]]
    expert_bytes = experts[0].nbytes / EXPERTS

    def launch(i: int, routing: Routing, config: MoeConfig) -> Callable[[], object]:
        rows, layer = len(routing.weights), i % len(dense)
        if name == "gate_up":
            h = act(rows, WIDTH)
            return lambda: moe.gate_up(
                h, dense[layer], h, experts[layer], routing, config=config, pdl=pdl
            )
        dense_act, expert_act = act(rows, DENSE), act(routing.experts.numel(), rows, INNER)
        return lambda: moe.down(
            dense_act, dense[layer], expert_act, experts[layer], routing, config=config, pdl=pdl
        )

    with ThreadPoolExecutor(8) as pool:  # compiles them all
        for rows in (1, 16):
            routing = random_routing(rows, moe.at_once(experts[0], rows))
            list(pool.map(lambda c, r=routing: launch(0, r, c)(), candidates))
    best = candidates[0]
    for rows in ROWS:
        routings = [random_routing(rows, moe.at_once(experts[0], rows)) for _ in range(CALLS)]
        distinct = sum(int(r.active) for r in routings) / CALLS
        size = dense[0].nbytes + distinct * expert_bytes
        timed = {}
        for config in candidates if rows in SWEPT else [best]:
            if not timed or time.monotonic() < deadline:
                calls = [launch(i, r, config) for i, r in enumerate(routings)]
                timed[config] = graph_seconds(calls, repeats=8)
        best = min(timed, key=timed.__getitem__)
        seconds = timed[best]
        plain = torch_seconds(act(rows, dense[0].shape[1]), dense, experts, rows) if (
            format_name == "plain" and name == "gate_up" and rows in (1, 4, 16)
        ) else None  # fmt: skip
        say(
            name, format_name, rows, f"{distinct:.1f}", tuple(best), f"{seconds * 1e6:.1f}",
            f"{size / seconds / 1e9:.0f}", f"{100 * size / seconds / copy:.0f} %",
            f"{plain * 1e6:.0f}" if plain else "",
            ", ".join(f"{value * 1e6:.1f}" for value in timed.values()),
        )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--formats", default="plain,fp8,int4")
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    copy = copy_bandwidth()
    sys.stdout.write(f"{machine()}, copy {copy / 1e9:.0f} GB/s\n\n")
    say("launch", "format", "T", "experts", "best", "µs", "GB/s", "of copy", "torch µs", "all µs")
    say(*["---"] * 10)
    for format_name in args.formats.split(","):
        shapes = [
            (2 * DENSE, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (WIDTH, DENSE), (EXPERTS, WIDTH, INNER)
        ]  # fmt: skip
        layers = range(LAYERS[format_name])
        weights = [[random_weight(format_name, *shape) for _ in layers] for shape in shapes]
        self_check(format_name, [w[0] for w in weights[:2]], [w[0] for w in weights[2:]])
        for name, pair in ("gate_up", weights[:2]), ("down", weights[2:]):
            bench_launch(name, format_name, *pair, copy, deadline, args.pdl)


if __name__ == "__main__":
    main()
