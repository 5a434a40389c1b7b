"""Byte ranges of files, assembled from decoded fragments."""

from __future__ import annotations

from collections import OrderedDict

from fragfs.cache.shared import FragmentFile
from fragfs.errors import IntegrityError
from fragfs.library.extents import OpenContent
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.plan import Piece, plan_read

__all__ = ["FileReader"]

_AHEAD_MAX = 8
"""Pieces of one read whose decodes are started while an earlier one is awaited. A request is at
most 1 MiB, two to four fragments of the usual size; more would only fill the queue."""

_RECENT_MAX = 8
_BUFFER_BYTES = 1 << 20


_Recent = tuple[int, int, int, memoryview | FragmentFile]
"""Start and end of the extent that was read last, where it starts in its fragment, the fragment."""


class FileReader:
    """Reads byte ranges of contents.

    Belongs to the event loop's thread; any number of reads may run at once.

    Args:
        fetcher: Where decoded fragments come from.
    """

    def __init__(self, fetcher: FragmentFetcher) -> None:
        self._fetcher = fetcher
        # Most reads follow another one in the same fragment: no plan, no cache, no task switch.
        self._recent: OrderedDict[int, _Recent] = OrderedDict()
        self._buffer = bytearray(_BUFFER_BYTES)

    def read_nowait(self, content: OpenContent, offset: int, size: int) -> memoryview | None:
        """Read a range that lies where the last read of the content was; else None.

        Args:
            content: The file.
            offset: First byte; at least 0.
            size: Bytes wanted; at least 0.
        """
        recent = self._recent.get(content.number)
        if recent is None:
            return None
        start, stop, skipped, raw = recent
        if start <= offset and (end := min(offset + size, content.size)) <= stop and end > offset:
            return self._part(raw, offset - start + skipped, end - offset)
        return None

    async def read(self, content: OpenContent, offset: int, size: int) -> memoryview | bytearray:
        """Read exactly `min(size, max(0, end - offset))` bytes.

        Does not pass a checkpoint when everything is cached; see `FragmentFetcher.fetch`.

        Args:
            content: The file.
            offset: First byte; at least 0.
            size: Bytes wanted; at least 0.

        Returns:
            The bytes, in memory that the next read may use again: send them before you wait for
            anything.

        Raises:
            FragmentError: A fragment cannot be decoded, or is shorter than the extents say.
        """
        pieces = plan_read(content.extents, offset, size)
        if not pieces:
            return bytearray()
        fragments = await self._fetch_all(pieces)
        # Nothing is awaited from here on: the buffer is everybody's.
        if len(pieces) == 1:
            data = self._part(fragments[0], pieces[0].fragment_offset, pieces[0].size)
        else:
            data = self._assemble(pieces, fragments)
        self._keep(content, offset + len(data) - 1, fragments[-1])
        return data

    async def _fetch_all(self, pieces: list[Piece]) -> list[memoryview | FragmentFile]:
        fragments = []
        for index, piece in enumerate(pieces):
            for following in pieces[index + 1 : index + 1 + _AHEAD_MAX]:
                self._fetcher.begin_nowait(following.fragment)
            fragments.append(await self._fetch(piece))
        return fragments

    def _keep(self, content: OpenContent, offset: int, raw: memoryview | FragmentFile) -> None:
        """Remember the extent that holds a byte, and its fragment's bytes."""
        extent = content.extents[content.extents.index_at(offset)]
        stop = extent.fragment_offset + extent.size
        if stop > raw.nbytes:
            return  # a damaged catalog: whoever reads that far gets the error
        end = extent.offset + extent.size
        self._recent[content.number] = (extent.offset, end, extent.fragment_offset, raw)
        self._recent.move_to_end(content.number)
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)

    async def _fetch(self, piece: Piece) -> memoryview | FragmentFile:
        raw = await self._fetcher.fetch(piece.fragment)
        end = piece.fragment_offset + piece.size
        if end > raw.nbytes:
            raise IntegrityError(
                f"fragment {piece.fragment} has {raw.nbytes} bytes, an extent needs {end}",
                remedy="restore the catalog from a backup, or add the model again",
                expected=end,
                actual=raw.nbytes,
            )
        return raw

    def _part(self, raw: memoryview | FragmentFile, start: int, size: int) -> memoryview:
        if isinstance(raw, memoryview):
            return raw[start : start + size]
        part = self._space(size)
        raw.read_into(part, start)
        return part

    def _assemble(
        self, pieces: list[Piece], fragments: list[memoryview | FragmentFile]
    ) -> memoryview:
        whole = self._space(sum(piece.size for piece in pieces))
        position = 0
        for piece, raw in zip(pieces, fragments, strict=True):
            part = whole[position : position + piece.size]
            start = piece.fragment_offset
            if isinstance(raw, memoryview):
                part[:] = raw[start : start + piece.size]
            else:
                raw.read_into(part, start)
            position += piece.size
        return whole

    def _space(self, size: int) -> memoryview:
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]
