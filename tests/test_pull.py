"""`pull` and `rm` against a hub on 127.0.0.1: what is fetched, refused, kept, said and freed."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dflash_chat import cards, here, hub, pairs
from dflash_chat.errors import (
    EXIT_ACCESS,
    EXIT_DISK,
    EXIT_DOES_NOT_FIT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER,
    EXIT_UNKNOWN_MODEL,
    UnknownModelError,
)
from dflash_chat.gpu import Gpu
from dflash_chat.preflight import PullPlan
from dflash_chat.progress import Step
from tests import hub_server
from tests.hub_pairs import (
    ALL_BYTES,
    DRAFTER,
    GGUF,
    TARGET_FILES,
    WEIGHTS,
    blobs,
    environment,
    run,
    start,
    write_catalogue,
)
from tests.hub_pairs import (
    hub as tiny_hub,
)
from tests.hub_server import Hub, serve


@pytest.fixture
def server(own_folders: Path) -> Iterator[Hub]:
    """The hub with both pairs, which the user's own catalogue knows."""
    write_catalogue(own_folders)
    with serve(tiny_hub()) as running:
        yield running


def steps(out: str) -> list[Step]:
    return [Step(**json.loads(line)) for line in out.splitlines()]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def complete(folder: Path) -> bool:
    """Both repositories of duo are there, byte by byte."""
    found = hub.installed(pairs.find("duo"))
    assert found is not None
    assert sorted(path.name for path in found.target.iterdir()) == TARGET_FILES
    assert (found.target / "model-1.safetensors").read_bytes() == WEIGHTS["a"]
    assert (found.target / "model-2.safetensors").read_bytes() == WEIGHTS["b"]
    assert (found.drafter / "model.safetensors").read_bytes() == DRAFTER
    return not partials(folder)


def partials(folder: Path) -> list[Path]:
    return [path for path in blobs(folder) if path.suffix == ".incomplete"]


# ── what is fetched ─────────────────────────────────────────────────────────────────────────────


def test_both_repositories_are_fetched_and_nothing_else_of_them(
    server: Hub, own_folders: Path
) -> None:
    code, out, errors = run(server, "pull", "duo")
    assert code == EXIT_OK, errors
    assert complete(own_folders)
    found = hub.installed(pairs.find("duo"))
    assert found is not None
    assert out == f"{found.target}\n"
    assert not server.leaked
    order = [line.rpartition("/")[2] for line in server.log if line.startswith("GET /cdn/")]
    assert order[0] == "drafter:model.safetensors"

    nowhere = Hub({}, url="http://127.0.0.1:9")  # and without a network that is known, too
    assert run(nowhere, "pull", "duo", HF_HUB_OFFLINE="1")[:2] == (EXIT_OK, out)
    code, out, _ = run(nowhere, "list", "--json", HF_HUB_OFFLINE="1")
    installed = {row["name"]: row["installed"] for row in json.loads(out)}
    assert (installed["duo"], installed["twin"]) == (True, False)
    code, _, errors = run(nowhere, "pull", "twin", HF_HUB_OFFLINE="1")
    assert code == EXIT_UNKNOWN_MODEL
    assert "HF_HUB_OFFLINE" in errors


def test_of_ggufs_exactly_one_is_fetched(server: Hub) -> None:
    code, out, errors = run(server, "pull", "duo@x")
    assert code == EXIT_OK, errors
    assert Path(out.strip()).name == "x.gguf"
    assert Path(out.strip()).read_bytes() == GGUF["x.gguf"]
    assert server.bodies("x.gguf") == 1
    assert server.bodies("y.gguf") == 0
    assert hub.ensure(pairs.find("duo")).build.name == "x"  # any build serves, if none is named


