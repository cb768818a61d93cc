"""Random weights: what they must have in common with trained ones."""

from __future__ import annotations

import pytest
import torch

from dflash_chat.runtime.random_weights import QUANTS, RandomWeights


@pytest.mark.parametrize("shape", [(256, 512), (3, 256, 512)])
@pytest.mark.parametrize("quant", QUANTS)
def test_numbers_have_no_mean_and_the_deviation_of_one_over_columns(
    quant: str, shape: tuple[int, ...]
) -> None:
    made = RandomWeights({"mlp.weight": shape}, quant, torch.device("cpu"), torch.float32)
    values = made["mlp.weight"].dequantize()
    assert abs(float(values.mean())) < 4 * 512**-0.5 * values.numel() ** -0.5
    assert float(values.std()) == pytest.approx(512**-0.5, rel=0.03)
    assert torch.equal(values, made["mlp.weight"].dequantize())
