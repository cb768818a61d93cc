"""A prompt's chunk: routed experts at Gemma-4-26B-A4B's shapes, and attention, in TFLOP/s.

    python -m tests.bench.kernels_prefill [--rows 2048] [--formats plain,fp8,int4] [--attention]

Each format is first compared with plain torch over the dequantised experts and stops at a
difference. Then every candidate of each launch is timed by its own, sorting and summing not
included, on a uniformly random routing and on a skewed one (experts drawn by 1/rank), and last the
whole of `routed_experts` with the fastest two. Operations are those of the routed rows: padded
tiles count as lost time. A layer's experts are larger than L2, so weights come from memory.

With `--attention` instead our kernel and every installed flash-attn, timed as a load times them;
one that computes something else says so. Operations are those of keys that rows may see.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dflash_chat.geometry import Geometry
from dflash_chat.runtime import flash
from dflash_chat.runtime.kernels import grouped, unpack
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import Int4, dequantize
from dflash_chat.runtime.kernels.grouped import GroupedConfig
from tests.bench.gpu import graph_seconds, machine
from tests.bench.kernels_moe import EXPERTS, INNER, TOP_K, WIDTH, act, random_weight, say

CANDIDATES = {  # bm, bn, bk, warps, stages
    "gate_up": [
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4),
        (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4),
    ],
    "down": [
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (64, 256, 64, 4, 3), (64, 256, 64, 8, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4),
    ],
}  # fmt: skip
ATTENTION = [  # query heads and layers
    (32, Geometry(8, 64)),  # Llama-3.2-1B
    (32, Geometry(8, 128)),  # Qwen3-8B
    (16, Geometry(8, 256)),
    (16, Geometry(8, 256, window=1024)),  # Gemma-4-26B-A4B's sliding layers
]


def random_slots(rows: int, skewed: bool) -> Tensor:
    """[T, k] on the device."""
    chances = torch.ones(EXPERTS)
    if skewed:
        chances /= torch.arange(1, EXPERTS + 1)
    return torch.multinomial(chances.expand(rows, -1), TOP_K).cuda()


def dequantized(w: MoeWeight, e: int) -> Tensor:
    """Expert e in bf16."""
    one = w.expert(e)
    return unpack.unpack(one) if isinstance(one, Int4) else dequantize(one).bfloat16()


def truth(x: Tensor, slots: Tensor, shares: Tensor, gate_up: MoeWeight, down: MoeWeight) -> Tensor:
    """Expert after expert, in bf16 with an fp32 sum."""
    out = torch.zeros(x.shape, device="cuda")
    for e in torch.unique(slots).tolist():
        row, place = (slots == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[row], dequantized(gate_up, e)).chunk(2, -1)
        inner = F.gelu(gate, approximate="tanh") * up
        out[row] += F.linear(inner, dequantized(down, e)) * shares[row, place, None]
    return out


def self_check(gate_up: MoeWeight, down: MoeWeight) -> None:
    """At a few numbers of rows."""
    for rows in (18, 300, 2048):
        x, slots = act(rows, WIDTH), random_slots(rows, skewed=rows == 300)
        shares = torch.rand(slots.shape, device="cuda")
        out = grouped.routed_experts(x, slots, shares, gate_up, down).float()
        wanted = truth(x, slots, shares, gate_up, down)
        error = float((out - wanted).norm() / wanted.norm())
        assert error < 1e-2, f"{gate_up.format}, T = {rows}: relative error {error:.3g}"


def launch(
    name: str, x: Tensor, slots: Tensor, shares: Tensor, w: MoeWeight, config: GroupedConfig
) -> Callable[[], object]:
    """One of the two launches."""
    groups = grouped.group(slots, EXPERTS, config.bm)
    places = slots.numel()
    if name == "gate_up":
        out = torch.empty(places, INNER, dtype=x.dtype, device="cuda")
        return lambda: grouped._launch(x, w, groups, None, out, TOP_K, config)
    out = torch.empty(places, WIDTH, dtype=x.dtype, device="cuda")
    inner = act(places, INNER)
    return lambda: grouped._launch(inner, w, groups, shares, out, TOP_K, config)


def bench(format_name: str, rows: int) -> None:
    """Rows of one format."""
    weights = {
        "gate_up": random_weight(format_name, EXPERTS, 2 * INNER, WIDTH),
        "down": random_weight(format_name, EXPERTS, WIDTH, INNER),
    }
    self_check(weights["gate_up"], weights["down"])
    x = act(rows, WIDTH)
    for skewed in (False, True):
        slots = random_slots(rows, skewed)
        shares = torch.rand(slots.shape, device="cuda")
        best: dict[str, dict[int, tuple[float, GroupedConfig]]] = {}
        for name, w in weights.items():
            operations = 2 * rows * TOP_K * w.shape[1] * w.shape[2]
            for config in (GroupedConfig(*c) for c in CANDIDATES[name]):
                call = launch(name, x, slots, shares, w, config)
                try:
                    seconds = graph_seconds([call] * 4, repeats=5)
                except triton.runtime.errors.OutOfResources as error:
                    say(name, format_name, skewed, tuple(config), str(error)[:60])
                    continue
                of_bm = best.setdefault(name, {})
                of_bm[config.bm] = min(of_bm.get(config.bm, (1.0, config)), (seconds, config))
                speed = f"{operations / seconds / 1e12:.0f}"
                say(name, format_name, skewed, tuple(config), f"{seconds * 1e6:.0f}", speed)
        for bm in best["gate_up"].keys() & best["down"].keys():
            pair = best["gate_up"][bm][1], best["down"][bm][1]

            def whole(pair: tuple[GroupedConfig, GroupedConfig] = pair, slots: Tensor = slots,
                      shares: Tensor = shares) -> object:  # fmt: skip
                return grouped.routed_experts(x, slots, shares, *weights.values(), configs=pair)

            seconds = graph_seconds([whole] * 4, repeats=5)
            speed = f"{6 * rows * TOP_K * INNER * WIDTH / seconds / 1e12:.0f}"
            say(
                "whole",
                format_name,
                skewed,
                [tuple(c) for c in pair],
                f"{seconds * 1e6:.0f}",
                speed,
            )


def bench_attention(rows: int) -> None:
    """Rows of one shape: ours, then each package or why it cannot be used."""
    for heads, geometry in ATTENTION:
        for keys in (2048, 8192):
            device = torch.device("cuda")
            ours, tried = flash.measured(device, torch.bfloat16, heads, geometry, rows, [keys])
            seen = sum(min(n, geometry.window or n) for n in range(keys - rows + 1, keys + 1))
            operations = 4 * heads * geometry.head_dim * seen
            for name, ms in {"ours": ours, **tried}.items():
                shape = heads, geometry.kv_heads, geometry.head_dim, geometry.window, keys
                if isinstance(ms, str):
                    say(name, *shape, ms, "")
                else:
                    say(name, *shape, f"{ms:.3f}", f"{operations / ms / 1e9:.0f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--formats", default="plain,fp8,int4")
    parser.add_argument("--attention", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    sys.stdout.write(f"{machine()}, {args.rows} rows\n\n")
    if args.attention:
        say("attention", "heads", "kv heads", "head dim", "window", "keys", "ms", "TFLOP/s")
        say(*["---"] * 8)
        bench_attention(args.rows)
        return
    say("launch", "format", "skewed", "config", "µs", "TFLOP/s")
    say(*["---"] * 6)
    for format_name in args.formats.split(","):
        bench(format_name, args.rows)


if __name__ == "__main__":
    main()