def test_what_another_program_fetched_is_taken_as_it_is(server: Hub, own_folders: Path) -> None:
    fetch = "import huggingface_hub as hub\n" + "".join(
        f"hub.snapshot_download('{repo}', revision='{commit * 40}')\n"
        for repo, commit in (("me/target", "a"), ("me/drafter", "d"))
    )
    subprocess.run([sys.executable, "-c", fetch], check=True, env=environment(server), timeout=60)
    nowhere = Hub({}, url="http://127.0.0.1:9")
    code, _, errors = run(nowhere, "pull", "duo", HF_HUB_OFFLINE="1")
    assert code == EXIT_OK, errors
    found = hub.installed(pairs.find("duo"))
    assert found is not None
    assert found.bytes == ALL_BYTES
    (found.target / "model-1.safetensors").unlink()
    code, _, errors = run(nowhere, "pull", "duo", HF_HUB_OFFLINE="1")
    assert code == EXIT_UNKNOWN_MODEL


def test_a_pair_of_ones_own_repositories_is_pulled_like_any_other(
    server: Hub, own_folders: Path
) -> None:
    code, out, errors = run(server, "pull", "me/target@main+me/drafter")
    assert code == EXIT_OK, errors
    nowhere = Hub({}, url="http://127.0.0.1:9")
    again = run(nowhere, "pull", "me/target@main+me/drafter", HF_HUB_OFFLINE="1")
    assert again[:2] == (EXIT_OK, out), again


# ── before the first byte ───────────────────────────────────────────────────────────────────────


def test_a_dry_run_says_everything_and_fetches_nothing(server: Hub, own_folders: Path) -> None:
    code, out, errors = run(server, "pull", "duo", "--dry-run")
    assert code == EXIT_OK, errors
    for words in ("licence MIT", "me/drafter at dddddddddddd", "model-2.safetensors", "needed"):
        assert words in out
    code, out, errors = run(server, "pull", "duo", "--dry-run", "--json")
    plan = json.loads(out)
    listed = {file["name"]: file for file in plan["repositories"][1]["files"]}
    assert sorted(listed) == TARGET_FILES
    assert listed["model-1.safetensors"]["bytes"] == len(WEIGHTS["a"])
    assert listed["model-1.safetensors"]["sha256"] == hub_server.sha256(WEIGHTS["a"])
    assert plan["missing_bytes"] == ALL_BYTES
    assert plan["needed_bytes"] > plan["missing_bytes"]
    assert not any(line.startswith("GET") and "/resolve/" in line for line in server.log)
    assert server.bodies() == 0
    assert not (own_folders / "hf" / "hub").exists()


def test_both_gates_are_asked_before_either_is_complained_about(
    server: Hub, own_folders: Path
) -> None:
    for name in ("me/target", "me/drafter"):
        server.repos[name].gated = "auto"
        server.repos[name].refusal = hub_server.NOT_ASKED
    code, out, errors = run(server, "pull", "duo")
    assert (code, out) == (EXIT_ACCESS, "")
    for name in ("me/target", "me/drafter"):
        assert f"{name} is behind a gate" in errors
        assert f"accept the terms at https://huggingface.co/{name}" in errors
    assert not any("/resolve/" in line or "/tree/" in line for line in server.log)
    for repo in server.repos.values():
        repo.refusal = ""
    assert run(server, "pull", "duo")[0] == EXIT_OK
    assert complete(own_folders)


def test_a_renamed_repository_is_followed_and_said(server: Hub, own_folders: Path) -> None:
    server.repos["me/newer"] = server.repos["me/target"]
    server.repos["me/target"] = hub_server.Repo({}, moved_to="me/newer")
    code, _, errors = run(server, "pull", "duo")
    assert code == EXIT_OK, errors
    assert "me/target is now called me/newer" in errors
    assert complete(own_folders)


ON_A_MACHINE = """
import json, sys
from dflash_chat import here, pairs, pull
from dflash_chat.errors import UserError
from dflash_chat.gpu import Gpu
bytes_, name, flags = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
card = Gpu(0, "", "a card", bytes_, bytes_, capability=(9, 0), bandwidth_gb_s=1000.0)
try:
    machine = here.Machine(card)
    sys.exit(pull.run(pairs.find(name), pull.PullArgs(**flags), print, machine))
except UserError as error:
    print(error.message, error.hint)
    sys.exit(error.exit_code)
"""


