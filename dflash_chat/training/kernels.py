"""Triton kernels of the training program: batched decode, sampling, and the head's cross-entropy.

Imported only where a GPU is used. Each kernel's plain form stands in `target.py` or `loss.py`, and
`profile.py` compares the two on the GPU.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: E741

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_attention(
    qkv, k_cache, v_cache, cos, sin, out, position,
    S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, KV head): rotate, append to the cache, attend to all so far."""
    n = tl.program_id(0)
    g = tl.program_id(1)
    t = tl.load(position).to(tl.int32)
    d = tl.arange(0, D)
    rows = tl.arange(0, ROWS)
    group: tl.constexpr = H // G
    half: tl.constexpr = D // 2
    turned = (d + half) % D
    sign = tl.where(d < half, -1.0, 1.0)
    c = tl.load(cos + t * D + d)
    s = tl.load(sin + t * D + d) * sign

    base = qkv + n.to(tl.int64) * ((H + 2 * G) * D)
    used = rows < group
    heads = (g * group + rows) * D
    q = tl.load(base + heads[:, None] + d[None, :], mask=used[:, None], other=0.0).to(tl.float32)
    q_turned = tl.load(base + heads[:, None] + turned[None, :], mask=used[:, None], other=0.0)
    q = q * c[None, :] + q_turned.to(tl.float32) * s[None, :]
    k_at = base + (H + g) * D
    k = tl.load(k_at + d).to(tl.float32) * c + tl.load(k_at + turned).to(tl.float32) * s
    v = tl.load(base + (H + G + g) * D + d)

    cache = (n.to(tl.int64) * G + g) * S * D
    k_row = k_cache + cache
    v_row = v_cache + cache
    k16 = k.to(v.dtype)
    tl.store(k_row + t * D + d, k16)
    tl.store(v_row + t * D + d, v)

    scale = (1.0 / (D**0.5)) * 1.4426950408889634
    top = tl.sum(q * k16.to(tl.float32)[None, :], axis=1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32) + v.to(tl.float32)[None, :]
    q16 = q.to(v.dtype)
    cols = tl.arange(0, BLOCK)
    for start in tl.range(0, t, BLOCK, num_stages=STAGES):
        at = start + cols
        inside = at < t
        kb = tl.load(k_row + at[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        vb = tl.load(v_row + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q16, kb) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(vb.dtype), vb, acc=acc * shrink[:, None])
        top = new_top
    acc = acc / total[:, None]
    o = out + n.to(tl.int64) * (H * D) + heads[:, None] + d[None, :]
    tl.store(o, acc.to(out.dtype.element_ty), mask=used[:, None])


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    *,
    block: int = 64,
    stages: int = 3,
    warps: int = 4,
) -> Tensor:
    """Rotate q and k, write k and v at `position` (a device scalar), return the output."""
    n, g, s, d = k_cache.shape
    h = qkv.shape[1] // d - 2 * g
    out = torch.empty(n, h * d, dtype=qkv.dtype, device=qkv.device)
    _decode_attention[(n, g)](
        qkv, k_cache, v_cache, cos, sin, out, position,
        s, H=h, G=g, D=d, ROWS=16, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _add_rms_norm(
    x, y, weight, out, features, position,
    S, W, eps, slot, C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CAPTURE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    h = tl.load(x + n * C + c, mask=inside, other=0.0)
    if ADD:
        h = (h.to(tl.float32) + tl.load(y + n * C + c, mask=inside, other=0.0).to(tl.float32)).to(
            h.dtype
        )
        tl.store(x + n * C + c, h, mask=inside)
    if CAPTURE:
        t = tl.load(position).to(tl.int64)
        tl.store(features + (n * S + t) * W + slot * C + c, h, mask=inside)
    h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / C + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * C + c, (h * scale * w).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    features: Tensor | None = None,
    slot: int = 0,
    position: Tensor | None = None,
) -> Tensor:
    """x += y in place, then RMSNorm(x); with `features`, x also goes to its slot at `position`."""
    n, c = x.shape
    out = torch.empty_like(x)
    rows, width = (features.shape[1], features.shape[2]) if features is not None else (0, 0)
    _add_rms_norm[(n,)](
        x, x if y is None else y, weight, out, x if features is None else features,
        x if position is None else position, rows, width, eps, slot,
        C=c, BLOCK=triton.next_power_of_2(c), ADD=y is not None, CAPTURE=features is not None,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < I
    g = tl.load(gate_up + n * 2 * I + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + n * 2 * I + I + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * I + c, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a fused [N, 2 I] projection."""
    n, width = gate_up.shape
    out = torch.empty(n, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(width // 2))
    _silu_mul[(n, triton.cdiv(width // 2, block))](gate_up, out, I=width // 2, BLOCK=block)
    return out


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _sample(logits, temperature, position, seed, out, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    t = tl.load(position).to(tl.uint32)
    row = _mix(_mix(_mix(tl.load(seed).to(tl.uint32)) ^ t) ^ n.to(tl.uint32))
    heat = tl.load(temperature + n)
    cold = 1.0 / tl.maximum(heat, 1e-3)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    base = logits + n.to(tl.int64) * V
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(base + c, mask=c < V, other=float("-inf")).to(tl.float32)
        if heat > 0.0:
            u = ((_mix(c.to(tl.uint32) ^ row) >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
            value = value * cold - tl.log(-tl.log(u))
        better = value > best
        best = tl.where(better, value, best)
        best_at = tl.where(better, c, best_at)
    top = tl.max(best, axis=0)
    tl.store(out + n, tl.min(tl.where(best == top, best_at, V), axis=0))


def sample(logits: Tensor, temperature: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """Gumbel-max per row, argmax where the temperature is 0; noise hashes (seed, t, n, c)."""
    n, v = logits.shape
    out = torch.empty(n, dtype=torch.int32, device=logits.device)
    _sample[(n,)](logits, temperature, position, seed, out, v, BLOCK=4096, num_warps=8)
    return out


@triton.jit
def _head_statistics(logits, labels, log_total, label_logit, best_id, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    base = logits + n.to(tl.int64) * V
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    top_at = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(base + c, mask=c < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(tl.maximum(top, value), -1e30)
        total = total * tl.exp(top - new_top) + tl.exp(value - new_top)
        top_at = tl.where(value > top, c, top_at)
        top = new_top
    peak = tl.max(top, axis=0)
    whole = tl.sum(total * tl.exp(top - peak), axis=0)
    tl.store(log_total + n, peak + tl.log(whole))
    tl.store(best_id + n, tl.min(tl.where(top == peak, top_at, V), axis=0))
    tl.store(label_logit + n, tl.load(base + tl.load(labels + n)).to(tl.float32))


def head_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: log-sum-exp, the label's logit, and the argmax."""
    n, v = logits.shape
    log_total = torch.empty(n, dtype=torch.float32, device=logits.device)
    label_logit = torch.empty_like(log_total)
    best_id = torch.empty(n, dtype=torch.int32, device=logits.device)
    _head_statistics[(n,)](
        logits, labels, log_total, label_logit, best_id, v, BLOCK=4096, num_warps=8
    )
    return log_total, label_logit, best_id


@triton.jit
def _head_gradient(logits, labels, log_total, weights, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    base = logits + n.to(tl.int64) * V
    label = tl.load(labels + n)
    shift = tl.load(log_total + n)
    weight = tl.load(weights + n)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(base + c, mask=c < V, other=0.0).to(tl.float32) - shift)
        grad = weight * (p - tl.where(c == label, 1.0, 0.0))
        tl.store(base + c, grad.to(logits.dtype.element_ty), mask=c < V)


def head_gradient_(logits: Tensor, labels: Tensor, log_total: Tensor, weights: Tensor) -> Tensor:
    """Overwrite the logits with weights · (softmax − onehot(label))."""
    n, v = logits.shape
    _head_gradient[(n,)](logits, labels, log_total, weights, v, BLOCK=4096, num_warps=8)
    return logits
