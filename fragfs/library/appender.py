"""Appending to one pack, with a small write buffer. Used by the writer, under its lock."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fragfs.errors import StorageError
from fragfs.library.files import Files
from fragfs.library.packs import scan_records
from fragfs.library.records import (
    FRAGMENT_HEADER,
    PACK_HEADER,
    RECORD_HEADER,
    IndexEntry,
    RecordKind,
)

__all__ = ["PackAppender", "PackState"]

# Appends are gathered to this size: one writev of a few MiB instead of one per fragment.
_BUFFERED_BYTES_MAX = 4 << 20


class PackState:
    """States of a pack in the catalog. Codes are on disk."""

    OPEN = 0
    SEALED = 1
    ABANDONED = 2
    RETIRED = 3


class PackAppender:
    """One pack open for appending, with a small write buffer."""

    def __init__(self, files: Files, path: Path, number: int, size: int, *, new: bool) -> None:
        self.number = number
        self.path = path
        self.size = size
        self.new = new
        self._files = files
        self._descriptor = files.create(path) if new else files.open_append(path)
        self._buffers: list[bytes | memoryview] = []
        self._buffered = 0

    def append(self, *buffers: bytes | memoryview) -> int:
        """Append; returns the offset of the first byte."""
        offset = self.size
        for buffer in buffers:
            self._buffers.append(buffer)
            self._buffered += len(buffer)
            self.size += len(buffer)
        if self._buffered >= _BUFFERED_BYTES_MAX:
            self.flush()
        return offset

    def flush(self) -> None:
        """Hand the buffer to the operating system."""
        self._files.append(self._descriptor, self._buffers)
        self._buffers = []
        self._buffered = 0

    def sync(self) -> None:
        """Make everything appended durable."""
        self.flush()
        self._files.sync(self._descriptor)

    def index_entries(self) -> list[IndexEntry] | None:
        """What an index of this pack lists: its records, whichever process wrote them.

        None if a damaged record hides those behind it: no index is better than half of one.
        """
        self.flush()
        entries = []
        end = PACK_HEADER.size
        for record in scan_records(self._files, self._descriptor, PACK_HEADER.size, self.size):
            fragment, raw_size = bytes(32), 0
            if record.header.kind is RecordKind.FRAGMENT:
                values = FRAGMENT_HEADER.unpack(record.data, RECORD_HEADER.size)
                fragment, raw_size = bytes(values[0]), int(values[2])
            entries.append(
                IndexEntry(
                    fragment,
                    record.offset,
                    record.header.record_size,
                    raw_size,
                    record.header.kind,
                )
            )
            end = record.offset + record.header.record_size
        return entries if end == self.size else None

    def discard(self) -> None:
        """Remove a closed pack that no commit names, if that is possible; else it is garbage."""
        with suppress(StorageError):
            self._files.unlink(self.path)

    def close(self) -> None:
        """Close the descriptor; what was not flushed is dropped."""
        self._files.close(self._descriptor)
