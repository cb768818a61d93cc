"""The real step on random weights of published shapes: what each part costs, and of what bound.

The acceptance is dictated by a law, since random weights accept nothing; everything else is what a
chat would run. Bytes are counted from the tensors that a pass must read; experts by the distinct
ones that its rows were really routed to.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from dflash_chat.budget import Budget, shortage
from dflash_chat.errors import DoesNotFitError, UserError
from dflash_chat.runtime import (
    draft_head,
    flash,
    memory,
    models,
    random_weights,
    target_head,
    timing,
)
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.cache import KVCache
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.fused import Experts
from dflash_chat.runtime.kernels import linear
from dflash_chat.runtime.parts import LayerParts
from dflash_chat.runtime.step import Graphs, Step, TargetParts
from dflash_chat.runtime.width import MAX_ROWS

SCRIPT_STEPS = 4096
SELF_CHECK_LIMIT = 0.1  # ten times what rounding to bf16 makes of thirty layers
LOOP_STEPS = 60  # few enough that the context stays what it is called
PROMPT_TOKENS = 8192


Route = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows [T, C] → experts and shares [T, k]


@dataclass(frozen=True)
class Law:
    """How many drafted tokens each step accepts: by a mean length, or the first with chance a1 and
    each further one, if all before it were, with chance r.
    """

    length: float = 0.0
    first: float = 0.0
    ratio: float = 0.0

    def script(self, steps: int = SCRIPT_STEPS, seed: int = 0) -> list[int]:
        """Accepted counts, bonus not included, before a width cuts them off."""
        if self.length:
            mean = self.length - 1
            return [int((i + 1) * mean) - int(i * mean) for i in range(steps)]
        chance = random.Random(seed)
        out = []
        for _ in range(steps):
            n = 0
            while n < 16 and chance.random() < (self.ratio if n else self.first):
                n += 1
            out.append(n)
        return out


@dataclass(frozen=True)
class Subject:
    """A pair of random weights on the device, its step and graphs."""

    target: Any
    drafter: Drafter
    cache: KVCache
    step: Step


def build(
    name: str, quant: str, context: int, device: torch.device, options: EngineOptions
) -> Subject:
    """Random weights of a published pair, with room for `context` tokens and the runs behind.

    Of the options, `drafter`, `head` and those of the draft head count.
    """
    shapes = random_weights.shapes(name)
    module = models.find(str(shapes.target["model_type"]))
    config = module.Config.from_hf(shapes.target)
    capacity, dtype = _capacity(context), torch.bfloat16
    made = random_weights.RandomWeights(config.tensor_shapes(), quant, device, dtype)
    target = module.Target(config, made, capacity, dtype, device)
    target_head.settle(target, options, device, dtype)
    drafter_config = DrafterConfig.from_raw(shapes.drafter)
    drafter_shapes = drafter_config.tensor_shapes(config.hidden_size)
    drafter_quant = "fp8" if options.drafter == "fp8" else "bf16"
    drafted = random_weights.RandomWeights(drafter_shapes, drafter_quant, device, dtype, seed=1)
    head = draft_head.of(
        target.lm_head, options, (), device, dtype, drafter_config.softcap, target.screen
    )
    drafter = Drafter(drafter_config, drafted, target.embed, head, capacity, dtype, device)
    cache = target.new_cache(capacity)
    for tensors in (cache.keys, cache.values, drafter.cache.keys, drafter.cache.values):
        for tensor in tensors:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)  # longer keys would blow up rounding
    parts = TargetParts.of(target)
    step = Step(parts, cache, drafter, drafter_config.target_layer_ids)
    return Subject(target, drafter, cache, step)


def _capacity(context: int) -> int:
    return max(context, PROMPT_TOKENS) + 1024


def planned(
    name: str, quant: str, context: int, widths: Sequence[int], options: EngineOptions
) -> Budget:
    """What `build` and the runs behind it should take, from shapes alone."""
    shapes = random_weights.shapes(name)
    config = models.find(str(shapes.target["model_type"])).Config.from_hf(shapes.target)
    drafter = DrafterConfig.from_raw(shapes.drafter)
    outline = partial(random_weights.RandomWeights, device=memory.META, dtype=torch.bfloat16)
    pair = memory.Pair.of(
        config, outline(config.tensor_shapes(), quant), drafter,
        outline(drafter.tensor_shapes(config.hidden_size), "bf16"), torch.bfloat16, max(widths) - 1,
    )  # fmt: skip
    return pair.plan(options, _capacity(context))


def memory_use(plan: Budget, outside_start: int) -> dict[str, int]:
    """The plan's bytes and those the device had in use at most: the most that torch had reserved,
    and what is in use beside that now. That other processes' counts asks for an idle GPU.
    """
    free, total = torch.cuda.mem_get_info()
    reserved, outside = torch.cuda.max_memory_reserved(), total - free
    outside -= torch.cuda.memory_reserved()
    return {
        **asdict(plan), "predicted": plan.total, "peak": reserved + outside, "reserved": reserved,
        "outside_start": outside_start, "outside_end": outside,
    }  # fmt: skip


def self_check(subject: Subject, context: int, n: int = 8) -> dict[str, float]:
    """Relative difference of the fused forward from the architecture's own, which is given so many
    rows more that it multiplies by other kernels.

    Both are told where to send their rows: rounding would choose other experts at near-ties.
    """
    step = subject.step
    _place(subject, context)
    ids = torch.randint(1000, 100_000, (n + linear.MAX_ROWS,), device=step.state.ids.device)
    step.state.ids[:n] = ids[:n]
    route_at_random(subject)
    fused_hidden = step.forward(n).float()
    fused_features = step.features[:n].float().clone()
    subject.cache.length = context
    with _plain_routed_alike(subject):
        plain, features = subject.target.forward(ids, subject.cache, step.taps)
    subject.cache.commit(0)
    out = {"hidden": _relative(fused_hidden, plain[:n].float())}
    taps = len(step.taps)
    ours, theirs = fused_features.chunk(taps, -1), features[:n].float().chunk(taps, -1)
    for layer, a, b in zip(step.taps, ours, theirs, strict=True):
        out[f"tap{layer}"] = _relative(a, b)
    return out


@contextmanager
def _plain_routed_alike(subject: Subject) -> Iterator[None]:
    """The plain layers' routers choose what the fused ones are told to."""

    def alike(experts: Experts) -> Route:
        told, m = experts.dictated, experts.moe
        assert told is not None

        def route(r: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.arange(len(r), device=r.device) % len(told)
            logits = told[rows].float() @ m.proj.float().T
            shares, chosen = logits.softmax(-1).topk(m.top_k)
            shares = shares / shares.sum(-1, keepdim=True) * m.per_expert_scale[chosen]
            return chosen, shares

        return route

    fused = [layer.experts for layer in subject.step.stack.layers if layer.experts is not None]
    with _rerouted(subject.target, [alike(experts) for experts in fused]):
        yield


@contextmanager
def _rerouted(target: Any, routes: Sequence[Route]) -> Iterator[None]:  # noqa: ANN401
    """`routes` stand for the routers of the layers with experts, in order."""
    routed = _routed(target)
    own = [experts.router for experts in routed]
    try:
        for experts, route in zip(routed, routes, strict=True):
            experts.router = route
        yield
    finally:
        for experts, router in zip(routed, own, strict=True):
            experts.router = router


def _routed(target: Any) -> list[Any]:  # noqa: ANN401
    """The experts of the layers that have some."""
    return [layer.experts for layer in target.layers if getattr(layer, "experts", None)]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _place(subject: Subject, context: int) -> None:
    """As if `context` tokens were committed, the last one of them alone in the last step."""
    state = subject.step.state
    state.length.fill_(context)
    state.start.fill_(context - 1)
    state.committed.fill_(1)
    state.step.zero_()


def run(
    name: str, quant: str, context: int, widths: Sequence[int], laws: dict[str, tuple[Law, int]],
    options: EngineOptions, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure everything once. `laws` maps a label to a law and the width it is run at.

    Raises DoesNotFitError if the device's free memory will not suffice.
    """
    device = torch.device("cuda")
    with torch.inference_mode():
        plan, free = planned(name, quant, context, widths, options), memory.available()
        outside = torch.cuda.mem_get_info()[1] - free
        if plan.needed > free:
            raise DoesNotFitError(
                shortage(f"{name} in {quant}", plan.needed, free),
                "try --quant int4, or a smaller --context",
            )
        bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()  # the copy is no part of the step
        torch.cuda.reset_peak_memory_stats()
        say(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
        subject = build(name, quant, context, device, options)
        step = subject.step
        free, total = torch.cuda.mem_get_info()
        say(f"{name} {quant}, head {options.head}: {(total - free) / 1e9:.1f} GB in use")
        check = self_check(subject, context)
        say("self-check " + " ".join(f"{k} {v:.2e}" for k, v in check.items()))
        if max(check.values()) > SELF_CHECK_LIMIT:
            raise UserError("the kernels' step differs from plain torch's: nothing was measured")
        filled = prefill(subject)
        say(
            f"prefill {filled['ms']:7.3f} ms  {PROMPT_TOKENS} tokens  {filled['tok_s']:.0f} tok/s"
            f"  {filled['tflop_s']:.0f} TFLOP/s of active parameters"
            + (f"  {filled['experts']:.1f} experts a chunk" if filled["experts"] else "")
            + f"  {flash.words(subject.cache, subject.target.config.num_attention_heads)}"
        )
        route_at_random(subject)
        vocab = step.target.table.shape[0]
        step.state.ids.random_(1000, vocab)
        step.state.block[:1].random_(1000, vocab)
        graphs = Graphs()
        step.script = torch.zeros(SCRIPT_STEPS, dtype=torch.int32, device=device)
        report: dict[str, Any] = {
            "copy_tb_s": bandwidth / 1e12, "check": check, "prefill": filled, "verify": {}
        }  # fmt: skip
        _place(subject, context)

        def draft() -> None:
            """Random weights draft one token over and over, which would route like one."""
            step.draft()
            step.state.ids[1:].random_(1000, vocab)

        graphs.capture("draft", draft)
        for n in widths:
            _place(subject, context)
            graphs.capture(f"verify {n}", lambda n=n: step.verify(n))  # type: ignore[misc]
        for n in widths:
            experts = distinct_experts(subject, context, n)
            size = verify_bytes(subject, context, n, experts)
            step.state.ids.random_(1000, vocab)
            _place(subject, context)
            ms = replay_ms(lambda n=n: graphs.replay(f"verify {n}"))  # type: ignore[misc]
            bound = size / bandwidth * 1e3
            report["verify"][n] = {
                "ms": ms,
                "gb": size / 1e9,
                "bound_ms": bound,
                "experts": experts,
            }
            say(
                f"verify {n:2d}  {ms:7.3f} ms  {size / 1e9:6.2f} GB  {bound / ms:5.1%} of bound"
                + (f"  {experts:.1f} experts" if experts else "")
                + (f"  {1e3 / ms:6.1f} tok/s plain" if n == 1 else "")
            )
        size = draft_bytes(subject, context)
        _place(subject, context)
        ms = replay_ms(lambda: graphs.replay("draft"))
        report["draft"] = {"ms": ms, "gb": size / 1e9}
        share = size / bandwidth * 1e3 / ms
        say(f"draft      {ms:7.3f} ms  {size / 1e9:6.2f} GB  {share:5.1%} of bound")
        for label, (law, n) in laws.items():
            step.script.copy_(torch.tensor(law.script(), dtype=torch.int32))
            _place(subject, context)
            steps = LOOP_STEPS
            wall, committed = loop(step, graphs, n, steps)
            busy = report["draft"]["ms"] + report["verify"][n]["ms"]
            gap = wall * 1e3 / steps - busy
            report[label] = {
                "tok_s": committed / wall,
                "step_ms": wall * 1e3 / steps,
                "gap_ms": gap,
            }
            say(
                f"{label}: n={n} {committed / steps:.2f} a step, {wall * 1e3 / steps:.3f} ms, "
                f"{committed / wall:.1f} tok/s, gap {gap:.3f} ms"
            )
        report["memory"] = used = memory_use(plan, outside)
        predicted, peak = used["predicted"], used["peak"]
        say(
            f"memory: predicted {predicted / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB "
            f"({peak / predicted:.1%})"
        )
    return report


def prefill(subject: Subject) -> dict[str, float]:
    """A prompt of random ids as the engine reads it: chunks through the target, their features into
    the drafter's context, logits of the last row. The quickest of three.
    """
    target, cache, drafter = subject.target, subject.cache, subject.drafter
    vocab = target.embed_tokens.shape[0]
    ids = torch.randint(1000, vocab, (PROMPT_TOKENS,), device=target.device)
    chunks = torch.split(ids, cache.largest_block)

    def forward(chunk: Tensor) -> Tensor:
        hidden, features = target.forward(chunk, cache, subject.step.taps)
        cache.commit(len(chunk))
        drafter.observe(features)
        drafter.flush()
        return cast(Tensor, hidden[-1:])

    def read() -> float:
        cache.truncate(0)
        drafter.truncate(0)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for chunk in chunks:
            last = forward(chunk)
        target.logits(last).argmax().item()
        return time.perf_counter() - started

    read()  # compiles
    seconds = min(read() for _ in range(3))
    cache.truncate(0)
    drafter.truncate(0)
    with recorded_routes(target) as routes:
        forward(chunks[0])
    distinct = [torch.unique(chosen).numel() for chosen in routes]
    return {
        "tokens": PROMPT_TOKENS,
        "ms": seconds * 1e3,
        "tok_s": PROMPT_TOKENS / seconds,
        "tflop_s": 2 * PROMPT_TOKENS * active_parameters(subject) / seconds / 1e12,
        "experts": sum(distinct) / len(distinct) if distinct else 0.0,
    }


@contextmanager
def recorded_routes(target: Any) -> Iterator[list[Tensor]]:  # noqa: ANN401
    """What every router chose, layer after layer: int64 [T, k] each."""
    chosen: list[Tensor] = []

    def recording(router: Route) -> Route:
        def route(r: Tensor) -> tuple[Tensor, Tensor]:
            slots, shares = router(r)
            chosen.append(slots)
            return slots, shares

        return route

    with _rerouted(target, [recording(experts.router) for experts in _routed(target)]):
        yield chosen


def active_parameters(subject: Subject) -> int:
    """Numbers that one row of a prompt is multiplied by: the target's layers, fc and context_kv."""
    total = 0
    for parts in subject.step.target.layers:
        a = parts.attention
        held = [a.qkv, a.o_proj, parts.gate_up, parts.down]
        total += sum(math.prod(weight.shape) for weight in held)
        if parts.moe is not None:
            stacks = (parts.moe.gate_up, parts.moe.down)
            total += sum(math.prod(stack.shape[1:]) for stack in stacks) * parts.moe.top_k
    drafter = subject.drafter
    return total + sum(math.prod(weight.shape) for weight in (drafter.fc, drafter.context_kv))


def loop(step: Step, graphs: Graphs, n: int, steps: int) -> tuple[float, int]:
    """Seconds and committed tokens of `steps` draft-and-verify steps, read one step late."""
    slots = [torch.zeros_like(step.record, device="cpu").pin_memory() for _ in range(2)]
    events = [timing.event() for _ in slots]

    def launch(i: int) -> None:
        graphs.replay("draft")
        graphs.replay(f"verify {n}")
        slots[i % 2].copy_(step.record, non_blocking=True)
        events[i % 2].record()

    launch(0)
    torch.cuda.synchronize()
    committed = 0
    started = time.perf_counter()
    launch(1)
    for i in range(1, steps + 1):
        if i < steps:
            launch(i + 1)
        events[i % 2].synchronize()
        committed += 1 + int(slots[i % 2][0])
    return time.perf_counter() - started, committed


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second of a large device copy, read and written bytes counted."""
    source = torch.randn(int(gigabytes * 1e9) // 4, device="cuda")
    target = torch.empty_like(source)
    ms = replay_ms(lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / ms * 1e3


def replay_ms(replay: Callable[[], object], repeats: int = 30) -> float:
    """Median milliseconds of one replay among many in a queue."""
    for _ in range(3):
        replay()
    marks = [timing.event() for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)))


def route_at_random(subject: Subject) -> None:
    """Every row of every layer to experts of its own: random weights would route rows alike."""
    for layer in subject.step.stack.layers:
        if layer.experts is not None:
            width = layer.experts.moe.proj.shape[1]
            noise = torch.randn(MAX_ROWS, width, device=layer.experts.moe.proj.device)
            layer.experts.dictated = noise.to(layer.experts.moe.proj.dtype)


def distinct_experts(subject: Subject, context: int, n: int) -> float:
    """Mean number of experts per layer that n random rows touch; 0 without experts."""
    _place(subject, context)
    subject.step.forward(n)
    layers = [layer.experts for layer in subject.step.stack.layers]
    seen = [experts.active for experts in layers if experts is not None]
    return float(torch.cat(seen).float().mean()) if seen else 0.0


def _layer_bytes(parts: LayerParts, experts: float) -> float:
    a = parts.attention
    total = float(sum(p.nbytes for p in (a.qkv, a.o_proj, parts.gate_up, parts.down)))
    if parts.moe is not None:
        stacks = parts.moe.gate_up.nbytes + parts.moe.down.nbytes
        total += parts.moe.proj.nbytes + stacks * experts / parts.moe.gate_up.shape[0]
    return total


def _cache_bytes(cache: KVCache, context: int) -> float:
    return float(sum(
        2 * 2 * g.kv_heads * g.head_dim * (min(context, g.window) if g.window else context)
        for g in cache.geometries
    ))  # fmt: skip


def verify_bytes(subject: Subject, context: int, n: int, experts: float) -> float:
    """Bytes a verify of n rows must read: weights once, routed experts once, the cache once; of a
    screened head the copy, beside which the candidates' rows are few.
    """
    target = subject.step.target
    layers = sum(_layer_bytes(parts, experts) for parts in target.layers)
    head = target.head if target.screen is None else target.screen
    return layers + head.nbytes + _cache_bytes(subject.cache, context)


def draft_bytes(subject: Subject, context: int) -> float:
    """Bytes a draft must read: the drafter, its head and its cache once."""
    drafter, head = subject.drafter, subject.drafter.head
    lent = 0 if head.copied else head.weight.nbytes  # a copy is among the drafter's own
    return drafter.nbytes + lent + _cache_bytes(drafter.cache, context)
