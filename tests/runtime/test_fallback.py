"""Where CUDA graphs cannot be had, the eager path answers, and a line says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dflash_chat.runtime import kernels, loading
from dflash_chat.runtime.engine import Engine
from tests.runtime import tiny


def engine(dtype: torch.dtype) -> Engine:
    target = tiny.target()
    made = Engine(target, target.new_cache(64), None, (), 1, frozenset())
    made.cache.dtype = dtype
    return made


def test_fp32_runs_eagerly() -> None:
    graphed, why = loading._graphs(engine(torch.float32))
    assert graphed is None
    assert why == "the kernels compute in bf16"


@pytest.fixture
def fresh_answer() -> Iterator[None]:
    """Whether kernels run is asked once per device and process."""
    kernels.missing.cache_clear()
    yield
    kernels.missing.cache_clear()


@pytest.mark.usefixtures("fresh_answer")
def test_an_old_card_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    graphed, why = loading._graphs(engine(torch.bfloat16))
    assert graphed is None
    assert "8.0" in why


@pytest.mark.usefixtures("fresh_answer")
def test_a_machine_without_triton_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    graphed, why = loading._graphs(engine(torch.bfloat16))
    assert graphed is None
    assert why == "Triton is not installed"
    assert not kernels.serve(torch.device("cuda"), torch.bfloat16)


@pytest.mark.usefixtures("fresh_answer")
def test_a_machine_that_cannot_compile_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dflash_chat.runtime.kernels import norms

    def failing(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(norms, "rms_norm", failing)
    _, why = loading._graphs(engine(torch.bfloat16))
    assert why == "RuntimeError: Failed to find C compiler."


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    pytest.importorskip("triton")
    from dflash_chat.runtime import graphed

    monkeypatch.setattr(kernels, "missing", lambda _: "")

    def failing(error: Exception) -> None:
        def captured(_: Engine) -> None:
            raise error

        monkeypatch.setattr(graphed, "captured", captured)

    return failing


def test_a_failed_capture_is_told_in_one_line(capturing: Callable[[Exception], None]) -> None:
    capturing(RuntimeError("no kernel image\nfor this device"))
    made = engine(torch.bfloat16)
    made.graphed, made.eager_because = loading._graphs(made)
    assert made.graphed is None
    words = loading._kernels(made)
    assert words.endswith("eager: RuntimeError: no kernel image")


def test_memory_that_does_not_suffice_is_no_reason_to_go_on(
    capturing: Callable[[Exception], None],
) -> None:
    capturing(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        loading._graphs(engine(torch.bfloat16))
