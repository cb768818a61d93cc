"""An installed pair becomes an engine: options → files → what fits → weights, caches, graphs.

What can be refused is refused before the first weight is read. Knows files, devices and memory;
knows neither chats nor text beyond the tokenizer it hands on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from dflash_chat import __version__
from dflash_chat.budget import OUTSIDE, TargetShape
from dflash_chat.errors import CheckpointError, DoesNotFitError, UsageError
from dflash_chat.hub import Installed
from dflash_chat.runtime import (
    draft_head,
    fitting,
    flash,
    kernels,
    memory,
    models,
    target_head,
    text,
    weights,
)
from dflash_chat.runtime.api import DEFAULT_CONTEXT, EngineOptions, ModelInfo, Progress
from dflash_chat.runtime.drafter import Config as DrafterConfig
from dflash_chat.runtime.drafter import Drafter
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.quant import Packed, cpu
from dflash_chat.runtime.quant.float_quantized import rounded
from dflash_chat.runtime.weights import Checkpoint, Shape
from dflash_chat.speed import Survival

if TYPE_CHECKING:
    from dflash_chat.runtime.graphed import GraphedSteps  # needs Triton

log = logging.getLogger(__name__)

ReportProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Loaded:
    """A pair in memory. `what_fits`: the hint, should memory run out. `keep` takes what a bench has
    found, for the next plan, and says whether it is kept.
    """

    engine: Engine
    tokenizer: text.Tokenizer
    info: ModelInfo
    what_fits: str
    keep: Callable[[Survival], bool]


def load(installed: Installed, options: EngineOptions, progress: ReportProgress) -> Loaded:
    """Load an installed pair.

    Raises CheckpointError for broken or mismatching files, UsageError for impossible options
    and DoesNotFitError when the device has too little memory, as far as possible beforehand.
    """
    started = time.perf_counter()
    device, dtype = _placement(options)
    target_head.refuse_screening(options, device, dtype)
    card, named = fitting.card_of(device), options.context_tokens
    options = fitting.planned(installed, options, card, dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every context length
    if options.threads:
        refuse_more_than_cores(options.threads)
        torch.set_num_threads(options.threads)
    progress(Progress("reading the target", 0, 0))
    with torch.inference_mode(), _opened(installed, options, device) as opened:
        what_fits = ""
        if device.type == "cuda":
            title = installed.pair.title
            opened, what_fits = _with_room(opened, title, options, dtype, named)
        try:
            engine = _build(opened, options, device, dtype, progress)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            raise DoesNotFitError(
                f"the GPU's memory ran out while {installed.pair.title} was loaded", what_fits
            ) from error
        fitting.measure(installed, engine, options, card)
    took = time.perf_counter() - started
    info = _info(installed, options, engine, opened, device, dtype, took)
    keep = partial(fitting.keep_survival, installed, engine)
    return Loaded(engine, opened.tokenizer, info, what_fits, keep)


def refuse_more_than_cores(threads: int) -> None:
    """Threads that share a core wait for each other in every small operator: seconds a token."""
    cores = os.cpu_count() or threads
    if threads > cores:
        raise UsageError(
            f"this machine has {cores} cores for {threads} threads", f"at most -o threads={cores}"
        )


def _placement(options: EngineOptions) -> tuple[torch.device, torch.dtype]:
    """Device and activation dtype; never guessed silently beyond what "auto" promises."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device", "use -o device=cpu, or check the driver")
    wide = options.dtype == "fp32" or (options.dtype == "auto" and not _fast_bf16(name))
    return torch.device(name), torch.float32 if wide else torch.bfloat16


def _fast_bf16(device: str) -> bool:
    """Whether bf16 activations are the fast choice: the packed CPU matmuls need AVX2 or AVX-512."""
    return device == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX")


@dataclass(frozen=True)
class _Opened:
    """A pair's files, read as far as it takes to know what they hold."""

    target: Checkpoint
    drafter: Checkpoint
    architecture: ModuleType
    config: Any  # of the architecture
    drafter_config: DrafterConfig
    tokenizer: text.Tokenizer
    capacity: int
    draft_tokens: int

    @property
    def for_target(self) -> tuple[Checkpoint, Mapping[str, Shape], tuple[str, ...]]:
        return self.target, self.config.tensor_shapes(), self.architecture.IGNORED

    @property
    def for_drafter(self) -> tuple[Checkpoint, Mapping[str, Shape]]:
        return self.drafter, self.drafter_config.tensor_shapes(self.config.hidden_size)


