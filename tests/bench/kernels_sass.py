"""What a warp waits for, from a kernel's machine code: no GPU needed.

`python -m tests.bench.kernels_sass [--form int4] [--rows 1 16] [--trace NAME]` compiles the kernels
of a Gemma-4-26B-A4B layer for an H200 and lets instructions go in order: each when the registers it
reads are there, one a cycle and scheduler. A loop's line is one round of one warp, a kernel's own
line all warps of a program from its wait for the previous launch to its end, loops passed once and
both sides of every branch. `--trace` prints the instructions of the kernels of that name that
waited.

Latencies are rounded ones of Hopper, L2's without any traffic: good for telling which of two
orders of the same work waits less, not for a time.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel

from dflash_chat.runtime.kernels import linear, moe, norms, rope_attention, router
from dflash_chat.runtime.kernels.norms import Branch, Router
from tests.runtime.kernels.compiled import bf16, compile_only, stack, weight

H200 = 90, 132  # compute capability, multiprocessors
SCHEDULERS = 4  # of a multiprocessor
NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
WAIT = "ACQBULK"  # for the previous launch
BARRIER, PRODUCT = 25, 4  # cycles for which nothing follows in the warp, and for the tensor core

# Cycles until a result is there, by how an instruction begins; the first that fits.
LATENCIES = (
    ("LDGSTS", 0), ("LDGDEPBAR", 0), ("LDC", 30), ("LDG", 300), ("LDS", 30), ("HMMA", 33),
    ("SHFL", 25), ("REDUX", 25), ("MUFU", 20), ("I2F", 20), ("F2F", 20), ("S2", 20), ("R2UR", 12),
    ("U", 12), ("", 5),
)  # fmt: skip
WITHOUT_RESULT = ("ST", "LDGSTS", "LDGDEPBAR", "BAR", "BRA", "RED.", "DEPBAR", "CCTL", "EXIT")
SEVERAL = {  # registers of an operand, by instruction and place
    ("HMMA", 0): 4, ("HMMA", 1): 4, ("HMMA", 2): 2, ("HMMA", 3): 4,
    ("IMAD.WIDE", 0): 2, ("IMAD.WIDE", 3): 2,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, and the registers it reads and writes."""

    text: str
    name: str
    reads: frozenset[str]
    writes: frozenset[str]

    @property
    def latency(self) -> int:
        """Cycles until what it writes can be read."""
        return next(cycles for start, cycles in LATENCIES if self.name.startswith(start))


def parse(text: str) -> Instruction:
    """An instruction as nvdisasm prints it: an optional predicate, a name, operands."""
    predicate, body = "", text
    if found := re.match(r"@!?(U?P\d)\s+(.*)", text):
        predicate, body = found.groups()
    body = re.sub(r"^@!?U?PT\s+", "", body)
    name, _, rest = body.partition(" ")
    operands = [part.strip() for part in re.split(r",\s*(?![^\[]*\])", rest)] if rest else []
    reads, writes = {predicate} - {""}, set()
    for place, operand in enumerate(operands):
        written = _is_written(name, place, operand)
        for kind, number, pair in re.findall(r"\b(UR|R|UP|P)(\d+)(\.64)?", operand):
            count = _registers(name, place, written, bool(pair)) if kind == "R" else 1
            names = {f"{kind}{int(number) + i}" for i in range(count)}
            (writes if written else reads).update(names)
    return Instruction(text, name, frozenset(reads), frozenset(writes))


def _is_written(name: str, place: int, operand: str) -> bool:
    if name.startswith(WITHOUT_RESULT):
        return False
    if place == 1:  # a carry or a second predicate
        return re.fullmatch(r"U?P\d", operand) is not None and "SEL" not in name
    return place == 0


