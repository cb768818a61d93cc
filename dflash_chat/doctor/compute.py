"""torch, Triton and attention, looked at in a process of their own (`dflash_chat.runtime.probe`).

A torch that hangs, crashes or cannot be imported becomes a line like any other.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from sysconfig import get_path
from typing import Any

from dflash_chat.doctor import cards, machine
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.gpu import Survey
from dflash_chat.runtime.client import exit_reason
from dflash_chat.runtime.probe import MARK

PROBE = (sys.executable, "-m", "dflash_chat.runtime.probe")
LIMIT_S = 120.0  # a first start compiles, perhaps on a busy machine
log = logging.getLogger(__name__)

_BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Found:
    """What the probe reported; `broken` is why it ended before it was through, "" if it was not.

    `torch` "" means that not even the import was survived; `kernels` None that they were not tried,
    "" that they run, else why they do not; `flash` the same of every flash-attn that is installed,
    by name and version. `problem` is torch's own reason for having no device.
    """

    torch: str = ""
    cuda: str = ""
    problem: str = ""
    architectures: Sequence[str] = ()
    uuids: Sequence[str] = ()
    capabilities: Sequence[Sequence[int]] = ()
    kernels: str | None = None
    flash: Mapping[str, str | None] = field(default_factory=dict)
    broken: str = ""


class Probe:
    """The running process; `found` waits for it."""

    def __init__(self, command: Sequence[str] = PROBE) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._broken = ""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a compiler that it started ends with it
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._broken = f"no process can be started: {error}"

    def found(self, limit_s: float = LIMIT_S) -> Found:
        """Everything it could report within `limit_s` seconds."""
        if self._process is None:
            return Found(broken=self._broken)
        broken = ""
        try:
            out, errors = self._process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._kill()
            out, errors = self._process.communicate()
            broken = f"no answer within {limit_s:.0f} seconds"
        log.debug("the probe's stderr: %s", errors)
        facts: dict[str, Any] = {}
        for line in out.splitlines():
            if line.startswith(MARK):  # others may print, too
                facts |= json.loads(line.removeprefix(MARK))
        if not broken and (code := self._process.returncode):
            last = next(reversed(errors.strip().splitlines()), "")
            broken = last if code > 0 and last else exit_reason(code)
        return Found(**facts, broken=broken)

    def end(self) -> None:
        """Kill it and whatever it started, unless it is through."""
        if self._process:
            self._kill()
            self._process.wait()
            for stream in (self._process.stdout, self._process.stderr):
                if stream:
                    stream.close()

    def _kill(self) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


@contextmanager
def probing(command: Sequence[str] = PROBE) -> Iterator[Probe]:
    """A probe that does not outlive the block."""
    probe = Probe(command)
    try:
        yield probe
    finally:
        probe.end()


# ── judging ─────────────────────────────────────────────────────────────────────────────────────


def lines(found: Found, survey: Survey) -> list[Line]:
    """What stands between this machine and its fastest kernels, if anything."""
    return [_torch(found, survey), *_order(found, survey), _kernels(found), _attention(found)]


def _torch(found: Found, survey: Survey) -> Line:
    requirement = _requirement("torch")
    again = f'pip install --force-reinstall "{requirement}"'
    if not found.torch:
        return fail("torch", f"torch cannot be loaded: {found.broken}", again)
    if not survey.gpus:
        build = f"built for CUDA {found.cuda}" if found.cuda else "for the CPU"
        if found.broken:
            return fail("torch", f"{found.torch}, {build}, broke down: {found.broken}", again)
        return ok("torch", f"{found.torch}, {build}")
    speaks = f" (the driver speaks up to {cards.version(survey.cuda)})" if survey.cuda else ""
    if not found.cuda:
        fix = f"pip uninstall torch, then install a build for CUDA{speaks}: {_BUILDS}"
        return fail("torch", f"{found.torch} is a build for the CPU, and there is a card", fix)
    built = tuple(int(number) for number in found.cuda.split("."))
    if survey.cuda and built[:1] > survey.cuda[:1]:
        text = f"{found.torch} is built for CUDA {found.cuda}{speaks}"
        return fail("torch", text, f"update the NVIDIA driver, or choose an older build: {_BUILDS}")
    if not found.capabilities:
        why = found.problem or found.broken or "it does not say why"
        fix = "nvidia-smi must work for you; then try sudo modprobe nvidia-uvm, or a restart"
        return fail("torch", f"{found.torch} cannot use the card: {why}", fix)
    major, minor = found.capabilities[0]
    if not runs_on((major, minor), found.architectures):
        text = f"{found.torch} has no code for compute capability {major}.{minor}"
        fix = f"install a build that has (it has {', '.join(found.architectures)}): {_BUILDS}"
        return fail("torch", text, f"{fix}; until then: -o device=cpu")
    return ok("torch", f"{found.torch}, built for CUDA {found.cuda}, has code for this card")


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for `architectures` (`sm_90`, `sm_90a`, `compute_90`, …) runs on a card.

    Machine code runs on its own major version from its minor one on, with an `a` on exactly its
    card; `compute` code is translated for any later card. Source: CUDA programming guide, compute
    capabilities.
    """
    for name in architectures:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not parts:
            continue
        kind, major, minor, special = parts[1], int(parts[2]), int(parts[3]), parts[4]
        same = capability[0] == major and capability[1] >= minor
        if special == "a":
            same = capability == (major, minor)
        if same or (kind == "compute" and not special and capability >= (major, minor)):
            return True
    return False


