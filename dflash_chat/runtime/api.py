"""Everything that crosses the border of the engine process, and what each number means.

Frozen dataclasses of builtins: they travel as one JSON line each, are logged as they are, and can
be replayed. This module knows no tensors, no processes and no widgets. `GLOSSARY` has one
definition per number, for the screen, `--json` and the code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

PROTOCOL_VERSION = 3

GLOSSARY = {
    "drafted": "proposed tokens that were put before the target; the anchor does not count",
    "accepted": "drafted tokens the target agreed with",
    "committed": "accepted + 1: each verify pass also yields a token of the target's own",
    "lookup": "drafts found in the text so far, behind where its last tokens stood before; they "
    "cost no draft",
    "correction": "the target's own token where it disagreed with a draft",
    "bonus": "the target's own token behind a block of which every draft was accepted",
    "tau": "acceptance length: committed ÷ verify passes; exactly 1 without drafting",
    "histogram": "verify passes by how many tokens they committed",
    "survival": "of the passes with drafts, the share that accepted at least i; adds up to the "
    "accepted tokens per such pass",
    "full blocks": "of the passes with drafts, the share that accepted all of them",
    "width": "rows of a verify pass: the anchor and the drafts behind it",
    "lately": "rows of one of the last fifty passes, the tokens it was expected to commit, in how "
    "many milliseconds, and those of a plain pass",
    "tok/s": "committed tokens ÷ seconds over the same window, never a mean of ratios",
    "plain": "tok/s without drafting: 1 ÷ the time of a verify pass of the anchor alone, "
    "the median of the last three",
    "speed-up": "tok/s of the answer ÷ plain",
    "draft": "milliseconds in which the drafter fills a block",
    "verify": "milliseconds of the target's pass over the block",
    "sample": "milliseconds in which the rows choose their tokens",
    "host": "milliseconds of a pass that none of the other parts explains",
    "ttft": "time to first token: submit → first committed token",
    "prefill": "tokens read ÷ seconds from the tokenised prompt to the first committed token",
    "cached": "prompt tokens found in the cache",
    "read": "prompt tokens that were not, and were read this turn",
    "context": "tokens whose keys and values the target's cache holds",
    "memory by part": "bytes of the weights and caches as loaded; other: buffers, graphs, "
    "workspace and the CUDA context; the first line counts every program on the card",
}

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


DEFAULT_CONTEXT = 8192  # tokens reserved unless options or a plan say otherwise


@dataclass(frozen=True)
class EngineOptions:
    """What is fixed while a pair stays loaded.

    `device`: "auto", "cpu" or "cuda". `dtype`: "auto", "fp32" or "bf16", the type of activations
    and of unquantised weights. `context_tokens` 0 takes the target's own limit, at most 8192,
    or what the plan says on a GPU.
    `draft_tokens` 0 takes the pair's default; otherwise how many drafted tokens are verified, at
    most the trained block minus one. `threads` 0 leaves torch's choice.

    "fp8" rounds weights to e4m3 with a scale per row: the `drafter`'s matrices, a copy of the head
    that only drafts (`draft_head`), or the target's own `head`. Only the last of them changes
    answers. A "screened" `head` stays as it is, with an int8 copy beside it that says which rows
    can win, for our CUDA kernels; drafts are read off that copy, too, and a plan that decides so
    says "screened" of `draft_head`. "bf16" and "own" refuse all this; "auto" leaves it to the plan
    on a GPU, which never rounds the head itself, and elsewhere as it is, but for a CPU's drafts: in
    bf16 the drafter's block and a copy of a quarter of the head are int8 there. `draft_rows` keeps
    the rows of that many lowest ids in the copy for drafts, and those of added tokens; on a CPU
    also of those that the text has brought; 0 keeps all.

    `lookup` "off" leaves all drafts to the drafter. Graphs of short steps look nothing up.
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
    lookup: str = "on"

    @property
    def copies_head(self) -> bool:
        """Whether they ask for a copy of the target's head to read drafts off."""
        return bool(self.draft_rows) or (self.draft_head == "fp8" and self.head != "fp8")


