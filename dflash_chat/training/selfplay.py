"""The target chats with itself: a per-row state machine over lockstep decoding, under a CUDA graph.

Each row alternates forced scripts (headers, openers) with turns that the target samples. Knows
token ids only; `scripts.py` makes them from text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_chat.training.target import Decoder, Target

FORCED, USER, ASSISTANT, OPENER = 0, 1, 2, 3


@dataclass(frozen=True)
class Scripts:
    """Forced token runs by id, and what follows each: USER, ASSISTANT or OPENER (as planned)."""

    runs: tuple[tuple[int, ...], ...]
    after: tuple[int, ...]
    starts: tuple[int, ...]  # ids of whole openings; the first is the template's own
    openers: tuple[int, ...]
    close_user: int  # after the user's own end marker
    cut_user: int  # with the end marker, where the turn ran into its limit
    close_assistant: int
    cut_assistant: int
    end_id: int


@dataclass(frozen=True)
class Style:
    """How a round is sampled; shares are of rows."""

    assistant_temperatures: tuple[tuple[float, float], ...] = (
        (0.0, 0.45),
        (0.3, 0.15),
        (0.7, 0.20),
        (1.0, 0.20),
    )  # (temperature, share)
    user_temperatures: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1)
    opener_share: float = 0.35
    other_system_share: float = 0.15
    assistant_limits: tuple[int, int] = (128, 320)
    user_limits: tuple[int, int] = (40, 200)


@dataclass(frozen=True)
class Round:
    """Views of the player's buffers, valid until the next round."""

    tokens: Tensor  # [N, S] int32
    kinds: Tensor  # [N, S] uint8: FORCED, USER or ASSISTANT
    features: Tensor  # [N, S, K C]; the last position's are never computed


def sample_plain(logits: Tensor, temperature: Tensor) -> Tensor:
    """Gumbel-max per row; argmax where the temperature is 0."""
    heat = temperature.clamp_min(1e-3)[:, None]
    noise = -torch.log(
        -torch.log(torch.rand_like(logits, dtype=torch.float32).clamp(1e-9, 1 - 1e-7))
    )
    hot = logits.float() / heat + noise
    return torch.where(temperature[:, None] > 0, hot, logits.float()).argmax(-1).to(torch.int32)


