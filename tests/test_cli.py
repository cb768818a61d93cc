"""What can be typed, what leaves on which stream, and the exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest

from dflash_chat import __version__, bench_random, cli, commands, completion, errors
from dflash_chat.chat import Conversation
from dflash_chat.config import Config
from dflash_chat.errors import (
    EXIT_DISK,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER,
    EXIT_UNKNOWN_MODEL,
    EXIT_USAGE,
    DiskError,
)
from dflash_chat.runtime.api import EngineOptions, SamplingParams
from dflash_chat.settings import KEYS, BenchArgs, OnceArgs, RandomBenchArgs
from dflash_chat.store import Store
from tests.saved import branched, essence

pytestmark = pytest.mark.usefixtures("own_folders")


@dataclass
class Runners:
    """Stands in for once, bench and the TUI: remembers what they were given."""

    got: list[OnceArgs | BenchArgs] = field(default_factory=list)
    chats: list[dict[str, object]] = field(default_factory=list)
    error: BaseException | None = None

    def run(self, args: OnceArgs | BenchArgs) -> int:
        self.got.append(args)
        if self.error:
            raise self.error
        return EXIT_OK

    def chat(self, **arguments: object) -> int:
        self.chats.append(arguments)
        return EXIT_OK


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> Runners:
    runners = Runners()
    for name in ("once", "bench", "sweep", "ui.app"):
        module = ModuleType(f"dflash_chat.{name}")
        vars(module)["run"] = runners.chat if name == "ui.app" else runners.run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, leaf = module.__name__.rpartition(".")
        monkeypatch.setattr(sys.modules.get(parent) or __import__(parent), leaf, module, False)
    return runners


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Streams named in the set are terminals; all of them at first."""
    terminals = {"stdin", "stdout", "stderr"}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        commands, "_is_terminal", lambda s: any(s is getattr(sys, name) for name in terminals)
    )
    return terminals


