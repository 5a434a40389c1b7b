"""Reading packs: descriptors kept open for reuse, records read with one pread.

Packs are read with pread, never mapped: a disk error must be an error for one reader, not a signal
that kills the daemon.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fragfs.errors import IntegrityError, StorageError
from fragfs.library.files import Files
from fragfs.library.records import (
    PACK_HEADER,
    RECORD_HEADER,
    RECORD_HEADER_BYTES_MAX,
    RecordHeader,
    parse_pack_header,
    parse_record_header,
)

__all__ = ["PACKS_NAME", "PackReader", "ScannedRecord", "pack_name", "pack_number", "scan_records"]

PACKS_NAME = "packs"
_SUFFIX = ".pack"

# Far below the usual limit of 1024 open files, well above what one model's files span.
_OPEN_PACKS_MAX = 128


def pack_name(number: int) -> str:
    """File name of a pack: ten digits, so that names sort by age."""
    return f"{number:010d}{_SUFFIX}"


def pack_number(name: str) -> int | None:
    """Number in a pack's file name, or None for other names."""
    digits = name.removesuffix(_SUFFIX)
    return int(digits) if name.endswith(_SUFFIX) and digits.isdigit() else None


class _OpenPack:
    """A descriptor that closes when its last user lets go, so eviction never races with a read."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self.descriptor = files.open_read(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._files.close(self.descriptor)


class PackReader:
    """Reads records of the packs of one library. Safe in any thread.

    Args:
        files: Where the bytes are.
        directory: The library's directory.
        uuid: The library's UUID: a pack of another library is refused.
    """

    def __init__(self, files: Files, directory: Path, uuid: bytes) -> None:
        self._files = files
        self._directory = directory / PACKS_NAME
        self._uuid = uuid
        self._open: OrderedDict[int, _OpenPack] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, number: int) -> Path:
        """Where a pack is."""
        return self._directory / pack_name(number)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a pack.

        Raises:
            StorageError: The pack is missing or the disk failed.
            IntegrityError: The pack ends before that, or is another library's.
        """
        pack = self._pack(number)
        data = self._read_at(number, pack, size, offset)
        if len(data) != size:
            raise IntegrityError(
                f"pack {number} ends at byte {offset + len(data)}, a record reaches to"
                f" {offset + size}",
                path=str(self.path(number)),
                offset=offset,
                remedy="restore the pack from a backup",
            )
        return data

    def _read_at(self, number: int, pack: _OpenPack, size: int, offset: int) -> bytes:
        try:
            return self._files.read_at(pack.descriptor, size, offset)
        except StorageError as error:
            raise StorageError(
                f"pack {number} at offset {offset}: {error.message}",
                path=str(self.path(number)),
                errno=error.errno,
                offset=offset,
                retryable=error.retryable,
                remedy=error.remedy or "restore the pack from a backup",
            ) from error

    def drop_descriptors(self) -> None:
        """Close what no read is using right now."""
        with self._lock:
            self._open.clear()

    def drop_removed(self) -> None:
        """Close packs that were removed: a descriptor of one keeps its space on the disk taken."""
        with self._lock:
            removed = [
                number
                for number, pack in self._open.items()
                if not os.fstat(pack.descriptor).st_nlink
            ]
            for number in removed:
                del self._open[number]

    def drop_page_cache(self) -> None:
        """Ask the kernel to forget cached bytes of all packs: the next reads hit the disk."""
        for name in self._files.names(self._directory):
            descriptor = self._files.open_read(self._directory / name)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                self._files.close(descriptor)

    def _pack(self, number: int) -> _OpenPack:
        with self._lock:
            pack = self._open.get(number)
            if pack is not None:
                self._open.move_to_end(number)
                return pack
        path = self.path(number)
        try:
            pack = _OpenPack(self._files, path)
        except StorageError as error:
            if error.retryable:
                raise
            may_not = error.errno in (errno.EACCES, errno.EPERM)
            raise StorageError(
                f"pack {number}: {error.message}",
                path=str(path),
                errno=error.errno,
                remedy="ask the library's owner for permission to read it"
                if may_not
                else "restore the pack from a backup, or see what can be done with: fragfs check",
            ) from error
        header = parse_pack_header(self._read_at(number, pack, PACK_HEADER.size, 0), str(path))
        if header.library_uuid != self._uuid or header.pack_number != number:
            raise IntegrityError(
                f"{path} is pack {header.pack_number} of library {header.library_uuid.hex()}",
                path=str(path),
                expected=f"pack {number} of {self._uuid.hex()}",
                remedy="restore the pack from a backup",
            )
        with self._lock:
            self._open[number] = pack
            while len(self._open) > _OPEN_PACKS_MAX:
                self._open.popitem(last=False)
        return pack


@dataclass(frozen=True, slots=True)
class ScannedRecord:
    """A record met while walking a pack.

    Attributes:
        offset: Where it starts in the pack.
        header: Its checked header.
        data: The header's bytes.
    """

    offset: int
    header: RecordHeader
    data: bytes


def scan_records(files: Files, descriptor: int, start: int, end: int) -> Iterator[ScannedRecord]:
    """Walk the records in `[start, end)`, reading headers only; stops at the first unreadable one.

    Used where a torn end is expected: what a crash left after the last whole record is no error.
    """
    offset = start
    while offset + RECORD_HEADER.size <= end:
        data = files.read_at(descriptor, min(_HEADER_GUESS, end - offset), offset)
        if len(data) < RECORD_HEADER.size:
            return
        header_size = int(RECORD_HEADER.unpack(data)[3])
        if header_size > len(data) and header_size <= RECORD_HEADER_BYTES_MAX:
            data = files.read_at(descriptor, header_size, offset)
        try:
            header = parse_record_header(data, f"offset {offset}")
        except IntegrityError:
            return
        if offset + header.record_size > end:
            return
        yield ScannedRecord(offset, header, data[: header.header_size])
        offset += header.record_size


# Nearly all headers are 90 to 200 bytes: one read gets the header and little else.
_HEADER_GUESS = 512
