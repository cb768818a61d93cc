"""Writes GGUF files for tests: any header, and a complete tiny llama with its tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dflash_chat.runtime.quant.blocks import GROUP
from dflash_chat.runtime.text import byte_alphabet

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
MERGES = (
    "Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "o u", "r e", "o n", "Ġ a", "in g", "Ġ s",
    "l l", "e d", "Ġ w", "n d", "ou r", "s t", "Ġa nd", "ã ģ", "ð Ł", "ðŁ ĺ", "Ġ Ġ", "ĠĠ ĠĠ",
    "1 2", "Ċ Ċ", "he ll", "hell o",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type number, where the Python type does not say it."""

    kind: int
    value: object


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes, and the results of `MERGES`."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIAL, *byte_alphabet().values(), *merged]


def tokenizer_metadata() -> dict[str, object]:
    tokens = vocabulary()
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """tensors: name -> (type, shape outermost first, bytes)."""
    path.write_bytes(gguf_bytes(metadata, tensors, version, alignment))
    return path


def gguf_bytes(
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    offset, data = 0, b""
    for name, (kind, shape, raw) in tensors.items():
        head += tensor_info(name, shape, TYPE_IDS[kind], offset)
        data += raw + bytes(-len(raw) % alignment)
        offset = len(data)
    return head + bytes(-len(head) % alignment) + data


def tensor_info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    dims = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: object) -> bytes:
    """Type number and value."""
    if isinstance(item, Typed):
        return struct.pack("<I", item.kind) + _raw(item.kind, item.value)
    kind = _kind(item)
    return struct.pack("<I", kind) + _raw(kind, item)


def _kind(item: object) -> int:
    for python_type, kind in ((bool, 7), (int, 4), (float, 6), (str, 8), (list, 9)):
        if isinstance(item, python_type):
            return kind
    raise TypeError(item)


_PACK = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
         12: "<d"}  # fmt: skip


def _raw(kind: int, item: object) -> bytes:
    if kind == 8:
        assert isinstance(item, str)
        return string(item)
    if kind == 9:
        assert isinstance(item, list)
        inner = _kind(item[0]) if item else 4
        return struct.pack("<IQ", inner, len(item)) + b"".join(_raw(inner, i) for i in item)
    return struct.pack(_PACK[kind], item)


# ── block formats, written independently of the package's readers ───────────────────────────────


def raw_f32(weight: Tensor) -> bytes:
    return weight.float().contiguous().numpy().tobytes()


def raw_q4_1(weight: Tensor) -> bytes:
    return quantize_q4_1(weight).numpy().tobytes()


def raw_q8_0(weight: Tensor) -> bytes:
    groups = weight.float().view(weight.shape[0], -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    q = torch.where(scale > 0, groups / scale.float(), 0.0).round().clamp(-127, 127)
    blocks = torch.cat((scale.view(torch.uint8), q.to(torch.int8).view(torch.uint8)), -1)
    return blocks.numpy().tobytes()


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of Q or K as llama.cpp's converter stores them: pairs of the two halves interleaved."""
    head_dim = weight.shape[0] // heads
    order = [
        head * head_dim + half * (head_dim // 2) + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


# ── a complete tiny llama ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of the model that `write_tiny_llama` writes; all widths are multiples of 32."""

    hidden: int = 64
    intermediate: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 512


def hf_weights(seed: int, sizes: TinyLlama = TinyLlama(), scale: float = 0.3) -> dict[str, Tensor]:
    """Seeded weights under Hugging Face's names, before any quantisation."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator) * scale

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(sizes.hidden, generator=generator)

    s = sizes
    weights = {"model.embed_tokens.weight": matrix(len(vocabulary()), s.hidden)}
    for i in range(s.layers):
        at = f"model.layers.{i}."
        weights |= {
            f"{at}input_layernorm.weight": norm(),
            f"{at}self_attn.q_proj.weight": matrix(s.heads * s.head_dim, s.hidden),
            f"{at}self_attn.k_proj.weight": matrix(s.kv_heads * s.head_dim, s.hidden),
            f"{at}self_attn.v_proj.weight": matrix(s.kv_heads * s.head_dim, s.hidden),
            f"{at}self_attn.o_proj.weight": matrix(s.hidden, s.heads * s.head_dim),
            f"{at}post_attention_layernorm.weight": norm(),
            f"{at}mlp.gate_proj.weight": matrix(s.intermediate, s.hidden),
            f"{at}mlp.up_proj.weight": matrix(s.intermediate, s.hidden),
            f"{at}mlp.down_proj.weight": matrix(s.hidden, s.intermediate),
        }
    return weights | {"model.norm.weight": norm()}


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def llama_tensors(
    weights: Mapping[str, Tensor], sizes: TinyLlama = TinyLlama()
) -> dict[str, tuple[str, Sequence[int], bytes]]:
    """The mix of the real file: Q8_0 embedding, F32 norms, Q4_1 for the rest."""
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}
    tensors: dict[str, tuple[str, Sequence[int], bytes]] = {}
    for name, weight in weights.items():
        rows = permuted(weight, h) if (h := heads.get(name.split(".")[-2])) else weight
        if weight.dim() == 1:
            packed = ("F32", weight.shape, raw_f32(rows))
        elif "embed" in name or "lm_head" in name:
            packed = ("Q8_0", weight.shape, raw_q8_0(rows))
        else:
            packed = ("Q4_1", weight.shape, raw_q4_1(rows))
        tensors[gguf_name(name)] = packed
    return tensors


def llama_metadata(sizes: TinyLlama = TinyLlama()) -> dict[str, object]:
    s = sizes
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": s.layers,
        "llama.context_length": s.context,
        "llama.embedding_length": s.hidden,
        "llama.feed_forward_length": s.intermediate,
        "llama.attention.head_count": s.heads,
        "llama.attention.head_count_kv": s.kv_heads,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": s.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(vocabulary()),
        **tokenizer_metadata(),
    }


def write_tiny_llama(path: Path, seed: int = 0, sizes: TinyLlama = TinyLlama()) -> Path:
    """A complete tiny llama with byte-level tokenizer and ChatML template, as a file at `path`."""
    tensors = llama_tensors(hf_weights(seed, sizes), sizes)
    return write_gguf(path, llama_metadata(sizes), tensors)


def quantize_q4_1(weight: Tensor) -> Tensor:
    """fp32 [N, K] -> uint8 [N, K/32·20], rounding to nearest between each group's extremes."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)  # [N, K/32, 32]
    low, high = groups.amin(-1), groups.amax(-1)  # [N, K/32]
    halves = torch.stack(((high - low) / 15, low), dim=-1).half()  # [N, K/32, 2]
    scale, minimum = halves.float()[..., None].unbind(-2)
    steps = torch.where(scale > 0, (groups - minimum) / scale, 0.0)
    q = steps.round().clamp(0, 15).to(torch.uint8)
    packed = q[..., :16] | q[..., 16:] << 4  # [N, K/32, 16]
    return torch.cat((halves.view(torch.uint8), packed), dim=-1).flatten(1)
