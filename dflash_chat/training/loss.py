"""D-PACE-weighted cross-entropy through the frozen head, with its gradient made on the way.

q̃ = (1 − α) q + α; prefix_j = Π_{i≤j} q̃_i; weight_j = Σ_{m≥j} prefix_m, detached: the derivative
of the expected accepted length. The logits of a chunk are overwritten by their gradient, so that no
row of the vocabulary is stored or computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.5
CHUNK_ROWS = 16_384


def dpace_weights(q: Tensor, valid: Tensor, alpha: float = ALPHA) -> Tensor:
    """Weights [A, K] of the labels' probabilities q [A, K]; `valid` is a prefix of ones per row."""
    prefix = torch.cumprod((1 - alpha) * q + alpha, dim=-1) * valid
    return prefix.flip(-1).cumsum(-1).flip(-1) * valid


def head_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: log-sum-exp, the label's logit, and the argmax."""
    if logits.is_cuda:
        from dflash_chat.training import kernels

        return kernels.head_statistics(logits, labels)
    wide = logits.float()
    return wide.logsumexp(-1), wide.gather(-1, labels[:, None])[:, 0], wide.argmax(-1).int()


def head_gradient_(logits: Tensor, labels: Tensor, log_total: Tensor, weights: Tensor) -> Tensor:
    """Overwrite the logits with weights · (softmax − onehot(label))."""
    if logits.is_cuda:
        from dflash_chat.training import kernels

        return kernels.head_gradient_(logits, labels, log_total, weights)
    grad = (logits.float() - log_total[:, None]).exp()
    grad.scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], -1, dtype=grad.dtype))
    return logits.copy_(grad * weights[:, None])


@dataclass(frozen=True)
class HeadLoss:
    """The scalar loss, and per anchor how many drafts matched from the first on."""

    loss: Tensor
    accepted: Tensor  # [A] int64


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        valid: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        anchors, drafts, width = hidden.shape
        grad = torch.empty_like(hidden)
        accepted = torch.empty(anchors, dtype=torch.int64, device=hidden.device)
        total = torch.zeros((), device=hidden.device)
        mass = torch.zeros((), device=hidden.device)
        step = max(1, CHUNK_ROWS // drafts)
        for at in range(0, anchors, step):
            part = slice(at, min(at + step, anchors))
            ids = labels[part].reshape(-1)
            rows = hidden[part].reshape(-1, width)
            logits = F.linear(rows, head)  # [R, V]
            log_total, label_logit, best = head_statistics(logits, ids)
            log_q = (label_logit - log_total).view(-1, drafts)
            weights = dpace_weights(log_q.exp(), valid[part]) * weight[part, None]
            total -= (weights * log_q).sum()
            mass += weights.sum()
            right = (best == ids).view(-1, drafts) & (valid[part] > 0)
            accepted[part] = right.long().cumprod(-1).sum(-1)
            logits = head_gradient_(logits, ids, log_total, weights.reshape(-1))
            grad[part] = F.linear(logits, head.t()).view(-1, drafts, width)
        mass = mass.clamp_min(1e-6)
        ctx.save_for_backward(grad, mass)
        ctx.mark_non_differentiable(accepted)
        return total / mass, accepted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad, mass = ctx.saved_tensors
        return grad * (grads[0] / mass).to(grad.dtype), None, None, None, None


def head_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, valid: Tensor, weight: Tensor
) -> HeadLoss:
    """Hidden rows [A, K, C] of K drafts per anchor; labels and valid [A, K]; weight [A]."""
    apply: Any = _Weighted.apply
    loss, accepted = apply(hidden, head, labels, valid, weight)
    return HeadLoss(loss, accepted)
