"""An engine client without an engine: records what is sent, hands out what a test scripts."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_chat.runtime.api import (
    Cancel,
    Event,
    Finished,
    Generate,
    Hello,
    ModelInfo,
    Prefill,
    Ready,
    Request,
    Spec,
    StepStats,
    Timing,
    Tokens,
    Usage,
)
from dflash_chat.runtime.client import EngineClient, EngineDied

PLAIN_TOK_S = 40.0  # what decoding without drafts would reach

INFO = ModelInfo(
    pair="smollm2-135m",
    target="SmolLM2-135M-Instruct",
    drafter="smollm2-135m-dflash",
    device="cpu",
    dtype="fp32",
    kernels="int4 torch",
    context_tokens=8192,
    block_size=8,
    draft_tokens=7,
    target_bytes=98_000_000,
    drafter_bytes=24_000_000,
    cache_bytes=30_000_000,
    load_s=1.2,
    plain_ms=1000 / PLAIN_TOK_S,
    plain_context=1024,
)

COMMITS = (1, 3, 2, 1, 4, 2, 1, 8, 2, 3, 1, 2)  # tokens per pass, over and over


class FakeClient(EngineClient):
    """Same methods as the real one; `emit` is what the engine would have said."""

    def __init__(self) -> None:
        super().__init__(("no", "process"))
        self.sent: list[Request] = []
        self.starts = 0
        self.closed = False

    async def start(self) -> None:
        self.starts += 1
        self.emit(Hello("0", 1, 1))

    async def restart(self) -> None:
        await self.start()

    async def close(self) -> None:
        self.closed = True

    def send(self, request: Request) -> None:
        self.sent.append(request)

    def emit(self, *events: Event | EngineDied) -> None:
        self._events.extend(events)

    def ready(self, info: ModelInfo = INFO) -> None:
        self.emit(Ready(info))

    @property
    def waiting(self) -> bool:
        """Whether the screen has not taken all events yet."""
        return bool(self._events)

    @property
    def asked(self) -> list[Generate]:
        return [request for request in self.sent if isinstance(request, Generate)]

    @property
    def cancelled(self) -> list[int]:
        return [request.id for request in self.sent if isinstance(request, Cancel)]

    def stream(self, text: str, cached: int = 0, prompt: int = 61, draft: bool = True) -> Spec:
        """Prefill and all tokens of `text` for the last request, four characters a token."""
        generation = self.asked[-1].id
        self.emit(Prefill(generation, cached, prompt, prompt))
        first = Timing(ttft_s=0.084, prefill_s=0.08)
        self.emit(Tokens(generation, text[:4], 1, None, (4,), first))
        spec, at, context = Spec(), 4, prompt
        while at < len(text):
            committed = COMMITS[spec.steps % len(COMMITS)] if draft else 1
            piece, at = text[at : at + 4 * committed], at + 4 * committed
            context += committed
            drafted = 7 if draft else 0
            draft_ms = 2.4 if draft else 0.0
            stats = StepStats(
                drafted, committed - 1, committed, draft_ms, 31.2, 0.6, 0.9, context,
                "commits most per second" if draft else "no drafting",
            )  # fmt: skip
            spec = spec.add(stats)
            lengths = tuple(len(piece[4 * i : 4 * i + 4]) for i in range(committed))
            self.emit(Tokens(generation, piece, committed, stats, lengths))
        return spec

    def answer(self, text: str, cached: int = 0, prompt: int = 61, reason: str = "stop") -> None:
        """A whole answer to the last request."""
        spec = self.stream(text, cached, prompt)
        self.finish(spec, cached, prompt, reason)

    def finish(self, spec: Spec, cached: int = 0, prompt: int = 61, reason: str = "stop") -> None:
        committed = sum((i + 1) * n for i, n in enumerate(spec.histogram))
        seconds = spec.steps * 0.0351
        tok_s = committed / seconds if seconds else 0.0
        timing = Timing(1.2, 0.084, seconds, tok_s, 0.08, PLAIN_TOK_S, tok_s / PLAIN_TOK_S)
        usage = Usage(prompt, cached, committed + 1)
        self.emit(Finished(self.asked[-1].id, reason, usage, spec, timing))

    def die(self, reason: str = "it was killed (SIGKILL)", log: Sequence[str] = ()) -> None:
        self.emit(EngineDied(reason, tuple(log)))