def on_a_machine(server: Hub, bytes_: int, name: str, **flags: bool) -> tuple[int, str]:
    """A pull as if this computer had a card of so many bytes: exit code and stdout."""
    command = [sys.executable, "-c", ON_A_MACHINE, str(bytes_), name, json.dumps(flags)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(server)
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_what_does_not_fit_is_not_listed_let_alone_fetched(server: Hub) -> None:
    code, out = on_a_machine(server, 1_000_000, "duo")
    assert code == EXIT_DOES_NOT_FIT
    assert "duo@bf16 with a context of" in out
    assert "--force" in out
    assert not any("/tree/" in line for line in server.log)
    assert on_a_machine(server, 1_000_000, "duo", force=True, dry_run=True)[0] == EXIT_OK


def test_the_build_is_the_planners_where_nobody_names_one(own_folders: Path) -> None:
    large, small = here.Machine(gpu(141)), here.Machine(gpu(24))
    pair = pairs.find("gemma-4-26b-a4b")
    assert small.choose(pair)[0].quant == "int4"
    assert large.choose(pair)[0].quant == "bf16"
    assert large.choose(pair)[1]
    assert large.choose(pairs.find("gemma-4-26b-a4b@int4"))[0].quant == "int4"
    assert large.choose(pairs.find("smollm2-135m"))[0].quant == ""
    assert small.fits(pair, pair.build("int4")) == ""
    assert "gemma-4-26b-a4b@bf16" in small.fits(pair, pair.build("bf16"))


def gpu(gib: int) -> Gpu:
    free = cards.usable(gib << 30)
    return Gpu(0, "", "a card", gib << 30, free, capability=(9, 0), bandwidth_gb_s=3000.0)


def test_much_is_not_fetched_by_the_way(server: Hub) -> None:
    plan = PullPlan(pairs.find("duo"), pairs.find("duo").builds[0], None, None, 0, Path(), 0, 0)
    hub.only_small(plan)
    large = PullPlan(plan.pair, plan.build, None, None, 2 * 10**9, Path(), 0, 0)
    with pytest.raises(UnknownModelError, match=r"not installed \(2\.0 GB to fetch\)") as caught:
        hub.only_small(large)
    assert caught.value.hint == "dflash-chat pull duo"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"failures": {"/api/models/*": [429]}}, EXIT_OTHER, "fewer requests (429)"),
        ({"failures": {"/api/models/me/target/*": [502]}}, EXIT_OTHER, "out of order (502)"),
        ({"tokens": {}}, EXIT_ACCESS, "the hub does not know the token from HF_TOKEN"),
        ({"repos": {}}, EXIT_ACCESS, "the hub shows no me/drafter"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_and_a_code(
    server: Hub, own_folders: Path, change: dict[str, object], code: int, words: str
) -> None:
    vars(server).update(change)
    got, out, errors = run(server, "pull", "duo")
    assert (got, out) == (code, "")
    assert words in errors
    assert blobs(own_folders) == []


# ── lines that break, and hubs that lie ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_again(
    server: Hub, own_folders: Path, ranges: bool
) -> None:
    server.cuts, server.ranges = 1, ranges
    server.failures = {"/cdn/*model-2*": [503]}  # and a hub out of order is asked again
    code, out, errors = run(server, "pull", "duo", "--json")
    assert code == EXIT_OK, errors
    assert complete(own_folders)
    assert server.bodies() == 5
    done = [step.done for step in steps(out) if step.stage == "fetching"]
    assert done == sorted(done)


def test_a_file_that_is_refused_on_the_way_leaves_the_others(
    server: Hub, own_folders: Path
) -> None:
    server.failures = {"/cdn/*model-2*": [404] * 9}
    code, _, errors = run(server, "pull", "duo")
    assert code == EXIT_OTHER
    assert "files are complete and kept" in errors
    assert not partials(own_folders)
    kept = {path.name for path in blobs(own_folders)}
    assert kept
    server.failures = {}
    assert run(server, "pull", "duo")[0] == EXIT_OK
    assert complete(own_folders)
    for name, data in (("drafter:model", DRAFTER), ("target:model-1", WEIGHTS["a"])):
        assert hub_server.sha256(data) not in kept or server.bodies(f"{name}.safetensors") == 1


