"""vLLM on the shapes, routing and acceptance of `dflash-chat bench --random-weights`.

    python -m tests.bench.vllm [--pair gemma-4-26b-a4b] [--drafts 15 --accept-length 7.8]

Needs `vllm` (0.26), which is no dependency of this project: random weights in bf16, experts drawn
uniformly, drafts accepted by its own synthetic rule, a prompt of 2048 random tokens. tok/s is that
between the 32nd and the 544th token of an answer, the middle one of three answers after one more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_chat.runtime.random_weights import shapes

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

PROMPT, FIRST, LAST = 2048, 32, 544
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",  # what mixed drafters take; plain decoding takes it, too
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def write(folder: Path, pair: str) -> tuple[str, str]:
    """config.json of target and drafter as vLLM wants them; nothing else is read."""
    published = shapes(pair)
    common = {"torch_dtype": "bfloat16", "attention_bias": False}
    target = published.target | common
    if target["model_type"] == "gemma4_text":
        target |= {
            "architectures": ["Gemma4ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "allow_global_per_layer_attribute_access": True,  # transformers 5.17 asks for it
        }
    else:
        target |= {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}
    drafter = published.drafter | common | {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_act": "silu",
        "use_sliding_window": True, "max_window_layers": 5, "tie_word_embeddings": True,
        "max_position_embeddings": target["max_position_embeddings"],
    }  # fmt: skip
    paths = folder / "target", folder / "drafter-dflash"
    for path, config in zip(paths, (target, drafter), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
    return str(paths[0]), str(paths[1])


def decode(engine: LLMEngine, name: str, prompt: list[int]) -> tuple[float, float, float]:
    """tok/s, tokens a step and ms a step between two tokens of one greedy answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=LAST + 16, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    steps: list[tuple[float, int]] = []
    count = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            new = len(output.outputs[0].token_ids)
            count += new
            if new:
                steps.append((time.perf_counter(), count))
    start = next(i for i, (_, seen) in enumerate(steps) if seen >= FIRST)
    end = next(i for i, (_, seen) in enumerate(steps) if seen >= LAST)
    seconds, tokens = steps[end][0] - steps[start][0], steps[end][1] - steps[start][1]
    return tokens / seconds, tokens / (end - start), seconds / (end - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", default="gemma-4-26b-a4b")
    parser.add_argument("--drafts", type=int, default=0, help="0 decodes plainly")
    parser.add_argument("--accept-length", type=float, default=1.0)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before vllm is imported
    with tempfile.TemporaryDirectory() as folder:
        target, drafter = write(Path(folder), args.pair)
        from vllm import LLM

        options: dict[str, Any] = {}
        if args.drafts:
            options["speculative_config"] = {
                "method": "dflash", "model": drafter, "num_speculative_tokens": args.drafts,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_length": args.accept_length,
            }  # fmt: skip
        engine = LLM(
            model=target, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16",
            max_model_len=4096, max_num_seqs=1, max_num_batched_tokens=4096, seed=0,
            async_scheduling=True, enable_prefix_caching=False, disable_log_stats=True,
            gpu_memory_utilization=0.85, attention_config={"backend": "TRITON_ATTN"}, **options,
        ).llm_engine  # fmt: skip
        draw = random.Random(0)
        answers = []
        for i in range(4):
            prompt = [draw.randrange(10, 150_000) for _ in range(PROMPT)]
            answers.append(decode(engine, str(i), prompt))
    low, middle, high = sorted(answers[1:])
    print(  # noqa: T201
        f"vLLM {args.pair}, {args.drafts} drafts: {middle[0]:.1f} tok/s ({low[0]:.1f} to "
        f"{high[0]:.1f}), {middle[1]:.2f} tokens and {middle[2]:.2f} ms a step"
    )


if __name__ == "__main__":
    main()
