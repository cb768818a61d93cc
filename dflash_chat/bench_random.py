"""`dflash-chat bench --random-weights`: the real step of a published pair without its weights.

Knows the arguments and the printing; `runtime/measure.py` does the measuring.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from dflash_chat.errors import EXIT_OK, DoesNotFitError, UsageError
from dflash_chat.runtime.width import WIDTHS
from dflash_chat.settings import RandomBenchArgs


def run(args: RandomBenchArgs) -> int:
    """Measure and print.

    Raises UsageError for an unknown pair, impossible numbers or a machine without CUDA, and
    DoesNotFitError when the GPU's memory does not suffice.
    """
    widths = args.widths or WIDTHS
    if not set(widths) <= set(WIDTHS):
        raise UsageError(f"--widths {args.widths}", f"captured are {', '.join(map(str, WIDTHS))}")
    if args.context < 16:
        raise UsageError("--context must be at least 16")
    if args.accept_length and not 1 <= args.accept_length <= 16:
        raise UsageError("--accept-length lies between 1 and 16")
    if args.sweep and args.accept_length:
        raise UsageError("--sweep takes --accept-curve, or the three curves of the notes")
    import torch  # comes in here, not before

    if not torch.cuda.is_available():
        raise UsageError("--random-weights measures a CUDA device, and this torch sees none")
    from dflash_chat.runtime import measure, memory, random_weights, traces
    from dflash_chat.runtime.measure import Law

    random_weights.shapes(args.pair)  # an unknown name ends here
    if args.quant not in random_weights.QUANTS:
        raise UsageError(f"--quant {args.quant}", f"known: {', '.join(random_weights.QUANTS)}")
    options = args.options
    if options.head == "auto":
        options = replace(options, head="screened")  # as a plan has it where there is room
    first, ratio = args.accept_curve
    laws = {}
    if args.accept_length or first:
        law = Law(args.accept_length, first, ratio)
        laws = {f"n = {n}": (law, n) for n in widths if n > 1}
    else:
        for length, n in ((7.8, 16), (4.0, 8), (3.2, 5)):
            if n in widths:
                laws[f"acceptance length {length}, k = {n - 1}"] = (Law(length), n)

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    try:
        if args.sweep:
            known = {
                "chat": traces.Trace.of(traces.CHAT),
                "mixed": traces.Trace.of(traces.MIXED),
                "code": traces.Trace.of(traces.CODE),
                "switching": traces.Trace.switching((traces.CHAT, traces.MIXED, traces.CODE)),
            }
            asked = traces.Trace.of(Law(first=first, ratio=ratio)) if first else None
            chosen = {f"a1 {first}, r {ratio}": asked} if asked else known
            report = traces.run(args.pair, args.quant, args.context, chosen, options, say)
        else:
            report = measure.run(args.pair, args.quant, args.context, widths, laws, options, say)
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        raise DoesNotFitError(
            f"the GPU's memory ran out while {args.pair} in {args.quant} was measured",
            "try --quant int4, or a smaller --context",
        ) from error
    report |= {
        "pair": args.pair, "quant": args.quant, "context": args.context, "head": options.head
    }  # fmt: skip
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return EXIT_OK