def test_wrong_sizes_are_seen_at_once_and_wrong_bytes_with_verify(
    server: Hub, own_folders: Path
) -> None:
    server.lies = {"model-1.safetensors": bytes(len(WEIGHTS["a"]))}
    folder = Path(run(server, "pull", "duo")[1].strip())
    os.truncate((folder / "model-2.safetensors").resolve(), 1000)
    code, _, errors = run(server, "pull", "duo")
    assert code == EXIT_OK
    assert "model-2.safetensors has 1000 bytes instead of 500000: refused, fetching it" in errors
    assert server.bodies("model-2.safetensors") == 2
    assert server.bodies("model-1.safetensors") == 1

    code, _, errors = run(server, "pull", "duo", "--verify")
    assert code == EXIT_OTHER
    assert "model-1.safetensors from me/target: the size or the sha256 differs" in errors
    assert hub.installed(pairs.find("duo")) is None
    server.lies = {}
    code, _, errors = run(server, "pull", "duo", "--verify")
    assert code == EXIT_OK, errors
    assert complete(own_folders)


STALL = """
import logging
from dflash_chat import hub, pairs, transfer
logging.basicConfig(format="%(message)s")
items = hub.plan(pairs.find("duo")).items()
transfer.run(items, lambda step: step.note and print(step.note), stall_s=0.3)
"""


def test_a_line_on_which_nothing_moves_is_said_to_be_so(server: Hub, own_folders: Path) -> None:
    server.pauses = 0.8
    done = subprocess.run(
        [sys.executable, "-c", STALL],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(server),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"nothing has arrived for \d s: still trying; complete files", done.stderr)
    assert "nothing has arrived for" in done.stdout


# ── interruptions and neighbours ────────────────────────────────────────────────────────────────


