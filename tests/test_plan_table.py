"""Contexts that fit cards of 8 to 141 GB, against arithmetic done without this package.

That arithmetic: need = weights by parameter counts + drafter + context · (keys and values of
target and drafter) + rings + 2 · recurrent state + 1.0 GiB for everything else. 53 of the 297
cells differ from ours by more than 3 %. `DIFFERENCES` has the reasons, and nothing else may
differ; in GB:

    reserve      0.3 to 1.2    most for quantised builds, whose prompts are read in full width
    tables       up to 1.8     7 KB a token for Gemma, 3 KB for Qwen3.5, 2 KB for the others
    rings        0.45 and 1.7  Gemma 26B and 31B; 0.03 and less for the others
    second home  0.01 to 0.11
    embeddings   1.0 to 2.5    where the table leaves them in the computer's memory
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from dflash_chat import budget, geometry
from dflash_chat.budget import Demand
from dflash_chat.geometry import Geometry
from dflash_chat.runtime.api import EngineOptions
from tests.published import DRAFTERS, TARGETS

GIB = 2**30
SIZES = (8, 12, 16, 24, 32, 48, 80, 96, 141)
USABLE = (7.65, 11.65, 15.6, 23.5, 31.4, 44.4, 79.1, 94.9, 139.7)  # GiB

# pair; bits of body, embedding (0: in the computer's memory), head, drafter; weights and drafter in
# GiB; context by size of card in 1024 tokens, "max" being all, "-" less than 4
TABLE = """
gemma-4-26b-a4b  16/16/16/16     46.98 .80   -   -   -   -    -    -    max  max max
gemma-4-26b-a4b  8/16/16/16      24.18 .80   -   -   -   -    221  max  max  max max
gemma-4-26b-a4b  4.5/16/16/16    14.20 .80   -   -   -   max  max  max  max  max max
gemma-4-26b-a4b  4.5/8/8/8       13.51 .40   -   -   19  max  max  max  max  max max
gemma-4-26b-a4b  4.5/4.5/4.5/8   13.21 .40   -   -   32  max  max  max  max  max max
gemma-4-31b      16/16/16/16     57.18 2.86  -   -   -   -    -    -    210  max max
gemma-4-31b      8/16/16/16      29.90 2.86  -   -   -   -    -    119  max  max max
gemma-4-31b      4.5/16/16/16    17.97 2.86  -   -   -   10   106  max  max  max max
gemma-4-31b      4.5/8/8/8       16.66 1.43  -   -   -   43   140  max  max  max max
qwen3.6-27b      16/16/16/16     50.10 3.22  -   -   -   -    -    -    max  max max
qwen3.6-27b      8/16/16/16      27.42 3.22  -   -   -   -    -    187  max  max max
qwen3.6-27b      4.125/16/16/16  16.43 3.22  -   -   -   38   157  max  max  max max
qwen3.6-27b      4.125/0/8/8     12.88 1.61  -   -   -   115  234  max  max  max max
qwen3.6-35b-a3b  16/16/16/16     64.56 .81   -   -   -   -    -    -    max  max max
qwen3.6-35b-a3b  8/16/16/16      33.23 .81   -   -   -   -    -    max  max  max max
qwen3.6-35b-a3b  4.5/16/16/16    19.52 .81   -   -   -   93   max  max  max  max max
qwen3.6-35b-a3b  4.125/0/8/8     16.63 .41   -   -   -   247  max  max  max  max max
qwen3.5-9b       16/16/16/16     16.68 1.96  -   -   -   74   229  max  max  max max
qwen3.5-9b       8/16/16/16      10.23 1.96  -   -   45  201  max  max  max  max max
qwen3.5-9b       4.125/16/16/16  7.11  1.96  -   29  107 max  max  max  max  max max
qwen3.5-9b       4.125/0/8/8     4.27  .98   25  104 182 max  max  max  max  max max
qwen3.5-4b       16/16/16/16     7.83  1.01  -   33  111 max  max  max  max  max max
qwen3.5-4b       8/8/8/16        3.92  1.01  32  110 188 max  max  max  max  max max
qwen3.5-4b       4.125/8/8/8     2.31  .50   73  152 230 max  max  max  max  max max
qwen3-8b         16/16/16/16     15.26 1.96  -   -   -   33   max  max  max  max max
qwen3-8b         8/16/16/16      8.79  1.96  -   -   24  max  max  max  max  max max
qwen3-8b         4.125/16/16/16  5.65  1.96  -   18  max max  max  max  max  max max
qwen3-4b         16/16/16/16     7.49  1.01  -   13  38  max  max  max  max  max max
qwen3-4b         8/16/16/16      4.11  1.01  9   34  max max  max  max  max  max max
qwen3-4b         4.125/16/16/16  2.47  1.01  19  max max max  max  max  max  max max
llama-3.1-8b     16/16/16/16     14.96 1.96  -   -   -   38   93   max  max  max max
llama-3.1-8b     4.125/16/16/16  5.31  1.96  -   23  50  105  max  max  max  max max
gpt-oss-20b      4.63/16/16/16   12.80 1.46  -   -   7   max  max  max  max  max max
"""


@dataclass(frozen=True)
class Row:
    name: str
    body: float
    embedding: float
    head: float
    drafter: float
    weights_gib: float
    drafter_gib: float
    contexts: tuple[str, ...]

    @classmethod
    def read(cls, line: str) -> Row:
        name, bits, weights, drafter, *contexts = line.split()
        body, embedding, head, drafted = (float(b) for b in bits.split("/"))
        return cls(
            name, body, embedding, head, drafted, float(weights), float(drafter), tuple(contexts)
        )

    def __str__(self) -> str:
        return f"{self.name} {self.body:g}/{self.embedding:g}/{self.head:g}/{self.drafter:g}"

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(drafter="fp8" if self.drafter == 8 else "bf16")

    @property
    def demand(self) -> Demand:
        """Ours; a table of embeddings is on the card, in 16 bits if nobody stored it in less."""
        target = geometry.target(TARGETS[self.name])
        embedding = (self.embedding or 16) * target.embedding
        held = self.body * target.body + embedding + self.head * target.head
        return budget.demand(
            target, geometry.drafter(DRAFTERS[self.name]), round(held / 8), head_bits=self.head,
            quantised=self.body < 16,
        )  # fmt: skip


ROWS = [Row.read(line) for line in TABLE.strip().splitlines()]


# ── the other arithmetic ────────────────────────────────────────────────────────────────────────


def ring(layers: tuple[Geometry, ...], further: int, most: int = 10**9) -> int:
    """bf16 bytes of all windows with so many slots more, at most `most`."""
    return sum(
        4 * a.kv_heads * a.head_dim * min(most, a.window + further) for a in layers if a.window
    )


def per_token(layers: tuple[Geometry, ...]) -> int:
    return sum(4 * a.kv_heads * a.head_dim for a in layers if not a.window)


def stated_need(row: Row, context: int) -> float:
    """As the table was made, in bytes, from its own figures of weights and drafters."""
    target, drafter = row.demand.target, row.demand.drafter
    fixed = ring(target.attention, 16) + ring(drafter.attention, 0) + 2 * row.demand.state_bytes
    tokens = context * (per_token(target.attention) + per_token(drafter.attention))
    return (row.weights_gib + row.drafter_gib + 1.0) * GIB + fixed + tokens


# ── and how ours differs ────────────────────────────────────────────────────────────────────────

Difference = Callable[[Row, int], float]
DIFFERENCES: dict[str, Difference] = {
    # The runtime keeps every table of embeddings on the card.
    "embeddings": lambda row, _: 2 * row.demand.target.vocab_size * row.demand.target.hidden_size
    * (row.embedding == 0),
    # A ring holds its window and a prompt's chunk of 2048 rows, so that a chunk is one forward.
    "rings": lambda row, n: ring(row.demand.target.attention, 2048, n)
    - ring(row.demand.target.attention, 16)
    + ring(row.demand.drafter.attention, 2048, n + 16)
    - ring(row.demand.drafter.attention, 0),
    # The drafter's k and v lie in qkv and again in the context's projection.
    "second home": lambda row, _: geometry.drafter(DRAFTERS[row.name]).context * row.drafter / 8,
    # Rotary tables, twice, for every position of the context.
    "tables": lambda row, n: row.demand.plan(row.options, n).tables,
    # Measured on a card, or exact, instead of 1 GiB: context and modules 0.8 GB, graphs, logits,
    # the drafter's block in its cache, and what a chunk of a prompt needs while it is read.
    "reserve": lambda row, n: sum(
        getattr(row.demand.plan(row.options, n), part)
        for part in ("cuda_context", "buffers", "graphs", "modules", "workspace")
    )
    - GIB
    + 16 * per_token(row.demand.drafter.attention),
}  # fmt: skip


def explained_need(row: Row, context: int) -> float:
    """The other arithmetic's bytes and all named differences."""
    return stated_need(row, context) + sum(d(row, context) for d in DIFFERENCES.values())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_weights_have_the_stated_size(row: Row) -> None:
    kept = 16 * row.demand.target.vocab_size * row.demand.target.hidden_size / 8
    ours = row.demand.target_bytes - (kept if row.embedding == 0 else 0)
    assert ours / GIB == pytest.approx(row.weights_gib, rel=0.005)
    drafter = geometry.drafter(DRAFTERS[row.name]).parameters * row.drafter / 8
    assert drafter / GIB == pytest.approx(row.drafter_gib, rel=0.015)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_difference_from_the_other_arithmetic_is_named(row: Row) -> None:
    for context in (4096, 32_768, 262_144):
        ours = row.demand.plan(row.options, context).total
        assert ours == pytest.approx(explained_need(row, context), rel=0.004)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_contexts_are_those_of_the_table_but_for_the_named_differences(row: Row) -> None:
    limit = geometry.target(TARGETS[row.name]).context_limit
    for size, usable, cell in zip(SIZES, USABLE, row.contexts, strict=True):
        free = round(usable * GIB)
        ours = row.demand.largest_context(row.options, limit, free - budget.CUDA_CONTEXT)
        stated = {"max": limit, "-": 0}.get(cell) if not cell.isdigit() else int(cell) * 1024
        assert stated is not None
        if abs(ours - stated) <= 0.03 * stated:
            continue
        contexts = range(budget.LEAST, limit + 1, budget.STEP)
        fitting = bisect_right(contexts, free, key=lambda n: explained_need(row, n))
        expected = contexts[fitting - 1] if fitting else 0
        assert ours == pytest.approx(expected, rel=0.03, abs=budget.STEP), f"{size} GB: {cell}K"
