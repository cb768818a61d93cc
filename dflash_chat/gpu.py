"""What NVIDIA's management library (NVML) tells about the cards, without creating a CUDA context.

`survey` lists the cards as a CUDA program would count them, so `gpus[0]` is torch's `cuda:0`: NVML
itself knows nothing of CUDA_VISIBLE_DEVICES. `Sampler` watches one card, found by its UUID, while
it works. A fact that a card does not tell is None; why there is no card is a sentence in
`Survey.problem`, never an exception. Knows nothing of torch, models or plans.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dflash_chat.visible import Device, visible

T = TypeVar("T")


class Cause(StrEnum):
    """Why there is no card, or not all of them; what a person can do differs for each."""

    NONE = ""
    NO_PACKAGE = "no package"
    NO_DRIVER = "no driver"
    NOT_LOADED = "driver not loaded"
    MISMATCH = "driver updated"
    FORBIDDEN = "no permission"
    SILENT = "no answer"
    NO_CARD = "no card"
    HIDDEN = "hidden"
    NO_INSTANCE = "no MIG instance"


_PROBLEMS = {  # NVML's error classes, without their prefix
    "LibraryNotFound": (Cause.NO_DRIVER, "there is no NVIDIA driver (libnvidia-ml.so.1)"),
    "DriverNotLoaded": (Cause.NOT_LOADED, "the NVIDIA driver is not loaded"),
    "LibRmVersionMismatch": (Cause.MISMATCH, "the NVIDIA driver was updated, the old one runs on"),
    "NoPermission": (Cause.FORBIDDEN, "there is no permission to ask the NVIDIA driver"),
}
_THROTTLING = (  # pynvml's nvmlClocksEventReason…, the gravest first; its other bits are harmless
    ("HwThermalSlowdown", "too hot"),
    ("SwThermalSlowdown", "too hot"),
    ("HwPowerBrakeSlowdown", "power supply"),
    ("HwSlowdown", "hardware slowdown"),
    ("SwPowerCap", "power limit"),
)


@dataclass(frozen=True)
class Gpu:
    """A card, or a MIG instance, that CUDA programs see. `index` is CUDA's, `cuda:<index>`.

    `total`, `free` and `reserved` (by the driver; neither free nor used) are bytes. `cuda` is the
    newest CUDA version the driver speaks. `bandwidth_gb_s` is bus width × memory clock × 2, in
    10⁹ bytes per second.
    """

    index: int
    uuid: str
    name: str
    total: int
    free: int
    reserved: int | None = None
    capability: tuple[int, int] | None = None
    driver: str = ""
    cuda: tuple[int, int] | None = None
    bandwidth_gb_s: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class Survey:
    """The cards in CUDA's order. `problem` says why there is none, or what is wrong with some,
    `cause` the same for programs; `hidden` counts those that CUDA_VISIBLE_DEVICES, or MIG, keeps
    from CUDA programs.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    cause: Cause = Cause.NONE
    hidden: int = 0
    driver: str = ""
    cuda: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One card at one moment. Memory in bytes, `used` by everybody and the driver; `utilisation`
    in percent of the time in which a kernel ran. `throttled` says what slows the clocks down, ""
    if nothing does. None is what the card does not tell.
    """

    used: int | None
    total: int | None
    utilisation: int | None
    power_w: float | None
    power_limit_w: float | None
    sm_clock_mhz: int | None
    temperature_c: int | None
    throttled: str | None


def survey(environ: Mapping[str, str] = os.environ) -> Survey:
    """Ask the driver about every card that CUDA programs under `environ` would see."""
    with _nvml() as (nvml, failure):
        if nvml is None:
            return failure
        driver = _told(nvml.nvmlSystemGetDriverVersion) or ""
        cuda = _version(_told(nvml.nvmlSystemGetCudaDriverVersion_v2))
        cards, problems = _cards(nvml)
        seen = visible(cards, environ)
        gpus: list[Gpu] = []
        for device in seen:
            try:
                gpus.append(_gpu(nvml, device, len(gpus), driver, cuda))
            except nvml.NVMLError as error:
                problems.append(f"{device.uuid} does not answer ({error})")
        cause = Cause.SILENT if problems else Cause.NONE
        if not cards and not problems:
            cause, problems = Cause.NO_CARD, ["the NVIDIA driver finds no card"]
        elif not seen and not problems:
            chosen = environ.get("CUDA_VISIBLE_DEVICES")
            cause, problem = (Cause.NO_INSTANCE, "MIG is on and has no instance")
            if chosen is not None:
                cause, problem = Cause.HIDDEN, f"CUDA_VISIBLE_DEVICES={chosen} hides every card"
            problems.append(problem)
        hidden = sum(len(card.devices) for card in cards) - len(seen)
    return Survey(tuple(gpus), "; ".join(problems), cause, hidden, driver, cuda)


class Sampler:
    """Watches one card. Ask `sample` about once a second, from any thread, and `close` it.

    `uuid` as in `Gpu.uuid`, with or without its "GPU-"; "" is the first card that CUDA programs
    see. Without such a card `available` is False and every sample None.
    """

    def __init__(self, uuid: str = "") -> None:
        self._stack = ExitStack()
        self._nvml, _ = self._stack.enter_context(_nvml())
        self._device = self._find(uuid) if self._nvml else None

    def _find(self, uuid: str) -> Device | None:
        cards, _ = _cards(self._nvml)
        if not uuid:
            return next(iter(visible(cards, os.environ)), None)
        devices = (device for card in cards for device in (card, *card.devices))
        return next((d for d in devices if uuid in (d.uuid, d.uuid.partition("-")[2])), None)

    @property
    def available(self) -> bool:
        """Whether there is a card to watch."""
        return self._device is not None

    def sample(self) -> Sample | None:
        """The card now; None without a card, after `close`, or if it fell off the bus."""
        nvml, device = self._nvml, self._device
        if nvml is None or device is None:
            return None
        used: int | None = None
        total: int | None = None
        try:
            memory = _memory(nvml, device.handle)
            used, total = memory.total - memory.free, memory.total
        except nvml.NVMLError_NoPermission:
            pass
        except nvml.NVMLError:
            return None
        board = device.board
        rates = _told(nvml.nvmlDeviceGetUtilizationRates, device.handle)
        power = _told(nvml.nvmlDeviceGetPowerUsage, board)
        limit = _told(nvml.nvmlDeviceGetEnforcedPowerLimit, board)
        reasons = _told(nvml.nvmlDeviceGetCurrentClocksEventReasons, board)
        return Sample(
            used=used,
            total=total,
            utilisation=None if rates is None else rates.gpu,
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            sm_clock_mhz=_told(nvml.nvmlDeviceGetClockInfo, board, nvml.NVML_CLOCK_SM),
            temperature_c=_told(nvml.nvmlDeviceGetTemperature, board, nvml.NVML_TEMPERATURE_GPU),
            throttled=None if reasons is None else _throttled(nvml, reasons),
        )

    def close(self) -> None:
        """Let go of NVML; twice does no harm."""
        self._nvml = self._device = None
        self._stack.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── asking ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _nvml() -> Iterator[tuple[Any, Survey]]:
    """pynvml, initialised until the end of the block; or None, and a survey that says why."""
    try:
        import pynvml
    except ImportError:
        problem = "the package nvidia-ml-py is not installed"
        yield None, Survey(problem=problem, cause=Cause.NO_PACKAGE)
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        kind = type(error).__name__.removeprefix("NVMLError_")
        unknown = (Cause.SILENT, f"the NVIDIA driver does not answer ({error})")
        cause, problem = _PROBLEMS.get(kind, unknown)
        yield None, Survey(problem=problem, cause=cause)
        return
    try:
        yield pynvml, Survey()
    finally:
        _told(pynvml.nvmlShutdown)


def _told(function: Callable[..., T], *arguments: object) -> T | None:
    """What the driver answers, or None if this card, this driver or this user gets no answer."""
    from pynvml import NVMLError

    try:
        return function(*arguments)
    except NVMLError:
        return None


def _cards(nvml: Any) -> tuple[list[Device], list[str]]:  # noqa: ANN401  a module
    """Every card in PCI order, and what is wrong with those that do not answer."""
    cards: list[Device] = []
    problems: list[str] = []
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return [], [f"the NVIDIA driver does not answer ({error})"]
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
        except nvml.NVMLError as error:
            problems.append(f"card {index} does not answer ({error})")
            continue
        cores = _told(nvml.nvmlDeviceGetNumGpuCores, handle) or 0
        clock = _told(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) or 0
        cards.append(
            Device(handle, handle, uuid, cores * clock, instances=_instances(nvml, handle, uuid))
        )
    return cards, problems


def _instances(nvml: Any, board: Any, uuid: str) -> tuple[Device, ...] | None:  # noqa: ANN401
    mode = _told(nvml.nvmlDeviceGetMigMode, board)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    found: list[Device] = []
    for index in range(_told(nvml.nvmlDeviceGetMaxMigDeviceCount, board) or 0):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index)
            name = nvml.nvmlDeviceGetUUID(handle)
            group = nvml.nvmlDeviceGetGpuInstanceId(handle)
            part = nvml.nvmlDeviceGetComputeInstanceId(handle)
        except nvml.NVMLError:  # places without an instance answer NotFound
            continue
        found.append(Device(handle, board, name, alias=f"MIG-{uuid}/{group}/{part}"))
    return tuple(found)


def _gpu(
    nvml: Any,  # noqa: ANN401
    device: Device,
    index: int,
    driver: str,
    cuda: tuple[int, int] | None,
) -> Gpu:
    memory = _memory(nvml, device.handle)
    notes = {
        "a MIG instance": bool(device.alias),
        "its memory is the computer's": memory.borrowed,
        "shared with Windows": under_wsl(),
    }
    name = _told(nvml.nvmlDeviceGetName, device.handle) or nvml.nvmlDeviceGetName(device.board)
    return Gpu(
        index=index,
        uuid=device.uuid,
        name=name,
        total=memory.total,
        free=memory.free,
        reserved=memory.reserved,
        capability=_told(nvml.nvmlDeviceGetCudaComputeCapability, device.board),
        driver=driver,
        cuda=cuda,
        bandwidth_gb_s=None if device.alias else _bandwidth_gb_s(nvml, device.board),
        notes="; ".join(note for note, holds in notes.items() if holds),
    )


class _Memory(NamedTuple):
    """Bytes. `borrowed`: the chip has none of its own and works in the computer's."""

    total: int
    free: int
    reserved: int | None
    borrowed: bool = False