def fetching(text: str) -> list[int]:
    """Processes that fetch for a test, told by a word in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def interrupted(
    server: Hub, folder: Path, number: signal.Signals, *flags: str
) -> tuple[int, str, str]:
    """A pull that gets a signal when four of its six files are complete and two on their way."""
    server.seconds = 3
    server.fast = {"model.safetensors"}
    child = start(server, "pull", "duo", *flags, PULL_MARK=str(folder))
    assert wait_until(lambda: server.sent > len(DRAFTER) + 250_000)
    server.seconds = 60
    time.sleep(0.3)  # what was sent is also received and told
    child.send_signal(number)
    out, errors = child.communicate(timeout=40)
    assert "Traceback" not in errors
    assert not partials(folder)
    assert wait_until(lambda: not fetching(str(folder)))
    return child.returncode, out, errors


def test_an_interrupt_says_what_is_kept_and_leaves_no_partial_file(
    server: Hub, own_folders: Path
) -> None:
    code, _, errors = interrupted(server, own_folders, signal.SIGINT)
    assert code == EXIT_INTERRUPTED
    assert "stopped: 4 of 6 files are complete and kept; what was in flight" in errors


def test_programs_are_told_of_an_interrupt(server: Hub, own_folders: Path) -> None:
    code, out, _ = interrupted(server, own_folders, signal.SIGTERM, "--json")
    last = steps(out)[-1]
    assert (code, last.stage, last.exit_code) == (143, "interrupted", 143)
    assert (last.files_done, last.files) == (4, 6)
    assert last.restart_bytes > 0


def test_a_killed_pull_is_completed_by_the_next(server: Hub, own_folders: Path) -> None:
    server.seconds = 30
    server.fast = {"model.safetensors"}
    child = start(server, "pull", "duo", PULL_MARK=str(own_folders))
    assert wait_until(lambda: server.bodies() == 3 and len(partials(own_folders)) == 2)
    child.kill()
    child.communicate()
    assert wait_until(lambda: not fetching(str(own_folders))), "it must die with its parent"
    assert len(partials(own_folders)) == 2
    assert hub.installed(pairs.find("duo")) is None
    server.seconds = 0
    code, _, errors = run(server, "pull", "duo")
    assert code == EXIT_OK, errors
    assert complete(own_folders)
    assert server.bodies("drafter:model.safetensors") == 1  # it was complete before the kill


def test_a_fetching_process_that_is_killed_is_an_error(server: Hub, own_folders: Path) -> None:
    server.seconds = 30
    child = start(server, "pull", "duo", PULL_MARK=str(own_folders))
    assert wait_until(lambda: partials(own_folders))
    (fetcher,) = [pid for pid in fetching(str(own_folders)) if pid != child.pid]
    os.kill(fetcher, signal.SIGKILL)
    _, errors = child.communicate(timeout=40)
    assert child.returncode == EXIT_OTHER
    assert "the fetching process was ended" in errors
    assert not partials(own_folders)


def test_two_pulls_of_one_pair_fetch_once(server: Hub, own_folders: Path) -> None:
    server.seconds = 60
    first = start(server, "pull", "duo")
    assert wait_until(lambda: partials(own_folders))
    second = start(server, "pull", "duo")
    assert second.stderr is not None
    assert "another process is fetching duo; waiting for it" in second.stderr.readline()
    server.seconds = 0
    outputs = [child.communicate(timeout=60) for child in (first, second)]
    assert (first.returncode, second.returncode) == (EXIT_OK, EXIT_OK), outputs
    assert complete(own_folders)
    assert server.bodies() == 3


def test_two_pairs_that_share_files_may_be_fetched_at_once(server: Hub, own_folders: Path) -> None:
    server.seconds = 0.5
    children = [start(server, "pull", name) for name in ("duo", "twin")]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [EXIT_OK, EXIT_OK], outputs
    assert complete(own_folders)
    assert hub.installed(pairs.find("twin")) is not None


# ── the disk ────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_cannot_be_written_further_does_no_damage(
    server: Hub, own_folders: Path
) -> None:
    limit = 450_000  # bytes a file may have; the last and largest has more
    child = subprocess.run(
        [sys.executable, "-m", "dflash_chat", "pull", "duo"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(server),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert child.returncode == EXIT_DISK, child.stderr
    assert "the disk filled up while fetching: complete files are kept" in child.stderr
    assert "HF_HOME" in child.stderr
    assert not partials(own_folders)
    assert run(server, "pull", "duo")[0] == EXIT_OK
    assert complete(own_folders)


SMALL_DISK = """
mount -t tmpfs -o size=70m tmpfs "$HF_HOME" || exit 99
{python} -m dflash_chat pull duo & pull=$!
until ls "$HF_HOME"/hub/*/blobs/*.incomplete >/dev/null 2>&1; do sleep 0.05; done
cat /dev/zero > "$HF_HOME/ballast" 2>/dev/null
wait $pull; echo "rc=$?"
ls "$HF_HOME"/hub/*/blobs/*.incomplete 2>/dev/null
{python} -m dflash_chat pull duo; echo "rc=$?"
rm "$HF_HOME/ballast"
{python} -m dflash_chat pull duo >/dev/null; echo "rc=$?"
"""


def test_a_disk_that_fills_up_is_said_and_a_full_one_before_anything_is_fetched(
    server: Hub, own_folders: Path
) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]).returncode:
        pytest.skip("no disk of one's own without privileges here")
    (own_folders / "hf").mkdir()
    server.seconds = 2
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SMALL_DISK.format(python=sys.executable)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(server),
    )
    assert done.stdout.split() == [f"rc={EXIT_DISK}", f"rc={EXIT_DISK}", f"rc={EXIT_OK}"], done
    assert "the disk filled up while fetching" in done.stderr
    assert "0 kB free, " in done.stderr


# ── lines for programs ──────────────────────────────────────────────────────────────────────────


def test_json_lines_tell_the_whole_pull(server: Hub) -> None:
    server.seconds = 0.5
    code, out, errors = run(server, "pull", "duo", "--json")
    assert (code, errors) == (EXIT_OK, "")
    told = steps(out)
    moving = [step for step in told if step.stage == "fetching"]
    done = [step.done for step in moving]
    assert done == sorted(done)
    assert {step.total for step in moving} == {ALL_BYTES}
    assert {step.files for step in moving} == {6}
    assert any(step.speed > 0 and step.eta_s is not None for step in moving)
    last = told[-1]
    assert (last.stage, last.done, last.files_done) == ("done", ALL_BYTES, 6)
    assert Path(last.path).is_dir()
    assert {field.name for field in fields(Step)} == set(json.loads(out.splitlines()[0]))


def test_json_lines_end_with_the_error(server: Hub) -> None:
    server.repos["me/target"].gated = "auto"
    server.repos["me/target"].refusal = hub_server.NOT_ASKED
    code, out, errors = run(server, "pull", "duo", "--json")
    last = steps(out)[-1]
    assert (code, last.stage, last.exit_code) == (EXIT_ACCESS, "failed", EXIT_ACCESS)
    assert "behind a gate" in last.note
    assert "https://huggingface.co/me/target" in last.hint
    assert last.note in errors


# ── deleting ────────────────────────────────────────────────────────────────────────────────────


def hub_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in blobs(folder))


def all_bytes(folder: Path) -> int:
    """Weights and manifests."""
    manifests = (path.stat().st_size for path in folder.glob("cache/models/*/*.json"))
    return hub_bytes(folder) + sum(manifests)


