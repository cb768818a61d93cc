"""Decoding without a model: passes take what their bytes take, and drafts are right by a law.

Costs. A pass takes bytes ÷ bandwidth, no launch costs. Weights are read once, an expert once per
layer if any row picks it (independent routing: of E experts n rows with k picks each touch
E · (1 - (1 - k/E)^n)), keys and values once; recurrent state is read and written. Bandwidths are
what a large copy reaches: H200 4.30 TB/s (measured), 5090 1.61 and 3090 0.84 (0.90 of datasheet).

Drafts. From every anchor position a block of 15 tokens is drawn. Slot i is right, if all before it
are, with its own chance p_i ~ Beta(2m, 2(1 - m)), m = a1 for the first slot and r behind it, so
that slot i survives with a1 · r^(i-1) on average. The drafter's confidence is an overconfident,
noisy reading of it: sigmoid(0.5 + 1.2 logit p_i + 0.5 z), z standard normal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dflash_chat.runtime.controller import Controller
from dflash_chat.runtime.costs import Costs, CostTable

TB_S = {"H200": 4.30, "5090": 1.61, "3090": 0.84}
BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128 + 0.5 / 128}  # group 128: scale, 4-bit zero
SLOTS = 15
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
CONTEXTS = (512, 2048, 8192, 32768)
START = 2048  # tokens of context when a trace begins
GRID = 128  # tokens of context between two points at which a rig's times are worked out


@dataclass(frozen=True)
class Model:
    """Weights of one pass by kind, and bytes that depend on the context."""

    dense: int
    router: int  # bf16 always
    head: int  # bf16 always
    expert: int  # weights of one expert in all layers
    experts: int
    top_k: int
    state_bytes: int
    kv_bytes: Callable[[int], int]
    drafter: int
    drafter_kv_bytes: Callable[[int], int]

    def verify_bytes(self, rows: int, weights: str, context: int) -> float:
        """Of a pass of `rows` tokens."""
        touched = 0.0
        if self.experts:
            touched = self.experts * (1 - (1 - self.top_k / self.experts) ** rows)
        body = self.dense + touched * self.expert
        fixed = 2.0 * (self.router + self.head) + self.kv_bytes(context) + 2 * self.state_bytes
        return body * BYTES[weights] + fixed

    def draft_bytes(self, context: int) -> float:
        """Of a draft by a bf16 drafter through the target's head."""
        return 2.0 * (self.drafter + self.head) + self.drafter_kv_bytes(context)


def _drafter(hidden: int, mlp: int, taps: int) -> int:
    """Five layers of 32 query and 8 key heads of 128, and the projection of the features, whose
    keys and values are computed, too.
    """
    kv = 2 * hidden * 1024
    return 5 * (2 * hidden * 4096 + kv + 3 * hidden * mlp) + taps * hidden * hidden + 5 * kv


def _windowed_drafter_kv(context: int) -> int:
    return 4 * 2 * 1024 * 2 * min(context, 2048) + 2 * 1024 * 2 * context


def _gemma() -> Model:
    hidden, layers = 2816, 30
    sliding = 25 * (2 * hidden * 16 * 256 + 2 * hidden * 8 * 256)
    full = 5 * (2 * hidden * 16 * 512 + hidden * 2 * 512)  # values are keys
    return Model(
        dense=sliding + full + layers * 3 * hidden * 2112,
        router=layers * hidden * 128,
        head=262144 * hidden,
        expert=layers * 3 * hidden * 704,
        experts=128,
        top_k=8,
        state_bytes=0,
        kv_bytes=lambda c: 25 * 2 * 8 * 256 * 2 * min(c, 1024) + 5 * 2 * 2 * 512 * 2 * c,
        drafter=_drafter(hidden, 5632, 6),
        drafter_kv_bytes=_windowed_drafter_kv,
    )


