"""From text to the forced token runs of self-play, in the chat template's own format."""

from __future__ import annotations

from collections.abc import Callable

from dflash_chat.training.openers import SYSTEM_PROMPTS, openers
from dflash_chat.training.selfplay import ASSISTANT, OPENER, USER, Scripts

Encode = Callable[[str], list[int]]

START, END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MASK_TOKEN = "<gh_stars>"


def chat_prompt(text: str) -> str:
    """A first user turn as the template renders it, ready for the assistant."""
    return f"{_opening(DEFAULT_SYSTEM)}{text}{END}\n{START}assistant\n"


def build_scripts(encode: Encode) -> Scripts:
    """Scripts for ChatML targets; `encode` must map the special tokens to their ids."""
    runs: list[tuple[int, ...]] = []
    after: list[int] = []

    def add(text: str, then: int) -> int:
        runs.append(tuple(encode(text)))
        after.append(then)
        return len(runs) - 1

    systems = (DEFAULT_SYSTEM, *SYSTEM_PROMPTS)
    return Scripts(
        starts=tuple(add(_opening(system), OPENER) for system in systems),
        openers=tuple(add(text, USER) for text in openers()),
        close_user=add(f"\n{START}assistant\n", ASSISTANT),
        cut_user=add(f"{END}\n{START}assistant\n", ASSISTANT),
        close_assistant=add(f"\n{START}user\n", OPENER),
        cut_assistant=add(f"{END}\n{START}user\n", OPENER),
        end_id=encode(END)[0],
        runs=tuple(runs),
        after=tuple(after),
    )


def random_scripts(vocab: int, end_id: int = 2) -> Scripts:
    """Scripts of arbitrary ids for targets without a tokenizer; only timing needs them."""
    low = 17 % vocab
    return Scripts(
        runs=((1, low, low + 1), (low, 1), (end_id, low, 1), (low + 2, 1), (end_id, low + 2, 1)),
        after=(OPENER, ASSISTANT, ASSISTANT, OPENER, OPENER),
        starts=(0,),
        openers=(),
        close_user=1,
        cut_user=2,
        close_assistant=3,
        cut_assistant=4,
        end_id=end_id,
    )


def _opening(system: str) -> str:
    return f"{START}system\n{system}{END}\n{START}user\n"
