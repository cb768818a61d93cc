"""Conversations of the kinds that are saved, for tests."""

from __future__ import annotations

from hypothesis import strategies as st

from dflash_chat.chat import Conversation, Turn
from dflash_chat.runtime.api import (
    Finished,
    ModelInfo,
    Prefill,
    SamplingParams,
    Spec,
    StepStats,
    Timing,
    Tokens,
    Usage,
)

INFO = ModelInfo(
    "smollm2-135m", "target", "drafter", "cpu", "fp32", "torch", 2048, 8, 7, 1, 1, 1, 0.1,
    {"torch": "2"},
)  # fmt: skip


def step(ms: float = 10.0, drafted: int = 7, accepted: int = 2) -> StepStats:
    return StepStats(drafted, accepted, accepted + 1, ms / 4, ms / 4, ms / 4, ms / 4, 100)


def recorded(chat: Conversation, words: str, ms: float = 10.0) -> Turn:
    """Append an answer of which every word is a verify pass of `ms` milliseconds."""
    turn = chat.begin_answer()
    turn.trace.append(Prefill(1, 0, 4, 4))
    spec, first, *rest = Spec(), *words.split(" ")
    turn.trace.append(Tokens(1, first, 1))
    for word in rest:
        stats = step(ms)
        spec = spec.add(stats)
        turn.trace.append(Tokens(1, " " + word, stats.committed, stats))
    turn.content = words
    seconds = len(rest) * ms / 1000
    usage = Usage(4, 0, 1 + 3 * len(rest))
    timing = Timing(1.0, 0.05, seconds, 3 * len(rest) / seconds if seconds else 0.0)
    turn.figures = Finished(1, "stop", usage, spec, timing)
    chat.end_answer()
    return turn


def branched() -> Conversation:
    """Two questions; the first answer regenerated, the second question edited."""
    chat = Conversation("Be brief.", pair="smollm2-135m", build="q4_1", info=INFO)
    chat.params, chat.draft = SamplingParams(0.7, stop=("END",), seed=3), False
    chat.ask("Why is the sky blue?")
    first = recorded(chat, "Rayleigh scattering of sunlight.")
    chat.regenerate(first.id)
    recorded(chat, "Because **air** scatters blue.")
    second = chat.ask("And the sea?")
    recorded(chat, "It mirrors the sky, mostly.")
    chat.edit(second.id, "And the grass?")
    chat.answer("Chloro", "stopped")
    return chat


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any tree with any text."""
    chat = Conversation(draw(st.text()))
    texts = st.text(min_size=1)
    chat.ask(draw(texts))
    for _ in range(draw(st.integers(0, 8))):
        turn = draw(st.sampled_from(list(chat.tree.values())))
        if turn.role == "assistant":
            chat.switch(turn.id)
            chat.tip = turn.id
            chat.ask(draw(texts))
        else:
            chat.tip = turn.id
            chat.answer(draw(texts), draw(st.sampled_from(["complete", "stopped", "failed"])))
    chat.switch(draw(st.sampled_from(list(chat.tree))))
    return chat


def essence(chat: Conversation) -> object:
    """All that must survive a file, without ids and without the traces."""
    number = {id_: n for n, id_ in enumerate(chat.tree)}
    turns = [
        (
            t.role, t.content, t.thinking, t.state, t.created,
            t.figures and vars(t.figures) | {"id": 0},
            None if t.parent is None else number[t.parent],
        )
        for t in chat.tree.values()
    ]  # fmt: skip
    facts = {key: value for key, value in vars(chat).items() if key not in ("id", "tip", "tree")}
    return facts, number.get(chat.tip or ""), turns