@dataclass(frozen=True)
class Message:
    """One chat turn: role is "system", "user" or "assistant"."""

    role: str
    content: str


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StepStats:
    """One verify pass. Times in milliseconds; `context_tokens` after the commit.

    `why` says in words why the pass had this width, and `figures`, now and then, by which numbers.
    A `probe` drafted nothing in order to time plain decoding. The drafts were `found` in the text
    so far, for nothing, or are the drafter's.
    """

    drafted: int
    accepted: int
    committed: int
    draft_ms: float
    verify_ms: float
    sample_ms: float
    host_ms: float
    context_tokens: int
    why: str = ""
    probe: bool = False
    figures: str = ""
    found: bool = False

    @property
    def width(self) -> int:
        """Rows of the pass."""
        return self.drafted + 1

    @property
    def full(self) -> bool:
        """Whether there were drafts and all of them were accepted."""
        return 0 < self.drafted == self.accepted

    @property
    def total_ms(self) -> float:
        """From draft to commit."""
        return self.draft_ms + self.verify_ms + self.sample_ms + self.host_ms


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Spec:
    """Speculation over one answer, or pooled over many: sums, never means of ratios.

    `histogram[i]` passes committed i + 1 tokens, `widths[i]` passes had i + 1 rows, and of `full`
    ones every draft was accepted. The drafts of `lookups` passes were found in the text, and
    `copied` of those accepted.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    full: int = 0
    lookups: int = 0
    copied: int = 0

    @property
    def tau(self) -> float:
        """Committed tokens per verify pass, the target's own included; 0 before the first pass."""
        committed = sum((i + 1) * count for i, count in enumerate(self.histogram))
        return committed / self.steps if self.steps else 0.0

    @property
    def accept_rate(self) -> float:
        """Accepted ÷ drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def survival(self) -> tuple[float, ...]:
        """Of the passes with drafts, the share that accepted at least i; i from 1."""
        tried, survived = self._tried, [*self.histogram, *[0] * len(self.widths)]
        return tuple(sum(survived[i:]) / tried for i in range(1, len(self.widths))) if tried else ()

    @property
    def full_blocks(self) -> float:
        """Of the passes with drafts, the share that accepted all of them."""
        return self.full / self._tried if self._tried else 0.0

    @property
    def _tried(self) -> int:
        """Passes with drafts."""
        return sum(self.widths[1:])

    def add(self, stats: StepStats) -> Spec:
        """The same sums with one more verify pass."""
        one = Spec(
            1, stats.drafted, stats.accepted, _one_of(stats.committed), _one_of(stats.width),
            int(stats.full), int(stats.found), stats.accepted * stats.found,
        )  # fmt: skip
        return self.merge(one)

    def merge(self, other: Spec) -> Spec:
        """Pooled sums of two answers."""
        return Spec(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            _summed(self.histogram, other.histogram),
            _summed(self.widths, other.widths),
            self.full + other.full,
            self.lookups + other.lookups,
            self.copied + other.copied,
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
            "survival": [round(share, 4) for share in self.survival],
            "full_blocks": round(self.full_blocks, 4),
            "widths": list(self.widths),
            "lookups": self.lookups,
            "copied": self.copied,
        }


def _one_of(n: int) -> tuple[int, ...]:
    """Counts of one pass that stands at n, the first being 1."""
    return (0,) * (n - 1) + (1,)


def _summed(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return tuple(map(int.__add__, longer, shorter)) + longer[len(shorter) :]


@dataclass(frozen=True)
class Timing:
    """Seconds. `decode_s` runs from the first committed token to the last; `tok_s` covers the
    same. `prefill_s` is the part of `ttft_s` behind the rendering of the prompt. `ar_tok_s` is
    plain decoding as measured lately, `speedup` what `tok_s` is of it; 0 is not known. It was
    measured behind `ar_context_tokens`, `ar_age_s` of decoding ago; None is at load.
    """

    load_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    tok_s: float = 0.0
    prefill_s: float = 0.0
    ar_tok_s: float = 0.0
    speedup: float = 0.0
    ar_age_s: float | None = None
    ar_context_tokens: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded, for titles and panels. Byte counts are resident bytes.

    `other_bytes` is what a GPU holds for us beside target, drafter and caches: buffers, graphs and
    workspace as reserved after loading, and `memory`'s figure for the CUDA context. `plain_ms` is
    a verify pass of one row with `plain_context` tokens before it, timed at load; 0: was not.
    """

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
    other_bytes: int = 0
    plain_ms: float = 0.0
    plain_context: int = 0