@contextmanager
def _opened(
    installed: Installed, options: EngineOptions, device: torch.device
) -> Iterator[_Opened]:
    with ExitStack() as files:
        target, drafter = (
            files.enter_context(closing(weights.open_checkpoint(path)))
            for path in (installed.target, installed.drafter)
        )
        architecture = models.find(str(target.config.get("model_type", "")))
        config = architecture.Config.from_hf(target.config)
        drafter_config = DrafterConfig.from_file(installed.drafter / "config.json")
        _check_match(drafter_config, config)
        yield _Opened(
            target, drafter, architecture, config, drafter_config,
            text.Tokenizer.from_checkpoint(installed.target),
            _capacity(options, config.max_position_embeddings),
            _draft_tokens(installed, options, drafter_config, device),
        )  # fmt: skip


def _with_room(
    opened: _Opened, title: str, options: EngineOptions, dtype: torch.dtype, named: int
) -> tuple[_Opened, str]:
    """Refuse what cannot fit, and cut a context that nobody named to what does; with what to try if
    it does not fit all the same.
    """
    pair = memory.Pair.of(
        opened.config, weights.outlines(*opened.for_target), opened.drafter_config,
        weights.outlines(*opened.for_drafter), dtype, opened.draft_tokens,
        opened.tokenizer.added_ids,
    )  # fmt: skip
    free = memory.available()
    capacity = opened.capacity if named else pair.room(options, opened.capacity, free)
    log.info("memory: %s, %.2f GB are free", pair.plan(options, capacity), free / 1e9)
    pair.check(title, options, capacity, free)
    return replace(opened, capacity=capacity), pair.what_fits(options, capacity // 2, free)


def _build(
    opened: _Opened,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress,
) -> Engine:
    """What stays comes first, in the order of `budget.Budget`; what comes and goes is run last."""
    config, drafter_config, capacity = opened.config, opened.drafter_config, opened.capacity
    packed = weights.load_packed(*opened.for_target)
    target = opened.architecture.Target(config, packed, capacity, dtype, device)
    target_head.settle(target, options, device, dtype)
    progress(Progress("reading the drafter", 0, 0))
    packed = weights.load_packed(*opened.for_drafter)
    if options.drafter == "fp8":
        packed = {name: _in_fp8(weight) for name, weight in packed.items()}
    added, cap = opened.tokenizer.added_ids, drafter_config.softcap
    head = draft_head.of(target.lm_head, options, added, device, dtype, cap, target.screen)
    drafter = Drafter(drafter_config, packed, target.embed, head, capacity, dtype, device)
    if _drafts_in_int8(options, device, dtype):
        drafter.round_block(cpu.Int8Copy.of)
    engine = Engine(
        target,
        target.new_cache(capacity),
        drafter,
        drafter_config.target_layer_ids,
        opened.draft_tokens,
        frozenset(opened.tokenizer.stop_ids),
        options.lookup == "on",
    )
    if device.type == "cuda":
        progress(Progress("capturing CUDA graphs", 0, 0))
        engine.graphed, engine.eager_because = _graphs(engine)
    progress(Progress("warming up", 0, 0))
    engine.warm_up()
    return engine


def _graphs(engine: Engine) -> tuple[GraphedSteps | None, str]:
    """The engine's steps as CUDA graphs, or why there are none."""
    if engine.cache.dtype != torch.bfloat16:
        return None, "the kernels compute in bf16"
    if why := kernels.missing(engine.cache.device):
        return None, why
    from dflash_chat.runtime import graphed

    try:
        return graphed.captured(engine), ""
    except Exception as error:  # of a compiler or a driver: the eager path is right, only slower
        if memory.ran_out(error):
            raise
        log.exception("CUDA graphs could not be captured")
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]


