"""The controller beside every pinned width, in simulation: prints a table, needs no GPU.

    python -m tests.bench.controller [--tokens 8000] [--seeds 3]

Speed-ups over plain decoding, sums over seeds ÷ sums. "late": the width is final before the draft;
"now": it is cut by the draft's own confidence. "least": the slowest 500 tokens of any run.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse

from tests.runtime import simulated_decoding as sim

TEXTS: dict[str, tuple[str, ...]] = {
    "chat": ("chat",),
    "mixed": ("mixed",),
    "code": ("code",),
    "switching": ("chat", "mixed", "code"),
    "dead": ("dead",),
    "dead, code": ("dead", "code"),
}
CASES = [(text, "honest") for text in TEXTS]
CASES += [("switching", "random"), ("switching", "inverted"), ("chat", "random")]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for rig in sim.RIGS:
        print(
            f"\n{rig}\n{'text':11} {'confidence':10}  best pinned     late  least      now  least"
        )
        for text, confidence in CASES:
            traces = [
                sim.trace(TEXTS[text], args.tokens, seed, confidence) for seed in range(args.seeds)
            ]
            pinned = {
                n: sim.pooled([sim.fixed(rig, trace, n) for trace in traces]) for n in sim.WIDTHS
            }
            best = max(pinned, key=lambda n: pinned[n])
            row = f"{text:11} {confidence:10}  {pinned[best]:5.2f} ({best:2} rows)"
            for late in (True, False):
                runs = [sim.controlled(sim.controller(rig, late), rig, trace) for trace in traces]
                row += f"  {sim.pooled(runs):7.2f}  {min(run.worst() for run in runs):5.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