# ── requests: UI → engine ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Load:
    """Load a pair. `quant` names one of its builds; "" leaves the choice to the pair."""

    pair: str
    quant: str = ""
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
class Bench:
    """Measure the loaded pair for about `seconds`, one round at least: plain decoding, numbers of
    drafted tokens, and as many as pay. `messages` is the chat: it stands before every prompt, so
    that the cache keeps it, unless most of it would have to be read for that.
    """

    id: int
    messages: tuple[Message, ...] = ()
    params: SamplingParams = SamplingParams()
    seconds: float = 20.0


@dataclass(frozen=True)
class Cancel:
    """Stop generation or bench `id` after the block in flight; the partial answer stands."""

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
    `tokens` counts committed tokens; `stats` is None for the token that prefill gave, which comes
    with the `timing` of the prompt.

    `lengths` says whose the text is: characters of each of the answer's last `len(lengths)` tokens,
    which reaches back behind this pass where text had been held. What it does not cover belongs to
    the last token. The first `stats.accepted` tokens of a pass were drafted.
    """

    id: int
    text: str
    tokens: int
    stats: StepStats | None = None
    lengths: tuple[int, ...] = ()
    timing: Timing | None = None


@dataclass(frozen=True)
class Finished:
    """The answer is complete. `reason`: "stop", "length", "cancelled" or "context". `why` says why
    the last step had its width, in words and figures.
    """

    id: int
    reason: str
    usage: Usage
    spec: Spec
    timing: Timing
    why: str = ""


@dataclass(frozen=True)
class Benched:
    """A bench as far as it is. `rates` has tok/s over whole rounds by how many tokens every pass
    drafted: 0 is plain decoding, -1 as many as pay. `before` tokens of the chat stood before every
    prompt; `forgotten` ones were in the cache and must be read again.

    `reason`: "" while it goes on, "done" or "cancelled". `kept`: the next plan goes by it.
    """

    id: int
    rounds: int = 0
    seconds: float = 0.0
    rates: tuple[tuple[int, float], ...] = ()
    before: int = 0
    reason: str = ""
    forgotten: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Failed:
    """A request could not be carried out. `trace` is for the log and the crash card's details."""

    id: int
    message: str
    hint: str
    exit_code: int
    trace: str = ""


Request = Load | Generate | Bench | Cancel | Shutdown
Event = Hello | Progress | Ready | Prefill | Tokens | Finished | Benched | Failed

# ── one JSON line each ──────────────────────────────────────────────────────────────────────────

_ASKING = ("Generate", "Bench")
_NESTED: dict[tuple[str, str], Any] = {
    ("Load", "options"): lambda d: EngineOptions(**d),
    **{(kind, "messages"): lambda d: tuple(Message(**m) for m in d) for kind in _ASKING},
    **{
        (kind, "params"): lambda d: SamplingParams(**{**d, "stop": tuple(d.get("stop", ()))})
        for kind in _ASKING
    },
    ("Benched", "rates"): lambda d: tuple((int(drafted), float(rate)) for drafted, rate in d),
    ("Ready", "info"): lambda d: ModelInfo(**d),
    ("Tokens", "stats"): lambda d: StepStats(**d),
    ("Tokens", "lengths"): tuple,
    ("Tokens", "timing"): lambda d: Timing(**d),
    ("Finished", "usage"): lambda d: Usage(**d),
    ("Finished", "spec"): lambda d: Spec(
        **{**d, "histogram": tuple(d.get("histogram", ())), "widths": tuple(d.get("widths", ()))}
    ),
    ("Finished", "timing"): lambda d: Timing(**d),
}
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Load, Generate, Bench, Cancel, Shutdown, Hello, Progress, Ready, Prefill, Tokens, Finished,
        Benched, Failed,
    )
}  # fmt: skip


def _news(value: Any) -> dict[str, Any]:  # noqa: ANN401 -- one of the dataclasses above
    """Fields of a dataclass that differ from their defaults."""
    return {
        name: found
        for name, default in _DEFAULTS[type(value)]
        if (found := getattr(value, name)) is not default and found != default
    }


_DEFAULTS = {
    kind: tuple((f.name, f.default) for f in fields(kind))
    for kind in (
        *_KINDS.values(), EngineOptions, SamplingParams, Message, StepStats, Usage, Spec, Timing,
        ModelInfo,
    )
}  # fmt: skip
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_news)


def encode(message: Request | Event) -> bytes:
    """One JSON line, newline included. Fields that have their default stay away."""
    body = {"type": type(message).__name__, **_news(message)}
    return _ENCODER.encode(body).encode() + b"\n"


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
