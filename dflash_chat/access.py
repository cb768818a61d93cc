"""May this machine read a repository of the Hugging Face hub, and if not, what is the next step.

Knows the hub's refusals and where a token comes from. Never returns, logs or prints the token, and
never accepts terms for anybody: that is done in a browser, so the address is given.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dflash_chat.errors import AccessError, UnknownModelError, UserError

_SITE = "https://huggingface.co"  # terms are accepted there, whatever mirror serves the files
_TOKENS = f"{_SITE}/settings/tokens"
_SCOPE = "Read access to contents of all public gated repos you can access"

log = logging.getLogger(__name__)


class State(StrEnum):
    """What the hub says to this machine about one repository at one revision."""

    OPEN = "open"
    GRANTED = "granted"
    RENAMED = "renamed"
    NO_TOKEN = "no-token"
    INVALID_TOKEN = "invalid-token"
    NOT_ACCEPTED = "not-accepted"
    MANUAL_APPROVAL = "manual-approval"
    PENDING = "pending"
    REJECTED = "rejected"
    WRONG_SCOPE = "wrong-scope"
    GONE = "gone"
    NO_REVISION = "no-revision"
    OFFLINE = "offline"
    UNREACHABLE = "unreachable"
    BUSY = "busy"
    FAILED = "failed"


READABLE = frozenset({State.OPEN, State.GRANTED, State.RENAMED})
_EXIT_UNKNOWN = frozenset({State.OFFLINE})
_EXIT_OTHER = frozenset({State.NO_REVISION, State.UNREACHABLE, State.BUSY, State.FAILED})


@dataclass(frozen=True)
class Token:
    """Where this machine's token comes from: a variable, a file, or nowhere (""). Not the token.

    `hides` is the file of a saved login that the variable overrides, or "".
    """

    source: str
    hides: str = ""

    def __str__(self) -> str:
        if not self.source:
            return "no token"
        hidden = f", which hides the login in {self.hides}" if self.hides else ""
        return f"the token from {self.source}{hidden}"


@dataclass(frozen=True)
class Access:
    """The answer of `check`. `url` is the page to open for the next step, or "".

    `repo` is the repository's present name, `commit` what the revision stands for; both are ""
    unless the state is in `READABLE`.
    """

    state: State
    message: str
    hint: str = ""
    url: str = ""
    repo: str = ""
    commit: str = ""

    def error(self) -> UserError:
        """The same as an exception with its exit code."""
        kind: type[UserError] = AccessError
        if self.state in _EXIT_UNKNOWN:
            kind = UnknownModelError
        elif self.state in _EXIT_OTHER:
            kind = UserError
        return kind(self.message, hint=self.hint)


def token() -> Token:
    """Where the token would come from, in the order the hub's client looks. No network."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return Token("")
    saved = Path(constants.HF_TOKEN_PATH)
    try:
        has_saved = bool(saved.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        has_saved = False
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Token(name, str(saved) if has_saved else "")
    if has_saved:
        return Token(str(saved))
    return Token("another login" if get_token() else "")


def check(repo: str, revision: str) -> Access:
    """Ask the hub about one repository, before any of its files is asked for.

    Returns, and does not raise, for everything that a person or the hub can be the reason of.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    if constants.HF_HUB_OFFLINE:
        return _offline(repo)
    api, gate = HfApi(), ""
    try:
        info = api.model_info(repo, revision=revision)
        gate = str(info.gated or "")
        if gate:  # mirrors do not answer this question, and need not for open repositories
            api.auth_check(repo)
    except (OSError, ValueError, HTTPError) as error:
        return explain(error, repo, revision, gate)
    now, commit = info.id or repo, info.sha or revision
    if now.lower() != repo.lower():
        told = f"{repo} is now called {now}", "the catalogue entry is old; the files are the same"
        return Access(State.RENAMED, *told, f"{_SITE}/{now}", now, commit)
    state = State.GRANTED if gate else State.OPEN
    words = "its terms are accepted" if gate else "is open to everybody"
    return Access(state, f"{repo} {words}", url=f"{_SITE}/{repo}", repo=repo, commit=commit)


def explain(error: Exception, repo: str, revision: str, gate: str = "") -> Access:
    """A refusal or failure of the hub's client in words. `gate`: "auto", "manual" or unknown ("").

    The order matters: a gate is also a "missing repository", and so is a wrong token.
    """
    from huggingface_hub import errors

    log.debug("hub: %s", error, exc_info=error)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.DryRunError)):  # why not?
        cause = error.__cause__
        if isinstance(cause, (errors.HfHubHTTPError, errors.OfflineModeIsEnabled)):
            error = cause
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(repo)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return _at_the_gate(error, repo, gate, status)
    if isinstance(error, errors.RevisionNotFoundError):
        return Access(
            State.NO_REVISION,
            f"{repo} has no revision {revision}",
            "the authors withdrew it or the catalogue is old; update dflash-chat",
            f"{_SITE}/{repo}/commits",
        )
    if status == 401 and _token_is_refused():
        return _invalid_token()
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return _gone(repo)
    if status == 429 or status >= 500:
        wait = str(getattr(response, "headers", {}).get("Retry-After", ""))
        when = f"in {wait} seconds" if wait.isdigit() else "in a few minutes"
        what = "asks for fewer requests (429)" if status == 429 else f"is out of order ({status})"
        return Access(State.BUSY, f"the hub {what}", f"try again {when}")
    if status:
        return Access(State.FAILED, f"the hub answered {repo} with an error ({status})")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    silent = (errors.HTTPError, errors.LocalEntryNotFoundError, errors.DryRunError)  # type: ignore[attr-defined]
    if isinstance(error, silent):
        return Access(
            State.UNREACHABLE, "the Hugging Face hub cannot be reached", "check the network"
        )
    return Access(State.FAILED, f"the hub download failed: {first}")


def _offline(repo: str) -> Access:
    return Access(
        State.OFFLINE,
        f"{repo} is not in the hub cache and HF_HUB_OFFLINE is set",
        "unset HF_HUB_OFFLINE once to fetch it",
    )


def _at_the_gate(error: Exception, repo: str, gate: str, status: int) -> Access:
    """A gated repository says why in its text; what it does not say follows from the token."""
    page, used = f"{_SITE}/{repo}", token()
    text = str(error).lower()
    if not used.source:
        return Access(
            State.NO_TOKEN,
            f"{repo} is behind a gate and this machine has no token",
            f"log in with `hf auth login` (or set HF_TOKEN), then accept the terms at {page}",
            page,
        )
    if status == 401:
        return _invalid_token()
    if "awaiting" in text:
        return Access(
            State.PENDING,
            f"access to {repo} is pending: its authors have not decided yet",
            f"asked for with {used}; see {page} and pull again once they agree",
            page,
        )
    if "rejected" in text:
        return Access(
            State.REJECTED,
            f"the authors of {repo} have refused access",
            f"asked for with {used}; see {page}, or choose another pair: dflash-chat list",
            page,
        )
    if "fine-grained" in text or not _is_gated(error):
        return Access(
            State.WRONG_SCOPE,
            f"{used} may not read gated repositories such as {repo}",
            f"a fine-grained token needs {_SCOPE!r}: tick it at {_TOKENS}",
            _TOKENS,
        )
    if gate == "manual":
        return Access(
            State.MANUAL_APPROVAL,
            f"{repo} is behind a gate and its authors approve by hand, which may take days",
            f"ask for access at {page} with the account of {used}; meanwhile: dflash-chat list",
            page,
        )
    return Access(
        State.NOT_ACCEPTED,
        f"{repo} is behind a gate and its terms are not accepted yet",
        f"accept the terms at {page} with the account of {used}, then try again",
        page,
    )


def _is_gated(error: Exception) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError)


def _invalid_token() -> Access:
    used = token()
    step = (
        f"set {used.source} to a valid one or unset it"
        if used.source.isupper()
        else "log in again with `hf auth login --force`"
    )
    return Access(
        State.INVALID_TOKEN,
        f"the hub does not know {used}: wrong or expired",
        f"{step}; tokens are made at {_TOKENS}",
        _TOKENS,
    )


def _gone(repo: str) -> Access:
    used = token()
    who = f"not even with {used}" if used.source else "and this machine has no token"
    return Access(
        State.GONE,
        f"the hub shows no {repo}, {who}: gone, renamed or private",
        "the catalogue may be old: update dflash-chat; for a private one log in as its owner",
        f"{_SITE}/{repo}",
    )


def _token_is_refused() -> bool:
    """A 401 alone does not say whether the token or the repository is the reason; this does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if not token().source:
        return False
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        return getattr(getattr(error, "response", None), "status_code", 0) == 401
    return False
