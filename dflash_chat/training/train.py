"""Self-play and training in turns, on one device, against the clock.

Every round of chats goes with its features into a ring on the device; steps draw sequences from the
ring and fresh anchors each time. The schedule follows elapsed time, so a run always ends with a
small rate.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_chat.training.drafter import (
    Attend,
    Drafter,
    DrafterShape,
    FlexAttend,
    block_inputs,
    block_positions,
    dense_attend,
    initialise,
    tables,
)
from dflash_chat.training.evaluate import Acceptance, AnswerSet, evaluate, first_answers
from dflash_chat.training.export import exported_tensors, read_checkpoint, write_checkpoint
from dflash_chat.training.loss import head_loss
from dflash_chat.training.selfplay import ASSISTANT, USER, Player, Scripts, Style
from dflash_chat.training.target import Target, features_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Everything a run may vary; defaults are the shipped drafter's recipe."""

    minutes: float = 18.0
    seed: int = 1
    rows: int = 2048
    length: int = 640
    ring: int = 5
    sequences: int = 96
    anchors: int = 64
    reuse: float = 1.3  # anchors trained per fresh assistant token
    user_weight: float = 0.15
    lr: float = 1.5e-3
    warmup: float = 0.03
    floor: float = 0.02
    clip: float = 1.0
    noise: float = 0.0
    ema: float = 0.999
    optimizer: str = "adamw"
    attention: str = "flex"
    compiled: bool = True
    init: str = "target"
    held_out: int = 32
    eval_minutes: float = 3.0
    checkpoint_seconds: float = 60.0
    progress_seconds: float = 5.0
    style: Style = field(default_factory=Style)


@dataclass(frozen=True)
class Batch:
    """One step's input."""

    features: Tensor  # [N, S, K C]
    tokens: Tensor  # [N, S]
    anchors: Tensor  # [N, A], sorted
    weight: Tensor  # [N, A], 0 where no anchor was left to draw
    labels: Tensor  # [N, A, B − 1]
    valid: Tensor  # [N, A, B − 1]
    answers: Tensor  # [N, A] bool: the anchor is the assistant's


