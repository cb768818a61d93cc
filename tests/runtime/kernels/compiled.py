"""Compile kernels for a card that is not there: python -m tests.runtime.kernels.compiled 86

One line per kernel and configuration: its name, what it is, the bytes of shared memory that a
program takes. Public functions are called with tensors in host memory and nothing is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dflash_chat.runtime.kernels import (
    attention,
    grouped,
    heads,
    linear,
    moe,
    norms,
    prefill,
    rope,
    rope_attention,
    router,
    screen,
    tuned,
)
from dflash_chat.runtime.kernels.expert_weights import MoeWeight
from dflash_chat.runtime.kernels.forms import Fp8, Int4, Int8, Weight, int4_run
from dflash_chat.runtime.kernels.norms import Branch, Router

ROWS = 16
ROOMY = (90, 100)  # compute capabilities with 227 KB of shared memory for a program


class Card:
    """The driver of a card of a given compute capability, as far as compiling asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None is used."""
        return 0


def bf16(*shape: int) -> Tensor:
    """Not filled: nothing reads it."""
    return torch.empty(shape, dtype=torch.bfloat16)


def weight(form: str, n: int, k: int) -> Weight:
    """[n, k]."""
    if form == "bf16":
        return bf16(n, k)
    if form == "fp8":
        return Fp8(torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n))
    if form == "int8":
        return Int8(torch.empty(n, k, dtype=torch.int8), torch.empty(n), torch.empty(n))
    run = int4_run(k)
    return Int4(torch.empty(k // (4 * run), n, run, dtype=torch.int16), bf16(k // 64, n, 2), None)


def stack(form: str, *shape: int) -> MoeWeight:
    """[E, N, K] or [N, K]."""
    if form == "plain":
        return MoeWeight(bf16(*shape))
    if form == "fp8":
        return MoeWeight(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(shape[:-1]))
    *experts, n, k = shape
    run = int4_run(k)
    words = torch.empty(*experts, k // (4 * run), n, run, dtype=torch.int16)
    return MoeWeight(words, bf16(*experts, k // 64, n, 2))


def compile_only(
    capability: int, multiprocessors: int, each: Callable[[CompiledKernel], None]
) -> None:
    """From here on no launch of this process launches: its kernel goes to `each` instead."""
    driver.set_active(Card(capability))
    run = JITFunction.run

    def compiled(
        self: JITFunction, *args: object, grid: object, warmup: bool, **options: object
    ) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        each(kernel)
        return kernel

    JITFunction.run = compiled
    attention.card = lambda device: attention.Card(multiprocessors, capability in ROOMY)
    for module in (grouped, norms, prefill):
        module.card = attention.card


def linears() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile of `tuned`, measured or by rule."""
    tiles = {(kernel, form, config) for (kernel, form, _, _), config in tuned._MEASURED.items()}
    tiles |= {(kernel, form, tuned.Config(*t, 1)) for (kernel, form), t in tuned._TILES.items()}
    tiles.add(("head", "int8", tuned.MANY_BOUNDS))
    for kernel, form, config in sorted(tiles, key=str):
        config = config._replace(splits=1)
        w = weight(form, 2 * config.bn, 4096)
        run: Callable[..., object] = {"linear": linear.partials, "head": heads.argmax}.get(
            kernel, lambda x, w, **options: linear.gated(x, w, "silu", **options)
        )
        for rows in (1, ROWS) if form == "int4" and kernel != "head" else (ROWS,):
            yield (
                f"{kernel} {form} {tuple(config)} {rows}",
                lambda run=run, w=w, config=config, rows=rows: run(
                    bf16(rows, 4096), w, config=config
                ),
            )


