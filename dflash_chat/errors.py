"""The only exceptions a person ever reads: one sentence, one hint, one exit code.

Raise `UserError` (or a subclass) for wrong input, broken files and missing access. Anything else
that escapes is a bug and may show a traceback in the log.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_ACCESS = 3
EXIT_UNKNOWN_MODEL = 4
EXIT_DOES_NOT_FIT = 5
EXIT_DISK = 6
EXIT_ENGINE_CRASHED = 7
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A message for the person at the keyboard, with the step that helps and the exit code."""

    exit_code = EXIT_OTHER

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """Wrong arguments or settings."""

    exit_code = EXIT_USAGE


class AccessError(UserError):
    """No token, a wrong token, or a gate that is not open yet."""

    exit_code = EXIT_ACCESS


class UnknownModelError(UserError):
    """No such pair, or the pair is not installed and may not be fetched."""

    exit_code = EXIT_UNKNOWN_MODEL


class DoesNotFitError(UserError):
    """The plan does not fit the card, or no supported card is there."""

    exit_code = EXIT_DOES_NOT_FIT


class DiskError(UserError):
    """Not enough space, or a folder that cannot be written."""

    exit_code = EXIT_DISK


class EngineCrashedError(UserError):
    """The engine process ended without being asked to."""

    exit_code = EXIT_ENGINE_CRASHED


class CheckpointError(UserError):
    """A weight file that is broken, truncated, or not what its header says."""


class WeightsMismatchError(CheckpointError):
    """Missing, unexpected or wrongly shaped tensors; the message names all of them."""