def _registers(name: str, place: int, written: bool, pair: bool) -> int:
    for (start, where), count in SEVERAL.items():
        if name.startswith(start) and place == where:
            return count
    if name.startswith(("LD", "ST")) and (written or (name.startswith("ST") and place == 1)):
        wide = re.search(r"\.M88\.(\d)|\.(128|64)", name)
        return 1 if wide is None else int(wide[1] or int(wide[2]) // 32)
    return 2 if pair else 1


def disassemble(kernel: CompiledKernel) -> tuple[list[Instruction], list[range]]:
    """The instructions, and the innermost loops among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(NVDISASM), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(parse(found[1]))
    loops = []
    for i, instruction in enumerate(code):
        found = re.search(r"BRA.*`\((\.L\w+)\)", instruction.text)
        if found and labels.get(found[1], i) < i:
            loops.append(range(labels[found[1]], i + 1))
    inner = [a for a in loops if not any(b != a and b[0] in a and b[-1] in a for b in loops)]
    return code, inner


def run(
    code: Sequence[Instruction], warps: int = 1, waited: dict[int, int] | None = None
) -> list[int]:
    """Cycles at which the last warp of one scheduler passes each instruction. waited: gets how long
    the first warp waited, by instruction.
    """
    at, free = [0] * warps, [0] * warps
    ready: list[dict[str, int]] = [{} for _ in range(warps)]
    arrived: dict[int, list[int]] = {}
    passed = [0] * len(code)
    now, tensor_core = 0, 0
    while behind := [w for w in range(warps) if at[w] < len(code)]:
        times = {}
        for w in behind:
            instruction = code[at[w]]
            times[w] = max([free[w], *(ready[w].get(r, 0) for r in instruction.reads)])
            if instruction.name.startswith("HMMA"):
                times[w] = max(times[w], tensor_core)
        w = min(behind, key=lambda w: (max(times[w], now), at[w]))
        instruction, begin = code[at[w]], max(times[w], now)
        if waited is not None and w == 0 and times[0] > free[0]:
            waited[at[0]] = times[0] - free[0]
        for register in instruction.writes:
            ready[w][register] = begin + instruction.latency
        free[w] = begin + 1
        if instruction.name.startswith("HMMA"):
            tensor_core = begin + PRODUCT
        if instruction.name.startswith("BAR"):
            here = arrived.setdefault(at[w], [])
            here.append(w)
            for other in here:
                free[other] = begin + BARRIER if len(here) == warps else 1 << 40
        passed[at[w]] = begin + 1
        at[w] += 1
        now = begin + 1
    return passed


def layer(form: str, rows: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches of a sliding layer of Gemma-4-26B-A4B, by name."""
    experts = "plain" if form == "bf16" else form
    dense = stack(experts, 4224, 2816), stack(experts, 2816, 2112)
    routed = stack(experts, 128, 1408, 2816), stack(experts, 128, 2816, 704)
    qkv, o_proj = weight(form, 8192, 2816), weight(form, 2816, 4096)
    h, keys, table = bf16(rows, 2816), bf16(8, 1152, 256), torch.empty(4096, 128)
    norm, head_norm, length = bf16(2816), bf16(256), torch.zeros(1, dtype=torch.int32)
    made = router.unmade(rows, 128, 8, h.device, moe.at_once(routed[0], rows))
    act = bf16(made.experts.numel(), rows, 704)
    logits, factors = torch.empty(rows, 128), bf16(128)
    choice = moe.Choice(logits, factors) if rows == 1 else None
    yield "qkv", lambda: linear.partials(h, qkv, pdl=True)
    if rope_attention.fits(rows, 16, 8, 256):
        yield (
            "rope and attention",
            lambda: rope_attention.rope_attention(
                torch.empty(4, rows, 8192), head_norm, head_norm, table, table, keys, keys, length,
                eps=1e-6, window=1024, causal=True, scale=1.0, v_norm=True, pdl=True,
            ),
        )  # fmt: skip
    yield "o_proj", lambda: linear.partials(bf16(rows, 4096), o_proj, dtype=h.dtype, pdl=True)
    yield (
        "norms and logits",
        lambda: norms.residual_norms_and_logits(
            h, [Branch(bf16(6, rows, 2816), norm=norm)], [norm] * 2, 1e-6,
            Router(norm, bf16(128, 2816)), pdl=True,
        ),
    )  # fmt: skip
    if rows > 1:
        at_once = moe.at_once(routed[0], rows)
        yield "choice", lambda: router.select(logits, factors, at_once=at_once, pdl=True)
    yield (
        "gate_up",
        lambda: moe.gate_up(h, dense[0], h, routed[0], made, choice=choice, pdl=True),
    )
    yield (
        "down",
        lambda: moe.down(bf16(rows, 2112), dense[1], act, routed[1], made, pdl=True),
    )
    branches = [
        Branch(bf16(3, rows, 2816), norm=norm),
        Branch(bf16(8, rows, 2816), torch.empty(rows, 8), norm),
    ]
    yield (
        "norms",
        lambda: norms.residual_norms(h, branches, [norm], 1e-6, post=norm, scale=bf16(1), pdl=True),
    )


def describe(name: str, kernel: CompiledKernel, trace: bool) -> None:
    """Print a kernel's line, one of each of its loops with products, and what waited."""
    code, loops = disassemble(kernel)
    begin = next((i for i, one in enumerate(code) if one.name == WAIT), 0)
    warps = kernel.metadata.num_warps
    barriers = sum(one.name.startswith("BAR") for one in code[begin:])
    cycles = max(run(code[begin:], max(1, warps // SCHEDULERS)))
    registers = max(int(n) for one in code for n in re.findall(r"\bR(\d+)\b", one.text)) + 1
    print(
        f"{name:20} {kernel.metadata.name:24} {warps:2} warps {registers:3} registers "
        f"{len(code) - begin:5} instructions {barriers:3} barriers {cycles:6} cycles"
    )
    for loop in loops:
        body = code[loop[0] : loop[-1] + 1]
        products = sum(one.name.startswith("HMMA") for one in body)
        if products:
            twice = run(body * 2)
            spent = twice[-1] - twice[len(body) - 1]
            print(f"{'':20} a round: {len(body)} instructions, {products} products, {spent} cycles")
    if trace:
        waited: dict[int, int] = {}
        run(code[begin:], 1, waited)
        for i, spent in waited.items():
            if spent > 15:
                print(f"    {spent:5} {code[begin + i].text}")


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", default="int4", choices=("bf16", "fp8", "int4"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--trace", default="", metavar="NAME")
    wanted = parser.parse_args()
    kernels: list[CompiledKernel] = []
    compile_only(*H200, kernels.append)
    for rows in wanted.rows:
        print(f"# {wanted.form}, {rows} rows, triton {triton.__version__}")
        for name, call in layer(wanted.form, rows):
            kernels.clear()
            call()
            for kernel in kernels:
                describe(name, kernel, name == wanted.trace)


if __name__ == "__main__":
    main()
