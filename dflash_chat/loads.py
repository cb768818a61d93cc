"""What the runtime loads, as a table for those who must not import torch.

A test compares it with `runtime/models` and `runtime/quant`. Says what is missing, in a clause;
knows no pair.
"""

from __future__ import annotations

ARCHITECTURES = (
    "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "llama", "qwen3",
)  # fmt: skip

FORMATS = {  # how weights are stored -> what they may be
    "safetensors": ("bf16", "fp16", "fp32"),
    "compressed-tensors": ("int4", "fp8"),
    "fp8": ("fp8",),  # as Qwen publishes them
    "gguf": ("q4_0", "q4_1", "q8_0", "bf16", "fp16", "fp32"),
}
GGUF_ARCHITECTURES = ("llama",)
DRAFTER_VERSIONS = (1,)


def missing_architecture(model_type: str) -> str:
    """What the runtime lacks for targets of this type; "" if nothing."""
    return "" if model_type in ARCHITECTURES else f"{model_type} is not read yet"


def missing_format(model_type: str, format_name: str, weights: str) -> str:
    """What the runtime lacks for weights stored like this; "" if nothing."""
    if weights not in FORMATS.get(format_name, ()):
        form = "" if format_name == weights else f"{format_name} "
        return f"{form}{weights} weights are not read yet"
    if format_name == "gguf" and model_type not in GGUF_ARCHITECTURES:
        return f"GGUF files of {model_type} are not read yet"
    return ""


def missing_drafter(version: int) -> str:
    """What the runtime lacks for drafters of this version; "" if nothing."""
    return "" if version in DRAFTER_VERSIONS else f"DFlash{version} drafters are not read yet"
