"""Everything that crosses the border of the engine process, and what each number means.

Frozen dataclasses of builtins: they travel as one JSON line each, are logged as they are, and can
be replayed. This module knows no tensors, no processes and no widgets.

Glossary (one definition per word, used on screen, in `--json` and in the code):

drafted      proposed tokens that were put before the target (the anchor does not count)
accepted     drafted tokens the target agreed with
committed    accepted + 1: each verify pass also yields one token of the target's own, the bonus
tau          acceptance length: committed ÷ verify passes. Without drafting it is exactly 1.
histogram    histogram[i] = verify passes that committed i + 1 tokens
tok/s        committed tokens ÷ seconds over the same window, never a mean of ratios
ttft         submit → first committed token
context      tokens whose keys and values the target's cache holds
cached       prompt tokens found in the cache; `prompt - cached` were read this turn
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

PROTOCOL_VERSION = 1

# ── what a person may set ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SamplingParams:
    """How the target's tokens are chosen. `temperature` 0 is greedy.

    Order: penalties → temperature → top-k → top-p → min-p → renormalise. `top_k` 0, `top_p` 1 and
    `min_p` 0 switch a filter off; penalties of 1, 0 and 0 do nothing. `seed` None draws a fresh
    one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineOptions:
    """What is fixed while a pair stays loaded.

    `device`: "auto", "cpu" or "cuda". `dtype`: "auto", "fp32" or "bf16", the type of activations
    and of unquantised weights. `context_tokens` 0 takes the target's own limit, at most 8192.
    `draft_tokens` 0 takes the pair's default; otherwise how many drafted tokens are verified, at
    most the trained block minus one. `threads` 0 leaves torch's choice.

    "fp8" instead of "auto" rounds weights to e4m3 with a scale per row: the `drafter`'s matrices, a
    copy of the head that only drafts (`draft_head`), or the target's own `head`. Only the last of
    them changes answers. `draft_rows` keeps the rows of that many lowest ids in the copy, and those
    of added tokens; 0 keeps all.
    """

    device: str = "auto"
    dtype: str = "auto"
    context_tokens: int = 0
    draft_tokens: int = 0
    threads: int = 0
    drafter: str = "auto"
    draft_head: str = "auto"
    draft_rows: int = 0
    head: str = "auto"


@dataclass(frozen=True)
class Message:
    """One chat turn: role is "system", "user" or "assistant"."""

    role: str
    content: str


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StepStats:
    """One verify pass. Times in milliseconds; `context_tokens` after the commit."""

    drafted: int
    accepted: int
    committed: int
    draft_ms: float
    verify_ms: float
    sample_ms: float
    host_ms: float
    context_tokens: int


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Spec:
    """Speculation over one answer, or pooled over many: sums, never means of ratios."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: tuple[int, ...] = ()

    @property
    def tau(self) -> float:
        """Committed tokens per verify pass, the bonus token included; 0 before the first pass."""
        committed = sum((i + 1) * count for i, count in enumerate(self.histogram))
        return committed / self.steps if self.steps else 0.0

    @property
    def accept_rate(self) -> float:
        """Accepted ÷ drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def add(self, drafted: int, accepted: int, committed: int) -> Spec:
        """The same sums with one more verify pass."""
        histogram = list(self.histogram) + [0] * (committed - len(self.histogram))
        histogram[committed - 1] += 1
        return Spec(
            self.steps + 1, self.drafted + drafted, self.accepted + accepted, tuple(histogram)
        )

    def merge(self, other: Spec) -> Spec:
        """Pooled sums of two answers."""
        width = max(len(self.histogram), len(other.histogram))
        a = list(self.histogram) + [0] * (width - len(self.histogram))
        b = list(other.histogram) + [0] * (width - len(other.histogram))
        return Spec(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            tuple(x + y for x, y in zip(a, b, strict=True)),
        )

    def to_json(self) -> dict[str, Any]:
        """The `spec` object of `--json`."""
        return {
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tau": round(self.tau, 4),
            "accept_rate": round(self.accept_rate, 4),
            "histogram": list(self.histogram),
        }


