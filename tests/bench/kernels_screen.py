"""The likeliest token of a head: dense, in fp8, and screened; and how much the screen leaves.

`python -m tests.bench.kernels_screen [--sweep]` on an idle GPU. Random rows and states: about as
many candidates as flat text has. `--sweep` tries tiles for the copy at one row and at sixteen.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse

import torch
import triton
from torch import Tensor

from dflash_chat.runtime.kernels import heads, screen, tuned
from dflash_chat.runtime.kernels.forms import Fp8, Int8, dequantize, round_to_int8
from dflash_chat.runtime.kernels.tuned import Config
from dflash_chat.runtime.quant.float_quantized import rounded
from tests.bench import gpu

HEADS = {"gemma-4-26b": (262144, 2816), "qwen3-8b": (151936, 4096)}
ROWS = (1, 4, 8, 16)
TILES = [
    (64, 256, 2, 4), (64, 256, 2, 3), (64, 128, 2, 6), (128, 128, 2, 4), (128, 256, 4, 3),
    (32, 256, 2, 5), (64, 512, 4, 3), (64, 256, 4, 4), (128, 128, 4, 4), (64, 256, 1, 4),
]  # fmt: skip


def candidates(x: Tensor, copy: Int8, w: Tensor) -> float:
    """Rows of the dense head that a state has read, on average."""
    near = x.float() @ dequantize(copy).T
    first = near.argmax(-1)
    floor = (x.float() * w[first].float()).sum(-1, keepdim=True)
    reach = copy.error * x.float().norm(dim=-1, keepdim=True)
    return float((near + reach >= floor).sum() / len(x))


def check(x: Tensor, w: Tensor, copy: Int8) -> None:
    """The dense head's tokens, but for ties that fp32 cannot tell. Stops where one differs."""
    ours, dense = screen.argmax(x, w, copy), heads.argmax(x, w)
    for t in (ours != dense).nonzero().flatten().tolist():
        a, b = (float(x[t].double() @ w[found[t]].double()) for found in (ours, dense))
        print(f"# row {t}: {a:.9f} of {int(ours[t])}, {b:.9f} of {int(dense[t])}")
        if a < b - 1e-5:
            raise SystemExit("the screened token is not the dense head's")


def microseconds(call: object, x: Tensor, *arguments: object, **options: object) -> float:
    """Of one call in a graph of ten; a head is larger than the L2 cache."""
    assert callable(call)
    return gpu.graph_seconds([lambda: call(x, *arguments, **options)] * 10) * 1e6


def sweep(x: Tensor, w: Tensor, copy: Int8) -> None:
    """Tiles of the copy, by time."""
    timed: dict[tuple[int, ...], float] = {}
    for tile in TILES:
        try:
            timed[tile] = microseconds(screen.argmax, x, w, copy, config=Config(*tile, 1), pdl=True)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
            print(f"# {tile}: {str(error).splitlines()[0]}")
    print("#", *(f"{tile} {us:.1f}" for tile, us in sorted(timed.items(), key=lambda i: i[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(gpu.machine())
    print(f"copy: {gpu.copy_bandwidth() / 1e12:.2f} TB/s")
    for name, (n, k) in HEADS.items():
        w = torch.empty(n, k, device="cuda", dtype=torch.bfloat16).normal_(0, k**-0.5)
        copy = round_to_int8(w)
        e4m3 = rounded(w)
        fp8 = Fp8(e4m3.weight, e4m3.scale.flatten())
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            check(x, w, copy)
            near = torch.empty(rows, n, device="cuda")
            config = tuned.head("int8", n, k)
            times = {
                "bf16": microseconds(heads.argmax, x, w, pdl=True),
                "fp8": microseconds(heads.argmax, x, fp8, pdl=True),
                "int8": microseconds(heads.argmax, x, copy, pdl=True),
                "copy": microseconds(heads.by_tiles, x, copy, near, None, 0.0, config, True),
                "screened": microseconds(screen.argmax, x, w, copy, pdl=True),
            }
            words = "  ".join(f"{what} {us:6.1f} µs" for what, us in times.items())
            rate = n * k / times["screened"] / 1e6
            left = candidates(x, copy, w)
            print(f"{name:12} T {rows:2}  {words}  {rate:.2f} TB/s  {left:.1f} candidates a row")
            if options.sweep and rows in (1, 16):
                sweep(x, w, copy)
            torch.cuda.empty_cache()
        del w, copy, e4m3, fp8


if __name__ == "__main__":
    main()