def freed(errors: str) -> str:
    return errors.splitlines()[0].partition(": ")[2]


def test_rm_keeps_what_another_pair_needs_and_frees_the_rest(
    server: Hub, own_folders: Path
) -> None:
    for name in ("duo", "twin", "duo@x"):
        assert run(server, "pull", name)[0] == EXIT_OK
    assert server.bodies() == 4  # twin needed none of its own
    before = hub_bytes(own_folders)
    code, _, errors = run(server, "rm", "duo", "--yes")
    assert code == EXIT_OK
    assert before - hub_bytes(own_folders) == len(GGUF["x.gguf"])
    assert "another installed pair needs config.json, model-1.safetensors" in errors
    assert hub.installed(pairs.find("duo")) is None
    assert hub.installed(pairs.find("twin")) is not None
    code, _, errors = run(server, "rm", "twin", "--yes")
    assert freed(errors) == "1 MB freed"
    assert blobs(own_folders) == []
    assert run(server, "rm", "twin", "--yes")[0] == EXIT_UNKNOWN_MODEL


def test_rm_leaves_a_neighbours_file_and_a_strangers_in_the_same_snapshot(
    server: Hub, own_folders: Path
) -> None:
    run(server, "pull", "duo@x")
    kept = Path(run(server, "pull", "duo@y")[1].strip())
    before = all_bytes(own_folders)
    code, _, errors = run(server, "rm", "duo@x", "--yes")
    gone = before - all_bytes(own_folders)
    assert gone >= len(GGUF["x.gguf"])
    assert (code, freed(errors)) == (EXIT_OK, f"{gone / 1e3:.0f} kB freed")
    assert kept.read_bytes() == GGUF["y.gguf"]
    assert len(list(kept.parent.glob("*.gguf"))) == 1
    assert hub.installed(pairs.find("duo@y")) is not None

    (kept.parent / "README.md").write_text("fetched by another program")
    assert run(server, "rm", "duo", "--yes")[0] == EXIT_OK
    assert [path.name for path in kept.parent.iterdir()] == ["README.md"]


def test_rm_frees_a_pull_that_was_broken_off(server: Hub, own_folders: Path) -> None:
    server.failures = {"/cdn/*model-2*": [404] * 9}
    assert run(server, "pull", "duo")[0] == EXIT_OTHER
    assert hub_bytes(own_folders) > 0
    (snapshot,) = own_folders.glob("hf/hub/models--me--target/snapshots/*")
    (snapshot / "README.md").write_text("fetched by another program")
    code, _, errors = run(server, "rm", "duo", "--yes")
    assert code == EXIT_OK, errors
    assert blobs(own_folders) == []
    assert [path.name for path in snapshot.iterdir()] == ["README.md"]
