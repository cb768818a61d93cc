"""torch's lines, from the report of the probe; and the probe, for every way in which it may end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat.doctor import compute
from dflash_chat.doctor.compute import Found
from dflash_chat.doctor.line import Line, State
from dflash_chat.gpu import Gpu, Survey

CARD = Gpu(0, "GPU-a", "NVIDIA H200", 10**11, 10**11, capability=(9, 0), cuda=(13, 0))
SURVEY = Survey((CARD,), driver="580.95", cuda=(13, 0))
FOUND = Found(
    torch="2.13.0",
    cuda="13.0",
    architectures=["sm_75", "sm_90", "compute_120"],
    uuids=["a"],
    capabilities=[[9, 0]],
    kernels="",
)


def lines(found: Found, survey: Survey = SURVEY) -> dict[str, Line]:
    return {line.check: line for line in compute.lines(found, survey)}


def test_all_is_well() -> None:
    found = lines(FOUND)
    assert {line.state for line in found.values()} == {State.OK}
    assert list(found) == ["torch", "kernels", "attention"]
    assert "our Triton kernels" in found["attention"].text


@pytest.mark.parametrize(
    ("changes", "text", "fix"),
    [
        ({"torch": "", "broken": "ImportError: libc10"}, "libc10", "--force-reinstall"),
        ({"cuda": "", "capabilities": ()}, "build for the CPU", "pytorch.org"),
        ({"cuda": "14.1"}, "built for CUDA 14.1 (the driver speaks up to 13.0)", "update the"),
        ({"capabilities": (), "problem": "unknown error"}, "unknown error", "nvidia-uvm"),
        ({"capabilities": (), "broken": "(SIGSEGV)"}, "(SIGSEGV)", "nvidia-uvm"),
        ({"architectures": ["sm_100"]}, "no code for compute capability 9.0", "it has sm_100"),
    ],
)
def test_a_torch_that_does_not_fit_fails_with_its_fix(
    changes: dict[str, object], text: str, fix: str
) -> None:
    line = lines(replace(FOUND, **changes))["torch"]  # type: ignore[arg-type]
    assert line.state is State.FAIL
    assert text in line.text
    assert fix in line.fix


def test_a_newer_minor_version_of_cuda_runs_on_an_older_driver() -> None:
    assert lines(replace(FOUND, cuda="13.2"))["torch"].state is State.OK


@pytest.mark.parametrize("cuda", ["", "13.0"])
def test_without_a_card_any_torch_will_do(cuda: str) -> None:
    found = lines(Found(torch="2.13.0", cuda=cuda), Survey())
    assert found["torch"].state is State.OK
    assert found["kernels"].state is State.SKIPPED
    assert "scaled_dot_product_attention" in found["attention"].text


def test_without_a_card_a_broken_torch_still_fails() -> None:
    line = lines(Found(torch="2.13.0", broken="it was killed"), Survey())["torch"]
    assert line.state is State.FAIL
    assert line.fix


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ["sm_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((8, 9), ["sm_80"], True),  # a later card of the same major version
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # translated by the driver
        ((12, 0), ["compute_90a"], False),
        ((12, 1), ["sm_120a"], False),
        ((12, 1), ["sm_120"], True),
        ((10, 3), ["sm_100f"], True),
        ((7, 0), ["sm_75", "compute_120"], False),
        ((9, 0), ["gfx942"], False),
        ((9, 0), [], False),
    ],
)
def test_which_cards_a_build_has_code_for(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert compute.runs_on(capability, architectures) is runs


def test_torch_may_rank_unlike_cards_otherwise() -> None:
    other = replace(CARD, index=1, uuid="GPU-b", name="Quadro")
    both = replace(SURVEY, gpus=(CARD, other))
    assert "order" not in lines(replace(FOUND, uuids=["a", "b"]), both)
    line = lines(replace(FOUND, uuids=["GPU-b", "GPU-a"]), both)["order"]
    assert line.state is State.WARN
    assert "Quadro" in line.text
    assert line.fix == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("Triton is not installed", 'pip install "triton'),
        ("the kernels need compute capability 8.0", "none on this card"),
        ("OutOfMemoryError: CUDA out of memory.", "nvidia-smi"),
        ("RuntimeError: what nobody foresaw", "DFLASH_CHAT_LOG=debug"),
    ],
)
def test_kernels_that_do_not_run_are_slower_and_say_what_helps(
    compiler: Callable[..., None], reason: str, fix: str
) -> None:
    compiler(there=True, headers=True)
    found = lines(replace(FOUND, kernels=reason))
    assert found["kernels"].state is State.WARN
    assert reason in found["kernels"].text
    assert fix in found["kernels"].fix
    assert "scaled_dot_product_attention" in found["attention"].text


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with or without a compiler and Python's headers."""

    def put(there: bool, headers: bool) -> None:
        for path in (tmp_path / "gcc", tmp_path / "Python.h"):
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path) if there else "")
        include = tmp_path if headers else tmp_path / "nowhere"
        monkeypatch.setattr(compute, "get_path", lambda name: str(include))

    return put


