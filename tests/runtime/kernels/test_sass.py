"""What a warp waits for, by machine code that can be counted by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.bench import kernels_sass
from tests.bench.kernels_sass import parse, run

CHAIN = ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.16816.F32.BF16 R4, R8, R14, R4"]
APART = ["HMMA.16816.F32.BF16 R4, R8, R12, RZ", "HMMA.16816.F32.BF16 R16, R8, R14, RZ"]


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("IADD3 R2, P1, R4, R5, RZ", "R4 R5", "R2 P1"),
        ("@!P0 LDG.E.128 R4, desc[UR6][R8.64+0x10]", "P0 UR6 R8 R9", "R4 R5 R6 R7"),
        ("STS.64 [R3+UR4], R10", "R3 UR4 R10 R11", ""),
        ("LDSM.16.M88.2 R6, [R20]", "R20", "R6 R7"),
        ("ISETP.NE.AND P2, PT, R1, RZ, PT", "R1", "P2"),
        ("SEL R1, R2, R3, P1", "R2 R3 P1", "R1"),
        ("IMAD.WIDE R4, R2, R3, R6", "R2 R3 R6 R7", "R4 R5"),
    ],
)
def test_what_an_instruction_reads_and_writes(text: str, reads: str, writes: str) -> None:
    found = parse(text)
    assert found.reads == set(reads.split())
    assert found.writes == set(writes.split())


def test_a_product_waits_for_the_sum_that_it_adds_to() -> None:
    assert run([parse(text) for text in CHAIN]) == [1, 34]
    assert run([parse(text) for text in APART]) == [1, 1 + kernels_sass.PRODUCT]


def test_another_warp_goes_on_while_one_waits() -> None:
    waited: dict[int, int] = {}
    code = [parse(text) for text in ("LDG.E R2, [R4]", "IADD3 R6, R2, R2, RZ")]
    assert run(code, 1, waited) == [1, 301]
    assert waited == {1: 299}
    assert run(code, 8)[-1] == 308  # not eight times as long


def test_nobody_passes_a_barrier_before_the_last_has_come() -> None:
    code = [parse(text) for text in ("SHFL.BFLY R2, R2, 1", "IADD3 R3, R2, R2, RZ", "BAR.SYNC 0")]
    both = run([*code, parse("IADD3 R4, R3, R3, RZ")], 2)
    assert both[2] == 29  # the sums are there at 27, then one barrier after the other
    assert both[3] >= both[2] - 1 + kernels_sass.BARRIER
