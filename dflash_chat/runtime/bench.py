"""A bench of some seconds within the engine that is loaded: ways of decoding, taking turns.

Every round answers one of the built-in prompts in every way, the order reversed from round to
round; only whole rounds count. The chat's controller learns nothing from it. Where the cache holds
the chat, the prompts go on from there, so that none of it need be read again. `bench.py` and
`sweep.py` of the command line measure longer, and compare the texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dflash_chat.bench import CONTROLLER, PLAIN, Way, answer, read_prompts
from dflash_chat.runtime.api import Bench, Benched, Finished, Message
from dflash_chat.runtime.controller import Controller

if TYPE_CHECKING:
    from dflash_chat.runtime.session import Session

ANSWER_TOKENS = 48  # the most of one answer
_ROWS = (2, 4, 8, 16)  # of the passes that are tried, and the widest
_MOST_READ = 512  # tokens to be read of a chat that the prompts may go on from
_SEED = 0  # a bench can be repeated

_Cancelled = Callable[[], bool]


def run(session: Session, request: Bench, cancelled: _Cancelled) -> Iterator[Benched]:
    """States of the bench: at its beginning, after every answer, and at its end.

    Keeps the acceptance of the widest passes for the next plan, unless it was cancelled.
    """
    engine = session.engine
    chats = engine.controller
    chat = request.messages
    if chat and chat[-1].role == "user":  # without an answer: no prompt may follow it
        chat = chat[:-1]
    _, *prompts = read_prompts(None)  # the first one's answer is too short
    ids = session.tokenizer.render(chat) if chat else []
    held = engine.reusable(ids) if ids else 0
    before = chat if _goes_on(session, chat, max(prompts, key=len)) else ()
    state = Benched(request.id, before=held if before else 0)
    yield state
    try:
        state = yield from _rounds(session, request, state, prompts, before, cancelled)
    finally:
        engine.controller = chats
    yield replace(state, forgotten=max(0, held - engine.reusable(ids)) if ids else 0)


def _rounds(
    session: Session, request: Bench, state: Benched, prompts: list[str],
    before: tuple[Message, ...], cancelled: _Cancelled,
) -> Generator[Benched, None, Benched]:  # fmt: skip
    """Rounds until time or prompts are up; the last state is returned."""
    engine, started = session.engine, time.monotonic()
    fixed, own = engine.new_controller(), engine.new_controller()
    ways = _ways(fixed)
    tallies = dict.fromkeys(ways, Way())
    params = replace(request.params, max_tokens=ANSWER_TOKENS, seed=_SEED, stop=())
    for prompt in prompts:
        found: dict[int, Finished] = {}
        for way in ways if state.rounds % 2 else reversed(ways):
            engine.controller = own if way == CONTROLLER else fixed
            draft = way != PLAIN, max(way, 0)
            _, found[way] = answer(session, prompt, params, *draft, before, cancelled)
            state = replace(state, seconds=time.monotonic() - started)
            if found[way].reason == "cancelled":
                return replace(state, reason="cancelled")
            yield state
        tallies = {way: tallies[way].plus(found[way]) for way in ways}
        rates = tuple((way, tally.tok_s) for way, tally in tallies.items())
        state = replace(state, rounds=state.rounds + 1, rates=rates)
        if state.seconds >= request.seconds:
            break
    engine.controller = fixed  # its costs, which every width has corrected, may be kept, too
    return replace(state, reason="done", kept=_keep(session, tallies))


def _ways(controller: Controller) -> list[int]:
    """Plain decoding, numbers of drafted tokens, and, unless the load named one, what pays."""
    drafted = [n - 1 for n in controller.widths[1:] if n in (*_ROWS, controller.widths[-1])]
    return [PLAIN, *drafted, *[CONTROLLER] * (controller.pinned is None)]


def _goes_on(session: Session, chat: tuple[Message, ...], prompt: str) -> bool:
    """Whether the cache holds the chat but for a little, and has room behind it."""
    if not chat:
        return False
    ids = session.tokenizer.render((*chat, Message("user", prompt)))
    engine = session.engine
    end = len(ids) + ANSWER_TOKENS + engine.draft_tokens + 1
    return len(ids) - engine.reusable(ids) <= _MOST_READ and end <= engine.cache.capacity


def _keep(session: Session, tallies: Mapping[int, Way]) -> bool:
    """Keep how far drafts survived where most of them were verified."""
    survival = tallies[max(tallies)].survival
    return survival is not None and session.keep(survival)
