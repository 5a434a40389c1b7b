"""A whole pack, read from its first byte to its last: what `check` and `--rebuild` look at.

Unlike `packs.scan_records` this reads payloads too, and goes on behind what it cannot read: at the
next record that the pack's index names, else at the next bytes that look like a record. A record
found by its looks may be part of a stored file; it is marked as `found_by_search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from fragfs.errors import FormatError, FragmentError, IntegrityError, StorageError
from fragfs.library.files import Files
from fragfs.library.progress import Progress
from fragfs.library.records import (
    BATCH_TRAILER,
    FOOTER_MAGIC,
    FRAGMENT_HEADER,
    PACK_FOOTER,
    PACK_HEADER,
    RECORD_HEADER,
    RECORD_HEADER_BYTES_MAX,
    RECORD_MAGIC,
    BatchTrailer,
    IndexEntry,
    PackHeader,
    RecordHeader,
    RecordKind,
    fragment_header_size,
    parse_batch_trailer,
    parse_index,
    parse_pack_header,
    parse_record_header,
)
from fragfs.types import FRAGMENT_BYTES_MAX

__all__ = ["TRAILER_SIZE", "FoundBatch", "FoundRecord", "Gap", "PackScan", "scan_pack"]

_CHUNK_BYTES = 4 << 20
_HEADER_GUESS = 512
_PAGE_BYTES = 4096
TRAILER_SIZE = RECORD_HEADER.size + BATCH_TRAILER.size + 8
"""Bytes of a batch trailer's record."""
_KEPT_PAYLOADS = (RecordKind.MANIFEST, RecordKind.REMOVAL, RecordKind.RETIREMENT)


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """A record with a readable header.

    Attributes:
        offset: Where it starts in the pack.
        header: What every record has.
        data: The header's bytes.
        intact: Whether the stored payload matches its checksum.
        payload: The payload of a MANIFEST, REMOVAL or RETIREMENT; empty for others.
        found_by_search: Whether damage before it made this a guess.
    """

    offset: int
    header: RecordHeader
    data: bytes
    intact: bool
    payload: bytes = b""
    found_by_search: bool = False

    @property
    def end(self) -> int:
        """Where the next record starts."""
        return self.offset + self.header.record_size


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a pack in which no record can be read.

    Attributes:
        start: Where they start in the pack.
        end: Where they end.
        reason: What is wrong with the record that should start there.
    """

    start: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class FoundBatch:
    """Records up to a trailer.

    Attributes:
        pack: Number of the pack they are in.
        trailer: The trailer's fields.
        records: The records before it, by offset.
        whole: Whether these are exactly the records that the trailer was written for.
        counted: Whether their number is the one that the trailer states, gaps counted as one each.
        end: Where the trailer ends.
    """

    pack: int
    trailer: BatchTrailer
    records: tuple[FoundRecord, ...]
    whole: bool
    counted: bool
    end: int


@dataclass(slots=True)
class PackScan:
    """What is in a pack.

    Attributes:
        number: The number in its file name.
        path: The file.
        size: Its bytes.
        header: The pack header; None if it is damaged.
        header_error: What is wrong with the header.
        batches: Batches with a trailer, by offset.
        rest: Records behind the last trailer.
        strays: Where trailers were found that end no known batch: parts of stored files, or
            trailers of batches whose beginning cannot be told.
        gaps: Where nothing can be read.
        disk_errors: Where records start of which the disk did not give all bytes.
        index: The entries of the index that the footer points to; None if there is no good one.
        records_end: Where the last record that is no index ends.
    """

    number: int
    path: Path
    size: int
    header: PackHeader | None = None
    header_error: FragmentError | None = None
    batches: list[FoundBatch] = field(default_factory=list)
    rest: list[FoundRecord] = field(default_factory=list)
    strays: list[int] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    disk_errors: list[int] = field(default_factory=list)
    index: list[IndexEntry] | None = None
    records_end: int = PACK_HEADER.size

    def records(self) -> Iterator[FoundRecord]:
        """Every readable record but trailers and indexes, by offset."""
        for batch in self.batches:
            yield from batch.records
        yield from self.rest


def scan_pack(
    files: Files, path: Path, number: int, end: int | None, progress: Progress
) -> PackScan:
    """Read a pack.

    Args:
        files: Where the bytes are.
        path: The pack.
        number: The number in its name.
        end: Where what counts of it ends; None to read all of it.
        progress: Told about bytes read.

    Raises:
        StorageError: It cannot be opened, or an error that may pass. Where the disk gives no bytes
            for good, that part is damage like any other.
    """
    size = files.size(path)
    scan = PackScan(number, path, size)
    descriptor = files.open_read(path)
    try:
        try:
            scan.header = parse_pack_header(
                files.read_at(descriptor, PACK_HEADER.size, 0), str(path)
            )
        except FragmentError as error:
            _raise_if_it_may_pass(error)
            scan.header_error = error
        scan.index = _read_index(files, descriptor, size, number)
        stop = size if end is None else min(end, size)
        _Walk(files, descriptor, scan, stop, progress).run()
    finally:
        files.close(descriptor)
    return scan


def _raise_if_it_may_pass(error: FragmentError) -> None:
    """An error that may pass, as too many open files, must not look like damage."""
    if isinstance(error, StorageError) and error.retryable:
        raise error


def _read_index(files: Files, descriptor: int, size: int, number: int) -> list[IndexEntry] | None:
    try:
        footer = files.read_at(descriptor, PACK_FOOTER.size, max(0, size - PACK_FOOTER.size))
        if len(footer) < PACK_FOOTER.size:
            return None
        offset, magic = PACK_FOOTER.unpack(footer)
        if magic != FOOTER_MAGIC or not PACK_HEADER.size <= offset < size - PACK_FOOTER.size:
            return None
        data = files.read_at(descriptor, size - PACK_FOOTER.size - offset, offset)
        return parse_index(data, f"pack {number} at offset {offset}")
    except FragmentError as error:
        _raise_if_it_may_pass(error)
        return None
    except ValueError:
        return None


class _Walk:
    """One pass over the records of a pack."""

    def __init__(
        self, files: Files, descriptor: int, scan: PackScan, stop: int, progress: Progress
    ) -> None:
        self._files = files
        self._descriptor = descriptor
        self._scan = scan
        self._stop = stop
        self._progress = progress
        self._starts = sorted(entry.offset for entry in scan.index or ())
        self._batch_start = PACK_HEADER.size
        self._gap_count = 0

    def run(self) -> None:
        scan = self._scan
        offset, by_search = PACK_HEADER.size, False
        while offset < self._stop:
            if self._is_footer(offset):
                break
            try:
                record = self._read(offset, found_by_search=by_search)
            except FragmentError as error:
                _raise_if_it_may_pass(error)
                if isinstance(error, StorageError):
                    scan.disk_errors.append(offset)
                following, by_search = self._next_start(offset + 1)
                scan.gaps.append(Gap(offset, following, error.message))
                self._gap_count += 1
                self._progress.advance(following - offset)
                offset = following
                continue
            self._progress.advance(record.header.record_size)
            offset = record.end
            if record.header.kind is RecordKind.BATCH_TRAILER:
                certain = self._close_batch(record)
                by_search = by_search and not certain
            elif record.header.kind is not RecordKind.PACK_INDEX:
                scan.rest.append(record)
            else:
                continue
            scan.records_end = offset

    def _is_footer(self, offset: int) -> bool:
        if offset + PACK_FOOTER.size != self._stop:
            return False
        try:
            footer = self._files.read_at(self._descriptor, PACK_FOOTER.size, offset)
        except StorageError as error:
            _raise_if_it_may_pass(error)
            return False
        return footer[-len(FOOTER_MAGIC) :] == FOOTER_MAGIC

    def _read(self, offset: int, *, found_by_search: bool) -> FoundRecord:
        """The record at an offset.

        Raises:
            FragmentError: There is none that can be read.
        """
        where = f"pack {self._scan.number} at offset {offset}"
        data = self._read_some(_HEADER_GUESS, offset)
        if len(data) >= RECORD_HEADER.size:
            header_size = int(RECORD_HEADER.unpack(data)[3])
            if len(data) < header_size <= RECORD_HEADER_BYTES_MAX:
                data = self._read_some(header_size, offset)
        header = parse_record_header(data, where)
        if offset + header.record_size > self._stop:
            raise IntegrityError(f"a record is cut off in {where}")
        if header.kind is RecordKind.BATCH_TRAILER and header.header_size < TRAILER_SIZE:
            raise FormatError(f"a batch trailer is too short in {where}")
        if header.kind is RecordKind.FRAGMENT and not _is_fragment(header, data):
            raise FormatError(f"a fragment's header is none that fragfs writes in {where}")
        intact, payload = self._read_payload(offset, header, where)
        data = data[: header.header_size]
        return FoundRecord(offset, header, data, intact, payload, found_by_search)

    def _read_payload(self, offset: int, header: RecordHeader, where: str) -> tuple[bool, bytes]:
        """Whether a record's payload is intact, and the payload if it is one to keep."""
        keep = header.kind in _KEPT_PAYLOADS
        digest = xxhash.xxh3_64()
        parts = []
        position, left = offset + header.header_size, header.payload_size
        while left:
            try:
                part = self._files.read_at(self._descriptor, min(left, _CHUNK_BYTES), position)
            except StorageError as error:
                # The header tells where the next record is: only this one is lost.
                _raise_if_it_may_pass(error)
                self._scan.disk_errors.append(offset)
                return False, b""
            if not part:
                raise IntegrityError(f"a record is cut off in {where}")
            digest.update(part)
            position, left = position + len(part), left - len(part)
            if keep:
                parts.append(part)
        return digest.intdigest() == header.payload_checksum, b"".join(parts)

    def _read_some(self, size: int, offset: int) -> bytes:
        """Bytes at an offset, up to the first page that the disk does not give.

        Raises:
            StorageError: It does not give the first one, or the error may pass.
        """
        size = min(size, self._stop - offset)
        try:
            return self._files.read_at(self._descriptor, size, offset)
        except StorageError as error:
            _raise_if_it_may_pass(error)
        data = b""
        while len(data) < size:
            at = offset + len(data)
            try:
                part = self._files.read_at(
                    self._descriptor, min(size - len(data), _PAGE_BYTES - at % _PAGE_BYTES), at
                )
            except StorageError as error:
                _raise_if_it_may_pass(error)
                if not data:
                    raise
                break
            if not part:
                break
            data += part
        return data

    def _close_batch(self, record: FoundRecord) -> bool:
        """End a batch; whether this trailer is certain to be the one that ends it."""
        trailer = parse_batch_trailer(record.data)
        is_ours = trailer.batch_offset == self._batch_start
        records = tuple(self._scan.rest)
        if record.found_by_search and not is_ours:
            # The trailer before may be damaged: then what it ended is found in front of this batch.
            first = next((n for n, r in enumerate(records) if r.offset == trailer.batch_offset), -1)
            if first < 0 or not _is_for(trailer, records[first:]):
                self._scan.strays.append(record.offset)
                return False  # may be part of a stored file
            proven = tuple(replace(found, found_by_search=False) for found in records[first:])
            records = records[:first] + proven
        self._scan.batches.append(
            FoundBatch(
                self._scan.number,
                trailer,
                records,
                whole=is_ours and not self._gap_count and _is_for(trailer, records),
                counted=is_ours and trailer.record_count == len(records) + self._gap_count,
                end=record.end,
            )
        )
        self._scan.rest = []
        self._batch_start = record.end
        self._gap_count = 0
        return True

    def _next_start(self, offset: int) -> tuple[int, bool]:
        """Where the next record may start, and whether that is a guess."""
        for start in self._starts:
            if start >= offset:
                return min(start, self._stop), False
        if self._starts:
            return self._stop, False
        while offset < self._stop:
            try:
                data = self._read_some(_CHUNK_BYTES, offset)
            except StorageError as error:
                _raise_if_it_may_pass(error)
                offset += _PAGE_BYTES - offset % _PAGE_BYTES
                continue
            if not data:
                break
            at = data.find(RECORD_MAGIC)
            while at >= 0:
                if self._looks_like_a_record(offset + at):
                    return offset + at, True
                at = data.find(RECORD_MAGIC, at + 1)
            # Magics that lie across two reads are found by the second.
            offset += max(1, len(data) - len(RECORD_MAGIC) + 1)
        return self._stop, True

    def _looks_like_a_record(self, offset: int) -> bool:
        try:
            data = self._read_some(RECORD_HEADER_BYTES_MAX, offset)
            return offset + parse_record_header(data, "").record_size <= self._stop
        except FragmentError as error:
            _raise_if_it_may_pass(error)
            return False


def _is_for(trailer: BatchTrailer, records: Sequence[FoundRecord]) -> bool:
    """Whether these are exactly the records that a trailer was written for."""
    headers = xxhash.xxh3_64()
    for found in records:
        headers.update(found.header.header_checksum.to_bytes(8, "little"))
    return trailer.record_count == len(records) and trailer.records_checksum == headers.intdigest()


def _is_fragment(header: RecordHeader, data: bytes) -> bool:
    """Whether the sizes that a fragment's header states fit together."""
    if header.header_size < fragment_header_size(0):
        return False
    values = FRAGMENT_HEADER.unpack(data, RECORD_HEADER.size)
    raw_size, base_count, params_size = int(values[2]), int(values[5]), int(values[7])
    return (
        fragment_header_size(base_count) + params_size == header.header_size
        and raw_size <= FRAGMENT_BYTES_MAX
        and header.payload_size <= FRAGMENT_BYTES_MAX
    )