@dataclass(frozen=True)
class Timing:
    """Seconds. `decode_s` runs from the first committed token to the last; `tok_s` covers the
    same.
    """

    load_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    tok_s: float = 0.0


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded, for titles and panels. Byte counts are resident bytes."""

    pair: str
    target: str
    drafter: str
    device: str
    dtype: str
    kernels: str
    context_tokens: int
    block_size: int
    draft_tokens: int
    target_bytes: int
    drafter_bytes: int
    cache_bytes: int
    load_s: float
    versions: dict[str, str] = field(default_factory=dict)


# ── requests: UI → engine ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Load:
    """Load an installed pair. `source` "" takes the first installed one of the pair's list."""

    pair: str
    source: str = ""
    options: EngineOptions = EngineOptions()


@dataclass(frozen=True)
class Generate:
    """Answer the conversation. `id` comes back in every event that belongs to it.

    `draft_tokens` 0 drafts as the engine was loaded to; otherwise that many in every pass, as far
    as the drafter proposes them (on CUDA, as far as such a width was captured). `continue_last`
    goes on with the last message, an answer that was cut short, and sends only what is new.
    """

    id: int
    messages: tuple[Message, ...]
    params: SamplingParams = SamplingParams()
    draft: bool = True
    draft_tokens: int = 0
    continue_last: bool = False


@dataclass(frozen=True)
class Cancel:
    """Stop generation `id` after the block in flight; the partial answer stands."""

    id: int


@dataclass(frozen=True)
class Shutdown:
    """Free everything and exit."""


# ── events: engine → UI ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Hello:
    """First line of a new engine process."""

    version: str
    protocol: int
    pid: int


@dataclass(frozen=True)
class Progress:
    """Loading or fetching: `stage` in words, `done` and `total` in bytes (total 0: unknown)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The pair is loaded."""

    info: ModelInfo


@dataclass(frozen=True)
class Prefill:
    """The prompt is being read: `cached` of `total` prompt tokens were there, `done` are now."""

    id: int
    cached: int
    done: int
    total: int


@dataclass(frozen=True)
class Tokens:
    """Text committed by one verify pass (the first token of an answer comes from prefill).

    `text` may be empty while an incomplete character or a possible stop string is held back.
    `tokens` counts committed tokens; `stats` is None for the token that prefill gave.
    """

    id: int
    text: str
    tokens: int
    stats: StepStats | None = None


@dataclass(frozen=True)
class Finished:
    """The answer is complete. `reason`: "stop", "length", "cancelled" or "context"."""

    id: int
    reason: str
    usage: Usage
    spec: Spec
    timing: Timing


@dataclass(frozen=True)
class Failed:
    """A request could not be carried out. `trace` is for the log and the crash card's details."""

    id: int
    message: str
    hint: str
    exit_code: int
    trace: str = ""


Request = Load | Generate | Cancel | Shutdown
Event = Hello | Progress | Ready | Prefill | Tokens | Finished | Failed

# ── one JSON line each ──────────────────────────────────────────────────────────────────────────

_NESTED: dict[tuple[str, str], Any] = {
    ("Load", "options"): lambda d: EngineOptions(**d),
    ("Generate", "messages"): lambda d: tuple(Message(**m) for m in d),
    ("Generate", "params"): lambda d: SamplingParams(**{**d, "stop": tuple(d.get("stop", ()))}),
    ("Ready", "info"): lambda d: ModelInfo(**d),
    ("Tokens", "stats"): lambda d: None if d is None else StepStats(**d),
    ("Finished", "usage"): lambda d: Usage(**d),
    ("Finished", "spec"): lambda d: Spec(**{**d, "histogram": tuple(d["histogram"])}),
    ("Finished", "timing"): lambda d: Timing(**d),
}
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Load, Generate, Cancel, Shutdown, Hello, Progress, Ready, Prefill, Tokens, Finished, Failed,
    )
}  # fmt: skip


def encode(message: Request | Event) -> bytes:
    """One JSON line, newline included."""
    body = {"type": type(message).__name__, **asdict(message)}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Request | Event:
    """The message of one line. Raises ValueError for anything `encode` did not write."""
    try:
        body = json.loads(line)
        kind = body.pop("type")
        fields = {
            key: _NESTED[kind, key](value) if (kind, key) in _NESTED else value
            for key, value in body.items()
        }
        message: Request | Event = _KINDS[kind](**fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a protocol line: {line[:200]!r}") from error
    return message
