"""The drafter against a plain fp64 rewrite of the published forward, and its strict config
reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError
from dflash_chat.runtime import drafter as module
from dflash_chat.runtime.quant import cpu
from tests.runtime import tiny

RAW: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "block_size": 5, "num_target_layers": 3, "vocab_size": 61,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2]},
}  # fmt: skip


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _rope(x: Tensor, positions: list[int], theta: float) -> Tensor:
    """x [T, heads, D], one loop per position and pair."""
    out = x.clone()
    half = x.shape[-1] // 2
    for t, position in enumerate(positions):
        for i in range(half):
            angle = torch.tensor(position * theta ** (-2 * i / (2 * half)), dtype=torch.float64)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * angle.cos() - b * angle.sin()
            out[t, :, i + half] = b * angle.cos() + a * angle.sin()
    return out


def _published_forward(c: module.Config, w: dict[str, Tensor], embed: Tensor, features: Tensor,
                       anchor: int) -> Tensor:  # fmt: skip
    """Final hidden states of the block, [B, C] in fp64, written from the algorithm's
    description.
    """
    n, block, dim = len(features), c.block_size, c.head_dim
    share = c.num_attention_heads // c.num_key_value_heads
    context = _norm(features.double() @ w["fc.weight"].T, w["hidden_norm.weight"], c.rms_norm_eps)
    x = embed[[anchor] + [c.mask_token_id] * (block - 1)].double()
    for i in range(c.num_hidden_layers):
        at = f"layers.{i}."
        y = _norm(x, w[at + "input_layernorm.weight"], c.rms_norm_eps)

        def heads(z: Tensor, name: str, at: str = at) -> Tensor:
            return (z @ w[f"{at}self_attn.{name}.weight"].T).view(len(z), -1, dim)

        q_norm, k_norm = w[at + "self_attn.q_norm.weight"], w[at + "self_attn.k_norm.weight"]
        q = _rope(
            _norm(heads(y, "q_proj"), q_norm, c.rms_norm_eps),
            list(range(n, n + block)),
            c.rope_theta,
        )
        both = torch.cat([context, y])
        k = _rope(
            _norm(heads(both, "k_proj"), k_norm, c.rms_norm_eps),
            list(range(n + block)),
            c.rope_theta,
        )
        v = heads(both, "v_proj")
        out = torch.zeros(block, c.num_attention_heads, dim, dtype=torch.float64)
        for row in range(block):
            visible = [
                j for j in range(n + block)
                if (not c.causal[i] or j <= n + row)
                and (not c.windows[i] or j > n + row - c.windows[i])
            ]  # fmt: skip
            for head in range(c.num_attention_heads):
                scores = k[visible, head // share] @ q[row, head] / dim**0.5
                out[row, head] = scores.softmax(0) @ v[visible, head // share]
        x = x + out.flatten(1) @ w[at + "self_attn.o_proj.weight"].T
        z = _norm(x, w[at + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = z @ w[at + "mlp.gate_proj.weight"].T, z @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return _norm(x, w["norm.weight"], c.rms_norm_eps)


SCALE = 32**0.5  # what a Gemma target multiplies its embeddings by


def _assert_published(
    c: module.Config, drafter: module.Drafter, features: Tensor, scale: float = 1.0
) -> None:
    """The drafter's block after `features` is the one the algorithm's description gives."""
    target = tiny.target()
    packed = tiny.weights(c.tensor_shapes(32), seed=1, scale=0.2)
    seen: list[Tensor] = []

    class Head:
        def logits(self, x: Tensor) -> Tensor:
            seen.append(x)
            return target.lm_head.matmul(x)

    drafter.head = Head()  # type: ignore[assignment]
    drafter.embed = lambda ids: target.embed(ids) * scale
    with torch.inference_mode():
        drafted = drafter.draft(9, 4)
    weights = {name: weight.dequantize().double() for name, weight in packed.items()}
    embed = target.embed_tokens.dequantize()
    truth = _published_forward(c, weights, embed * scale, features, anchor=9)
    torch.testing.assert_close(seen[0].double(), truth[1:], rtol=1e-4, atol=1e-5)
    assert drafted.argmax(-1).tolist() == (truth[1:] @ embed.double().T).argmax(-1).tolist()


def _features(rows: int) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("window", "causal"), [(0, False), (0, True), (4, True), (4, False)])
@pytest.mark.parametrize("context", [1, 4, 23])
def test_the_block_equals_the_published_forward(window: int, causal: bool, context: int) -> None:
    c = tiny.drafter_config(window, causal)
    drafter, features = (
        tiny.drafter(tiny.target(), window=window, causal=causal),
        _features(context),
    )
    with torch.inference_mode():
        for row in features:  # one by one, as plain decoding would bring them
            drafter.observe(row[None])
    _assert_published(c, drafter, features)


@pytest.mark.parametrize("context", [3, 12, 20, 21, 47])
def test_a_block_for_gemma_equals_the_published_forward(context: int) -> None:
    """4 sliding layers, causal, on rings of 12 + 8 rows; 1 full layer, not causal."""
    shape: dict[str, Any] = {"window": 12, "causal": None, "sliding": 4}
    c = tiny.drafter_config(**shape)
    assert c.causal == (True, True, True, True, False)
    drafter, features = tiny.drafter(tiny.target(), **shape, largest_block=8), _features(context)
    assert [len(keys[0]) for keys in drafter.cache.keys] == [20, 20, 20, 20, 261]
    with torch.inference_mode():
        drafter.observe(features[: context // 2])
        drafter.draft(9, 4)  # leaves its block in the rings
        drafter.observe(features[context // 2 :])
    _assert_published(c, drafter, features, SCALE)


def test_tokens_that_only_wait_are_forgotten_without_being_projected() -> None:
    drafter, features = tiny.drafter(tiny.target()), _features(9)
    with torch.inference_mode():
        drafter.observe(features[:4])
        drafter.flush()
        drafter.observe(features[4:])
        drafter.truncate(6)
        assert (drafter.length, drafter.cache.length) == (6, 4)
    _assert_published(tiny.drafter_config(), drafter, features[:6])


def test_fewer_tokens_are_a_prefix_of_the_whole_block() -> None:
    target = tiny.target()
    drafter = tiny.drafter(target)
    with torch.inference_mode():
        drafter.observe(torch.randn(6, 64, generator=torch.Generator().manual_seed(2)))
        whole = drafter.draft(4, 4).tolist()
        assert [drafter.draft(4, n).tolist() for n in (1, 2, 3)] == [
            whole[:1],
            whole[:2],
            whole[:3],
        ]


def test_sliding_layers_are_causal_by_default_and_full_ones_are_not() -> None:
    raw = RAW | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2048}
    config = module.Config.from_raw(raw)
    assert (config.windows, config.causal) == ((2048, 0), (True, False))
    assert module.Config.from_raw(raw | {"is_causal": False}).causal == (False, False)


def test_block_size_may_live_in_dflash_config() -> None:
    raw = {k: v for k, v in RAW.items() if k != "block_size"}
    raw["dflash_config"] = RAW["dflash_config"] | {"block_size": 16}
    assert module.Config.from_raw(raw).block_size == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        (
            {"dflash_config": {**RAW["dflash_config"], "sample_from_anchor": True}},
            "sample_from_anchor",
        ),
        ({"dflash_config": {"mask_token_id": 3}}, "target_layer_ids"),
        ({"dflash_config": None}, "dflash_config"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 3]}}, "target_layer_ids"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 0}, "sliding_window"),
        ({"block_size": 1}, "block_size"),
        ({"hidden_size": "many"}, "many"),
        ({"head_dim": None, "num_attention_heads": 0}, "heads = 0"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        module.Config.from_raw(RAW | change)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rms_norm_eps", "block_size"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        module.Config.from_raw({k: v for k, v in RAW.items() if k != key})


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 5000, '{"a": 1}'])
def test_an_unreadable_config_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        module.Config.from_file(tmp_path / "config.json")


def test_the_published_sizes_come_out_of_the_shapes() -> None:
    """Qwen3-8B-DFlash-b16 is published with 1048.6 M parameters in 58 tensors."""
    raw = RAW | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 5,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "block_size": 16,
        "num_target_layers": 36, "vocab_size": 151936,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    }  # fmt: skip
    shapes = module.Config.from_raw(json.loads(json.dumps(raw))).tensor_shapes(4096)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert len(shapes) == 58
    assert round(count / 1e6, 1) == 1048.6


def test_a_published_config_for_gemma_is_read() -> None:
    raw = {
        "architectures": ["DFlashDraftModel"], "attention_bias": False, "attention_dropout": 0.0,
        "block_size": 16, "bos_token_id": 2, "dtype": "bfloat16", "eos_token_id": 1,
        "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 6, 11, 17, 22, 27]},
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2816, "intermediate_size": 5632, "max_position_embeddings": 262144,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"], "max_window_layers": 5,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 5,
        "num_key_value_heads": 8, "num_target_layers": 30, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "sliding_window": 2048, "tie_word_embeddings": False,
        "use_cache": True, "use_sliding_window": True, "vocab_size": 262144,
        "rope_theta": 1000000, "rope_scaling": None,
    }  # fmt: skip
    config = module.Config.from_raw(raw)
    assert config.windows == (2048, 2048, 2048, 2048, 0)
    assert config.causal == (True, True, True, True, False)
    assert config.softcap == 30.0
    shapes = config.tensor_shapes(2816)
    assert round(sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6, 1) == 429.7


def test_what_a_few_passes_left_is_projected_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = tiny.drafter(tiny.target())
    block, sizes = drafter.config.block_size, []
    project = drafter._project

    def counted(features: torch.Tensor) -> None:
        sizes.append(len(features))
        project(features)

    monkeypatch.setattr(drafter, "_project", counted)
    with torch.inference_mode():
        for rows in (block + 3, 1, module.FEW_BLOCKS * block + 1):
            drafter.observe(_features(rows))
            drafter.flush()
    assert sizes == [block, 3, 1, module.FEW_BLOCKS * block + 1]


@pytest.mark.skipif(not cpu.int8_serves(torch.bfloat16), reason="no fbgemm for this CPU")
def test_a_rounded_block_stands_behind_the_same_context() -> None:
    target, features = tiny.target(dtype=torch.bfloat16), _features(9).bfloat16()
    exact, rounded = (tiny.drafter(target, dtype=torch.bfloat16) for _ in range(2))
    rounded.round_block(cpu.Int8Copy.of)
    with torch.inference_mode():
        blocks = []
        for drafter in (exact, rounded):
            drafter.observe(features)
            blocks.append(drafter.forward(7, 4).float())
    for layer in range(2):
        ours, theirs = rounded.cache.seen(layer, 0), exact.cache.seen(layer, 0)
        assert all(len(a[0]) == 9 and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    error = float((blocks[1] - blocks[0]).norm() / blocks[0].norm())
    assert 0 < error < 0.1
    assert rounded.nbytes < exact.nbytes
