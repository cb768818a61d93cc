"""Maps a file into memory as one flat tensor of bytes.

Knows that only regular files may be opened: a pipe would hang, a folder cannot be mapped. Does not
know what the bytes mean. The mapping is private (copy on write) and lives as long as any tensor
that views it; nothing is read from the disk until it is touched.
"""

from __future__ import annotations

import stat
from pathlib import Path

import torch
from torch import Tensor

from dflash_chat.errors import CheckpointError

DOWNLOAD_AGAIN = "The file is damaged or incomplete; download it again."


def map_file(path: Path) -> Tensor:
    """The bytes of `path`: uint8 [file_bytes]. Raises CheckpointError if it cannot be mapped."""
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "Check the path.") from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a file.", "Give the path of a weight file.")
    if info.st_size == 0:
        raise CheckpointError(f"{path} is empty.", DOWNLOAD_AGAIN)
    try:
        return torch.from_file(str(path), shared=False, size=info.st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:  # no permission, or it shrank since stat
        raise CheckpointError(f"{path} cannot be mapped.", "Check its permissions.") from error


def read_whole(path: Path, limit_bytes: int) -> bytes:
    """The content of a small file. Raises CheckpointError if missing or above `limit_bytes`."""
    data = map_file(path)
    if data.numel() > limit_bytes:
        raise CheckpointError(f"{path} has {data.numel()} bytes, too many.", DOWNLOAD_AGAIN)
    return data.numpy().tobytes()
