"""Byte ranges of files, assembled from decoded fragments."""

from __future__ import annotations

from fragfs.errors import IntegrityError
from fragfs.library.extents import OpenContent
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.plan import Piece, plan_read

__all__ = ["FileReader"]

_AHEAD_MAX = 8
"""Pieces of one read whose decodes are started while an earlier one is awaited. A request is at
most 1 MiB, two to four fragments of the usual size; more would only fill the queue."""


class FileReader:
    """Reads byte ranges of contents.

    Belongs to the event loop's thread; any number of reads may run at once.

    Args:
        fetcher: Where decoded fragments come from.
    """

    def __init__(self, fetcher: FragmentFetcher) -> None:
        self._fetcher = fetcher

    async def read(self, content: OpenContent, offset: int, size: int) -> memoryview | bytearray:
        """Read exactly `min(size, max(0, end - offset))` bytes.

        Does not pass a checkpoint when everything is cached; see `FragmentFetcher.fetch`.

        Args:
            content: The file.
            offset: First byte; at least 0.
            size: Bytes wanted; at least 0.

        Returns:
            A view into the one fragment that holds the range, without a copy, else a new buffer.

        Raises:
            FragmentError: A fragment cannot be decoded, or is shorter than the extents say.
        """
        pieces = plan_read(content.extents, offset, size)
        if len(pieces) == 1:
            return await self._piece(pieces[0])
        assembled = bytearray(sum(piece.size for piece in pieces))
        position = 0
        for index, piece in enumerate(pieces):
            for following in pieces[index + 1 : index + 1 + _AHEAD_MAX]:
                self._fetcher.begin_nowait(following.fragment)
            # Copied at once, so that a read which waits holds no decoded fragment alive.
            assembled[position : position + piece.size] = await self._piece(piece)
            position += piece.size
        return assembled

    async def _piece(self, piece: Piece) -> memoryview:
        raw = await self._fetcher.fetch(piece.fragment)
        end = piece.fragment_offset + piece.size
        if end > raw.nbytes:
            raise IntegrityError(
                f"fragment {piece.fragment} has {raw.nbytes} bytes, an extent needs {end}",
                remedy="restore the catalog from a backup, or add the model again",
                expected=end,
                actual=raw.nbytes,
            )
        return raw[piece.fragment_offset : end]