def run(*argv: str, piped: bytes | None = b"") -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, its streams not terminals."""
    return subprocess.run(
        [sys.executable, "-m", "dflash_chat", *argv],
        input=None if piped is None else piped.decode(),
        capture_output=True,
        text=True,
        timeout=60,
    )


# ── once, bench, chat ───────────────────────────────────────────────────────────────────────────


def test_once_gets_prompt_pair_and_settings(runners: Runners, terminal: set[str]) -> None:
    flags = ["--no-draft", "--stats", "--json", "-o", "temperature=0.5", "-o", "temperature=0.7"]
    names = ["-m", "smollm2", "-s", "brief", "--seed", "3", "--max-tokens", "9"]
    code = cli.main(["--once", "hi", *names, *flags])
    (got,) = runners.got
    assert code == EXIT_OK
    assert isinstance(got, OnceArgs)
    assert (got.prompt, got.pair, got.system) == ("hi", "smollm2-135m", "brief")
    assert (got.draft, got.stats, got.json, got.extract) == (False, True, True, False)
    assert cli.main(["--once", "hi", "-x"]) == EXIT_OK
    short = runners.got[-1]
    assert isinstance(short, OnceArgs)
    assert (short.prompt, short.json, short.extract) == ("hi", False, True)
    sampling = got.settings.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.7, 3, 9)


def test_once_is_greedy_and_drafted_unless_told_otherwise(
    runners: Runners, terminal: set[str]
) -> None:
    cli.main(["--once", "hi"])
    (got,) = runners.got
    assert isinstance(got, OnceArgs)
    assert got == OnceArgs("hi")
    assert got.settings.sampling.temperature == 0


@pytest.mark.parametrize(
    ("argv", "piped", "prompt"),
    [
        (["--once", "Sum this up."], "a long text\n\n", "a long text\nSum this up."),
        (["--once"], "a question?\n", "a question?"),
        ([], "a question?", "a question?"),
        (["-o", "seed=1"], "äöü €", "äöü €"),
        (["--once", "hi"], "", "hi"),
    ],
)
def test_what_is_piped_comes_before_the_prompt(
    runners: Runners,
    terminal: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    piped: str,
    prompt: str,
) -> None:
    terminal.clear()
    (tmp_path / "in").write_text(piped, encoding="utf-8")
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(argv) == EXIT_OK
    (got,) = runners.got
    assert isinstance(got, OnceArgs)
    assert got.prompt == prompt


def test_bench_gets_its_own_arguments(runners: Runners, terminal: set[str]) -> None:
    chosen = ["--prompts", "p.jsonl", "--limit", "3", "--max-tokens", "9", "-o", "k=4"]
    assert cli.main(["bench", "-m", "smollm2", *chosen, "--json"]) == EXIT_OK
    (got,) = runners.got
    assert isinstance(got, BenchArgs)
    assert (got.pair, got.prompts, got.limit, got.json) == (
        "smollm2-135m", Path("p.jsonl"), 3, True,
    )  # fmt: skip
    assert (got.settings.sampling.max_tokens, got.settings.engine.draft_tokens) == (9, 4)


@pytest.mark.parametrize("sweep", [False, True])
def test_sweep_reaches_both_forms_of_bench(
    sweep: bool, runners: Runners, terminal: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RandomBenchArgs] = []
    monkeypatch.setattr(bench_random, "run", lambda args: given.append(args) or EXIT_OK)
    flags = ["--sweep"] if sweep else []
    assert cli.main(["bench", *flags, "--limit", "2"]) == EXIT_OK
    assert cli.main(["bench", "--random-weights", "qwen3-8b", *flags]) == EXIT_OK
    (got,) = runners.got
    assert isinstance(got, BenchArgs)
    assert (got.sweep, got.limit, given[0].sweep) == (sweep, 2, sweep)


def test_bench_takes_the_formats_of_drafter_and_heads_in_both_its_forms(
    runners: Runners, terminal: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RandomBenchArgs] = []

    def measured(args: RandomBenchArgs) -> int:
        given.append(args)
        return EXIT_OK

    monkeypatch.setattr(bench_random, "run", measured)
    chosen = ["--drafter", "fp8", "--draft-head", "fp8:9", "-o", "head=fp8"]
    assert cli.main(["bench", *chosen]) == EXIT_OK
    assert cli.main(["bench", "--random-weights", "qwen3-8b", *chosen]) == EXIT_OK
    (got,) = runners.got
    assert isinstance(got, BenchArgs)
    want = EngineOptions(drafter="fp8", draft_head="fp8", draft_rows=9, head="fp8")
    assert got.settings.engine == given[0].options == want


@pytest.mark.parametrize(
    "named",
    [
        ["-m", "smollm2@bf16"],
        ["-m", "smollm2", "--quant", "bf16"],
        ["-m", "smollm2", "-o", "quant=BF16"],
        ["-m", "smollm2@bf16", "--quant", "bf16"],
    ],
)
def test_a_build_is_named_beside_the_pair_or_by_itself(
    runners: Runners, terminal: set[str], named: list[str]
) -> None:
    assert cli.main([*named, "--once", "hi"]) == EXIT_OK
    assert cli.main(["bench", *named]) == EXIT_OK
    assert cli.main(named) == EXIT_OK
    assert [(got.pair, got.settings.quant) for got in runners.got] == [("smollm2-135m", "bf16")] * 2  # type: ignore[union-attr]
    assert [(got["pair"], got["quant"]) for got in runners.chats] == [("smollm2-135m", "bf16")]


def test_the_model_may_stand_before_the_command(runners: Runners, terminal: set[str]) -> None:
    assert cli.main(["-m", "nonsense", "bench"]) == EXIT_UNKNOWN_MODEL


def test_the_chat_starts_with_the_cards_sampling(runners: Runners, terminal: set[str]) -> None:
    assert cli.main(["-s", "Be kind.", "-o", "top_k=5"]) == EXIT_OK
    (got,) = runners.chats
    assert (got["pair"], got["system"], got["draft"]) == ("smollm2-135m", "Be kind.", True)
    assert got["params"] == SamplingParams(temperature=0.2, top_p=0.9, top_k=5)


def test_the_chat_refuses_a_redirected_screen(
    runners: Runners, terminal: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.discard("stderr")
    assert cli.main([]) == EXIT_USAGE
    assert runners.chats == []
    assert "stderr is not a terminal" in capsys.readouterr().err


def test_a_wrong_key_in_the_configuration_is_named(
    runners: Runners, terminal: set[str], own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_folders / "config" / "dflash-chat" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('[keys]\nhelpp = "f7"\n')
    assert cli.main([]) == EXIT_USAGE
    assert "did you mean help?" in capsys.readouterr().err
    file.write_text('theme = "nord"\n[keys]\nhelp = "f7"\n')
    assert cli.main([]) == EXIT_OK
    (got,) = runners.chats
    assert got["config"] == Config("nord", {"help": "f7"})


@pytest.mark.parametrize(
    ("term", "argv", "piped", "why"),
    [
        ("dumb", [], "", "TERM is dumb"),
        ("xterm", [], "stdout", "stdout is not a terminal"),
        ("xterm", ["--plain"], "", ""),
        ("xterm", ["--plain"], "stdin", ""),
    ],
)
def test_a_chat_in_lines(
    runners: Runners,
    terminal: set[str],
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    argv: list[str],
    piped: str,
    why: str,
) -> None:
    taken: list[tuple[object, ...]] = []
    said: list[str] = []
    terminal.discard(piped)
    module = ModuleType("dflash_chat.plain")
    vars(module)["say"] = said.append
    vars(module)["run"] = lambda *given: taken.append(given) or EXIT_OK
    monkeypatch.setitem(sys.modules, "dflash_chat.plain", module)
    monkeypatch.setattr(sys.modules["dflash_chat"], "plain", module, False)
    monkeypatch.setenv("TERM", term)
    assert cli.main([*argv, "-s", "Be kind.", "--stats"]) == EXIT_OK
    ((pair, settings, *rest),) = taken
    assert (pair, rest) == ("smollm2-135m", ["Be kind.", True, True, None])
    assert settings.sampling == SamplingParams(temperature=0.2, top_p=0.9)
    assert runners.chats == []
    assert said == ([f"{why}, so the chat goes line by line"] if why else [])


# ── errors and exit codes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--once", "hi", "-m", "smolm2"], EXIT_UNKNOWN_MODEL, "did you mean smollm2"),
        (["--once", "hi", "-o", "temprature=1"], EXIT_USAGE, "did you mean temperature?"),
        (["--once", "hi", "--seed", "x"], EXIT_USAGE, "option seed=x"),
        (["--once"], EXIT_USAGE, "there is no prompt"),
        (["--once", "hi", "-x", "--json"], EXIT_USAGE, "two ways to print"),
        (["-x"], EXIT_USAGE, "-x need --once"),
        (["hello"], EXIT_USAGE, "To ask something"),
        (["shwo"], EXIT_USAGE, "no command 'dflash-chat shwo'\n  did you mean show"),
        (["sessions", "serach", "x"], EXIT_USAGE, "did you mean search"),
        (["list", "-x"], EXIT_USAGE, "see dflash-chat list --help"),
        (["--max-token", "3"], EXIT_USAGE, "did you mean --max-tokens"),
        (["pull"], EXIT_USAGE, "PAIR"),
        (["pull", "nonsense"], EXIT_UNKNOWN_MODEL, "no pair named"),
        (["pull", "smollm2", "--quant", "q4"], EXIT_UNKNOWN_MODEL, "did you mean q4_1?"),
        (["rm", "smollm2"], EXIT_UNKNOWN_MODEL, "not installed"),
        (["--once", "hi", "-m", "smollm2@q4"], EXIT_UNKNOWN_MODEL, "did you mean q4_1?"),
        (["--once", "hi", "-m", "gpt-oss"], EXIT_UNKNOWN_MODEL, "cannot be loaded: gpt_oss"),
        (["--once", "hi", "-m", "smollm2@q4_1", "--quant", "bf16"], EXIT_USAGE, "two builds are"),
        (["bench", "--quant", "/"], EXIT_USAGE, "expected the name of a build"),
        (["bench", "--limit", "0"], EXIT_USAGE, "--limit must be at least 1"),
        (["bench", "--widths", "4,x"], EXIT_USAGE, "'4,x': expected e.g. 4,8,16"),
        (["bench", "--widths", "4,8"], EXIT_USAGE, "--widths needs --random-weights PAIR"),
        (["bench", "--random-weights", "qwen3-8b", "--limit", "2"], EXIT_USAGE, "--limit does not"),
        (["bench", "--drafter", "int4"], EXIT_USAGE, "invalid choice"),
        (["bench", "--draft-head", "half"], EXIT_USAGE, "fp8, a number of rows, or fp8:rows"),
        (["bench", "--limit", "many"], EXIT_USAGE, "invalid int value"),
        (["completion", "tcsh"], EXIT_USAGE, "invalid choice"),
        (["list", "--json", "-q"], EXIT_USAGE, "not allowed with"),
    ],
)
def test_mistakes_are_one_line_a_hint_and_a_code(
    runners: Runners,
    terminal: set[str],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    words: str,
) -> None:
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("dflash-chat: ")
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DiskError("full", hint="delete something"), EXIT_DISK, "full\n  delete something\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, ""),
        (OSError(errno.ENOSPC, "No space left"), EXIT_DISK, "written: No space left\n  free some"),
        (RuntimeError("odd\nthing"), EXIT_OTHER, "RuntimeError: odd thing\n  set DFLASH_CHAT_LOG"),
    ],
)
def test_what_escapes_a_command_becomes_a_code(
    runners: Runners,
    terminal: set[str],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
) -> None:
    runners.error = error
    assert cli.main(["--once", "hi"]) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_a_traceback_is_there_for_those_who_ask() -> None:
    program = "from dflash_chat import cli, hub; hub.installed = None; cli.main(['list'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "DFLASH_CHAT_LOG": "debug"},
    )
    assert "Traceback" in done.stderr


def test_help_names_every_exit_code() -> None:
    out = run("--help").stdout
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    listed = {int(n) for n in re.findall(r"^  (\d+)  ", out.split("exit codes:")[1], re.M)}
    assert listed == codes


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m dflash_chat list --json | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def test_empty_input_without_arguments_is_a_usage_error() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert "there is no prompt" in done.stderr


# ── list, rm, version, completion ───────────────────────────────────────────────────────────────


def test_list_speaks_to_people_programs_and_shells() -> None:
    table = run("list").stdout.splitlines()
    assert table[0].split() == ["PAIR", "BUILD", "SIZE", "LICENCE", "STATE"]
    assert re.fullmatch(r"smollm2-135m +q4_1 +98 MB +Apache-2.0 +not installed", table[1])
    assert run("ls", "-q").stdout.split() == [line.split()[0] for line in table[1:]]
    rows = json.loads(run("list", "--json").stdout)
    assert [row["name"] for row in rows] == [line.split()[0] for line in table[1:]]
    assert (rows[0]["installed"], rows[0]["path"], rows[0]["loadable"]) == (False, None, True)


def test_an_empty_answer_deletes_nothing(
    terminal: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "readline", lambda: "\n", raising=False)
    with pytest.raises(errors.UserError, match="nothing was done"):
        commands.confirm("Delete?")
    terminal.discard("stdin")
    with pytest.raises(errors.UsageError, match="nobody can be asked"):
        commands.confirm("Delete?")


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"dflash-chat {__version__}\n"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command_flag_and_key(shell: str) -> None:
    script = completion.script(shell, cli.build_parser())
    for word in completion.words(cli.build_parser()):
        bare = re.escape(word.lstrip("-"))  # fish has no dashes
        assert re.search(rf"(?<!\w){bare}(?![\w-])", script), word
    assert all(f"{key}=" in script for key in KEYS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dflash-chat pu", ["pull"]),
        ("dflash-chat pull smo", ["smollm2-135m"]),
        ("dflash-chat plan smo", ["smollm2-135m"]),
        ("dflash-chat -m smo", ["smollm2-135m"]),
        ("dflash-chat -o temp", ["temperature="]),
        ("dflash-chat completion z", ["zsh"]),
        ("dflash-chat rm --y", ["--yes"]),
        ("dflash-chat --o", ["--once"]),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, expected: list[str]) -> None:
    stub = tmp_path / "dflash-chat"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -m dflash_chat "$@"\n')
    stub.chmod(0o755)
    script = completion.script("bash", cli.build_parser())
    words = " ".join(f"'{word}'" for word in line.split(" "))
    probe = f"""{script}
