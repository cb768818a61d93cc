"""Every kernel compiles for a card that is smaller than the one its tiles were measured on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

AMPERE, SHARED = 86, 99 * 1024  # an RTX 3090: no type for e4m3, no asynchronous warp groups
KERNELS = {
    "_linear_kernel", "_head_kernel", "_argmax_kernel", "_floor_kernel", "_refine_kernel",
    "_gate_up_kernel", "_down_kernel", "_grouped_kernel", "_attention_kernel", "_merge_kernel",
    "_chunk_attention_kernel", "_qk_rope_write_kernel", "_rope_attention_kernel",
    "_residual_kernel", "_select_kernel",
}  # fmt: skip


@pytest.mark.slow
def test_every_tile_compiles_for_an_rtx_3090_and_fits_its_shared_memory(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.runtime.kernels.compiled", str(AMPERE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split("\t") for line in done.stdout.splitlines()]
    assert {name for name, _, _ in kernels} == KERNELS
    too_large = [line for line in kernels if int(line[2]) > SHARED]
    assert not too_large, f"{too_large}"
