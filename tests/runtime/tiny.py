"""Tiny seeded models, and a drafter and a lookup that do what the test tells them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_chat.runtime import drafter as drafter_module
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.runtime.cache import Geometry
from dflash_chat.runtime.draft_head import DraftHead
from dflash_chat.runtime.engine import Engine, Prefilled, Step
from dflash_chat.runtime.lookup import Chances, Found
from dflash_chat.runtime.models import gemma4, llama
from dflash_chat.runtime.quant import Packed
from dflash_chat.runtime.quant.dense import DenseWeight

CPU = torch.device("cpu")
VOCAB = 61
TAPS = (0, 2)


def config(vocab: int = VOCAB) -> llama.Config:
    return llama.Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=vocab, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=512, tie_word_embeddings=True, rope={},
    )  # fmt: skip


def hybrid(window: int = 8, seed: int = 0, capacity: int = 256) -> gemma4.Target:
    """A target of sliding and full layers, some experts included."""
    c = gemma4.Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=VOCAB,
        rms_norm_eps=1e-6, max_position_embeddings=512, tie_word_embeddings=True,
        final_logit_softcapping=30.0, attention_k_eq_v=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=8, sliding_theta=1e4, full_theta=1e6, rotated=0.25, prefix="model.",
        attention=(Geometry(2, 8, window), Geometry(1, 16), Geometry(2, 8, window)),
    )  # fmt: skip
    return gemma4.Target(c, weights(c.tensor_shapes(), seed, 0.3), capacity, torch.float32, CPU)


def weights(shapes: dict[str, tuple[int, ...]], seed: int, scale: float) -> dict[str, Packed]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Packed] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * scale
        made[name] = DenseWeight(values + 1 if len(shape) == 1 else values)
    return made


def target(
    seed: int = 0, capacity: int = 256, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> llama.Target:
    c = config(vocab)
    return llama.Target(c, weights(c.tensor_shapes(), seed, 0.3), capacity, dtype, CPU)


def drafter_config(
    window: int = 0, causal: bool | None = False, sliding: int = 1
) -> drafter_module.Config:
    """`sliding` layers of `window` (full ones if it is 0), then one full layer."""
    kind = "sliding_attention" if window else "full_attention"
    return drafter_module.Config.from_raw(
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": sliding + 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "block_size": 5, "vocab_size": VOCAB,
            "num_target_layers": 3, "sliding_window": window, "is_causal": causal,
            "layer_types": [kind] * sliding + ["full_attention"],
            "dflash_config": {"mask_token_id": 3, "target_layer_ids": list(TAPS)},
        }
    )  # fmt: skip


def drafter(
    of: llama.Target | gemma4.Target,
    seed: int = 1,
    capacity: int = 256,
    window: int = 0,
    causal: bool | None = False,
    sliding: int = 1,
    largest_block: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> drafter_module.Drafter:
    c = drafter_config(window, causal, sliding)
    return drafter_module.Drafter(
        c,
        weights(c.tensor_shapes(32), seed, 0.2),
        of.embed,
        DraftHead(of.lm_head, of.lm_head.shape[0]),
        capacity,
        dtype,
        CPU,
        largest_block,
    )


class ScriptedDrafter:
    """Drafts `script[i]` right tokens of the known continuation in step i, and wrong ones after.
    With a `certainty` of 0 it knows nothing.
    """

    def __init__(
        self, continuation: Sequence[int], prompt: int, script: Sequence[int], certainty: float = 1
    ) -> None:
        self.continuation, self.prompt, self.script = list(continuation), prompt, list(script)
        self.certainty = certainty
        self.length = 0
        self.calls = 0
        self.multiplied: list[int] = []  # rows that went through the head at a time

    def observe(self, features: Tensor) -> None:
        self.length += len(features)

    def flush(self) -> None:
        pass

    def rewindable(self, n: int) -> int:
        return n

    def truncate(self, n: int) -> None:
        self.length = min(self.length, n)

    def read(self, ids: Sequence[int]) -> None:
        pass

    def candidates(self, hidden: Tensor) -> tuple[Tensor, None]:
        self.multiplied.append(len(hidden))
        return hidden, None

    def forward(self, anchor: int, n: int) -> Tensor:
        done = self.length - self.prompt + 1  # answer tokens chosen so far, the anchor included
        assert anchor == self.continuation[done - 1]
        right = self.script[self.calls % len(self.script)]
        self.calls += 1
        future = [*self.continuation[done : done + n], *[0] * n][:n]
        tokens = [t if i < right else (t + 1) % VOCAB for i, t in enumerate(future)]
        return certain(tokens, VOCAB) * self.certainty


class Foreseeing(ScriptedDrafter):
    """Gives the hidden states that the target itself will have: its guesses are always right,
    if they are made with the target's own random numbers.
    """

    def __init__(
        self, of: llama.Target, continuation: Sequence[int], prompt: Sequence[int]
    ) -> None:
        super().__init__(continuation, len(prompt), [0])
        text = torch.tensor([*prompt, *continuation])
        with torch.inference_mode():
            self.hidden, _ = of.forward(text, of.new_cache(len(text)))  # [T, C]
        self.head = of.logits

    def candidates(self, hidden: Tensor) -> tuple[Tensor, None]:
        hidden, _ = super().candidates(hidden)
        return self.head(hidden), None

    def forward(self, anchor: int, n: int) -> Tensor:
        return self.hidden[self.length : self.length + n]


class ScriptedLookup:
    """Finds `script[i]` right tokens of the known continuation in step i, and wrong ones after."""

    def __init__(self, continuation: Sequence[int], script: Sequence[int]) -> None:
        self.continuation, self.script = continuation, script
        self.text: list[int] = []
        self.done = self.asked = 0

    def __call__(self, ids: Sequence[int], chances: Chances) -> ScriptedLookup:
        self.text, self.done = list(ids), 1
        return self

    def find(self, most: int) -> Found:
        right = self.script[self.asked % len(self.script)]
        self.asked += 1
        tokens = list(self.continuation[self.done : self.done + most])
        tokens = [t if i < right else (t + 1) % VOCAB for i, t in enumerate(tokens)]
        return Found(tokens, [0.5] * len(tokens))

    def extend(self, ids: Sequence[int]) -> None:
        self.text += ids
        self.done += len(ids)


def certain(tokens: Sequence[int], vocab: int) -> Tensor:
    """Logits [n, V] that leave no doubt, whatever noise is added."""
    return torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.int64), vocab) * 1e4


def run(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, draft: bool = True
) -> list[Step]:
    """All steps of one answer."""
    steps = engine.generate(prompt, params, draft)
    return [step for step in steps if not isinstance(step, Prefilled)]


def tokens(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]
