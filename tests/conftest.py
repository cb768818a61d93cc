"""What every test shares: the GPU lane, seeds, the real weights, and folders of one's own."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from dflash_chat import hub, pairs
from dflash_chat.errors import UserError
from dflash_chat.settings import DEFAULT_PAIR

# a worker among others gets one core, or their threads wait for each other
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-snapshots` writes what the screens look like now; look at the difference."""
    parser.addoption("--update-snapshots", action="store_true", help="write tests/ui/snapshots")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device; torch is asked only if there are any. Files
    that take long come first, so that no worker is left alone with one.
    """
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell that runs tests in the background ignores SIGINT, and so would every child."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def threads_of_children() -> None:
    """Child processes take as many threads as this one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Fixed seeds and thread count. Torch is not imported for tests that do without it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default pair's real GGUF file, fetched on first use as any user would."""
    try:
        return hub.ensure(pairs.find(DEFAULT_PAIR), "q4_1").target
    except UserError as error:
        pytest.skip(f"no real weights: {error.message}")


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache, configuration, chats and hub cache below tmp_path, also for child processes; returns
    it."""
    monkeypatch.setenv("DFLASH_CHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DFLASH_CHAT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path
