"""Acceptance length as it is served: draft at every position of known answers, then walk.

Drafts are argmax and a draft is accepted iff it equals the target's own token, so on text that the
target chose (greedily or by sampling) the walk is exactly what sample-and-match serving does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.errors import UsageError
from dflash_chat.training.drafter import (
    Drafter,
    block_inputs,
    block_positions,
    dense_attend,
    tables,
)
from dflash_chat.training.scripts import Encode, chat_prompt
from dflash_chat.training.selfplay import ASSISTANT, answer
from dflash_chat.training.target import Target

ANCHORS = 64
ROWS = 32


@dataclass(frozen=True)
class AnswerSet:
    """Sequences with one answer each, at [start, end)."""

    name: str
    tokens: Tensor  # [N, S] int32
    features: Tensor  # [N, S, K C]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Acceptance:
    """Pooled over a set; `histogram[i]` counts passes that committed i + 1 tokens."""

    name: str
    histogram: tuple[int, ...]

    @property
    def passes(self) -> int:
        return sum(self.histogram)

    @property
    def tau(self) -> float:
        """Committed tokens per verify pass, bonus included."""
        committed = sum((i + 1) * count for i, count in enumerate(self.histogram))
        return committed / max(1, self.passes)

    @property
    def survival(self) -> tuple[float, ...]:
        """Share of passes whose first k drafts were all accepted, k = 1…B−1."""
        tails = [sum(self.histogram[k:]) for k in range(1, len(self.histogram))]
        return tuple(tail / max(1, self.passes) for tail in tails)

    def line(self) -> str:
        steps = " ".join(f"{share:.2f}" for share in self.survival)
        return f"eval {self.name}: tau {self.tau:.3f} passes {self.passes} survival {steps}"


def read_prompts(path: Path) -> list[str]:
    """First turns of a JSONL file with `prompt` or `turns` per line."""
    prompts = []
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        entry = json.loads(line)
        prompt = entry.get("prompt") or (entry.get("turns") or [None])[0]
        if not isinstance(prompt, str):
            raise UsageError(f"{path} has a line without prompt or turns")
        prompts.append(prompt)
    return prompts


def answer_sets(
    target: Target,
    encode: Encode,
    end_id: int,
    prompts: dict[str, list[str]],
    new_tokens: int,
    temperatures: Sequence[float] = (0.0, 0.7),
) -> list[AnswerSet]:
    """Let the target answer every prompt at every temperature, all in one batch."""
    plan = [
        (f"{name}@{heat:g}", heat, encode(chat_prompt(text)))
        for name, texts in prompts.items()
        for heat in temperatures
        for text in texts
    ]
    if not plan:
        return []
    ids, features = answer(target, [row[2] for row in plan], new_tokens, [row[1] for row in plan])
    sets = []
    for name in dict.fromkeys(row[0] for row in plan):
        rows = [i for i, row in enumerate(plan) if row[0] == name]
        starts = tuple(len(plan[i][2]) for i in rows)
        ends = tuple(
            _end(ids[i, start : start + new_tokens].tolist(), end_id) + start
            for i, start in zip(rows, starts, strict=True)
        )
        width = max(ends)
        sets.append(AnswerSet(name, ids[rows, :width], features[rows, :width], starts, ends))
    return sets


def first_answers(name: str, tokens: Tensor, kinds: Tensor, features: Tensor) -> AnswerSet:
    """The first assistant turn of each self-written chat; rows without one are left out."""
    rows, starts, ends = [], [], []
    for row, marks in enumerate(kinds.tolist()):
        if ASSISTANT not in marks:
            continue
        start = marks.index(ASSISTANT)
        stop = next((i for i in range(start, len(marks)) if marks[i] != ASSISTANT), len(marks))
        rows.append(row)
        starts.append(start)
        ends.append(stop)
    return AnswerSet(name, tokens[rows].clone(), features[rows].clone(), tuple(starts), tuple(ends))


@torch.no_grad()
def accepted_everywhere(drafter: Drafter, target: Target, answers: AnswerSet) -> list[list[int]]:
    """Per sequence, how many drafts hold with the block anchored at start, start + 1, … end − 1."""
    shape = drafter.shape
    n, s = answers.tokens.shape
    device = target.device
    rope = tables(shape.target, s + shape.block, device)
    starts = torch.tensor(answers.starts, device=device)
    ends = torch.tensor(answers.ends, device=device)
    span = max(e - b for b, e in zip(answers.starts, answers.ends, strict=True))
    drafts = shape.block - 1
    held = torch.zeros(n, span, dtype=torch.int64, device=device)
    for top in range(0, n, ROWS):
        part = slice(top, top + ROWS)
        tokens, features = answers.tokens[part], answers.features[part]
        for at in range(0, span, ANCHORS):
            steps = torch.arange(at, min(at + ANCHORS, span), device=device)
            anchors = starts[part, None] + steps
            inside = anchors < ends[part, None]
            anchors = torch.where(inside, anchors, starts[part, None])  # [N, A]
            hidden = drafter(
                features,
                block_inputs(target, tokens, anchors, shape),
                block_positions(anchors, shape.block),
                rope,
                dense_attend(anchors, s, shape.block),
            )
            rows = hidden.view(len(anchors), -1, shape.block, hidden.shape[-1])[:, :, 1:]
            best = F.linear(rows, target.head).argmax(-1)  # [N, A, B − 1]
            places = anchors[:, :, None] + torch.arange(1, drafts + 1, device=device)
            real = tokens.gather(1, places.clamp_max(s - 1).flatten(1)).view_as(places)
            right = (best == real) & (places < ends[part, None, None])
            held[part, at : at + len(steps)] = right.long().cumprod(-1).sum(-1)
    return [
        row[: e - b] for row, b, e in zip(held.tolist(), answers.starts, answers.ends, strict=True)
    ]


def walk(accepted: Sequence[int], block: int) -> list[int]:
    """Histogram of one answer: from its first token, commit the accepted drafts and the bonus."""
    histogram = [0] * block
    at = 0
    while at + 1 < len(accepted):
        commit = min(accepted[at] + 1, len(accepted) - 1 - at)
        histogram[commit - 1] += 1
        at += commit
    return histogram


def evaluate(drafter: Drafter, target: Target, answers: AnswerSet) -> Acceptance:
    """Serve the set and pool its passes."""
    block = drafter.shape.block
    pooled = [0] * block
    for accepted in accepted_everywhere(drafter, target, answers):
        pooled = [a + b for a, b in zip(pooled, walk(accepted, block), strict=True)]
    return Acceptance(answers.name, tuple(pooled))


def _end(answer_ids: list[int], end_id: int) -> int:
    """Length of an answer with its end marker."""
    return answer_ids.index(end_id) + 1 if end_id in answer_ids else len(answer_ids)
