"""Sampling's two launches on this GPU, beside torch's path and torch's top-k.

    python -m tests.bench.kernels_sample [--seconds 30]

First the tokens of every setting are compared with torch's. Then one row per (vocabulary, rows,
setting): µs of the candidates alone, of a sample and of a guess. "flat" rows have a nucleus beyond
the candidates and are read again and again. Then other configurations, until --seconds are over,
each with the rank down to which its candidates were complete.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.kernels import sample
from dflash_chat.runtime.kernels.sample import Config
from dflash_chat.runtime.sampling import Sampler
from tests.bench.gpu import graph_seconds, machine

SHAPES = ((49152, 8), (262144, 1), (262144, 8), (262144, 16))
SETTINGS = {
    "T .7": SamplingParams(temperature=0.7, seed=1),
    "T 1, top-k 64, top-p .95": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1),
    "T .7, top-p .9": SamplingParams(temperature=0.7, top_p=0.9, seed=1),
    "T 1, top-p .9, flat": SamplingParams(temperature=1.0, top_p=0.9, seed=1),
}
DRAWS = 40  # seeds of the comparison
CALLS = 20  # of one graph


def logits_of(rows: int, vocab: int, exponent: float) -> Tensor:
    """Probabilities that fall as rank^−exponent, in random order: fp32 [rows, vocab]."""
    falling = -exponent * torch.arange(1, vocab + 1, device="cuda").log()
    return torch.stack([falling[torch.randperm(vocab, device="cuda")] for _ in range(rows)])


def exponent_of(setting: str) -> float:
    return 1.1 if "flat" in setting else 1.6


def check(vocab: int, rows: int) -> None:
    """Nearly every token is torch's in fp64; the last bits may decide a few."""
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    params = sample.new_params(length.device)
    for name, request in SETTINGS.items():
        logits = logits_of(rows, vocab, exponent_of(name))
        other = 0
        for seed in range(DRAWS):
            sampler = Sampler(SamplingParams(**{**vars(request), "seed": seed}), [])
            sample.write(params, sampler, 0)
            drawn = sample.sample(logits, length, params)
            guessed, _ = sample.guess(logits, length, params)
            other += int((drawn != sample.reference(logits.double(), sampler)).sum())
            other += int((guessed != sampler.guess(logits)[0]).sum())
        say(f"# {vocab} × {rows}, {name}: {other} of {2 * DRAWS * rows} tokens are not torch's")
        assert other <= DRAWS * rows / 100, "that is more than rounding"


def complete_to(logits: Tensor, params: Tensor, config: Config) -> int:
    """The rank below which some row's candidates have a gap."""
    least = sample.candidates(logits, params, config).logits[:, -1].amax(-1, keepdim=True)
    return int((logits > least).sum(-1).min())


def configs(vocab: int) -> Iterator[Config]:
    """Neighbours of the default, most promising first."""
    c = sample.default_config(vocab)
    yield c._replace(tile=2 * c.tile, top=16)
    yield c._replace(warps=16)
    yield c._replace(tile=c.tile, top=16, warps=16)
    yield c._replace(tile=2 * c.tile)
    yield c._replace(warps=4)
    yield c._replace(block=8192)
    yield c._replace(block=8192, warps=16)
    yield c._replace(tile=4 * c.tile, top=32)
    yield c._replace(block=2048)


class Case:
    """Rows of logits and a request."""

    def __init__(self, vocab: int, rows: int, setting: str) -> None:
        self.name = f"{vocab:6d} × {rows:2d}  {setting:26s}"
        self.request = SETTINGS[setting]
        self.logits = logits_of(rows, vocab, exponent_of(setting))
        self.length = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.params = sample.new_params(self.length.device)
        sample.write(self.params, Sampler(self.request, []), 0)

    def row(self, config: Config) -> str:
        """µs of each launch."""
        rest = self.length, self.params, config
        alone = graph_seconds([lambda: sample.candidates(self.logits, self.params, config)] * CALLS)
        drawn = graph_seconds([lambda: sample.sample(self.logits, *rest)] * CALLS)
        guessed = graph_seconds([lambda: sample.guess(self.logits, *rest)] * CALLS)
        rank = complete_to(self.logits, self.params, config)
        return (
            f"{self.name} candidates {alone * 1e6:6.1f}  choose {(drawn - alone) * 1e6:7.1f}  "
            f"guess's choose {(guessed - alone) * 1e6:6.1f} µs  rank {rank:5d}  {tuple(config)}"
        )

    def torch_row(self) -> str:
        """µs of torch's path, in a graph where it can be captured, and of its top-k."""
        sampler = Sampler(self.request, [])
        eager = timed(lambda: sample.reference(self.logits, sampler))
        top = graph_seconds([lambda: self.logits.topk(512, -1)] * CALLS)
        return f"{self.name} torch, eagerly {eager * 1e6:7.1f}  top-k 512 {top * 1e6:7.1f} µs"


def timed(call: object, repeats: int = 30) -> float:
    """Seconds of a call that cannot be captured, launches included."""
    assert callable(call)
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="for other configurations")
    args = parser.parse_args()
    torch.manual_seed(0)
    say(machine())
    for vocab in sorted({vocab for vocab, _ in SHAPES}):
        check(vocab, 8)
    for vocab, rows in SHAPES:
        for setting in SETTINGS:
            case = Case(vocab, rows, setting)
            say(case.row(sample.default_config(vocab)))
            say(case.torch_row())
    deadline = time.monotonic() + args.seconds
    for vocab, rows in (SHAPES[0], SHAPES[-1]):
        for config in configs(vocab):
            for setting in SETTINGS:
                if time.monotonic() > deadline:
                    say("# out of time")
                    return
                say(Case(vocab, rows, setting).row(config))


if __name__ == "__main__":
    main()