def draw_anchors(
    kinds: Tensor, count: int, user_weight: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Up to `count` sorted anchors per row without replacement, and 1 or 0 for drawn or missing."""
    here, following = kinds[:, :-1], kinds[:, 1:]
    chance = ((here == ASSISTANT) & (following == ASSISTANT)).float()
    chance += user_weight * ((here == USER) & (following == USER)).float()
    noise = torch.rand(chance.shape, generator=generator, device=kinds.device).clamp_(
        1e-9, 1 - 1e-7
    )
    score = chance.log() - (-noise.log()).log()  # −inf where it may not stand
    best, at = score.topk(count, dim=1)
    anchors, order = torch.where(best.isinf(), 0, at).sort(dim=1)
    return anchors, (~best.isinf()).float().gather(1, order)


def labels_of(tokens: Tensor, kinds: Tensor, anchors: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Labels and validity [N, A, B − 1]: the anchor's own turn, up to and with its end marker."""
    steps = torch.arange(block, device=tokens.device)
    places = anchors[:, :, None] + steps
    inside = places < tokens.shape[1]
    flat = places.clamp_max(tokens.shape[1] - 1).flatten(1)
    ids = tokens.gather(1, flat).view_as(places).long()
    kind = kinds.gather(1, flat).view_as(places)
    same = (inside & (kind == kind[:, :, :1])).long().cumprod(-1)
    return ids[:, :, 1:], same[:, :, 1:].float()


class Ring:
    """The newest rounds on the device."""

    def __init__(self, slots: int, rows: int, length: int, width: int, target: Target) -> None:
        device = target.device
        self.slots, self.rows = slots, rows
        self.features = torch.zeros(slots * rows, length, width, dtype=target.dtype, device=device)
        self.tokens = torch.zeros(slots * rows, length, dtype=torch.int32, device=device)
        self.kinds = torch.zeros(slots * rows, length, dtype=torch.uint8, device=device)
        self.filled = 0

    def put(self, index: int, tokens: Tensor, kinds: Tensor, features: Tensor) -> None:
        at = (index % self.slots) * self.rows
        part = slice(at, at + self.rows)
        self.tokens[part], self.kinds[part] = tokens, kinds
        self.features[part] = features
        self.filled = min(self.slots, max(self.filled, index % self.slots + 1))


class Weights:
    """Flat fp32 master weights behind a drafter whose parameters are views in the compute dtype."""

    def __init__(self, drafter: Drafter) -> None:
        named = dict(drafter.named_parameters())
        self.names = list(named)
        first = next(iter(named.values()))
        sizes = [p.numel() for p in named.values()]
        total = sum(sizes)
        self.work = torch.empty(total, dtype=first.dtype, device=first.device)
        self.work_grad = torch.zeros_like(self.work)
        self.master = torch.empty(total, dtype=torch.float32, device=first.device)
        self.master_grad = torch.zeros_like(self.master)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        at = 0
        for (name, p), size in zip(named.items(), sizes, strict=True):
            part = slice(at, at + size)
            self.master[part] = p.detach().float().flatten()
            p.data = self.work[part].view(p.shape)
            p.grad = self.work_grad[part].view(p.shape)
            view = torch.nn.Parameter(self.master[part].view(p.shape))
            view.grad = self.master_grad[part].view(p.shape)
            self.parameters[name] = view
            at += size
        self.ema = self.master.clone()
        self.publish(self.master)

    def publish(self, flat: Tensor) -> None:
        """Make the drafter compute with these weights."""
        self.work.copy_(flat)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        out, at = {}, 0
        for name, p in self.parameters.items():
            out[name] = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights by name; the average restarts from them."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[name])
        self.ema.copy_(self.master)
        self.publish(self.master)


def optimizers(weights: Weights, options: Options) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over matrices with AdamW over the rest."""
    fused = weights.master.is_cuda
    every = list(weights.parameters.values())

    def adamw(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    if options.optimizer == "adamw":
        return [adamw(every)]
    matrices = [p for p in every if p.dim() == 2]
    muon = torch.optim.Muon(
        matrices, lr=options.lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw([p for p in every if p.dim() == 1])]


class Trainer:
    """Owns the ring, the drafter, its optimiser and the counters."""

    def __init__(
        self, target: Target, scripts: Scripts, shape: DrafterShape, options: Options
    ) -> None:
        self.target, self.shape, self.options = target, shape, options
        device = target.device
        self.player = Player(
            target, scripts, options.style, options.rows, options.length, options.seed
        )
        self.ring = Ring(options.ring, options.rows, options.length, target.feature_width, target)
        self.drafter = Drafter(shape).to(device=device, dtype=target.dtype)
        self.drafter.feature_rms = self.drafter.feature_rms.float()
        self.weights: Weights | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.generator = torch.Generator(device).manual_seed(options.seed)
        self.rope = tables(shape.target, options.length + shape.block, device)
        self.flex = (
            FlexAttend(options.sequences, options.anchors, options.length, shape.block, device)
            if options.attention == "flex"
            else None
        )
        self.forward: Callable[..., Tensor] = self.drafter
        if options.compiled:
            self.forward = torch.compile(self.drafter, dynamic=False)
        self.held_out: AnswerSet | None = None
        self.rounds = self.steps = self.tokens_made = self.fresh = self.reported = 0
        self.elapsed = 0.0
        drafts = shape.block - 1
        self.loss_sum = torch.zeros((), device=device)
        self.survived = torch.zeros(drafts, device=device)
        self.seen = torch.zeros((), device=device)

    def play_round(self) -> None:
        """Write one round into the ring; the first also sets up drafter and held-out text."""
        played = self.player.play(self.rounds)
        kinds = played.kinds
        if self.rounds == 0 and self.options.held_out:
            held = slice(0, self.options.held_out)
            self.held_out = first_answers(
                "held-out", played.tokens[held], kinds[held], played.features[held]
            )
            kinds[held] = 0
        self.ring.put(self.rounds, played.tokens, kinds, played.features)
        self.fresh = int(((kinds[:, :-1] == ASSISTANT) & (kinds[:, 1:] == ASSISTANT)).sum())
        self.rounds += 1
        self.tokens_made += self.options.rows * self.options.length
        if self.weights is None:
            sample = played.features[: min(64, self.options.rows), 1:-1].float()
            self.set_up(sample.square().mean((0, 1)).sqrt().clamp_min(1e-6))

    def set_up(self, feature_rms: Tensor) -> None:
        source = self.target if self.options.init == "target" else None
        initialise(self.drafter, source, feature_rms, self.options.seed)
        self.weights = Weights(self.drafter)
        self.optimizers = optimizers(self.weights, self.options)

    def start_from(self, folder: Path) -> None:
        """Continue from exported weights with a fresh optimiser; a round must have been played."""
        assert self.weights is not None, "play a round first"
        self.weights.load(read_checkpoint(folder, self.drafter))

    @property
    def steps_per_round(self) -> int:
        per_step = self.options.sequences * self.options.anchors
        return max(1, round(self.options.reuse * self.fresh / per_step))

    def draw_batch(self) -> Batch:
        options, ring = self.options, self.ring
        rows = torch.randint(
            ring.filled * ring.rows, (options.sequences,), generator=self.generator,
            device=self.target.device,
        )  # fmt: skip
        tokens, kinds = ring.tokens.index_select(0, rows), ring.kinds.index_select(0, rows)
        features = ring.features.index_select(0, rows)
        if options.noise:
            scale = (options.noise * self.drafter.feature_rms).to(features.dtype)
            features += torch.randn_like(features) * scale
        anchors, weight = draw_anchors(kinds, options.anchors, options.user_weight, self.generator)
        labels, valid = labels_of(tokens, kinds, anchors, self.shape.block)
        answers = (kinds.gather(1, anchors) == ASSISTANT) & (weight > 0)
        return Batch(features, tokens, anchors, weight, labels, valid, answers)

    def train_step(self, fraction: float) -> None:
        """One update; `fraction` of the run is behind us."""
        assert self.weights is not None, "play a round first"
        batch = self.draw_batch()
        loss, accepted = self.backward(batch)
        self.update(fraction)
        self.loss_sum += loss
        drafts = self.shape.block - 1
        steps = torch.arange(1, drafts + 1, device=accepted.device)
        answers = batch.answers.flatten()
        self.survived += ((accepted[:, None] >= steps) & answers[:, None]).sum(0)
        self.seen += answers.sum()
        self.steps += 1

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape, target = self.shape, self.target
        n, a = batch.anchors.shape
        hidden = self.hidden(batch).view(n * a, shape.block, -1)[:, 1:]
        out = head_loss(
            hidden, target.head, batch.labels.flatten(0, 1), batch.valid.flatten(0, 1),
            batch.weight.flatten(),
        )  # fmt: skip
        out.loss.backward()  # type: ignore[no-untyped-call]
        return out.loss.detach(), out.accepted

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states of all block rows, [N, A B, C]."""
        attend: Attend
        if self.flex is not None:
            self.flex.update(batch.anchors)
            attend = self.flex
        else:
            attend = dense_attend(batch.anchors, batch.tokens.shape[1], self.shape.block)
        return self.forward(
            batch.features,
            block_inputs(self.target, batch.tokens, batch.anchors, self.shape),
            block_positions(batch.anchors, self.shape.block),
            self.rope,
            attend,
        )

    @torch.no_grad()
    def update(self, fraction: float) -> None:
        weights, options = self.weights, self.options
        assert weights is not None
        weights.master_grad.copy_(weights.work_grad)
        weights.work_grad.zero_()
        norm = weights.master_grad.norm()
        weights.master_grad.mul_((options.clip / (norm + 1e-6)).clamp_max(1.0))
        rate = options.lr * rate_factor(fraction, options.warmup, options.floor)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        weights.ema.lerp_(
            weights.master, 1 - min(options.ema, (self.steps + 1) / (self.steps + 10))
        )
        weights.publish(weights.master)

    def report(self) -> dict[str, float | list[float]]:
        """Means since the last report; the one place that waits for the device."""
        seen = max(1.0, float(self.seen))
        steps = max(1, self.steps - self.reported)
        survival = [float(x) / seen for x in self.survived.tolist()]
        out: dict[str, float | list[float]] = {
            "loss": float(self.loss_sum) / steps,
            "tau": 1 + sum(survival),
            "survival": survival,
        }
        self.reported = self.steps
        self.loss_sum.zero_()
        self.survived.zero_()
        self.seen.zero_()
        return out

    def evaluate(self, sets: Sequence[AnswerSet]) -> tuple[list[Acceptance], dict[str, Tensor]]:
        """Raw and averaged weights on every set; returns the better one's results and tensors."""
        weights = self.weights
        assert weights is not None
        every = [*sets, *([self.held_out] if self.held_out is not None else [])]
        best: tuple[float, list[Acceptance], Tensor, str] | None = None
        for name, flat in (("raw", weights.master), ("average", weights.ema)):
            weights.publish(flat)
            results = [evaluate(self.drafter, self.target, part) for part in every]
            judged = results[len(sets) :] or results  # held-out text decides, not the benchmark
            score = sum(result.tau for result in judged) / max(1, len(judged))
            if best is None or score > best[0]:
                best = score, results, flat, name
        assert best is not None
        weights.publish(weights.master)
        log.info("better weights: %s", best[3])
        return best[1], exported_tensors(self.drafter, weights.by_name(best[2]))

    def save(self, path: Path) -> None:
        """Everything to continue, in one file, replaced in one step."""
        weights, ring = self.weights, self.ring
        assert weights is not None
        used = ring.filled * ring.rows
        state: dict[str, Any] = {
            "master": weights.master.cpu(),
            "ema": weights.ema.cpu(),
            "feature_rms": self.drafter.feature_rms.cpu(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "ring_tokens": ring.tokens[:used].cpu().to(torch.uint16),
            "ring_kinds": ring.kinds[:used].cpu(),
            "held_out": None
            if self.held_out is None
            else (self.held_out.tokens.cpu(), self.held_out.starts, self.held_out.ends),
            "counters": (self.rounds, self.steps, self.tokens_made, self.fresh, self.elapsed),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Continue exactly; the ring's features are computed again from its tokens."""
        device = self.target.device
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.set_up(state["feature_rms"].to(device))
        weights, ring = self.weights, self.ring
        assert weights is not None
        with torch.no_grad():
            weights.master.copy_(state["master"])
            weights.ema.copy_(state["ema"])
        weights.publish(weights.master)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        tokens = state["ring_tokens"].to(torch.int32).to(device)
        ring.filled = len(tokens) // ring.rows
        ring.tokens[: len(tokens)] = tokens
        ring.kinds[: len(tokens)] = state["ring_kinds"].to(device)
        for at in range(0, len(tokens), 64):
            part = slice(at, min(at + 64, len(tokens)))
            ring.features[part] = features_of(self.target, tokens[part])
        if state["held_out"] is not None:
            ids, starts, ends = state["held_out"]
            ids = ids.to(device)
            features = features_of(self.target, ids)
            self.held_out = AnswerSet("held-out", ids, features, starts, ends)
        self.rounds, self.steps, self.tokens_made, self.fresh, self.elapsed = state["counters"]
        self.reported = self.steps


def rate_factor(fraction: float, warmup: float, floor: float) -> float:
    """Linear warm-up, then a cosine from 1 to `floor`, over the run's time."""
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    done = min(1.0, (fraction - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def run(
    trainer: Trainer,
    sets: Sequence[AnswerSet],
    out: Path,
    export_to: Path,
    say: Callable[[str], None],
    init_from: Path | None = None,
) -> list[Acceptance]:
    """Rounds of self-play and training until the minutes are over; returns the last evaluation."""
    options = trainer.options
    out.mkdir(parents=True, exist_ok=True)
    budget = options.minutes * 60
    began = time.monotonic() - trainer.elapsed
    last_line = last_save = last_eval = time.monotonic()
    marks = (trainer.tokens_made, trainer.steps)
    play_seconds = 0.0

    def measure() -> list[Acceptance]:
        results, tensors = trainer.evaluate(sets)
        for result in results:
            say(result.line())
        write_checkpoint(export_to, trainer.shape, tensors)
        return results

    while trainer.elapsed < budget:
        at = time.monotonic()
        first = trainer.weights is None
        trainer.play_round()  # waits for the device
        play_seconds += time.monotonic() - at
        if first and init_from is not None:
            trainer.start_from(init_from)
        for _ in range(trainer.steps_per_round):
            now = time.monotonic()
            trainer.elapsed = now - began
            if trainer.elapsed >= budget:
                break
            trainer.train_step(trainer.elapsed / budget)
            if now - last_line >= options.progress_seconds:
                report = trainer.report()
                span = time.monotonic() - last_line
                made, done = trainer.tokens_made - marks[0], trainer.steps - marks[1]
                say(progress_line(trainer, report, span, made, done, play_seconds))
                last_line, marks, play_seconds = now, (trainer.tokens_made, trainer.steps), 0.0
            if now - last_save >= options.checkpoint_seconds:
                trainer.save(out / "state.pt")
                last_save = time.monotonic()
            if now - last_eval >= options.eval_minutes * 60:
                measure()
                last_eval = time.monotonic()
    results = measure()
    trainer.save(out / "state.pt")
    return results


def progress_line(
    trainer: Trainer,
    report: dict[str, float | list[float]],
    span: float,
    made: int,
    done: int,
    play_seconds: float,
) -> str:
    """One line for the person watching."""
    options = trainer.options
    rate = options.lr * rate_factor(
        trainer.elapsed / (options.minutes * 60), options.warmup, options.floor
    )
    survival = report["survival"]
    assert isinstance(survival, list)
    shares = " ".join(f"{share:.2f}" for share in survival)
    play_rate = made / play_seconds / 1e3 if play_seconds > 0 else 0.0
    step_ms = 1e3 * max(0.0, span - play_seconds) / max(1, done)
    return (
        f"{trainer.elapsed / 60:5.2f}/{options.minutes:g} min  round {trainer.rounds}  "
        f"{trainer.tokens_made / 1e6:.1f} M tokens ({play_rate:.0f} k/s played)  "
        f"step {trainer.steps} ({step_ms:.1f} ms)  loss {report['loss']:.3f}  "
        f"tau~{report['tau']:.3f} [{shares}]  lr {rate:.2e}"
    )
