"""Checks on the device that matter before a run, then the time of every part.

Prints errors against plain torch first: a fast kernel that is wrong is no kernel.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dflash_chat.training.drafter import DrafterShape
from dflash_chat.training.loss import HeadLoss, dpace_weights, head_loss
from dflash_chat.training.selfplay import Scripts
from dflash_chat.training.target import Decoder, Target, full_forward, rotate
from dflash_chat.training.train import Options, Trainer

Say = Callable[[str], None]


def profile(
    target: Target, scripts: Scripts, shape: DrafterShape, options: Options, say: Say
) -> None:
    """Self-checks, then generation and training rates at the options' sizes."""
    cuda = target.device.type == "cuda"
    if cuda:
        say(f"{torch.cuda.get_device_name()}  torch {torch.__version__}")
    check_decoding(target, say)
    check_head_loss(target, say)
    if cuda:
        check_sampling(target, say)
        time_attention(target, options, say)
    trainer = Trainer(target, scripts, shape, options)
    time_play(trainer, say)
    if trainer.weights is None:
        return
    time_training(trainer, say)
    if cuda:
        say(f"memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))


@torch.no_grad()
def check_decoding(target: Target, say: Say, length: int = 200) -> None:
    """Step-by-step decoding against one full forward: logits and features."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, target.shape.vocab, (4, length), generator=g).to(target.device)
    features, hidden = full_forward(target, tokens)
    decoder = Decoder(target, 4, length)
    decoder.tokens.copy_(tokens)
    worst = 0.0
    for t in range(length):
        decoder.position.fill_(t)
        logits = decoder.step()
        worst = max(worst, relative(logits, F.linear(hidden[:, t], target.head)))
    error = relative(decoder.features, features)
    say(f"check decode: logits off by {worst:.2e}, features by {error:.2e} (bf16: about 2e-2)")


def check_head_loss(target: Target, say: Say) -> None:
    """The hand-made gradient of the weighted cross-entropy against autograd in fp32."""
    g = torch.Generator().manual_seed(4)
    c, v = target.shape.hidden, target.shape.vocab
    hidden = torch.randn(64, 7, c, generator=g).to(target.device, target.dtype)
    labels = torch.randint(0, v, (64, 7), generator=g).to(target.device)
    valid = torch.ones(64, 7, device=target.device)
    valid[::3, 4:] = 0
    weight = torch.ones(64, device=target.device)
    hidden.requires_grad_()
    out: HeadLoss = head_loss(hidden, target.head, labels, valid, weight)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    plain = hidden.detach().float().requires_grad_()
    log_q = (
        F.linear(plain, target.head.float()).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    )
    weights = dpace_weights(log_q.detach().exp(), valid)
    loss = -(weights * log_q).sum() / weights.sum()
    (true,) = torch.autograd.grad(loss, plain)
    say(
        f"check head loss: {float(out.loss):.4f} for {float(loss):.4f}, "
        f"gradient off by {relative(grad, true):.2e}"
    )


@torch.no_grad()
def check_sampling(target: Target, say: Say) -> None:
    """Frequencies of the sampling kernel against softmax, and its argmax."""
    from dflash_chat.training import kernels

    device, rows = target.device, 65_536
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0] + [-30.0] * 60, device=device).to(torch.bfloat16)
    many = logits.expand(rows, -1).contiguous()
    at = torch.zeros(1, dtype=torch.int64, device=device)
    hot = torch.full((rows,), 0.7, device=device)
    drawn = kernels.sample(many, hot, at, at + 11)
    share = torch.bincount(drawn.long(), minlength=64)[:4] / rows
    true = (logits.float() / 0.7).softmax(-1)[:4]
    wide = torch.randn(64, target.shape.vocab, device=device, dtype=torch.bfloat16)
    cold = kernels.sample(wide, torch.zeros(64, device=device), at, at)
    chosen = wide.gather(1, cold[:, None].long())[:, 0] == wide.amax(-1)
    say(
        f"check sampling: frequencies off by {float((share - true).abs().max()):.4f} "
        f"(noise 0.002), argmax right {int(chosen.sum())}/64"
    )


@torch.no_grad()
def time_attention(target: Target, options: Options, say: Say) -> None:
    """The decode kernel against torch at half length, for a few launch shapes."""
    from dflash_chat.training import kernels

    shape, device, n, s = target.shape, target.device, options.rows, options.length
    t = s // 2
    cache = (n, shape.kv_heads, s, shape.head_dim)
    k = torch.randn(cache, device=device, dtype=target.dtype)
    v = torch.randn(cache, device=device, dtype=target.dtype)
    qkv = torch.randn(n, shape.qkv, device=device, dtype=target.dtype)
    decoder = Decoder(dataclasses.replace(target, layers=()), 1, s)
    at = torch.full((1,), t, device=device)
    args = (qkv, k, v, decoder.cos, decoder.sin, at)
    h, g, d = shape.heads, shape.kv_heads, shape.head_dim
    out = kernels.decode_attention(*args)
    q = qkv[:16, : h * d].view(16, h, d)
    q = rotate(q, decoder.cos[t], decoder.sin[t]).view(16, g, h // g, d)
    true = F.scaled_dot_product_attention(q, k[:16, :, : t + 1], v[:16, :, : t + 1])
    say(f"check attention: off by {relative(out[:16], true.reshape(16, h * d)):.2e}")
    moved = 2 * n * g * t * d * k.element_size()
    for block, stages, warps in ((64, 3, 4), (64, 3, 2), (64, 4, 4), (128, 2, 4), (128, 3, 4),
                                 (32, 4, 2), (128, 3, 8)):  # fmt: skip

        def call(block: int = block, stages: int = stages, warps: int = warps) -> None:
            kernels.decode_attention(*args, block=block, stages=stages, warps=warps)

        ms = time_ms(call, 20)
        say(f"  attention block {block} stages {stages} warps {warps}: {ms * 1e3:.0f} us, "
            f"{moved / ms / 1e9:.2f} TB/s")  # fmt: skip


def time_ms(call: Callable[[], object], repeats: int) -> float:
    """Mean milliseconds of a call, after two for warm-up."""
    for _ in range(2):
        call()
    _wait()
    began = time.monotonic()
    for _ in range(repeats):
        call()
    _wait()
    return (time.monotonic() - began) * 1e3 / repeats


def time_play(trainer: Trainer, say: Say) -> None:
    """One whole round, with the state of its chats; the graph is captured already."""
    began = time.monotonic()
    trainer.play_round()
    _wait()
    seconds = time.monotonic() - began
    steps = trainer.options.length - 1
    rate = trainer.options.rows * steps / seconds
    kinds = trainer.ring.kinds[: trainer.ring.rows]
    shares = [float((kinds == kind).float().mean()) for kind in range(3)]
    say(
        f"play: {seconds:.2f} s a round, {rate / 1e3:.0f} k tok/s, "
        f"{seconds * 1e3 / steps:.2f} ms a step; "
        f"forced {shares[0]:.2f}, user {shares[1]:.2f}, assistant {shares[2]:.2f}; "
        f"{trainer.fresh} fresh anchors, {trainer.steps_per_round} steps a round"
    )


def time_training(trainer: Trainer, say: Say) -> None:
    """Whole steps of every variant, safest first, then the parts of the chosen one."""
    assert trainer.weights is not None
    forward, flex = trainer.forward, trainer.flex
    trainer.flex, trainer.forward = None, trainer.drafter
    say(f"step, dense eager: {time_ms(lambda: trainer.train_step(0.5), 5):.2f} ms")
    trainer.forward, trainer.flex = forward, flex
    began = time.monotonic()
    trainer.train_step(0.5)
    _wait()
    say(f"first step as chosen (with compilation): {time.monotonic() - began:.1f} s")
    say(f"step as chosen: {time_ms(lambda: trainer.train_step(0.5), 20):.2f} ms")
    batch = trainer.draw_batch()

    fast = trainer.hidden(batch).detach()
    few = slice(0, 4)
    small = dataclasses.replace(
        batch, features=batch.features[few], tokens=batch.tokens[few], anchors=batch.anchors[few]
    )
    trainer.forward, trainer.flex = trainer.drafter, None
    slow = trainer.hidden(small).detach()
    trainer.forward, trainer.flex = forward, flex
    say(f"check drafter: forward as chosen off by {relative(fast[few], slow):.2e} from dense eager")

    def forward_only() -> None:
        trainer.hidden(batch)

    def both() -> None:
        trainer.backward(batch)

    drafts = trainer.shape.block - 1
    n, a = batch.anchors.shape
    rows = torch.randn(
        n * a, drafts, trainer.target.shape.hidden, device=trainer.target.device,
        dtype=trainer.target.dtype, requires_grad=True,
    )  # fmt: skip

    def head_only() -> None:
        head_loss(
            rows, trainer.target.head, batch.labels.flatten(0, 1), batch.valid.flatten(0, 1),
            batch.weight.flatten(),
        )  # fmt: skip

    say(f"  draw batch {time_ms(trainer.draw_batch, 10):.2f} ms")
    say(f"  drafter forward {time_ms(forward_only, 10):.2f} ms")
    say(f"  head loss {time_ms(head_only, 10):.2f} ms")
    say(f"  forward + loss + backward {time_ms(both, 10):.2f} ms")
    say(f"  optimiser {time_ms(lambda: trainer.update(0.5), 10):.2f} ms")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