compopt() {{ :; }}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_dflash_chat; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", probe],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.split() == expected, done.stderr


# ── saved chats ─────────────────────────────────────────────────────────────────────────────────


def a_saved_chat(pair: str = "smollm2-135m") -> Conversation:
    chat = branched()
    chat.pair = pair
    with Store() as store:
        store.save(chat)
    return chat


@pytest.mark.parametrize("how", ["--continue", "--resume"])
def test_a_saved_chat_is_gone_on_with_as_it_was_set(
    runners: Runners, terminal: set[str], how: str
) -> None:
    chat = a_saved_chat()
    argv = [how] if how == "--continue" else [how, chat.id[:4]]
    assert cli.main([*argv, "-o", "top_k=5"]) == EXIT_OK
    (given,) = runners.chats

    assert given["pair"] == "smollm2-135m"
    assert given["params"] == replace(chat.params, top_k=5)
    assert given["draft"] is False
    reopened = given["chat"]
    assert isinstance(reopened, Conversation)
    assert (reopened.id, reopened.system) == (chat.id, "Be brief.")
    assert essence(reopened) == essence(chat)


def test_a_new_system_prompt_replaces_the_saved_one(runners: Runners, terminal: set[str]) -> None:
    a_saved_chat()
    assert cli.main(["--continue", "--system", "Be long."]) == EXIT_OK
    reopened = runners.chats[0]["chat"]
    assert isinstance(reopened, Conversation)
    assert reopened.system == "Be long."


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--continue"], EXIT_UNKNOWN_MODEL, "there is no chat to continue"),
        (["--resume", "abc"], EXIT_UNKNOWN_MODEL, "there is no chat 'abc'"),
        (["--continue", "--resume", "abc"], EXIT_USAGE, "not allowed with"),
        (["--continue", "--once", "Hi"], EXIT_USAGE, "--once asks nothing of a saved chat"),
        (["--replay", "/no/such"], errors.EXIT_OTHER, "/no/such cannot be read"),
    ],
)
def test_what_cannot_be_reopened_is_said(
    runners: Runners,
    terminal: set[str],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    words: str,
) -> None:
    assert cli.main(argv) == code
    assert words in capsys.readouterr().err
    assert runners.chats == []


def test_a_saved_chat_needs_a_terminal(runners: Runners, terminal: set[str]) -> None:
    a_saved_chat()
    terminal.remove("stdin")
    assert cli.main(["--continue"]) == EXIT_USAGE
    assert runners.chats == []
