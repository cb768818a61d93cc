"""The table of what can be loaded says what the runtime really reads, no more and no less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dflash_chat import loads
from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import models, quant, safetensors_file, stored_weights, weights
from dflash_chat.runtime.drafter import Config
from dflash_chat.runtime.quant import dense, float_quantized, pack_quantized
from tests import folders
from tests.runtime.gguf_writer import gguf_bytes

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MODULES = {path.stem for path in Path(str(quant.__file__)).parent.glob("*.py")}


def test_architectures_are_the_files_and_their_other_names() -> None:
    files = {path.stem for path in Path(str(models.__file__)).parent.glob("*.py")} - {"__init__"}
    assert set(loads.ARCHITECTURES) == files | set(models._FILES)
    assert all(models.find(name) for name in loads.ARCHITECTURES)


def test_an_architecture_without_a_file_is_missing_in_both() -> None:
    assert loads.missing_architecture("gpt_oss")
    with pytest.raises(CheckpointError):
        models.find("gpt_oss")


def test_plain_safetensors_are_the_dtypes_of_the_dense_format() -> None:
    assert set(loads.FORMATS["safetensors"]) == {NAMES[dtype] for dtype in dense.FLOATS}


def test_quantised_safetensors_are_the_methods_that_are_read() -> None:
    assert set(loads.FORMATS) - {"safetensors", "gguf"} == set(stored_weights.METHODS)


def test_gguf_holds_the_block_formats_and_the_plain_ones() -> None:
    blocks = {name for name in MODULES if name.startswith("q") and name[1].isdigit()}
    plain = {NAMES[dtype] for dtype in weights._GGUF_DENSE.values()}
    assert set(loads.FORMATS["gguf"]) == blocks | plain


def test_gguf_files_of_other_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "qwen3"}, {}))
    assert loads.missing_format("qwen3", "gguf", "q4_0")
    with pytest.raises(CheckpointError, match="architecture 'qwen3' is not supported"):
        weights.open_checkpoint(path)


def _stored(tmp_path: Path, tensors: dict[str, torch.Tensor], quantization: Any) -> set[str]:  # noqa: ANN401
    """The formats that the runtime finds in a folder with these tensors."""
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": quantization}
    files = safetensors_file.read_folder(tmp_path)
    return {weight.format for weight in stored_weights.read(files, config).values()}


INT4 = {
    "x.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
    "x.weight_scale": torch.ones(4, 2, dtype=torch.bfloat16),
    "x.weight_shape": torch.tensor([4, 64]),
}
FP8 = {
    "x.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn),
    "x.weight_scale": torch.ones(4, 1, dtype=torch.bfloat16),
}
BLOCKS = {
    "x.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn),
    "x.weight_scale_inv": torch.ones(1, 1),
}
READ = {
    ("compressed-tensors", "int4"): (INT4, {"quant_method": "compressed-tensors"}, pack_quantized),
    ("compressed-tensors", "fp8"): (FP8, {"quant_method": "compressed-tensors"}, float_quantized),
    ("fp8", "fp8"): (
        BLOCKS, {"quant_method": "fp8", "weight_block_size": [128, 128]}, float_quantized,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stored", READ, ids=" ".join)
def test_what_the_table_has_is_read(tmp_path: Path, stored: tuple[str, str]) -> None:
    tensors, quantization, module = READ[stored]
    assert loads.missing_format("llama", *stored) == ""
    assert _stored(tmp_path, tensors, quantization) == {module.__name__.rpartition(".")[2]}


def test_the_table_has_no_other_quantised_safetensors() -> None:
    listed = {
        (form, weights)
        for form in stored_weights.METHODS
        for weights in loads.FORMATS[form]
    }  # fmt: skip
    assert listed == set(READ)


NVFP4 = {
    "x.weight_packed": torch.zeros(4, 32, dtype=torch.uint8),
    "x.weight_scale": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "x.weight_global_scale": torch.ones(1),
}
AWQ = {"x.qweight": torch.zeros(64, 1, dtype=torch.int32), "x.scales": torch.ones(2, 8)}
NOT_READ = {
    ("compressed-tensors", "nvfp4"): (NVFP4, {"quant_method": "compressed-tensors"}),
    ("autoawq", "int4"): (AWQ, {"quant_method": "awq"}),
    ("gptq", "int4"): (AWQ, {"quant_method": "gptq"}),
}


@pytest.mark.parametrize("stored", NOT_READ, ids=" ".join)
def test_what_the_table_lacks_is_refused(tmp_path: Path, stored: tuple[str, str]) -> None:
    tensors, quantization = NOT_READ[stored]
    assert loads.missing_format("llama", *stored)
    with pytest.raises(CheckpointError):
        _stored(tmp_path, tensors, quantization)


def test_drafters_of_the_first_version_are_read_and_of_the_second_refused() -> None:
    raw = folders.drafter_config()
    assert loads.missing_drafter(1) == ""
    assert Config.from_raw(raw).block_size == 5
    second = raw["dflash_config"] | {"selector_rank": 256, "conv_kernel_size": 2}
    assert loads.missing_drafter(2)
    with pytest.raises(CheckpointError, match="unknown keys"):
        Config.from_raw(raw | {"dflash_config": second})