def test_a_missing_compiler_is_named(compiler: Callable[..., None]) -> None:
    reason = "RuntimeError: Failed to find C compiler."
    compiler(there=False, headers=True)
    assert "C compiler" in lines(replace(FOUND, kernels=reason))["kernels"].fix
    compiler(there=True, headers=False)
    assert "-dev" in lines(replace(FOUND, kernels=reason))["kernels"].fix


def test_a_kernel_that_takes_the_process_with_it_fails() -> None:
    line = lines(replace(FOUND, kernels=None, broken="it crashed (SIGSEGV)"))["kernels"]
    assert line.state is State.FAIL
    assert "SIGSEGV" in line.text


@pytest.mark.parametrize(
    ("flash", "state", "text", "fix"),
    [
        ({}, State.OK, "our Triton kernels; flash-attn is not installed, nor needed", ""),
        ({"flash-attn 2.8.3": ""}, State.OK, "flash-attn 2.8.3 reads long prompts where", ""),
        (
            {"flash-attn-4 4.0": "ImportError: x", "flash-attn 2.8.3": ""},
            State.WARN,
            "flash-attn-4 4.0 cannot be used: ImportError: x; flash-attn 2.8.3 reads long",
            "pip uninstall flash-attn-4; answers are the same",
        ),
        (
            {"flash-attn-4 4.0": None},
            State.FAIL,
            "trying flash-attn-4 4.0 ended the process: it crashed (SIGSEGV)",
            "pip uninstall flash-attn-4; a model would not be loaded, either",
        ),
    ],
    ids=["none", "usable", "one of two is broken", "takes the process with it"],
)
def test_flash_attn_is_told_to_be_used_or_why_it_cannot_be(
    flash: dict[str, str | None], state: State, text: str, fix: str
) -> None:
    broken = "it crashed (SIGSEGV)" if None in flash.values() else ""
    line = lines(replace(FOUND, flash=flash, broken=broken))["attention"]
    assert (line.state, line.fix) == (state, fix)
    assert text in line.text


# ── the probe ───────────────────────────────────────────────────────────────────────────────────

TORCH = """
import os, signal, sys, time
__version__ = "2.13.0"
class version:
    cuda = "13.0"
class cuda:
    @staticmethod
    def init():
        {init}
"""


@pytest.fixture
def torch_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a torch with this source before the real one, for child processes."""

    def write(source: str) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(source)
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        monkeypatch.setenv("PYTHONPATH", path)

    return write


def found(limit_s: float = 60.0) -> Found:
    with compute.probing() as probe:
        return probe.found(limit_s)


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("raise ImportError('libcudart.so.13: no such file')", "ImportError: libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_torch_that_cannot_be_imported(
    torch_that: Callable[[str], None], source: str, broken: str
) -> None:
    torch_that(source)
    report = found()
    assert report.torch == ""
    assert broken in report.broken
    assert lines(report, Survey())["torch"].state is State.FAIL


def test_what_was_found_before_the_end_is_kept(torch_that: Callable[[str], None]) -> None:
    torch_that(TORCH.format(init="print('{}'); os.kill(os.getpid(), signal.SIGABRT)"))
    report = found()
    assert (report.torch, report.cuda) == ("2.13.0", "13.0")
    assert "SIGABRT" in report.broken


def test_torchs_reason_for_having_no_device(torch_that: Callable[[str], None]) -> None:
    torch_that(TORCH.format(init="raise RuntimeError('No CUDA GPUs are available\\nmore')"))
    assert found() == Found("2.13.0", "13.0", problem="No CUDA GPUs are available")


def test_a_torch_that_hangs_is_not_waited_for(torch_that: Callable[[str], None]) -> None:
    torch_that("import time; time.sleep(600)")
    started = time.monotonic()
    assert found(limit_s=0.3).broken == "no answer within 0 seconds"
    assert time.monotonic() - started < 60


def test_a_probe_ends_with_its_block(torch_that: Callable[[str], None]) -> None:
    torch_that("import time; time.sleep(600)")
    with compute.probing() as probe:
        process = probe._process
    assert process is not None
    assert process.returncode == -9


def test_a_probe_that_cannot_be_started_is_a_report() -> None:
    with compute.probing(("/nowhere/python",)) as probe:
        report = probe.found()
    assert "no process can be started" in report.broken
    assert lines(report)["torch"].state is State.FAIL


@pytest.mark.gpu
def test_the_probe_of_the_real_card() -> None:
    import torch

    report = found(limit_s=300)
    assert report.broken == ""
    assert report.torch == torch.__version__
    assert tuple(report.capabilities[0]) == torch.cuda.get_device_capability(0)
    assert report.kernels == ""
    assert None not in report.flash.values()
