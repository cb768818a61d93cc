"""Every answer the hub can give about a repository, and the next step a person is told.

The real client asks a hub on 127.0.0.1. One process goes through all cases, since the client reads
where the hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dflash_chat.access import READABLE, Access, State
from dflash_chat.errors import EXIT_ACCESS, EXIT_OTHER, EXIT_UNKNOWN_MODEL
from tests import hub_server
from tests.hub_server import Hub, Repo, serve

KNOWN, UNKNOWN = "hf_known_secret", "hf_unknown_secret"
SITE = "https://huggingface.co"
# case → repository, revision, environment, whether a login is saved
CASES: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "open": ("me/open", "main", {}, False),
    "granted": ("me/granted", "main", {"HF_TOKEN": KNOWN}, False),
    "renamed": ("me/old", "main", {}, False),
    "no token": ("me/auto", "main", {}, False),
    "token of no account": ("me/auto", "main", {"HF_TOKEN": UNKNOWN}, True),
    "old variable, no account": ("me/open", "main", {"HUGGING_FACE_HUB_TOKEN": UNKNOWN}, False),
    "not accepted": ("me/auto", "main", {"HF_TOKEN": KNOWN}, False),
    "not accepted, saved login": ("me/auto", "main", {}, True),
    "manual": ("me/manual", "main", {"HF_TOKEN": KNOWN}, False),
    "pending": ("me/pending", "main", {"HF_TOKEN": KNOWN}, False),
    "rejected": ("me/rejected", "main", {"HF_TOKEN": KNOWN}, False),
    "scope": ("me/scope", "main", {"HF_TOKEN": KNOWN}, False),
    "gone": ("me/nothing", "main", {"HF_TOKEN": KNOWN}, False),
    "gone or private": ("me/nothing", "main", {}, False),
    "no revision": ("me/open", "f" * 40, {}, False),
    "limit": ("me/limited", "main", {}, False),
    "out of order": ("me/broken", "main", {}, False),
}
DRIVER = """
import json, os, pathlib, sys
from dflash_chat import access
saved = pathlib.Path(os.environ["HF_TOKEN_PATH"])
for name, (repo, revision, environment, login) in json.load(sys.stdin).items():
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(variable, None)
    os.environ.update(environment)
    saved.write_text("hf_known_secret" if login else "")
    answer = access.check(repo, revision)
    error = answer.error()
    print(json.dumps([name, vars(answer), error.exit_code, str(access.token())]))
"""


def ask(
    folder: Path, url: str, cases: dict[str, tuple[str, str, dict[str, str], bool]], **more: str
) -> dict[str, tuple[Access, int, str]]:
    """The real client's answers: what `check` says, its exit code, and where the token was from."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder),
        "HF_TOKEN_PATH": str(folder / "token"),
        "DFLASH_CHAT_LOG": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **settings, **more},
    )
    assert done.returncode == 0, done.stderr
    for secret in (KNOWN, UNKNOWN):
        assert secret not in done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, fields, code, token = json.loads(line)
        found[name] = (Access(**{**fields, "state": State(fields["state"])}), code, token)
    return found


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[Access, int, str]]]:
    def gated(refusal: str, gate: str = "auto") -> Repo:
        return Repo({"config.json": b"{}"}, gated=gate, refusal=refusal)

    hub = Hub(
        repos={
            "me/open": Repo({"config.json": b"{}"}),
            "me/granted": gated(""),
            "me/old": Repo({}, moved_to="me/open"),
            "me/auto": gated(hub_server.NOT_ASKED),
            "me/manual": gated(hub_server.NOT_ASKED, "manual"),
            "me/pending": gated(hub_server.PENDING, "manual"),
            "me/rejected": gated(hub_server.REJECTED, "manual"),
            "me/scope": gated(hub_server.SCOPE),
            "me/limited": Repo({}),
            "me/broken": Repo({}),
        },
        tokens={KNOWN: "ada"},
        failures={"/api/models/me/limited*": [429] * 9, "/api/models/me/broken*": [503] * 9},
        retry_after="7",
    )
    with serve(hub) as server:
        yield ask(tmp_path_factory.mktemp("access"), server.url, CASES)


