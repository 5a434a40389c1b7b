"""zip."""

from __future__ import annotations

from fragfs.formats.layout import Layout, ReadAt

__all__ = ["parse_zip"]


def parse_zip(size: int, read_at: ReadAt) -> Layout | None:
    """Being written."""
    return None
