"""What a hub repository holds, without its weights: config.json and the bytes of its files.

Asks the hub, and where that cannot be reached, its cache on this machine. Knows nothing of pairs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dflash_chat import transfer
from dflash_chat.entries import SAFETENSORS
from dflash_chat.errors import CheckpointError


@dataclass(frozen=True)
class Repository:
    """A repository at one commit. `bytes` are those of the files that a pull takes."""

    repo: str
    commit: str
    config: dict[str, Any]
    bytes: int


def describe(repo: str, revision: str) -> Repository:
    """config.json and sizes of `repo` at `revision`, a commit, branch or tag.

    Raises AccessError, UnknownModelError or UserError with what the hub answered, CheckpointError
    if there is no usable config.json.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = str(info.sha)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if "config.json" not in files:
            raise CheckpointError(f"{repo} has no config.json, so it is no model folder")
        config = Path(hub.hf_hub_download(repo, "config.json", revision=revision))
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, errors.HfHubHTTPError):  # it was reached, and said no
            raise transfer.as_error(error, repo, revision) from error
        cached = hub.try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise transfer.as_error(error, repo, revision) from error
        config = Path(cached)
        commit = config.parent.name
        files = {file.name: file.stat().st_size for file in config.parent.iterdir()}
    taken = (size for name, size in files.items() if _is_taken(name))
    return Repository(repo, commit, _read(repo, config), max(1, sum(taken)))


def _is_taken(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SAFETENSORS)


def _read(repo: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json of {repo} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json of {repo} holds no JSON object")
    return config
