"""Python, packages, the person's own catalogue and settings, and room on the disks in use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from dflash_chat import config, pairs
from dflash_chat.doctor.line import Line, fail, ok, skipped, warn
from dflash_chat.errors import UserError
from dflash_chat.progress import size

PACKAGE = "dflash-chat"
LITTLE_BYTES = 10 * 10**9  # less does not hold a pair of 8 billion weights in 4 bits with its copy
NOTHING_BYTES = 500_000_000  # less does not hold the default pair and the wheel it comes in


def python() -> list[Line]:
    """Which interpreter runs, and where."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return [ok("python", f"{platform.python_version()} on {system}, {os.cpu_count()} cores")]


def packages() -> list[Line]:
    """Whether every package this one needs is there in a version it was made for."""
    try:
        required = requirements(PACKAGE)
    except metadata.PackageNotFoundError:
        return [skipped("packages", "dflash-chat runs without being installed")]
    wrong, versions = [], []
    for name, wanted in required.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append((f"{name} is missing", wanted))
            continue
        versions.append(f"{name} {version}")
        if not _accepts(wanted, version):
            wrong.append((f"{name} is {version}", wanted))
    if wrong:
        fix = "pip install " + " ".join(f'"{wanted}"' for _, wanted in wrong)
        return [fail("packages", "; ".join(problem for problem, _ in wrong), fix)]
    return [ok("packages", ", ".join(versions))]


def requirements(package: str = PACKAGE) -> dict[str, str]:
    """Name → requirement, as pip takes it, of each package that `package` needs here.

    Raises PackageNotFoundError if pip knows no such package: ours may run from a mere folder.
    """
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires(package) or ()]
    return {
        wanted.name: f"{wanted.name}{wanted.specifier}"
        for wanted in found
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    }


def _accepts(wanted: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(wanted).specifier.contains(version, prereleases=True)


def catalogue() -> list[Line]:
    """Whether the person's own models.toml can be read."""
    path = pairs.user_file()
    try:
        known = pairs.load_catalogue(path)
    except UserError as error:
        hint = f": {error.hint}" if error.hint else ""
        return [fail("config", error.message, f"correct {path}{hint}")]
    own = f"with your own in {path}" if path.exists() else f"none of your own ({path})"
    return [ok("config", f"{len(known)} pairs, {own}")]


def settings() -> list[Line]:
    """Whether the person's own config.toml can be read: with a mistake in it no chat opens."""
    from dflash_chat.ui.actions import usual_keys
    from dflash_chat.ui.completion import themes

    path = config.config_file()
    try:
        config.load(path, usual_keys(), themes())
    except UserError as error:
        return [fail("settings", error.message, error.hint or f"correct {path}")]
    own = f"your own in {path}" if path.exists() else f"none of your own ({path})"
    return [ok("settings", f"keys and colours, {own}")]


def disk(check: str, folder: Path, variable: str) -> list[Line]:
    """Whether `folder` can be written and holds a model; `variable` moves it elsewhere."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        fix = f"make {there} writable, or point {variable} at another folder"
        return [fail(check, f"{folder} cannot be written", fix)]
    free = shutil.disk_usage(there).free
    text = f"{folder}, {size(free)} free"
    fix = f"free some space, or point {variable} at another disk"
    if free < NOTHING_BYTES:
        return [fail(check, f"{text}: too little for any pair", fix)]
    if free < LITTLE_BYTES:
        return [warn(check, f"{text}: too little for most pairs", fix)]
    return [ok(check, text)]
