"""What the hub says about the repositories of a pair, asked by a process of its own.

It can be given up at any moment, and the hub's client, which is slow to import and reads its
settings only once, stays out of the app. `python -m dflash_chat.ui.gate REPO REVISION …` is the
process: one JSON object a repository on stdout.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import asdict

from dflash_chat.access import READABLE, Access, State, check
from dflash_chat.entries import Build, HubSource, Pair

PATIENCE_S = 8.0
_IN_BROWSER = frozenset({  # what a person can change at once, so that asking again makes sense
    State.NO_TOKEN, State.INVALID_TOKEN, State.NOT_ACCEPTED, State.WRONG_SCOPE,
})  # fmt: skip
_BY_OTHERS = frozenset({State.MANUAL_APPROVAL, State.PENDING})
_WORDS = {
    State.OPEN: "open", State.RENAMED: "open", State.GRANTED: "✓ granted",
    State.NO_TOKEN: "! log in", State.INVALID_TOKEN: "! log in", State.NOT_ACCEPTED: "! accept",
    State.MANUAL_APPROVAL: "! ask", State.PENDING: "… pending", State.REJECTED: "✗ refused",
    State.WRONG_SCOPE: "! token", State.GONE: "✗ gone", State.NO_REVISION: "✗ gone",
}  # fmt: skip


def sources(pair: Pair, build: Build) -> list[HubSource]:
    """The repositories that a pull of this build reads, the drafter's first."""
    found = (pair.drafter.source, build.source)
    return [source for source in found if isinstance(source, HubSource)]


def word(answers: list[Access]) -> str:
    """Both gates in one word: the first that is not open, else whether one had to be opened."""
    if not answers:
        return "–"
    shut = [a for a in answers if a.state not in READABLE]
    first = shut or [a for a in answers if a.state is State.GRANTED] or answers
    return _WORDS.get(first[0].state, "? " + first[0].state.value)


def waits(answers: list[Access]) -> bool:
    """Whether a person can open what is shut in the next minutes, with a browser or a login."""
    shut = [a for a in answers if a.state not in READABLE]
    return bool(shut) and all(a.state in _IN_BROWSER for a in shut)


def waits_for_others(answers: list[Access]) -> bool:
    """Whether the authors decide, in hours or days."""
    return any(a.state in _BY_OTHERS for a in answers)


def unreached(why: str) -> Access:
    """An answer that did not come."""
    return Access(State.UNREACHABLE, why, "it is asked again when the pair is fetched")


async def ask(asked: list[HubSource], limit_s: float = PATIENCE_S) -> list[Access]:
    """The hub's answers, in the order of `asked`; `unreached` ones after `limit_s` seconds."""
    if not asked:
        return []
    words = [part for source in asked for part in (source.repo, source.revision)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dflash_chat.ui.gate", *words,
        stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = await asyncio.wait_for(process.communicate(), limit_s)
        told = [json.loads(line) for line in out.splitlines()]
        answers = [Access(**{**each, "state": State(each["state"])}) for each in told]
    except TimeoutError:
        answers = [unreached("the hub has not answered in time")]
    except ValueError:
        answers = [unreached("the hub's answer was not understood")]
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return answers or [unreached("the hub could not be asked")]


def main(words: list[str]) -> int:
    """Be the process."""
    for repo, revision in zip(words[::2], words[1::2], strict=True):
        sys.stdout.write(json.dumps(asdict(check(repo, revision))) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