def _memory(nvml: Any, handle: Any) -> _Memory:  # noqa: ANN401
    """Raises NVMLError if the memory may not be read, or the card does not answer."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
        return _Memory(memory.total, memory.free, memory.reserved)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_FunctionNotFound,  # an old driver
        nvml.NVMLError_ArgumentVersionMismatch,
    ):
        pass
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return _Memory(memory.total, memory.free, None)
    except nvml.NVMLError_NotSupported:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        kib = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
        return _Memory(kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024, None, borrowed=True)


def _bandwidth_gb_s(nvml: Any, board: Any) -> float | None:  # noqa: ANN401
    bits = _told(nvml.nvmlDeviceGetMemoryBusWidth, board)
    mhz = _told(nvml.nvmlDeviceGetMaxClockInfo, board, nvml.NVML_CLOCK_MEM)
    return bits / 8 * 2 * mhz / 1000 if bits and mhz else None


def _throttled(nvml: Any, reasons: int) -> str:  # noqa: ANN401
    words = (
        word
        for name, word in _THROTTLING
        if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
    )
    return next(words, "")


def _version(number: int | None) -> tuple[int, int] | None:
    """12040 → (12, 4)."""
    return None if number is None else (number // 1000, number % 1000 // 10)


def under_wsl() -> bool:
    """Whether this Linux runs inside Windows, where the driver is Windows' own."""
    try:
        return "microsoft" in Path("/proc/sys/kernel/osrelease").read_text(encoding="ascii").lower()
    except OSError:
        return False
