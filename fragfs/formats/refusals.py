"""Wordings that several formats share."""

from __future__ import annotations

__all__ = ["TRUNCATED_REMEDY", "promise_broken"]

TRUNCATED_REMEDY = "download it again, or add it with --force to store it as it is"


def promise_broken(promised_size: int, size: int) -> str:
    """Why a file is refused that is shorter than its header says."""
    return f"truncated: the header promises {promised_size} bytes, the file has {size}"
