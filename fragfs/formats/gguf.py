"""gguf."""

from __future__ import annotations

from fragfs.formats.layout import Layout, ReadAt

__all__ = ["parse_gguf"]


def parse_gguf(size: int, read_at: ReadAt) -> Layout | None:
    """Being written."""
    return None
