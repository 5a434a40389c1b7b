"""How long operations tell somebody how far they are."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NO_PROGRESS", "Progress"]


class Progress(Protocol):
    """Told about progress, from one thread at a time."""

    def start(self, what: str, total_bytes: int) -> None:
        """A new stage begins; it will advance by `total_bytes` altogether."""

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""

    def note(self, text: str) -> None:
        """What is being worked on right now."""


class _NoProgress:
    def start(self, what: str, total_bytes: int) -> None:
        return None

    def advance(self, size: int) -> None:
        return None

    def note(self, text: str) -> None:
        return None


NO_PROGRESS: Progress = _NoProgress()
"""Shows nothing."""
