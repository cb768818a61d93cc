"""The cards as CUDA counts them, through an NVML that stands in for the library.

Its error classes and constants are pynvml's own, so is everything that asks; only the functions
that would call the driver answer from a table, and with NotSupported where the table says nothing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml
import pytest

from dflash_chat import gpu
from dflash_chat.gpu import Cause

GB = 10**9
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
ERRORS = [getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_ERROR_")]


class Handle(ctypes.c_void_p):
    """A handle with its answers by function name; like the real ones it cannot be hashed."""

    def __init__(self, **answers: object) -> None:
        super().__init__()
        self.answers = answers


class Nvml(ModuleType):
    """pynvml with `boards` instead of a driver; `alive` counts nvmlInit without nvmlShutdown."""

    def __init__(self, *boards: object, **answers: object) -> None:
        super().__init__("pynvml")
        names = ("NVML", "nvmlClocksEventReason", "nvmlMemory_v2")
        vars(self).update({k: v for k, v in vars(pynvml).items() if k.startswith(names)})
        self.boards, self.alive = boards, 0
        self.answers = {
            "SystemGetDriverVersion": "580.95.05",
            "SystemGetCudaDriverVersion_v2": 13000,
            "DeviceGetCount": len(boards),
        } | answers

    def __getattr__(self, name: str) -> Callable[..., object]:
        def answer(*arguments: object) -> object:
            assert self.alive, f"{name} outside of nvmlInit … nvmlShutdown"
            table = arguments[0].answers if arguments and isinstance(arguments[0], Handle) else None
            key = name.removeprefix("nvml")
            value = (self.answers if table is None else table).get(key, not_supported())
            if isinstance(value, Exception):
                raise value
            return value(*arguments[1:]) if callable(value) else value

        return answer

    def nvmlInit(self) -> None:
        if isinstance(error := self.answers.get("Init"), Exception):
            raise error
        self.alive += 1

    def nvmlShutdown(self) -> None:
        self.alive -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        if isinstance(error := self.boards[index], Exception):
            raise error
        return self.boards[index]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, board: Handle, index: int) -> object:
        instances = board.answers["instances"]
        assert isinstance(instances, list)
        if instances[index] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return instances[index]


def not_supported() -> Exception:
    return pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def memory(total: int, used: int, reserved: int) -> Callable[..., object]:
    """As the driver answers: version 1 counts what is reserved as used."""

    def answer(version: int | None = None) -> object:
        free = total - used - reserved
        if version == pynvml.nvmlMemory_v2:
            return SimpleNamespace(total=total, free=free, used=used, reserved=reserved)
        return SimpleNamespace(total=total, free=free, used=used + reserved)

    return answer


def board(uuid: str, **answers: object) -> Handle:
    """A card that tells everything, but for what `answers` replaces; None takes away."""
    clocks = {pynvml.NVML_CLOCK_SM: 1695, pynvml.NVML_CLOCK_MEM: 9751}
    everything = {
        "DeviceGetUUID": uuid,
        "DeviceGetName": "NVIDIA GeForce RTX 3090",
        "DeviceGetMemoryInfo": memory(24 * GB, 1 * GB, GB // 2),
        "DeviceGetCudaComputeCapability": (8, 6),
        "DeviceGetNumGpuCores": 10496,
        "DeviceGetMemoryBusWidth": 384,
        "DeviceGetMaxClockInfo": lambda clock: clocks[clock],
        "DeviceGetClockInfo": lambda clock: clocks[clock] - 100,
        "DeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=60),
        "DeviceGetPowerUsage": 301_500,
        "DeviceGetEnforcedPowerLimit": 350_000,
        "DeviceGetTemperature": lambda sensor: {pynvml.NVML_TEMPERATURE_GPU: 71}[sensor],
        "DeviceGetCurrentClocksEventReasons": 0,
    } | answers
    return Handle(**{key: value for key, value in everything.items() if value is not None})


def in_mig_mode(uuid: str, *instances: str | None) -> Handle:
    """A card cut into instances; None is a place without one."""
    handles = [
        name
        and Handle(
            DeviceGetUUID=name,
            DeviceGetMemoryInfo=memory(10 * GB, 0, 0),
            DeviceGetGpuInstanceId=7 + place,
            DeviceGetComputeInstanceId=0,
        )
        for place, name in enumerate(instances)
    ]
    return board(
        uuid,
        DeviceGetMigMode=[pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE],
        DeviceGetMaxMigDeviceCount=len(instances),
        DeviceGetMemoryInfo=pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION),
        DeviceGetUtilizationRates=None,
        instances=handles,
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Nvml]]:
    """Puts an Nvml where pynvml is; afterwards every nvmlInit must have had its nvmlShutdown."""
    installed: list[Nvml] = []

    def put(*boards: object, **answers: object) -> Nvml:
        installed.append(Nvml(*boards, **answers))
        monkeypatch.setitem(sys.modules, "pynvml", installed[-1])
        return installed[-1]

    yield put
    assert [nvml.alive for nvml in installed] == [0] * len(installed)


# ── facts ───────────────────────────────────────────────────────────────────────────────────────


def test_a_card_that_tells_everything(install: Callable[..., Nvml]) -> None:
    install(board("GPU-a"))
    found = gpu.survey({})
    assert found == gpu.Survey(
        gpus=(
            gpu.Gpu(
                index=0,
                uuid="GPU-a",
                name="NVIDIA GeForce RTX 3090",
                total=24 * GB,
                free=22_500_000_000,
                reserved=500_000_000,
                capability=(8, 6),
                driver="580.95.05",
                cuda=(13, 0),
                bandwidth_gb_s=pytest.approx(936.1, abs=0.1),
            ),
        ),
        driver="580.95.05",
        cuda=(13, 0),
    )


@pytest.mark.parametrize(
    ("answers", "changed"),
    [
        ({"DeviceGetCudaComputeCapability": None}, {"capability": None}),
        ({"DeviceGetMemoryBusWidth": None}, {"bandwidth_gb_s": None}),
        ({"DeviceGetMaxClockInfo": None}, {"bandwidth_gb_s": None}),
        ({"DeviceGetNumGpuCores": None}, {}),
        (  # a driver from before version 2 of the structure
            {"DeviceGetMemoryInfo": lambda *v: (v and fail("FUNCTION_NOT_FOUND")) or V1},
            {"reserved": None, "total": 9, "free": 4},
        ),
    ],
)
def test_a_fact_that_is_not_told_is_none(
    install: Callable[..., Nvml], answers: dict[str, object], changed: dict[str, object]
) -> None:
    install(board("GPU-a"))
    (whole,) = gpu.survey({}).gpus
    install(board("GPU-a", **answers))
    (partial,) = gpu.survey({}).gpus
    assert vars(partial) == vars(whole) | changed


V1 = SimpleNamespace(total=9, free=4, used=5)


def fail(name: str) -> None:
    raise pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{name}"))


def test_a_chip_without_memory_of_its_own_has_the_computers(install: Callable[..., Nvml]) -> None:
    install(board("GPU-a", DeviceGetMemoryInfo=None))
    (card,) = gpu.survey({}).gpus
    assert card.total > card.free > 100_000_000
    assert (card.reserved, card.notes) == (None, "its memory is the computer's")


def test_under_wsl_the_card_is_shared(
    install: Callable[..., Nvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "under_wsl", lambda: True)
    install(board("GPU-a"))
    (card,) = gpu.survey({}).gpus
    assert card.notes == "shared with Windows"


@pytest.mark.parametrize(
    ("code", "cause", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, Cause.NO_DRIVER, "no NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, Cause.NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, Cause.MISMATCH, "was updated"),
        (pynvml.NVML_ERROR_NO_PERMISSION, Cause.FORBIDDEN, "no permission"),
        (pynvml.NVML_ERROR_UNKNOWN, Cause.SILENT, "does not answer (Unknown Error)"),
    ],
)
def test_without_a_driver_there_is_a_reason_and_no_card(
    install: Callable[..., Nvml], code: int, cause: Cause, words: str
) -> None:
    install(board("GPU-a"), Init=pynvml.NVMLError(code))
    found = gpu.survey({})
    assert (found.gpus, found.cause) == ((), cause)
    assert words in found.problem
    with gpu.Sampler() as sampler:
        assert (sampler.available, sampler.sample()) == (False, None)


def test_without_the_package_there_is_a_reason_and_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = gpu.survey({})
    assert (found.gpus, found.cause) == ((), Cause.NO_PACKAGE)
    assert "nvidia-ml-py" in found.problem


@pytest.mark.parametrize("code", ERRORS)
def test_no_error_of_nvml_escapes_wherever_it_happens(
    install: Callable[..., Nvml], code: int
) -> None:
    error = pynvml.NVMLError(code)
    for function in ("SystemGetDriverVersion", "SystemGetCudaDriverVersion_v2", "DeviceGetCount"):
        install(board("GPU-a"), **{function: error})
        gpu.survey({})
    for function in board("GPU-a").answers:
        install(board("GPU-a", **{function: error}), board("GPU-b"))
        assert "GPU-b" in [card.uuid for card in gpu.survey({}).gpus]
        with gpu.Sampler("GPU-a") as sampler:
            sampler.sample()


@pytest.mark.parametrize(
    ("boards", "cause", "problem"),
    [
        ([], Cause.NO_CARD, "the NVIDIA driver finds no card"),
        ([LOST], Cause.SILENT, "card 0 does not answer (GPU is lost)"),
        (
            [board("GPU-a", DeviceGetMemoryInfo=LOST)],
            Cause.SILENT,
            "GPU-a does not answer (GPU is lost)",
        ),
        ([in_mig_mode("GPU-a", None)], Cause.NO_INSTANCE, "MIG is on and has no instance"),
    ],
)
def test_why_there_is_no_card(
    install: Callable[..., Nvml], boards: list[object], cause: Cause, problem: str
) -> None:
    install(*boards)
    found = gpu.survey({})
    assert (found.gpus, found.cause, found.problem) == ((), cause, problem)
    assert (found.driver, found.cuda) == ("580.95.05", (13, 0))


def test_a_lost_card_does_not_hide_the_others(install: Callable[..., Nvml]) -> None:
    install(LOST, board("GPU-b"))
    found = gpu.survey({})
    assert [card.uuid for card in found.gpus] == ["GPU-b"]
    assert found.problem == "card 0 does not answer (GPU is lost)"


# ── which cards, in which order ─────────────────────────────────────────────────────────────────

A, B, C = "GPU-aaaa-1", "GPU-aaab-2", "GPU-cccc-3"


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, [A, B, C]),
        ("0,1,2", [A, B, C]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", [B]),  # up to the first wrong entry
        ("1,3,0", [B]),
        ("0,x,1", [A]),
        ("0,,1", [A]),
        ("1st,0", [B, A]),  # as CUDA reads numbers
        ("0,1,0", []),  # nothing twice
        (C, [C]),
        (f"{B},{A}", [B, A]),
        ("GPU-c", [C]),
        ("GPU-aaab,0", [B, A]),
        ("GPU-aaa", []),  # two begin like this
        ("GPU-aaaa,GPU-ffff,GPU-cccc", [A]),
        ("cccc-3", []),
        (f"0,{A}", []),
        ("MIG-x", []),
    ],
)
def test_cuda_visible_devices(
    install: Callable[..., Nvml], chosen: str | None, seen: list[str]
) -> None:
    install(board(A), board(B), board(C))
    found = gpu.survey({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    assert [card.uuid for card in found.gpus] == seen
    assert [card.index for card in found.gpus] == list(range(len(seen)))
    assert found.hidden == 3 - len(seen)
    assert found.cause == (Cause.NONE if seen else Cause.HIDDEN)
    assert found.problem == ("" if seen else f"CUDA_VISIBLE_DEVICES={chosen} hides every card")


@pytest.mark.parametrize(
    ("environ", "seen"),
    [
        ({}, [B, A, C]),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, [B, A, C]),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [A, B, C]),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}, [A]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [B]),
        ({"CUDA_VISIBLE_DEVICES": f"1,{B}"}, [A, B]),
    ],
)
def test_the_fastest_card_comes_first_unless_the_bus_decides(
    install: Callable[..., Nvml], environ: dict[str, str], seen: list[str]
) -> None:
    install(board(A), board(B, DeviceGetNumGpuCores=16384), board(C))
    assert [card.uuid for card in gpu.survey(environ).gpus] == seen


M, N = "MIG-mmmm", "MIG-nnnn"


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, [M]),  # one instance, and no other card beside it
        ("0", [A]),
        ("1", [M]),
        ("0,1", [M]),
        (N, [N]),
        (f"{N},{M}", [N]),
        ("MIG-n", [N]),
        ("MIG-GPU-aaab-2/9/0", [N]),  # its name before driver 470
        ("GPU-aaab", [M]),
        (f"{A},{N}", [N]),
        ("MIG-x", []),
    ],
)
def test_mig_instances(install: Callable[..., Nvml], chosen: str | None, seen: list[str]) -> None:
    install(board(A), in_mig_mode(B, M, None, N))
    found = gpu.survey({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    assert [card.uuid for card in found.gpus] == seen
    assert found.hidden == 3 - len(seen)


def test_an_instance_knows_its_memory_and_takes_the_rest_from_its_card(
    install: Callable[..., Nvml],
) -> None:
    install(in_mig_mode(A, M))
    (card,) = gpu.survey({}).gpus
    assert (card.total, card.capability) == (10 * GB, (8, 6))
    assert (card.name, card.notes) == ("NVIDIA GeForce RTX 3090", "a MIG instance")
    assert card.bandwidth_gb_s is None  # it has a part of the card's, and NVML does not say which
    with gpu.Sampler(M) as sampler:
        sample = sampler.sample()
    assert sample is not None
    assert (sample.total, sample.used, sample.utilisation) == (10 * GB, 0, None)
    assert (sample.power_w, sample.temperature_c) == (301.5, 71)


# ── samples ─────────────────────────────────────────────────────────────────────────────────────


def test_a_sample(install: Callable[..., Nvml]) -> None:
    install(board(A), board(B))
    with gpu.Sampler(B) as sampler:
        assert sampler.available
        assert sampler.sample() == gpu.Sample(
            used=1_500_000_000,
            total=24 * GB,
            utilisation=97,
            power_w=301.5,
            power_limit_w=350.0,
            sm_clock_mhz=1595,
            temperature_c=71,
            throttled="",
        )
    assert sampler.sample() is None
    sampler.close()


@pytest.mark.parametrize("uuid", [B, B.removeprefix("GPU-"), ""])
def test_a_card_is_found_by_its_uuid_or_is_the_first(
    install: Callable[..., Nvml], monkeypatch: pytest.MonkeyPatch, uuid: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    install(board(A, DeviceGetPowerUsage=1000), board(B, DeviceGetPowerUsage=2000))
    with gpu.Sampler(uuid) as sampler:
        sample = sampler.sample()
    assert sample is not None
    assert sample.power_w == 2.0


def test_an_unknown_card_gives_no_samples(install: Callable[..., Nvml]) -> None:
    install(board(A))
    with gpu.Sampler("GPU-x") as sampler:
        assert (sampler.available, sampler.sample()) == (False, None)


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("DeviceGetUtilizationRates", "utilisation"),
        ("DeviceGetPowerUsage", "power_w"),
        ("DeviceGetEnforcedPowerLimit", "power_limit_w"),
        ("DeviceGetClockInfo", "sm_clock_mhz"),
        ("DeviceGetTemperature", "temperature_c"),
        ("DeviceGetCurrentClocksEventReasons", "throttled"),
    ],
)
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION])
def test_what_a_sample_does_not_tell_is_none_and_the_rest_is_there(
    install: Callable[..., Nvml], function: str, field: str, code: int
) -> None:
    install(board(A, **{function: pynvml.NVMLError(code)}))
    with gpu.Sampler(A) as sampler:
        sample = sampler.sample()
    assert [name for name, value in vars(sample).items() if value is None] == [field]


def test_a_card_that_is_lost_later_gives_no_more_samples(install: Callable[..., Nvml]) -> None:
    nvml = install(board(A))
    with gpu.Sampler(A) as sampler:
        assert sampler.sample() is not None
        (card,) = nvml.boards
        assert isinstance(card, Handle)
        card.answers["DeviceGetMemoryInfo"] = LOST
        assert sampler.sample() is None


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (pynvml.nvmlClocksEventReasonGpuIdle, ""),
        (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, ""),
        (pynvml.nvmlClocksEventReasonSwPowerCap, "power limit"),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "too hot"),
        (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "power supply"),
        (
            pynvml.nvmlClocksEventReasonHwSlowdown
            | pynvml.nvmlClocksEventReasonHwThermalSlowdown
            | pynvml.nvmlClocksEventReasonSwPowerCap,
            "too hot",
        ),
    ],
)
def test_what_slows_the_clocks_down(install: Callable[..., Nvml], bits: int, words: str) -> None:
    install(board(A, DeviceGetCurrentClocksEventReasons=bits))
    with gpu.Sampler(A) as sampler:
        sample = sampler.sample()
    assert sample is not None
    assert sample.throttled == words


# ── the real bindings ───────────────────────────────────────────────────────────────────────────

LIBRARY = r"""
#include <string.h>
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
static int boards[2];
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strcpy(text, "580.1"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **board) { *board = boards + i; return 0; }
int nvmlDeviceGetUUID(void *board, char *text, unsigned n)
    { strcpy(text, board == boards ? "GPU-aaaa" : "GPU-bbbb"); return 0; }
