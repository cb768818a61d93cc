"""Whether the Hugging Face hub knows this machine's token and still opens the installed pairs.

All questions are asked side by side, and nobody waits longer than a few seconds for an answer:
without a network there is nothing to judge. The token itself is never looked at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from dflash_chat import access
from dflash_chat.access import READABLE, Access, State
from dflash_chat.doctor import weights
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.entries import HubSource
from dflash_chat.hub import Installed

T = TypeVar("T")

LIMIT_S = 8.0
_NOTHING_TO_JUDGE = (State.OFFLINE, State.UNREACHABLE, State.BUSY)
_ALREADY_HERE = "the files that are here go on working"


def lines(limit_s: float = LIMIT_S) -> list[Line]:
    """The token's line and one for each repository, after at most `limit_s` seconds."""
    from huggingface_hub import constants

    sources = repositories(weights.installed())
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
        return [skipped("token", f"{access.token()}; not tried: {why}"), skipped("access", why)]
    until = time.monotonic() + limit_s
    account = later(who) if access.token().source else None
    answers = [later(access.check, source.repo, source.revision) for source in sources]
    found = [_token(_answer(account, until) if account else None)]
    for source, answer in zip(sources, answers, strict=True):
        found.append(_access(source.repo, _answer(answer, until)))
    return found if sources else [*found, skipped("access", "no installed pair is from the hub")]


def repositories(present: Sequence[Installed]) -> list[HubSource]:
    """What of the installed pairs came from the hub, targets and drafters, each once."""
    sources = [s for found in present for s in (found.build.source, found.pair.drafter.source)]
    return list({s.repo: s for s in sources if isinstance(s, HubSource)}.values())


def who() -> str | Access:
    """The account of this machine's token, or the hub's reason for not telling."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    try:
        return str(HfApi().whoami()["name"])
    except (OSError, HTTPError) as error:
        return access.explain(error, "your account", "main")


def _token(account: str | Access | None) -> Line:
    used = access.token()
    if not used.source:
        return ok("token", "none; open repositories need none")
    if account is None:
        return skipped("token", f"{used}; the hub did not answer in time")
    if isinstance(account, Access):
        if account.state in _NOTHING_TO_JUDGE:
            return skipped("token", f"{used}; not tried: {account.message}")
        return fail("token", account.message, _step(account))
    if used.hides:
        fix = f"unset {used.source}, if the saved login is the one you mean"
        return warn("token", f"{used}; account {account}", fix)
    return ok("token", f"{used}; account {account}")


def _access(repo: str, answer: Access | None) -> Line:
    if answer is None:
        return skipped("access", f"{repo}: the hub did not answer in time")
    if answer.state in READABLE:
        return ok("access", answer.message)
    if answer.state in _NOTHING_TO_JUDGE:
        return skipped("access", f"{repo}: {answer.message}")
    return warn("access", f"{answer.message}; {_ALREADY_HERE}", _step(answer))


def _step(answer: Access) -> str:
    return answer.hint or f"see {answer.url or 'https://status.huggingface.co'} and try again"


# ── asking without waiting ──────────────────────────────────────────────────────────────────────


def later(function: Callable[..., T], *arguments: object) -> Future[T]:
    """Call `function` in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _answer(future: Future[T], until: float) -> T | None:
    """The result, or None if it is not there at `until`."""
    try:
        return future.result(max(0.0, until - time.monotonic()))
    except TimeoutError:
        return None
