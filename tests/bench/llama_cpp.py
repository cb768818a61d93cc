"""Our CPU path beside llama.cpp: same GGUF, same prompts, same threads, one run.

    python -m tests.bench.llama_cpp [--threads 2] [--tokens 128] [--limit 12]

Needs `llama-cpp-python`, which is no dependency of this project. The three ways take turns on every
prompt, after one prompt of warm-up; tok/s is Σ tokens ÷ Σ seconds from the first token to the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

from dflash_chat import hub, pairs
from dflash_chat.bench import read_prompts
from dflash_chat.runtime.api import EngineOptions, Finished, Generate, Message, SamplingParams
from dflash_chat.runtime.session import Session
from dflash_chat.settings import DEFAULT_PAIR

REST_S = 0.3  # lets the other process's worker threads stop spinning

Measured = tuple[int, float]  # tokens after the first, seconds they took


def serve(path: str, threads: int, tokens: int) -> None:
    """The child: a JSON prompt per line in, a JSON [tokens, seconds] per line out."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=2048, verbose=False)
    for line in sys.stdin:
        first, count = 0.0, 0
        for chunk in model.create_chat_completion(
            [{"role": "user", "content": json.loads(line)}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
        ):
            if "content" in chunk["choices"][0]["delta"]:
                first = first or time.perf_counter()
                count += 1
        sys.stdout.write(json.dumps([count - 1, time.perf_counter() - first]) + "\n")
        sys.stdout.flush()


def llama_cpp(path: str, threads: int, tokens: int) -> Callable[[str], Measured]:
    """llama.cpp in a process of its own: two OpenMP runtimes in one would wait for each other."""
    command = [sys.executable, "-m", "tests.bench.llama_cpp", "--serve", path]
    child = subprocess.Popen(
        [*command, "--threads", str(threads), "--tokens", str(tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(prompt: str) -> Measured:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(prompt) + "\n")
        child.stdin.flush()
        count, seconds = json.loads(child.stdout.readline())
        return count, seconds

    return ask


def ours(session: Session, tokens: int, draft: bool) -> Callable[[str], Measured]:
    def ask(prompt: str) -> Measured:
        request = Generate(0, (Message("user", prompt),), SamplingParams(max_tokens=tokens), draft)
        for event in session.generate(request, lambda: False):
            if isinstance(event, Finished):
                return event.usage.completion - 1, event.timing.decode_s
        raise AssertionError("no Finished event")

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--serve", metavar="GGUF", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads, args.tokens)
        return
    installed = hub.ensure(pairs.find(DEFAULT_PAIR), "q4_1")
    options = EngineOptions(device="cpu", threads=args.threads)
    session = Session.load(installed, options, lambda _: None)
    ways = {
        "llama.cpp": llama_cpp(str(installed.target), args.threads, args.tokens),
        "plain": ours(session, args.tokens, draft=False),
        "drafted": ours(session, args.tokens, draft=True),
    }
    sums = dict.fromkeys(ways, (0, 0.0))
    for number, prompt in enumerate(read_prompts(None)[: args.limit + 1]):
        for name, ask in ways.items():
            time.sleep(REST_S)
            count, seconds = ask(prompt)
            if number:  # the first prompt warms up
                sums[name] = sums[name][0] + count, sums[name][1] + seconds
    rates = {name: count / seconds for name, (count, seconds) in sums.items()}
    for name, rate in rates.items():
        ratio = rate / rates["llama.cpp"]
        sys.stdout.write(f"{name:10s} {rate:7.1f} tok/s   {ratio:5.2f} of llama.cpp\n")
    sys.stdout.write(f"drafted ÷ plain {rates['drafted'] / rates['plain']:.3f}\n")


if __name__ == "__main__":
    main()
