"""The architectures' own forward through our kernels against the same forward in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dflash_chat.runtime import kernels, models
from dflash_chat.runtime.kernels import grouped, prefill
from dflash_chat.runtime.kernels.grouped import GroupedConfig
from dflash_chat.runtime.quant import cpu
from dflash_chat.runtime.random_weights import RandomWeights
from tests.runtime.kernels.conftest import DEVICE
from tests.runtime.kernels.pairs import KINDS, TAPS, VOCAB
from tests.runtime.kernels.test_step import CAPACITY
from tests.runtime.kernels.truth import relative_error

CHUNKS = (24, 24, 1, 13)  # the sliding layers' rings wrap


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_through_kernels_equal_plain_chunks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "prepacking_serves", lambda *_: False)
    monkeypatch.setattr(grouped, "_config", lambda *_: GroupedConfig(16, 32, 32, 4, 2))
    tile = prefill.Config(16, 16, 4, 2)
    monkeypatch.setattr(prefill, "CONFIGS", {16: tile, 32: tile})
    monkeypatch.setattr(prefill, "MIN_ROWS", 1)
    module = models.find(KINDS[kind]["model_type"])
    config = module.Config.from_hf(KINDS[kind])
    dtype = torch.float32
    weights = RandomWeights(config.tensor_shapes(), "bf16", DEVICE, dtype)
    target = module.Target(config, weights, CAPACITY, dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (sum(CHUNKS),), generator=generator).to(DEVICE)

    def read() -> tuple[Tensor, Tensor]:
        cache = target.new_cache(CAPACITY, largest_block=24)
        pieces = []
        for chunk in ids.split(CHUNKS):
            pieces.append(target.forward(chunk, cache, TAPS))
            cache.commit(len(chunk))
        hidden, features = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return hidden, features

    with torch.inference_mode():
        plain = read()
        asked: list[torch.device] = []
        monkeypatch.setattr(kernels, "serve", lambda device, _: not asked.append(device))
        monkeypatch.setattr("dflash_chat.runtime.cache.KVCache.mask", None)  # must not be built
        ours = read()
    assert asked
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) < (1e-2 if DEVICE.type == "cuda" else 1e-5)  # tf32 or fp32
