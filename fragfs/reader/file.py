"""Byte ranges of files, assembled from decoded fragments."""

from __future__ import annotations

from fragfs.errors import IntegrityError
from fragfs.library.extents import OpenContent
from fragfs.reader.ahead import SequentialReads
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.plan import Piece, plan_read

__all__ = ["FileReader"]

_AHEAD_MAX = 8
"""Pieces of one read whose decodes are started while an earlier one is awaited. A request is at
most 1 MiB, two to four fragments of the usual size; more would only fill the queue."""


_FRAGMENTS_AHEAD = 2
"""Fragments decoded ahead of a sequential reader: the first read of a bf16 file through a mount on
two cores ran 1.5 to 2 times as fast as with none (see `tools/bench`, section read)."""


class FileReader:
    """Reads byte ranges of contents.

    Belongs to the event loop's thread; any number of reads may run at once.

    Args:
        fetcher: Where decoded fragments come from.
    """

    def __init__(self, fetcher: FragmentFetcher) -> None:
        self._fetcher = fetcher
        self._sequential = SequentialReads()

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
        end = min(offset + size, content.size)
        if self._sequential.observe(content.number, offset, end):
            self._begin_ahead(content, end)
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

    def _begin_ahead(self, content: OpenContent, end: int) -> None:
        if end >= content.size:
            return
        extents = content.extents
        # The reader may be in the middle of a fragment: that one is its own to wait for.
        following = extents.index_at(end - 1) + 1
        for index in range(following, min(following + _FRAGMENTS_AHEAD, len(extents))):
            self._fetcher.begin_nowait(extents.fragments[index])

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