def _qwen36() -> Model:
    hidden, mlp = 5120, 17408
    delta_net = hidden * (4096 + 6144) + hidden * 6144 + 2 * hidden * 48 + 6144 * hidden
    attention = 2 * hidden * 24 * 256 + 2 * hidden * 4 * 256 + 24 * 256 * hidden
    return Model(
        dense=48 * delta_net + 16 * attention + 64 * 3 * hidden * mlp,
        router=0,
        head=248320 * hidden,
        expert=0,
        experts=0,
        top_k=0,
        state_bytes=48 * 48 * 128 * 128 * 4,
        kv_bytes=lambda c: 16 * 2 * 4 * 256 * 2 * c,
        drafter=_drafter(hidden, mlp, 5),
        drafter_kv_bytes=_windowed_drafter_kv,
    )


def _qwen3() -> Model:
    hidden, mlp = 4096, 12288
    return Model(
        dense=36 * (2 * hidden * 4096 + 2 * hidden * 1024 + 3 * hidden * mlp),
        router=0,
        head=151936 * hidden,
        expert=0,
        experts=0,
        top_k=0,
        state_bytes=0,
        kv_bytes=lambda c: 36 * 2 * 8 * 128 * 2 * c,
        drafter=_drafter(hidden, mlp, 5),
        drafter_kv_bytes=lambda c: 5 * 2 * 1024 * 2 * c,
    )


MODELS = {"Gemma-4-26B-A4B": _gemma(), "Qwen3.6-27B": _qwen36(), "Qwen3-8B": _qwen3()}


@dataclass(frozen=True)
class Rig:
    """A model in some weights on a card."""

    model: str
    card: str
    weights: str

    def __str__(self) -> str:
        return f"{self.model} {self.weights} {self.card}"

    def verify_ms(self, rows: int, context: int) -> float:
        """A pass of `rows` tokens."""
        return MODELS[self.model].verify_bytes(rows, self.weights, context) / TB_S[self.card] / 1e9

    def draft_ms(self, context: int) -> float:
        """A draft."""
        return MODELS[self.model].draft_bytes(context) / TB_S[self.card] / 1e9

    @cache  # noqa: B019 - a handful of rigs that live as long as the process
    def table(self) -> CostTable:
        """What measuring it would give."""
        return CostTable.measured(
            WIDTHS,
            CONTEXTS,
            [self.draft_ms(c) for c in CONTEXTS],
            [[self.verify_ms(n, c) for c in CONTEXTS] for n in WIDTHS],
        )

    @cache  # noqa: B019
    def times(self, context: int) -> tuple[float, dict[int, float]]:
        """The draft's and the verify passes' true milliseconds."""
        return self.draft_ms(context), {n: self.verify_ms(n, context) for n in WIDTHS}


RIGS = (
    Rig("Gemma-4-26B-A4B", "H200", "bf16"),
    Rig("Gemma-4-26B-A4B", "5090", "int4"),
    Rig("Gemma-4-26B-A4B", "3090", "int4"),
    Rig("Qwen3.6-27B", "H200", "bf16"),
    Rig("Qwen3.6-27B", "5090", "int4"),
    Rig("Qwen3.6-27B", "3090", "int4"),
    Rig("Qwen3-8B", "H200", "bf16"),
    Rig("Qwen3-8B", "5090", "bf16"),
    Rig("Qwen3-8B", "3090", "bf16"),
)

TEXTS = {"chat": (0.75, 0.80), "mixed": (0.82, 0.86), "code": (0.92, 0.93), "dead": (0.02, 0.02)}


@dataclass(frozen=True)
class Trace:
    """By anchor position: how many drafted tokens are right, and how sure the drafter is."""

    accepted: list[int]
    confidence: list[list[float]]

    def __len__(self) -> int:
        return len(self.accepted)


