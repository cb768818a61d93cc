"""The figures of an answer in one line, the same on screen and in lines."""

from __future__ import annotations

from dflash_chat.runtime.api import Finished

_ENDINGS = {
    "cancelled": "stopped · ",
    "length": "cut at max_tokens · ",
    "context": "context is full · ",
}


def numbers_words(finished: Finished) -> str:
    """The line under an answer."""
    usage, timing, spec = finished.usage, finished.timing, finished.spec
    words = [
        f"cached {usage.cached}",
        f"read {usage.prompt - usage.cached}",
        f"ttft {timing.ttft_s * 1000:.0f} ms",
        f"{timing.tok_s:.0f} tok/s",
    ]
    if spec.steps:
        words.append(f"tau {spec.tau:.1f}")
    return _ENDINGS.get(finished.reason, "") + " · ".join(words)