def _order(found: Found, survey: Survey) -> list[Line]:
    """Whether torch counts the cards as we do; unlike cards may be ranked otherwise."""
    ours = [card.uuid.removeprefix("GPU-") for card in survey.gpus if card.uuid[:4] != "MIG-"]
    torchs = [uuid.removeprefix("GPU-") for uuid in found.uuids]
    if not ours or set(ours) != set(torchs) or ours == torchs:
        return []
    first = next(card for card in survey.gpus if card.uuid.removeprefix("GPU-") == torchs[0])
    text = f"torch's cuda:0 is {first.name} ({first.uuid}), plans are made for another card"
    return [warn("order", text, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")]


def _kernels(found: Found) -> Line:
    if found.kernels == "":
        return ok("kernels", f"Triton {_version('triton')} compiles and runs ours")
    if found.kernels:
        text = f"plain torch is used, which is slower: {found.kernels}"
        return warn("kernels", text, _kernels_fix(found.kernels))
    if not found.capabilities:
        return skipped("kernels", "Triton kernels need a CUDA device")
    fix = 'look into DFLASH_CHAT_LOG=debug, then pip install --force-reinstall "triton"'
    return fail("kernels", f"trying one ended the process: {found.broken}", fix)


def _kernels_fix(reason: str) -> str:
    """What helps most often; the reason alone does not always tell."""
    if "not installed" in reason:
        return f'pip install "{_requirement("triton", of="torch")}"'
    if "capability" in reason:
        return "none on this card; answers are the same"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "install a C compiler (sudo apt install gcc), or name one in CC"
    if not (Path(get_path("include")) / "Python.h").exists():
        return f"install Python's headers: sudo apt install python3.{sys.version_info.minor}-dev"
    if "out of memory" in reason:
        return "nvidia-smi shows which programs hold the card's memory; end those you can spare"
    return "rm -r ~/.triton/cache and try again; DFLASH_CHAT_LOG=debug shows the traceback"


def _attention(found: Found) -> Line:
    """Which code computes attention, and what becomes of flash-attn, which need not be there."""
    if found.kernels != "":
        return ok("attention", "torch's scaled_dot_product_attention, with or without flash-attn")
    if not found.flash:
        return ok("attention", "our Triton kernels; flash-attn is not installed, nor needed")
    words = [_flash(name, why, found.broken) for name, why in found.flash.items()]
    text = "; ".join(["our Triton kernels", *words])
    unusable = [name.partition(" ")[0] for name, why in found.flash.items() if why != ""]
    if not unusable:
        return ok("attention", text)
    remove = f"pip uninstall {' '.join(unusable)}"
    if None in found.flash.values():
        return fail("attention", text, f"{remove}; a model would not be loaded, either")
    return warn("attention", text, f"{remove}; answers are the same")


def _flash(name: str, why: str | None, broken: str) -> str:
    if why is None:
        return f"trying {name} ended the process: {broken}"
    return f"{name} cannot be used: {why}" if why else f"{name} reads long prompts where quicker"


def _requirement(name: str, of: str = machine.PACKAGE) -> str:
    """`name` with the versions that the package `of` asks for, as pip takes it."""
    try:
        return machine.requirements(of).get(name, name)
    except metadata.PackageNotFoundError:
        return name


def _version(package: str) -> str:
    """The installed version, "" if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