@pytest.mark.parametrize(
    ("case", "state", "code", "words", "url"),
    [
        ("no token", State.NO_TOKEN, EXIT_ACCESS, ["no token", "hf auth login"], "/me/auto"),
        (
            "token of no account",
            State.INVALID_TOKEN,
            EXIT_ACCESS,
            ["from HF_TOKEN, which hides the login in", "wrong or expired", "unset it"],
            "/settings/tokens",
        ),
        (
            "old variable, no account",
            State.INVALID_TOKEN,
            EXIT_ACCESS,
            ["from HUGGING_FACE_HUB_TOKEN"],
            "/settings/tokens",
        ),
        (
            "not accepted",
            State.NOT_ACCEPTED,
            EXIT_ACCESS,
            ["accept the terms", "HF_TOKEN"],
            "/me/auto",
        ),
        (
            "not accepted, saved login",
            State.NOT_ACCEPTED,
            EXIT_ACCESS,
            ["accept the terms", "the account of the token from /"],
            "/me/auto",
        ),
        (
            "manual",
            State.MANUAL_APPROVAL,
            EXIT_ACCESS,
            ["by hand, which may take days", "dflash-chat list"],
            "/me/manual",
        ),
        ("pending", State.PENDING, EXIT_ACCESS, ["is pending", "once they agree"], "/me/pending"),
        ("rejected", State.REJECTED, EXIT_ACCESS, ["refused", "another pair"], "/me/rejected"),
        (
            "scope",
            State.WRONG_SCOPE,
            EXIT_ACCESS,
            ["Read access to contents of all public gated repos you can access"],
            "/settings/tokens",
        ),
        ("gone", State.GONE, EXIT_ACCESS, ["shows no me/nothing", "HF_TOKEN"], "/me/nothing"),
        ("gone or private", State.GONE, EXIT_ACCESS, ["has no token", "private"], "/me/nothing"),
        (
            "no revision",
            State.NO_REVISION,
            EXIT_OTHER,
            ["has no revision ffff"],
            "/me/open/commits",
        ),
        ("limit", State.BUSY, EXIT_OTHER, ["fewer requests", "in 7 seconds"], ""),
        ("out of order", State.BUSY, EXIT_OTHER, ["out of order (503)"], ""),
    ],
)
def test_a_refusal_has_its_own_words_and_next_step(
    answers: dict[str, tuple[Access, int, str]],
    case: str,
    state: State,
    code: int,
    words: list[str],
    url: str,
) -> None:
    answer, exit_code, _ = answers[case]
    assert (answer.state, exit_code) == (state, code)
    assert answer.state not in READABLE
    for word in words:
        assert word in f"{answer.message} — {answer.hint}"
    assert answer.url == (f"{SITE}{url}" if url else "")


@pytest.mark.parametrize(
    ("case", "state", "repo"),
    [
        ("open", State.OPEN, "me/open"),
        ("granted", State.GRANTED, "me/granted"),
        ("renamed", State.RENAMED, "me/open"),
    ],
)
def test_a_readable_repository_has_a_name_and_a_commit(
    answers: dict[str, tuple[Access, int, str]], case: str, state: State, repo: str
) -> None:
    answer, _, _ = answers[case]
    assert (answer.state, answer.repo, answer.commit) == (state, repo, "c" * 40)
    assert answer.state in READABLE


def test_a_rename_is_said(answers: dict[str, tuple[Access, int, str]]) -> None:
    assert "me/old is now called me/open" in answers["renamed"][0].message


def test_the_source_of_the_token_is_known_and_never_the_token(
    answers: dict[str, tuple[Access, int, str]],
) -> None:
    assert answers["open"][2] == "no token"
    assert answers["granted"][2] == "the token from HF_TOKEN"
    assert answers["not accepted, saved login"][2].endswith("/token")
    assert "hides the login in" in answers["token of no account"][2]


@pytest.mark.parametrize(
    ("settings", "state", "code", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, State.OFFLINE, EXIT_UNKNOWN_MODEL, "unset HF_HUB_OFFLINE"),
        ({}, State.UNREACHABLE, EXIT_OTHER, "check the network"),
    ],
)
def test_without_a_network_that_is_said(
    tmp_path: Path, settings: dict[str, Any], state: State, code: int, words: str
) -> None:
    cases = {"one": CASES["open"]}
    answer, exit_code, _ = ask(tmp_path, "http://127.0.0.1:9", cases, **settings)["one"]
    assert (answer.state, exit_code) == (state, code)
    assert words in answer.hint


def test_a_token_that_is_switched_off_is_no_token(tmp_path: Path) -> None:
    cases = {"one": CASES["not accepted"]}
    settings = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "1"}
    assert ask(tmp_path, "http://127.0.0.1:9", cases, **settings)["one"][2] == "no token"
