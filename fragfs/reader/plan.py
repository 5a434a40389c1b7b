"""Which pieces of which fragments make up a byte range of a file. Pure.

Source: library/FORMAT.md, "Extents".
"""

from __future__ import annotations

from typing import NamedTuple

from fragfs.library.extents import ExtentMap

__all__ = ["Piece", "plan_read"]


class Piece(NamedTuple):
    """A part of one fragment's raw bytes.

    Attributes:
        fragment: Number of the fragment in the catalog.
        fragment_offset: Where the piece starts in the fragment's raw bytes.
        size: Its length; at least 1.
    """

    fragment: int
    fragment_offset: int
    size: int


def plan_read(extents: ExtentMap, offset: int, size: int) -> list[Piece]:
    """Cut a read into pieces, front to back.

    Args:
        extents: How the file is assembled.
        offset: First byte wanted; at least 0.
        size: Bytes wanted; at least 0.

    Returns:
        Pieces whose sizes sum to `min(size, max(0, extents.size - offset))`: nothing for a read
        at or beyond the end.

    Raises:
        ValueError: `offset` or `size` is negative (a caller bug).
    """
    if offset < 0 or size < 0:
        raise ValueError(f"cannot read {size} bytes at {offset}")
    remaining = min(size, extents.size - offset)
    if remaining <= 0:
        return []
    index = extents.index_at(offset)
    pieces = []
    while remaining > 0:
        extent = extents[index]
        skipped = offset - extent.offset
        length = min(extent.size - skipped, remaining)
        pieces.append(Piece(extent.fragment, extent.fragment_offset + skipped, length))
        offset += length
        remaining -= length
        index += 1
    return pieces