def _drafts_in_int8(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether nobody chose the drafter's format, and a CPU multiplies quicker in int8."""
    return options.drafter == "auto" and device.type == "cpu" and cpu.int8_serves(dtype)


def _in_fp8(weight: Packed) -> Packed:
    """A matrix rounded; a norm's scale as it is."""
    return rounded(weight.dequantize()) if len(weight.shape) > 1 else weight


def _capacity(options: EngineOptions, limit: int) -> int:
    if options.context_tokens > limit:
        raise UsageError(
            f"ctx {options.context_tokens} is more than the target's {limit} positions"
        )
    return options.context_tokens or min(limit, DEFAULT_CONTEXT)


def _check_match(drafter: DrafterConfig, target: TargetShape) -> None:
    """A drafter serves one target only; refuse what cannot be its own."""
    for what, wants, has in (
        ("hidden_size", drafter.hidden_size, target.hidden_size),
        ("num_target_layers", drafter.num_target_layers, target.num_hidden_layers),
        ("vocab_size", drafter.vocab_size, target.vocab_size),
    ):
        if wants is not None and wants != has:
            raise CheckpointError(
                f"the drafter was made for another target: {what} {wants}, this one has {has}"
            )


def _draft_tokens(
    installed: Installed, options: EngineOptions, config: DrafterConfig, device: torch.device
) -> int:
    most = config.block_size - 1
    if options.draft_tokens > most:
        raise UsageError(
            f"k {options.draft_tokens} is more than this drafter proposes", f"at most {most}"
        )
    of_pair = installed.pair.drafter
    default = of_pair.draft_tokens
    if device.type == "cpu" and of_pair.cpu_draft_tokens:
        default = of_pair.cpu_draft_tokens
    return options.draft_tokens or min(default, most)


def _rounded_words(options: EngineOptions, drafter: Drafter, screened: bool) -> list[str]:
    """What the options made coarser than the files are, or read a coarser copy of."""
    words = ["fp8 target head"] if options.head == "fp8" else []
    if options.head == "screened":  # which takes graphs, and a dense head
        words.append("screened head" if screened else "head not screened")
    words += ["fp8 drafter"] if options.drafter == "fp8" else []
    words += ["int8 drafter"] if drafter.layers[0].gate_up.kernel == "int8" else []
    head = drafter.head
    if options.copies_head:
        kind = "fp8 draft head" if options.draft_head == "fp8" else "draft head"
        words.append(f"{kind} of {head.weight.shape[0]} rows")
    elif head.copied:
        words.append(f"{head.weight.kernel} draft head of {head.weight.shape[0]} rows")
    return words


def _info(
    installed: Installed,
    options: EngineOptions,
    engine: Engine,
    opened: _Opened,
    device: torch.device,
    dtype: torch.dtype,
    load_s: float,
) -> ModelInfo:
    drafter = engine.drafter
    assert isinstance(drafter, Drafter)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    screened = engine.graphed is not None and engine.graphed.step.screen is not None
    cache_bytes = engine.cache.nbytes + drafter.cache.nbytes
    other_bytes = 0
    if device.type == "cuda":
        ours = engine.target.nbytes + drafter.nbytes + cache_bytes
        other_bytes = max(0, torch.cuda.memory_reserved(device) - ours) + OUTSIDE
    plain = engine.plain
    heads = opened.config.num_attention_heads
    computing = [_kernels(engine), flash.words(engine.cache, heads)]
    computing += _rounded_words(options, drafter, screened)
    return ModelInfo(
        pair=installed.pair.name,
        target=f"{installed.pair.title} ({installed.build.source})",
        drafter=installed.drafter.name,
        device=name,
        dtype="fp32" if dtype == torch.float32 else "bf16",
        kernels=", ".join(filter(None, computing)),
        context_tokens=engine.cache.capacity,
        block_size=opened.drafter_config.block_size,
        draft_tokens=engine.draft_tokens,
        target_bytes=engine.target.nbytes,
        drafter_bytes=drafter.nbytes,
        cache_bytes=cache_bytes,
        load_s=load_s,
        versions={
            "dflash-chat": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        other_bytes=other_bytes,
        plain_ms=plain.ms if plain is not None else 0.0,
        plain_context=plain.context_tokens if plain is not None else 0,
    )


def _kernels(engine: Engine) -> str:
    """What computes, in words."""
    if engine.graphed is not None:
        return "CUDA graphs of own kernels"
    because = f", eager: {engine.eager_because}" if engine.eager_because else ""
    return engine.target.kernels + because
