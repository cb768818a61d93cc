"""The plan's part in loading a pair: options for the card at hand, and its costs for the next plan.

Knows which card torch computes on and who measured what; planner.py decides. A card that NVML does
not tell of is loaded on as if there were no plan.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from dflash_chat import calibration, gpu, planner
from dflash_chat.budget import CUDA_CONTEXT
from dflash_chat.calibration import Key
from dflash_chat.gpu import Gpu
from dflash_chat.hub import Installed
from dflash_chat.runtime import memory
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.engine import Engine
from dflash_chat.runtime.width import WidthChooser
from dflash_chat.speed import Costs

log = logging.getLogger(__name__)


def card_of(device: torch.device) -> Gpu | None:
    """The card behind a CUDA device, `free` being what is there for all of us; None without NVML.

    Makes a CUDA context, which counts as ours.
    """
    if device.type != "cuda":
        return None
    index, cards = device.index or 0, gpu.survey().gpus
    if index >= len(cards):
        return None
    return replace(cards[index], free=memory.available() + CUDA_CONTEXT)


def planned(
    installed: Installed, options: EngineOptions, card: Gpu | None, dtype: torch.dtype
) -> EngineOptions:
    """The options with what nobody chose filled in; as they are without a card or in fp32."""
    if card is None or dtype != torch.bfloat16:
        return options
    filled = planner.plan_for(
        installed.pair, installed.build, options, card, measured=calibration.read
    )
    log.info("plan for %s: %s", card.name, filled)
    return filled


def keep_costs(installed: Installed, engine: Engine, card: Gpu | None) -> None:
    """Write down what the engine measured of its graphs, if it did."""
    chooser = engine.graphed.chooser if engine.graphed else None
    if card is None or chooser is None:
        return
    key = Key(card.name, card.driver, installed.pair.name, installed.build.name)
    calibration.write(key, costs_of(chooser))


def costs_of(chooser: WidthChooser) -> Costs:
    """The chooser's figures; its cost of one row leaves out what such a step saves of a draft."""
    verify = {n: ms for n, ms in enumerate(chooser.verify_ms, 1) if math.isfinite(ms)}
    verify[1] += chooser.draft_ms
    return Costs(verify, chooser.draft_ms)