int nvmlDeviceGetName(void *board, char *text, unsigned n) { strcpy(text, "Board"); return 0; }
int nvmlDeviceGetMemoryInfo_v2(void *board, memory_v2 *m) {
    if (m->version != (sizeof *m | 2 << 24)) return 25;  /* argument version mismatch */
    m->total = 100; m->reserved = 10; m->free = 60; m->used = 30; return 0;
}
int nvmlDeviceGetPowerUsage(void *board, unsigned *milliwatts) { *milliwatts = 5500; return 0; }
"""
ASKING = """
from dflash_chat import gpu
cards = gpu.survey().gpus
print(*[(c.uuid, c.name, c.total, c.free, c.reserved, c.driver, c.capability) for c in cards])
with gpu.Sampler() as sampler:
    print(sampler.sample())
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_pynvml_itself_with_a_library_that_knows_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvml.c").write_text(LIBRARY)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")], check=True
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,0")
    done = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cards, sample = done.stdout.splitlines()
    assert cards == " ".join(
        f"('{uuid}', 'Board', 100, 60, 10, '580.1', None)" for uuid in ("GPU-bbbb", "GPU-aaaa")
    )
    assert sample == str(gpu.Sample(40, 100, None, 5.5, None, None, None, None))


# ── the real thing ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["", "PCI_BUS_ID"])
def test_the_order_is_torchs(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    program = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    card = torch.cuda.get_device_properties(i)\n"
        "    print(card.uuid, card.major, card.minor, card.name, sep='\\t')\n"
    )
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torchs = [line.split("\t") for line in done.stdout.splitlines()]
    ours = gpu.survey().gpus
    assert [
        [card.uuid.removeprefix("GPU-"), *map(str, card.capability or ()), card.name]
        for card in ours
    ] == [[uuid.removeprefix("GPU-"), *facts] for uuid, *facts in torchs]


@pytest.mark.gpu
def test_facts_and_samples_of_the_real_card() -> None:
    import torch

    found = gpu.survey()
    card = found.gpus[0]
    free, total = torch.cuda.mem_get_info(0)
    assert abs(card.total - (card.reserved or 0) - total) < 0.02 * total
    assert 0 < card.free <= card.total
    assert abs(card.free - free) < 0.1 * total
    assert found.problem == ""
    assert found.cuda is not None
    assert found.cuda >= tuple(int(n) for n in (torch.version.cuda or "0.0").split("."))[:1]
    assert card.bandwidth_gb_s is None or 50 < card.bandwidth_gb_s < 20_000
    with gpu.Sampler(card.uuid) as sampler:
        sample = sampler.sample()
    assert sample is not None
    assert sample.used is not None
    assert sample.temperature_c is None or 10 < sample.temperature_c < 110
