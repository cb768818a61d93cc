"""The plan's part in loading a pair: options for the card at hand, and its costs for the next plan.

Knows which card torch computes on and who measured what; planner.py decides. A card that NVML does
not tell of is loaded on as if there were no plan.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from dflash_chat import __version__, calibration, gpu, planner
from dflash_chat.budget import CUDA_CONTEXT
from dflash_chat.calibration import Key
from dflash_chat.gpu import Gpu
from dflash_chat.hub import Installed
from dflash_chat.runtime import memory
from dflash_chat.runtime.api import EngineOptions
from dflash_chat.runtime.engine import Engine
from dflash_chat.speed import Survival

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


def key_of(installed: Installed, card: Gpu | None) -> Key:
    """What a measurement of this pair on this card, or on the CPU, is kept under."""
    device = (card.name, card.driver) if card else ("", "")
    return Key(*device, installed.pair.name, installed.build.name)


def rig_of(engine: Engine, options: EngineOptions) -> str:
    """What else the times of its passes depend on."""
    words = [__version__, torch.__version__, engine.target.kernels]
    words += [options.drafter, options.head, options.draft_head, str(options.draft_rows)]
    words.append(str(engine.draft_tokens))
    if engine.target.device.type == "cpu":
        words.append(f"{torch.get_num_threads()} threads")
    return " ".join(words)


def measure(installed: Installed, engine: Engine, options: EngineOptions, card: Gpu | None) -> None:
    """Time the engine's passes, or take what was measured of its graphs before, and keep it. So on
    a CPU, at the speed that it has now, if its passes still compare as they did. How far drafts got
    in an earlier sweep is where the controller begins.
    """
    pinned, key = options.draft_tokens > 0, key_of(installed, card)
    kept = calibration.read(key).survival
    survival = kept.shares if kept else ()
    on_cpu = engine.target.device.type == "cpu"
    if not on_cpu and (card is None or engine.graphed is None):
        engine.measure(pinned, survival=survival)
        return
    rig = rig_of(engine, options)
    known = calibration.table(key, rig)
    if known is not None and on_cpu:
        known = engine.at_present(known)
    elif known is not None and engine.graphed is not None:
        known = known if known.widths == tuple(engine.graphed.widths) else None
    engine.measure(pinned, known, survival)
    if known is None:
        calibration.write(key, rig, engine.controller.costs.table)


def keep_survival(installed: Installed, engine: Engine, survival: Survival) -> bool:
    """Keep what was accepted for the next plan. Says whether there is a device to keep it for: a
    card must be one that NVML tells of.
    """
    device = engine.target.device
    card = card_of(device)
    if card is None and device.type == "cuda":
        return False
    calibration.write_survival(key_of(installed, card), survival)
    return True