def trace(texts: Sequence[str], tokens: int, seed: int, confidence: str = "honest") -> Trace:
    """`tokens` positions of one text, or of several that alternate at random every 50 to 300.

    `confidence`: "honest" (the law above), "random" (another block's) or "inverted" (1 minus it).
    """
    rng = np.random.default_rng(seed)
    first, later = np.empty(tokens), np.empty(tokens)
    at = 0
    text = str(rng.choice(texts))
    while at < tokens:
        end = tokens if len(texts) == 1 else at + int(rng.integers(50, 301))
        first[at:end], later[at:end] = TEXTS[text]
        at = end
        text = str(rng.choice([t for t in texts if t != text] or list(texts)))
    mean = np.repeat(later[:, None], SLOTS, 1)  # [tokens, SLOTS]
    mean[:, 0] = first
    chance = rng.beta(2 * mean, 2 * (1 - mean)).clip(1e-9, 1 - 1e-9)
    right = rng.random(chance.shape) < chance
    logit = np.log(chance / (1 - chance))
    sure = 1 / (1 + np.exp(-(0.5 + 1.2 * logit + 0.5 * rng.standard_normal(chance.shape))))
    if confidence == "random":
        sure = rng.permutation(sure.ravel()).reshape(sure.shape)
    elif confidence == "inverted":
        sure = 1 - sure
    else:
        assert confidence == "honest", confidence
    return Trace(right.cumprod(1).sum(1).tolist(), sure.tolist())


@dataclass(frozen=True)
class Run:
    """Tokens and milliseconds of every step, and what plain decoding would have taken for it."""

    tokens: np.ndarray
    ms: np.ndarray
    plain_ms: np.ndarray

    @property
    def speedup(self) -> float:
        """Over plain decoding, of the whole run."""
        return float(self.plain_ms.sum() / self.ms.sum())

    def worst(self, window: int = 500) -> float:
        """The least speed-up over any stretch of steps that first reaches `window` tokens."""
        tokens, ms, plain = (
            np.concatenate([[0], np.cumsum(x)]) for x in (self.tokens, self.ms, self.plain_ms)
        )
        begin = np.flatnonzero(tokens + window <= tokens[-1])
        end = np.searchsorted(tokens, tokens[begin] + window)
        return float(((plain[end] - plain[begin]) / (ms[end] - ms[begin])).min())


def pooled(runs: Sequence[Run]) -> float:
    """The speed-up over plain decoding of all runs together."""
    return float(sum(run.plain_ms.sum() for run in runs) / sum(run.ms.sum() for run in runs))


def fixed(rig: Rig, drafts: Trace, width: int) -> Run:
    """Always `width` rows; 1 is plain decoding."""
    steps: list[tuple[int, float, float]] = []
    at = 0
    while at < len(drafts):
        draft_ms, verify_ms = rig.times((START + at) // GRID * GRID)
        tokens = min(drafts.accepted[at], width - 1) + 1
        spent = verify_ms[width] + (draft_ms if width > 1 else 0.0)
        steps.append((tokens, spent, tokens * verify_ms[1]))
        at += tokens
    return Run(*np.array(steps).T)


def controlled(controller: Controller, rig: Rig, drafts: Trace) -> Run:
    """As the controller decides. If it is late, every step is launched before the last one is read,
    so it is decided one step late, and for a context that is a step short.
    """
    steps: list[tuple[int, float, float]] = []
    at = 0
    decision = controller.decide(START, SLOTS + 1)
    while at < len(drafts):
        following = controller.decide(START + at, SLOTS + 1) if controller.late else None
        sure = drafts.confidence[at] if decision.draft else None
        if sure is not None and not controller.late:
            controller.cut(decision, sure)
        width = decision.width
        draft_ms, verify_ms = rig.times((START + at) // GRID * GRID)
        draft_ms = draft_ms if decision.draft else 0.0
        accepted = min(drafts.accepted[at], width - 1)
        tokens = accepted + 1
        steps.append((tokens, draft_ms + verify_ms[width], tokens * verify_ms[1]))
        controller.observe(decision, accepted, START + at, draft_ms, verify_ms[width], sure)
        at += tokens
        decision = following or controller.decide(START + at, SLOTS + 1)
    return Run(*np.array(steps).T)


def controller(rig: Rig, late: bool) -> Controller:
    """A controller that has just been started on a rig."""
    return Controller(Costs(rig.table()), SLOTS, late)
