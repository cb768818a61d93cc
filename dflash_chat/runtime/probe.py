"""What torch can do on this machine: `python -m dflash_chat.runtime.probe`, in lines of JSON.

A process of its own, because a broken torch, driver or compiler may end it or never return. Each
line adds to those before, so what was found by then is kept. Nothing is judged here; `doctor` does.
"""

from __future__ import annotations

import json
import sys

MARK = "dflash-chat probe: "  # begins our lines; libraries print whatever they like


def main() -> None:
    """Report torch, its CUDA devices, whether our kernels run on the first of them, and whether
    flash-attn does.
    """
    import torch

    report(torch=torch.__version__, cuda=torch.version.cuda or "")
    if not torch.version.cuda:
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        report(problem=str(error).strip().partition("\n")[0])
        return
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    report(
        architectures=torch.cuda.get_arch_list(),
        uuids=[str(card.uuid) for card in cards],
        capabilities=[(card.major, card.minor) for card in cards],
    )
    from dflash_chat.runtime import flash, kernels

    first = torch.device("cuda", 0)
    missing, found = kernels.missing(first), flash.installed()
    report(kernels=missing, flash=dict.fromkeys(found))
    if found and not missing:
        report(flash=flash.trial(first))


def report(**facts: object) -> None:
    """Write one line, at once."""
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
