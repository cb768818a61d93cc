"""`dflash-chat sessions`: what it prints, what it takes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dflash_chat import cli
from dflash_chat.chat import Conversation
from dflash_chat.errors import EXIT_DISK, EXIT_OK, EXIT_OTHER, EXIT_UNKNOWN_MODEL, EXIT_USAGE
from dflash_chat.store import FILE, Store
from tests.saved import branched, essence

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def saved(own_folders: Path) -> Conversation:
    """A chat in the file, with its steps."""
    chat = branched()
    with Store() as store:
        store.save(chat)
        for turn in chat.tree.values():
            store.add_trace(turn.id, turn.trace)
    return chat


def out(capsys: pytest.CaptureFixture[str], *argv: str, code: int = EXIT_OK) -> str:
    assert cli.main(["sessions", *argv]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_chats_are_listed(saved: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = out(capsys).splitlines()
    assert line.startswith(saved.id)
    assert line.endswith("smollm2-135m    Why is the sky blue?")
    assert out(capsys, "ls") == line + "\n"
    assert out(capsys, "ls", "-q") == out(capsys, "-q") == saved.id + "\n"
    (entry,) = json.loads(out(capsys, "--json"))
    assert entry["id"] == saved.id
    assert entry["turns"] == 7


def test_without_chats_nothing_is_listed_and_a_person_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["sessions"]) == EXIT_OK
    assert capsys.readouterr() == ("", "there are no saved chats yet\n")
    assert cli.main(["sessions", "-q"]) == EXIT_OK
    assert capsys.readouterr() == ("", "")
    assert json.loads(out(capsys, "--json")) == []


def test_chats_are_searched(saved: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = out(capsys, "search", "rayleigh", "sunlight").splitlines()
    assert first.startswith(saved.id)
    assert "Rayleigh scattering of sunlight." in second
    assert out(capsys, "search", "rayleigh", "-q") == saved.id + "\n"
    assert out(capsys, "search", "nothing-like-it") == ""
    assert json.loads(out(capsys, "search", "rayl", "--json"))[0]["found"]


def test_a_chat_is_shown_by_the_beginning_of_its_id(
    saved: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    text = out(capsys, "show", saved.id[:4])
    assert text.startswith("# Why is the sky blue?\n")
    assert "## Answer (stopped)\n\nChloro\n" in text
    data = json.loads(out(capsys, "show", saved.id, "--json"))
    assert all(message["trace"] == [] for message in data["messages"])


def test_what_goes_out_comes_in_again(
    saved: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.json"
    assert out(capsys, "export", saved.id, "--format", "json", "--to", str(path)) == ""
    (new,) = out(capsys, "import", str(path)).split()
    assert new != saved.id
    with Store() as store:
        again = store.load(new)
        assert essence(again) == essence(saved)
        for before, after in zip(saved.tree.values(), again.tree.values(), strict=True):
            assert [vars(e) | {"id": 0} for e in before.trace] == [
                vars(e) for e in store.trace(after.id)
            ]
    assert out(capsys, "export", new, "--format", "json") != path.read_text()  # other ids
    assert out(capsys, "export", new) == out(capsys, "export", saved.id)


def test_a_trace_goes_out_as_protocol_lines(
    saved: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = out(capsys, "export", saved.id, "--format", "trace").splitlines()
    kinds = [json.loads(line)["type"] for line in lines]
    assert kinds == ["Ready", "Generate", "Prefill", "Tokens", *["Tokens"] * 3, "Finished"]


def test_chats_are_removed_when_it_is_meant(
    saved: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "add --yes" in out(capsys, "rm", saved.id, code=EXIT_USAGE)
    assert out(capsys, "-q") == saved.id + "\n"
    out(capsys, "rm", saved.id[:5], saved.id, "--yes")
    assert out(capsys, "-q") == ""


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["show", "nothing"], EXIT_UNKNOWN_MODEL, "there is no chat 'nothing'"),
        (["export", "0", "--format", "pdf"], EXIT_USAGE, "invalid choice: 'pdf'"),
        (["rm", "zzz", "--yes"], EXIT_UNKNOWN_MODEL, "there is no chat 'zzz'"),
        (["import", "/no/such/file"], EXIT_OTHER, "/no/such/file cannot be read: No such file"),
        (["import", "README.md"], EXIT_OTHER, "README.md: the file is no exported chat: it is not"),
        (["serach", "x"], EXIT_USAGE, "did you mean search?"),
        (["ls", "--jsn"], EXIT_USAGE, "unknown argument '--jsn'"),
    ],
)
def test_what_cannot_be_done_is_said(
    saved: Conversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert words in out(capsys, *argv, code=code)


def test_a_damaged_file_is_named(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_folders / "data").mkdir()
    (own_folders / "data" / FILE).write_text("not a database at all" * 100)
    assert f"{FILE}: it is damaged" in out(capsys, code=EXIT_DISK)


def test_what_cannot_be_written_is_named(
    saved: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    words = out(capsys, "export", saved.id, "--to", "/no/folder/x", code=EXIT_DISK)
    assert "/no/folder/x cannot be written: No such file" in words