def experts() -> Iterator[tuple[str, Callable[[], object]]]:
    """gate_up and down at every number of rows that has a configuration, and prompts."""
    for form in ("plain", "fp8", "int4"):
        dense = stack(form, 4224, 2816), stack(form, 2816, 2112)
        routed = stack(form, 8, 1408, 2816), stack(form, 8, 2816, 704)
        for rows in {*moe.CONFIGS["gate_up", form], *moe.CONFIGS["down", form]}:
            made = router.unmade(rows, 8, 8, torch.device("cpu"), moe.at_once(routed[0], rows))
            h, dense_act = bf16(rows, 2816), bf16(rows, 2112)
            act = bf16(made.experts.numel(), rows, 704)
            choice = moe.Choice(torch.empty(1, 8), bf16(8)) if rows == 1 else None
            yield (
                f"gate_up {form} {rows}",
                lambda h=h, d=dense, r=routed, made=made, c=choice: moe.gate_up(
                    h, d[0], h, r[0], made, choice=c
                ),
            )
            yield (
                f"down {form} {rows}",
                lambda a=dense_act, e=act, d=dense, r=routed, made=made: moe.down(
                    a, d[1], e, r[1], made
                ),
            )
        slots = torch.arange(8).repeat(2048, 1)
        yield (
            f"prompt {form}",
            lambda r=routed, slots=slots: grouped.routed_experts(
                bf16(2048, 2816), slots, torch.empty(2048, 8), *r
            ),
        )


def layers() -> Iterator[tuple[str, Callable[[], object]]]:
    """What stands between the matmuls: head dims in use, and a layer of Gemma 4."""
    length = torch.zeros(1, dtype=torch.int32)
    for heads_, groups, dim, window in (
        (9, 3, 64, 0), (32, 8, 128, 0), (16, 8, 256, 1024), (16, 2, 512, 0),
    ):  # fmt: skip
        keys = bf16(groups, 4096, dim)
        for rows in (1, ROWS):
            q = bf16(rows, heads_, dim)
            yield (
                f"attention {dim} {rows}",
                lambda q=q, keys=keys, w=window: attention.block_attention(
                    q, keys, keys, length, window=w, causal=True, scale=1.0
                ),
            )
        if dim in prefill.CONFIGS:
            q = bf16(2048, heads_, dim)
            yield (
                f"prompt's attention {dim}",
                lambda q=q, keys=keys, w=window: prefill.chunk_attention(
                    q, keys, keys, 0, window=w, scale=1.0
                ),
            )
        tables = torch.empty(64, dim // 2), torch.empty(64, dim // 2)
        parts = torch.empty(4, ROWS, (heads_ + 2 * groups) * dim)
        yield (
            f"rope {dim}",
            lambda p=parts, t=tables, keys=keys, d=dim: rope.qk_rope_write(
                p, bf16(d), bf16(d), *t, keys, keys, length, eps=1e-6
            ),
        )
        for rows in (1, 4):
            if rope_attention.fits(rows, heads_, groups, dim):
                yield (
                    f"rope and attention {dim} {rows}",
                    lambda p=parts[:, :rows], t=tables, keys=keys, d=dim, w=window: (
                        rope_attention.rope_attention(
                            p.contiguous(),
                            bf16(d),
                            bf16(d),
                            *t,
                            keys,
                            keys,
                            length,
                            eps=1e-6,
                            window=w,
                            causal=True,
                            scale=1.0,
                        )
                    ),
                )
    branch, norm = Branch(bf16(8, ROWS, 2816), norm=bf16(2816)), bf16(2816)
    routing = Router(norm, bf16(128, 2816))
    yield "norms", lambda: norms.residual_norms(bf16(ROWS, 2816), [branch] * 2, [norm], 1e-6)
    yield (
        "norms and logits",
        lambda: norms.residual_norms_and_logits(
            bf16(ROWS, 2816), [branch], [norm] * 2, 1e-6, routing
        ),
    )
    yield "select", lambda: router.select(torch.empty(ROWS, 128), norm[:128], at_once=8)
    head = bf16(4096, 2816)
    yield "screen", lambda: screen.argmax(bf16(ROWS, 2816), head, weight("int8", 4096, 2816))


def main() -> None:
    """Print the lines."""
    said = [""]

    def tell(kernel: CompiledKernel) -> None:
        sys.stdout.write(f"{kernel.metadata.name}\t{said[0]}\t{kernel.metadata.shared}\n")

    compile_only(int(sys.argv[1]), 84, tell)
    for family in (linears, experts, layers):
        for name, call in family():
            said[0] = name
            call()


if __name__ == "__main__":
    main()
