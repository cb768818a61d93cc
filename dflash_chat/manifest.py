"""The mark of a finished pull: which files belong to it, their sizes and hashes, where they are.

One JSON file per pair and build, beside the weights or in their place. Sizes cost a stat call each,
so that starting up is quick; hashes are looked at when a file was touched, or when asked for.
Knows nothing of the network, and imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dflash_chat import fetch
from dflash_chat.fetch import Report

Files = dict[str, dict[str, Any]]  # name → bytes, sha256 ("" if unknown), mtime_ns when last good


@dataclass
class Manifest:
    """`folder` holds `files`, the target's; `drafter` holds `drafter_files`, if it was fetched.

    `identity` is what must not have changed in the catalogue since the day `fetched`.
    """

    path: Path
    identity: str
    folder: str
    files: Files
    fetched: str = ""
    drafter: str = ""
    drafter_files: Files = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at `path`; None if there is none, or none of ours."""
        try:
            manifest = cls(path, **json.loads(path.read_text(encoding="utf-8")))
            for _, entry in manifest.entries():
                entry["bytes"] + entry["mtime_ns"] + len(entry["sha256"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if any(manifest.entries()) else None

    def entries(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every file with what is known of it, the drafter's after the target's."""
        for folder, files in ((self.folder, self.files), (self.drafter, self.drafter_files)):
            for name, entry in files.items():
                yield Path(folder) / name, entry

    @property
    def bytes(self) -> int:
        """Bytes on disk of everything it lists."""
        return sum(entry["bytes"] for _, entry in self.entries())

    def write(self) -> None:
        """Replace the file on disk in one step."""
        self.fetched = datetime.now(UTC).isoformat(timespec="seconds")
        body = {key: value for key, value in vars(self).items() if key != "path"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)

    def damage(self) -> str:
        """What is missing or has the wrong size, in words; "" if nothing."""
        for path, entry in self.entries():
            try:
                size = path.stat().st_size
            except OSError:
                return f"{path.name} is missing"
            if size != entry["bytes"]:
                return f"{path.name} has {size} bytes instead of {entry['bytes']}"
        return ""

    def changed(self, report: Report, check: bool) -> str:
        """Hash what was touched since its last check (`check`: everything); "" if all is well."""
        checked = False
        for path, entry in self.entries():
            mtime_ns = path.stat().st_mtime_ns
            if not entry["sha256"] or (mtime_ns == entry["mtime_ns"] and not check):
                continue
            if fetch.sha256(path, report) != entry["sha256"]:
                return f"{path.name} does not have the sha256 it should"
            entry["mtime_ns"] = mtime_ns
            checked = True
        if checked:
            self.write()
        return ""


def describe(folder: Path, names: Iterable[str], hashes: Mapping[str, str]) -> Files:
    """The entries of files that were just fetched and checked."""
    files: Files = {}
    for name in names:
        stat = (folder / name).stat()
        files[name] = {
            "bytes": stat.st_size,
            "sha256": hashes.get(name, ""),
            "mtime_ns": stat.st_mtime_ns,
        }
    return files
