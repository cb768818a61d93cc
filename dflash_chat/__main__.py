"""`python -m dflash_chat` and the console script. Nothing heavy may be imported here."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from dflash_chat import cli


def main() -> int:
    """Run the command line. SIGTERM unwinds like Ctrl+C, so that nothing half-fetched stays."""
    signal.signal(signal.SIGTERM, _terminated)
    return cli.main()


def _terminated(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
