"""The token's and the repositories' lines: the real client asks a hub on 127.0.0.1.

One process goes through the cases, since the client reads where the hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dflash_chat.access import Access
from dflash_chat.access import State as Answer
from dflash_chat.doctor import account
from dflash_chat.doctor.line import Line, State
from dflash_chat.entries import HubSource
from dflash_chat.hub import Installed
from tests import hub_server, loopback
from tests.hub_server import Hub, Repo, serve

KNOWN, UNKNOWN = "hf_known_secret", "hf_unknown_secret"
DRIVER = """
import json, os, pathlib, sys
from dflash_chat.doctor import account
from dflash_chat.entries import HubSource
saved = pathlib.Path(os.environ["HF_TOKEN_PATH"])
limit_s = float(sys.argv[1])
for name, (repos, token, login) in json.load(sys.stdin).items():
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    saved.write_text(login)
    account.repositories = lambda present: [HubSource(repo, "main", 1) for repo in repos]
    for line in account.lines(limit_s):
        print(json.dumps([name, *vars(line).values()]))
"""
Cases = dict[str, tuple[list[str], str, str]]  # name → repositories, HF_TOKEN, saved login


def lines(
    folder: Path, url: str, cases: Cases, limit_s: float = 60, **more: str
) -> dict[str, list[Line]]:
    """What the real client leads to, case by case."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(folder), "HF_TOKEN_PATH": str(folder / "token")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(limit_s)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "", **settings, **more},
    )
    assert done.returncode == 0, done.stderr
    for secret in (KNOWN, UNKNOWN):
        assert secret not in done.stdout + done.stderr
    found: dict[str, list[Line]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        check, state, text, fix = line[1:]
        found.setdefault(line[0], []).append(Line(check, State(state), text, fix))
    return found


def test_token_and_repositories_as_the_hub_sees_them(own_folders: Path) -> None:
    gated = Repo({}, gated="auto", refusal=hub_server.NOT_ASKED)
    repos = {"me/open": Repo({}), "me/gated": gated}
    with serve(Hub(repos, tokens={KNOWN: "ada"})) as hub:
        found = lines(
            own_folders,
            hub.url,
            {
                "no token": (["me/open", "me/gated"], "", ""),
                "variable": (["me/open", "me/gated"], KNOWN, ""),
                "login": (["me/gone"], "", KNOWN),
                "both": ([], KNOWN, UNKNOWN),
                "wrong": (["me/open"], UNKNOWN, ""),
            },
        )
    token, opened, closed = found["no token"]
    assert (token.state, token.text) == (State.OK, "none; open repositories need none")
    assert opened.state is State.OK
    assert closed.state is State.WARN
    assert "me/gated is behind a gate" in closed.text
    assert "go on working" in closed.text
    assert "hf auth login" in closed.fix
    token, opened, closed = found["variable"]
    assert (token.state, token.text) == (State.OK, "the token from HF_TOKEN; account ada")
    assert closed.state is State.WARN
    assert "accept the terms at https://huggingface.co/me/gated" in closed.fix
    token, gone = found["login"]
    assert token.text == f"the token from {own_folders / 'token'}; account ada"
    assert gone.state is State.WARN
    assert "me/gone" in gone.text
    token, none = found["both"]
    assert token.state is State.WARN
    assert token.fix.startswith("unset HF_TOKEN")
    assert none.state is State.SKIPPED
    token, opened = found["wrong"]
    assert token.state is State.FAIL
    assert "wrong or expired" in token.text
    assert "set HF_TOKEN to a valid one" in token.fix
    assert opened.state is State.WARN


def test_without_a_network_there_is_nothing_to_judge(own_folders: Path) -> None:
    with socket.socket() as silent:  # takes calls and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        case: Cases = {"silent": (["me/open"], KNOWN, "")}
        started = time.monotonic()
        (token, access) = lines(own_folders, url, case, limit_s=0.2)["silent"]
        assert time.monotonic() - started < 60
    assert (token.state, access.state) == (State.SKIPPED, State.SKIPPED)
    assert "did not answer in time" in token.text
    (token, access) = lines(own_folders, "http://127.0.0.1:9", case)["silent"]
    assert (token.state, access.state) == (State.SKIPPED, State.SKIPPED)
    assert "cannot be reached" in access.text


def test_nothing_is_asked_offline(own_folders: Path) -> None:
    case: Cases = {"offline": (["me/open"], KNOWN, "")}
    found = lines(own_folders, "http://127.0.0.1:9", case, HF_HUB_OFFLINE="1")["offline"]
    assert [line.state for line in found] == [State.SKIPPED, State.SKIPPED]
    assert found[0].text == "the token from HF_TOKEN; not tried: HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("answer", list(Answer))
def test_whatever_the_hub_says_a_warning_names_a_step(answer: Answer) -> None:
    line = account._access("me/it", Access(answer, "its message"))
    assert "its message" in line.text
    assert bool(line.fix) is (line.state is State.WARN)


def test_the_repositories_of_installed_pairs_are_asked_about_once(tmp_path: Path) -> None:
    local = loopback.tiny_pair(loopback.make_wheel(tmp_path))
    target, drafter = HubSource("me/target", "main", 1), HubSource("me/drafter", "main", 1)
    fetched = replace(local.drafter, path=None, source=drafter)
    pair = replace(local, drafter=fetched)
    builds = [replace(local.builds[0], source=target), replace(local.builds[0], source=target)]
    present = [Installed(local, local.builds[0], tmp_path, tmp_path, 1)]
    assert account.repositories(present) == []
    present += [Installed(pair, build, tmp_path, tmp_path, 1) for build in builds]
    assert account.repositories(present) == [target, drafter]


def test_what_a_thread_raises_is_raised_where_it_is_asked_for() -> None:
    assert account.later(max, 1, 2).result(60) == 2
    with pytest.raises(ZeroDivisionError):
        account.later(divmod, 1, 0).result(60)