class Loop:
    """Repeats one device-side step: captured once as a CUDA graph, or called as it is on a CPU."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                step()

    def run(self, steps: int) -> None:
        call = self._graph.replay if self._graph is not None else self._step
        for _ in range(steps):
            call()


class Player:
    """Plays rounds of `rows` chats of `length` tokens; everything per step stays on the device."""

    def __init__(
        self, target: Target, scripts: Scripts, style: Style, rows: int, length: int, seed: int
    ) -> None:
        device = target.device
        self.scripts, self.style, self.seed = scripts, style, seed
        self.decoder = Decoder(target, rows, length)
        self.rows, self.length = rows, length
        width = max(len(run) for run in scripts.runs)
        self._table = torch.tensor(
            [list(run) + [0] * (width - len(run)) for run in scripts.runs],
            dtype=torch.int32, device=device,
        )  # fmt: skip
        self._lengths = torch.tensor([len(run) for run in scripts.runs], device=device)
        self._after = torch.tensor(scripts.after, device=device)
        self._close = torch.tensor([0, scripts.close_user, scripts.close_assistant], device=device)
        self._cut = torch.tensor([0, scripts.cut_user, scripts.cut_assistant], device=device)

        def state() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        self._mode, self._script, self._offset = state(), state(), state()
        self._turn, self._turn_tokens = state(), state()
        self._plan = torch.full((rows, 64), -1, dtype=torch.int64, device=device)
        self._limits = torch.ones(rows, 3, dtype=torch.int64, device=device)
        self._heats = torch.zeros(rows, 3, device=device)
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.kinds = torch.zeros(rows, length, dtype=torch.uint8, device=device)
        self._begin(0)
        self._loop = Loop(self._step, device)

    def play(self, index: int) -> Round:
        """Round `index` of this seed, from empty caches."""
        self._begin(index)
        self._loop.run(self.length - 1)
        return Round(self.decoder.tokens, self.kinds, self.decoder.features)

    def _begin(self, index: int) -> None:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        torch.manual_seed(self.seed * 1_000_003 + index)
        rows, style, scripts = self.rows, self.style, self.scripts

        def choose(share: float) -> Tensor:
            return torch.rand(rows, generator=g) < share

        def pick(values: Sequence[float], shares: Sequence[float]) -> Tensor:
            at = torch.multinomial(torch.tensor(shares), rows, replacement=True, generator=g)
            return torch.tensor(values)[at]

        def between(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (rows,), generator=g)

        start = torch.full((rows,), scripts.starts[0])
        if len(scripts.starts) > 1:
            others = torch.tensor(scripts.starts[1:])
            other = others[torch.randint(len(others), (rows,), generator=g)]
            start = torch.where(choose(style.other_system_share), other, start)
        plan = torch.full(self._plan.shape, -1)
        if scripts.openers:
            ids = torch.tensor(scripts.openers)
            drawn = ids[torch.randint(len(ids), plan.shape, generator=g)]
            plan = torch.where(
                torch.rand(plan.shape, generator=g) < style.opener_share, drawn, plan
            )
        heats, shares = zip(*style.assistant_temperatures, strict=True)
        user_heats = pick(style.user_temperatures, [1.0] * len(style.user_temperatures))
        limits = [torch.ones(rows, dtype=torch.int64)]
        limits += [between(*style.user_limits), between(*style.assistant_limits)]

        self._script.copy_(start)
        self._plan.copy_(plan)
        self._limits.copy_(torch.stack(limits, dim=1))
        self._heats.copy_(torch.stack([torch.zeros(rows), user_heats, pick(heats, shares)], dim=1))
        self._seed.fill_(self.seed * 65_537 + index)
        self._mode.fill_(FORCED)
        self._offset.fill_(1)
        self._turn.zero_()
        self._turn_tokens.zero_()
        self.kinds.zero_()
        self.decoder.reset()
        self.decoder.tokens[:, 0] = self._table[self._script, 0]

    def _step(self) -> None:
        logits = self.decoder.step()
        heat = self._heats.gather(1, self._mode[:, None])[:, 0]
        if logits.is_cuda:
            from dflash_chat.training import kernels

            sampled = kernels.sample(logits, heat, self.decoder.position, self._seed)
        else:
            sampled = sample_plain(logits, heat)
        tokens, kinds = self._advance(sampled)
        self.decoder.put(tokens)
        self.kinds.index_copy_(1, self.decoder.position, kinds[:, None])

    def _advance(self, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """The next token and its kind per row; moves the state machine in place."""
        forced = self._mode == FORCED
        scripted = self._table[self._script, self._offset.clamp_max(self._table.shape[1] - 1)]
        token = torch.where(forced, scripted, sampled)
        kind = self._mode.to(torch.uint8)

        offset = self._offset + forced
        done = forced & (offset >= self._lengths[self._script])
        after = self._after[self._script]
        to_user = done & (after == OPENER)
        opener = self._plan.gather(1, (self._turn % self._plan.shape[1])[:, None])[:, 0]
        to_opener = to_user & (opener >= 0)

        turn_tokens = self._turn_tokens + ~forced
        limit = self._limits.gather(1, self._mode[:, None])[:, 0]
        ended = ~forced & (token == self.scripts.end_id)
        cut = ~forced & ~ended & (turn_tokens >= limit)
        script = torch.where(ended, self._close[self._mode], self._script)
        script = torch.where(cut, self._cut[self._mode], script)
        script = torch.where(to_opener, opener, script)
        restart = to_opener | ended | cut
        mode = torch.where(done, torch.where(after == OPENER, USER, after), self._mode)

        self._script.copy_(script)
        self._mode.copy_(torch.where(restart, FORCED, mode))
        self._offset.copy_(torch.where(restart, 0, offset))
        self._turn_tokens.copy_(torch.where(done | restart, 0, turn_tokens))
        self._turn.add_(to_user)
        return token, kind


@torch.no_grad()
def answer(
    target: Target, prompts: Sequence[Sequence[int]], new_tokens: int, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Continue every prompt by `new_tokens`: ids [N, S] and features [N, S, K C].

    Rows are as long as the longest prompt needs; ids after a row's own `new_tokens` go on and are
    the caller's to cut.
    """
    device, n = target.device, len(prompts)
    longest = max(len(prompt) for prompt in prompts)
    decoder = Decoder(target, n, longest + new_tokens)
    given = torch.zeros(n, longest + new_tokens, dtype=torch.int32, device=device)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    heat = torch.tensor(temperatures, dtype=torch.float32, device=device)
    seed = torch.full((1,), 7, dtype=torch.int64, device=device)

    def step() -> None:
        logits = decoder.step()
        if logits.is_cuda:
            from dflash_chat.training import kernels

            sampled = kernels.sample(logits, heat, decoder.position, seed)
        else:
            sampled = sample_plain(logits, heat)
        scripted = given.index_select(1, decoder.position + 1)[:, 0]
        decoder.put(torch.where(decoder.position + 1 < lengths, scripted, sampled))

    decoder.tokens[:, 0] = given[:, 0]
    loop = Loop(step, device)
    decoder.reset()
    loop.run(longest + new_tokens - 1)
    return decoder.tokens, decoder.features
