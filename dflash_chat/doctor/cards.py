"""The driver and the cards, as NVML tells them; and what to do when it tells nothing."""

from __future__ import annotations

from pathlib import Path

from dflash_chat import gpu
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.gpu import Cause, Gpu, Survey

_PCI = Path("/sys/bus/pci/devices")
_WSL_DEVICE = Path("/dev/dxg")
_CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"))

_FIXES = {
    Cause.NO_PACKAGE: 'pip install "nvidia-ml-py>=13"',
    Cause.NO_DRIVER: "install NVIDIA's driver and restart: Ubuntu: sudo ubuntu-drivers install; "
    "others: https://www.nvidia.com/drivers",
    Cause.NOT_LOADED: "sudo modprobe nvidia; if that is refused, the driver does not fit this "
    "kernel (dkms status), or Secure Boot forbids it",
    Cause.MISMATCH: "restart the computer",
    Cause.FORBIDDEN: "see ls -l /dev/nvidia* and join the group that may use them",
    Cause.SILENT: "sudo dmesg | grep -i -e nvrm -e xid says why; often a restart helps",
    Cause.NO_CARD: "sudo dmesg | grep -i nvrm says why; the driver may be too old for the card",
    Cause.HIDDEN: "unset CUDA_VISIBLE_DEVICES, or set it to a UUID that nvidia-smi -L shows",
    Cause.NO_INSTANCE: "make an instance (sudo nvidia-smi mig -cgi 0 -C), or switch MIG off "
    "(sudo nvidia-smi -mig 0)",
}
_IN_CONTAINER = "start the container with the card: --gpus all, or --device nvidia.com/gpu=all"
_IN_WSL = "install NVIDIA's driver in Windows, none inside of WSL, then run wsl --update"


def driver(survey: Survey) -> list[Line]:
    """Whether there is a driver, and whether it is the reason for having no card."""
    cause = survey.cause
    if cause in (Cause.NO_DRIVER, Cause.NOT_LOADED, Cause.NO_CARD) and not card_in_machine():
        return [skipped("driver", "no NVIDIA card: models run on the CPU")]
    fix = _FIXES.get(cause, "")
    if cause in (Cause.NO_DRIVER, Cause.NOT_LOADED, Cause.NO_CARD):
        if gpu.under_wsl():
            fix = _IN_WSL
        elif any(mark.exists() for mark in _CONTAINERS):
            fix = _IN_CONTAINER
    if cause is Cause.HIDDEN or (cause and survey.gpus):
        return [warn("driver", survey.problem, fix)]
    if cause:
        return [fail("driver", survey.problem, fix)]
    cuda = f", for CUDA up to {version(survey.cuda)}" if survey.cuda else ""
    hidden = f"; {survey.hidden} more cannot be seen by CUDA programs" if survey.hidden else ""
    return [ok("driver", f"{survey.driver or 'there'}{cuda}{hidden}")]


def cards(survey: Survey) -> list[Line]:
    """A line for each card that CUDA programs see."""
    return [_card(card) for card in survey.gpus]


def _card(card: Gpu) -> Line:
    facts = [
        f"cuda:{card.index} {card.name}",
        f"{card.free / 2**30:.1f} of {card.total / 2**30:.1f} GiB free",
        f"compute capability {version(card.capability)}" if card.capability else "",
        f"{card.bandwidth_gb_s:.0f} GB/s" if card.bandwidth_gb_s else "",
        card.notes,
    ]
    text = ", ".join(fact for fact in facts if fact)
    if card.free < card.total / 2:
        fix = "nvidia-smi shows which programs hold its memory; end those that you can spare"
        return warn("card", text, fix)
    return ok("card", text)


def card_in_machine() -> bool:
    """Whether this machine has an NVIDIA card, with or without a driver."""
    if gpu.under_wsl():
        return _WSL_DEVICE.exists()
    return any(
        _word(device / "vendor") == "0x10de" and _word(device / "class").startswith("0x03")
        for device in _PCI.glob("*")
    )


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def version(numbers: tuple[int, int] | None) -> str:
    """(12, 4) → `12.4`."""
    return ".".join(map(str, numbers or ()))
