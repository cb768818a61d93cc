"""What all tests of the screen share."""

from __future__ import annotations

import pytest

from dflash_chat.ui import pace


@pytest.fixture(autouse=True)
def quick_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a frame meant for an eye."""
    monkeypatch.setattr(pace, "FRAME_S", 0.02)
