"""Block sizes of the kernels, by kernel and shape: measured rows, and a rule for every other shape.

`python -m tests.bench.kernels_linear` prints rows. Nothing here depends on the number of rows of a
block, so that a verify of any width sums in the same order as plain decoding does.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of a single row of x: `bn` rows of int4, by as many columns as `only_row` takes at once."""

    bn: int
    warps: int
    stages: int


class Config(NamedTuple):
    """A tile of `bn` rows of w by `bk` columns; `splits` shares of K, of whole `bk`. alone: int4's
    tile for a single row, whose shares are the same, if it has one of its own.
    """

    bn: int
    bk: int
    warps: int
    stages: int
    splits: int
    alone: Tile | None = None


PROGRAMS = 264  # two on each of an H200's 132 multiprocessors
WASTE = 1.1  # how much longer than the mean the longest share of K may be

_TILES = {  # (kernel, form of w): bn, bk, warps, stages
    ("linear", "bf16"): (64, 128, 4, 4),
    ("linear", "fp8"): (64, 128, 2, 6),
    ("linear", "int8"): (64, 128, 2, 6),
    ("linear", "int4"): (64, 128, 2, 6),
    ("gated", "bf16"): (64, 128, 4, 4),
    ("gated", "fp8"): (64, 128, 2, 6),
    ("gated", "int4"): (64, 128, 2, 6),
    ("head", "bf16"): (128, 64, 4, 5),
    ("head", "fp8"): (128, 128, 2, 4),
    ("head", "int8"): (64, 256, 4, 4),
    ("head", "int4"): (128, 128, 2, 5),
}

MANY_BOUNDS = Config(64, 256, 2, 3, 1)  # of a head's int8 copy, for more than eight rows

_MEASURED: dict[tuple[str, str, int, int], Config] = {  # (kernel, form of w, N, K), on an H200
    ("linear", "fp8", 2816, 8192): Config(32, 256, 4, 3, 4),
    ("linear", "fp8", 2816, 4096): Config(32, 256, 4, 3, 4),
    ("linear", "fp8", 8192, 2816): Config(32, 128, 2, 4, 2),
    ("linear", "bf16", 2816, 4096): Config(64, 128, 4, 4, 4),
    ("linear", "bf16", 2816, 8192): Config(64, 128, 4, 4, 4),
    ("gated", "bf16", 4224, 2816): Config(64, 64, 4, 8, 2),
    ("gated", "bf16", 24576, 4096): Config(128, 128, 8, 3, 1),
    ("linear", "fp8", 9216, 2816): Config(32, 128, 2, 4, 2),
    ("linear", "fp8", 2816, 2112): Config(32, 256, 2, 5, 3),
    ("gated", "fp8", 11264, 2816): Config(128, 128, 2, 4, 3),
    ("linear", "fp8", 2816, 16896): Config(64, 256, 2, 4, 6),
    ("head", "fp8", 262144, 2816): Config(64, 256, 2, 4, 1),
    ("linear", "fp8", 6144, 4096): Config(128, 128, 2, 4, 5),
    ("head", "fp8", 151936, 4096): Config(64, 256, 2, 4, 1),
    ("linear", "int4", 8192, 2816): Config(64, 256, 2, 3, 4, Tile(64, 2, 3)),
    ("linear", "int4", 9216, 2816): Config(64, 256, 2, 3, 4, Tile(64, 2, 3)),
    ("linear", "int4", 2816, 4096): Config(64, 128, 2, 4, 6, Tile(16, 1, 3)),
    ("linear", "int4", 2816, 8192): Config(64, 128, 2, 4, 6, Tile(16, 1, 3)),
    ("linear", "int4", 2816, 2112): Config(64, 256, 2, 4, 3, Tile(64, 2, 4)),
    ("linear", "int4", 6144, 2816): Config(128, 128, 2, 5, 4),
    ("gated", "int4", 11264, 2816): Config(128, 128, 2, 5, 3),
    ("linear", "int4", 2816, 5632): Config(64, 256, 2, 4, 6, Tile(64, 2, 4)),
    ("linear", "int4", 2816, 16896): Config(64, 256, 2, 4, 6, Tile(64, 2, 4)),
    ("head", "int4", 262144, 2816): Config(64, 256, 2, 4, 1),
    ("linear", "int4", 6144, 4096): Config(128, 128, 2, 5, 5),
    ("linear", "int4", 4096, 4096): Config(128, 128, 2, 5, 8),
    ("gated", "int4", 24576, 4096): Config(64, 256, 2, 4, 1, Tile(64, 2, 4)),
    ("linear", "int4", 4096, 12288): Config(64, 256, 2, 4, 4, Tile(64, 2, 4)),
    ("head", "int4", 151936, 4096): Config(64, 256, 2, 4, 1),
}


def linear(form: str, n: int, k: int) -> Config:
    """For `linear.partials` and `linear.matmul` of an [n, k] weight."""
    return _pick("linear", form, n, k, most=8)


def gated(form: str, n: int, k: int) -> Config:
    """For `linear.gated` of an [n, k] weight, which has one tile of gate and up together."""
    return _pick("gated", form, n, k, most=4)


def head(form: str, n: int, k: int, rows: int = 1) -> Config:
    """For the head, whose tiles are too many to be worth cutting. The logits of an int8 copy only
    bound others, so its tiles alone may depend on the rows.
    """
    if form == "int8" and rows > 8:
        return MANY_BOUNDS
    return _pick("head", form, n, k, most=1)


def _pick(kernel: str, form: str, n: int, k: int, most: int) -> Config:
    if (kernel, form, n, k) in _MEASURED:
        return _MEASURED[kernel, form, n, k]
    bn, bk, warps, stages = _TILES[kernel, form]
    return Config(bn, bk, warps, stages, splits(n, k, bn, bk, most))


def splits(n: int, k: int, bn: int, bk: int, most: int) -> int:
    """The most shares of K that run at once, are even, and are not too short to fill a pipeline."""
    chunks = -(-k // bk)
    limit = min(most, PROGRAMS * bn // n, chunks // 3)
    for count in range(limit, 1, -1):
        if -(-chunks // count) * count <= WASTE * chunks:
            return count
    return 1
