"""Packs, byte by byte: pack header, records, batch trailer, pack index. Pure.

FORMAT.md is the contract; `tests/library/test_format_document.py` compares its tables with the
`Layout` values below, so a field cannot change here alone. All integers are little-endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from fragfs.errors import FormatError, IntegrityError, LimitError, UsageError
from fragfs.types import (
    FRAGMENT_BYTES_MAX,
    LIBRARY_FORMAT_VERSION,
    PREDICTORS_FROM_BASES,
    Dtype,
    Fragment,
    FragmentId,
    Level,
    LibraryConfig,
    Predictor,
)

__all__ = [
    "BATCH_TRAILER",
    "FOOTER_MAGIC",
    "FRAGMENT_HEADER",
    "INDEX_ENTRY",
    "PACK_FOOTER",
    "PACK_HEADER",
    "PACK_MAGIC",
    "RECORD_HEADER",
    "RECORD_HEADER_BYTES_MAX",
    "RECORD_MAGIC",
    "RETIRED_BATCH",
    "BatchTrailer",
    "IndexEntry",
    "PackHeader",
    "RecordHeader",
    "RecordKind",
    "RetiredBatch",
    "checksum",
    "fragment_header_size",
    "pack_batch_trailer",
    "pack_fragment_record",
    "pack_index",
    "pack_pack_header",
    "pack_plain_record",
    "pack_retirement",
    "parse_batch_trailer",
    "parse_fragment_record",
    "parse_index",
    "parse_pack_header",
    "parse_record_header",
    "parse_retirement",
]


class Layout:
    """A fixed run of little-endian fields, described once for code and document.

    Args:
        *fields: (name, struct code) pairs, in order, without gaps.
    """

    def __init__(self, *fields: tuple[str, str]) -> None:
        self.fields = fields
        self._struct = struct.Struct("<" + "".join(code for _, code in fields))
        self.size = self._struct.size

    def pack(self, *values: object) -> bytes:
        """Pack one value per field."""
        return self._struct.pack(*values)

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> tuple[Any, ...]:
        """Unpack one value per field; the caller has checked that enough bytes are there."""
        return self._struct.unpack_from(data, offset)

    def table(self) -> list[tuple[int, int, str]]:
        """(offset, size, name) of every field, as FORMAT.md lists them."""
        rows = []
        offset = 0
        for name, code in self.fields:
            size = struct.calcsize("<" + code)
            rows.append((offset, size, name))
            offset += size
        return rows


class RecordKind(enum.IntEnum):
    """What a record is. Codes are on disk."""

    FRAGMENT = 1
    MANIFEST = 2
    REMOVAL = 3
    RETIREMENT = 4
    BATCH_TRAILER = 5
    PACK_INDEX = 6


PACK_MAGIC = b"\x89FRAGPK\n"
RECORD_MAGIC = b"FrRc"
FOOTER_MAGIC = b"FRAGEND\n"

PACK_HEADER = Layout(
    ("magic", "8s"),
    ("format_version", "I"),
    ("header_size", "I"),
    ("library_uuid", "16s"),
    ("pack_number", "Q"),
    ("pack_bytes_max", "Q"),
    ("fragment_elements", "I"),
    ("closure_max", "B"),
    ("zstd_level", "B"),
    ("level", "B"),
    ("reserved", "B"),
    ("header_checksum", "Q"),
)
RECORD_HEADER = Layout(
    ("magic", "4s"),
    ("kind", "B"),
    ("flags", "B"),
    ("header_size", "H"),
    ("payload_size", "Q"),
    ("payload_checksum", "Q"),
)
FRAGMENT_HEADER = Layout(
    ("id", "32s"),
    ("raw_checksum", "Q"),
    ("raw_size", "I"),
    ("predictor", "B"),
    ("dtype", "B"),
    ("base_count", "B"),
    ("reserved_1", "B"),
    ("params_size", "H"),
    ("reserved_2", "H"),
)
BATCH_TRAILER = Layout(
    ("generation", "Q"),
    ("batch", "16s"),
    ("parent", "16s"),
    ("batch_offset", "Q"),
    ("record_count", "I"),
    ("reserved", "I"),
    ("records_checksum", "Q"),
)
RETIRED_BATCH = Layout(("generation", "Q"), ("batch", "16s"), ("parent", "16s"))
INDEX_ENTRY = Layout(
    ("id", "32s"), ("offset", "Q"), ("record_size", "I"), ("raw_size", "I"), ("kind", "B")
)
PACK_FOOTER = Layout(("index_offset", "Q"), ("magic", "8s"))

_CHECKSUM_BYTES = 8
RECORD_HEADER_BYTES_MAX = 0xFFFF
_PLAIN_HEADER_SIZE = RECORD_HEADER.size + _CHECKSUM_BYTES
_RECORD_BYTES_MAX = 1 << 36


def checksum(data: bytes | memoryview) -> int:
    """XXH3-64 with seed 0, the checksum of everything in a pack."""
    return xxhash.xxh3_64_intdigest(data)


def _sealed(header: bytes) -> bytes:
    return header + checksum(header).to_bytes(_CHECKSUM_BYTES, "little")


# --- packs


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The first bytes of a pack: which library it belongs to, and that library's settings."""

    library_uuid: bytes
    pack_number: int
    config: LibraryConfig


def pack_pack_header(header: PackHeader) -> bytes:
    """Pack a `PackHeader`; its size is `PACK_HEADER.size`."""
    config = header.config
    body = PACK_HEADER.pack(
        PACK_MAGIC,
        LIBRARY_FORMAT_VERSION,
        PACK_HEADER.size,
        header.library_uuid,
        header.pack_number,
        config.pack_bytes_max,
        config.fragment_elements,
        config.closure_max,
        config.zstd_level,
        config.level,
        0,
        0,
    )
    return _sealed(body[:-_CHECKSUM_BYTES])


def parse_pack_header(data: bytes, path: str) -> PackHeader:
    """Read a pack's first `PACK_HEADER.size` bytes.

    Raises:
        FormatError: A pack of a newer format.
        IntegrityError: Not a pack, or its header is damaged.
    """
    if len(data) < PACK_HEADER.size or data[:8] != PACK_MAGIC:
        raise IntegrityError(
            f"{path} is not a pack", path=path, remedy="restore the file from a backup"
        )
    values = dict(
        zip((name for name, _ in PACK_HEADER.fields), PACK_HEADER.unpack(data), strict=True)
    )
    if values["header_checksum"] != checksum(data[: PACK_HEADER.size - _CHECKSUM_BYTES]):
        raise IntegrityError(
            f"{path}: the pack header is damaged",
            path=path,
            remedy="restore the file from a backup",
        )
    if int(values["format_version"]) > LIBRARY_FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {values['format_version']}, this fragfs reads up to"
            f" {LIBRARY_FORMAT_VERSION}",
            path=path,
            remedy="upgrade fragfs",
        )
    try:
        config = LibraryConfig(
            fragment_elements=int(values["fragment_elements"]),
            closure_max=int(values["closure_max"]),
            zstd_level=int(values["zstd_level"]),
            pack_bytes_max=int(values["pack_bytes_max"]),
            level=Level(int(values["level"])),
        )
    except (UsageError, ValueError) as error:
        raise FormatError(
            f"{path}: settings that this fragfs does not know: {error}",
            path=path,
            remedy="upgrade fragfs",
        ) from error
    return PackHeader(bytes(values["library_uuid"]), int(values["pack_number"]), config)


# --- records


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The part that every record starts with, checked.

    Attributes:
        kind: What the record is.
        header_size: Bytes before the payload.
        payload_size: Bytes of the payload.
        payload_checksum: XXH3-64 of the payload as stored.
        header_checksum: XXH3-64 of the header before this field.
    """

    kind: RecordKind
    header_size: int
    payload_size: int
    payload_checksum: int
    header_checksum: int

    @property
    def record_size(self) -> int:
        """Bytes of the whole record."""
        return self.header_size + self.payload_size


def parse_record_header(data: bytes | memoryview, where: str) -> RecordHeader:
    """Read the header at the start of `data` (at least the header must be there).

    Args:
        data: Bytes from the start of a record.
        where: "pack 12 at offset 4096", for messages.

    Raises:
        IntegrityError: There is no whole, undamaged record header of a known kind.
    """
    damaged = IntegrityError(f"no readable record in {where}", remedy=_DAMAGED_REMEDY)
    if len(data) < RECORD_HEADER.size:
        raise damaged
    magic, kind, flags, header_size, payload_size, payload_checksum = RECORD_HEADER.unpack(data)
    header_size, payload_size = int(header_size), int(payload_size)
    if (
        magic != RECORD_MAGIC
        or not _PLAIN_HEADER_SIZE <= header_size <= len(data)
        or payload_size > _RECORD_BYTES_MAX
    ):
        raise damaged
    body_size = header_size - _CHECKSUM_BYTES
    found = int.from_bytes(data[body_size:header_size], "little")
    if found != checksum(memoryview(data)[:body_size]):
        raise damaged
    if flags or kind not in RecordKind.__members__.values():
        raise FormatError(
            f"record of unknown kind {kind} (flags {flags}) in {where}", remedy="upgrade fragfs"
        )
    return RecordHeader(
        RecordKind(int(kind)), header_size, payload_size, int(payload_checksum), found
    )


_DAMAGED_REMEDY = (
    "restore the pack from a backup, or add a model that holds these bytes again, which heals it"
)


def _pack_record(kind: RecordKind, fields: bytes, payload: bytes | memoryview) -> bytes:
    header_size = _PLAIN_HEADER_SIZE + len(fields)
    if header_size > RECORD_HEADER_BYTES_MAX:
        raise LimitError(
            f"a record header of {header_size} bytes exceeds {RECORD_HEADER_BYTES_MAX}"
        )
    head = RECORD_HEADER.pack(RECORD_MAGIC, kind, 0, header_size, len(payload), checksum(payload))
    return _sealed(head + fields)


def pack_plain_record(kind: RecordKind, payload: bytes) -> bytes:
    """A record whose header has no fields of its own: MANIFEST, REMOVAL."""
    return _pack_record(kind, b"", payload) + payload


def pack_fragment_record(fragment: Fragment) -> tuple[bytes, bytes | memoryview]:
    """The record of a fragment as (header, payload), to be written back to back."""
    fields = FRAGMENT_HEADER.pack(
        fragment.id,
        fragment.raw_checksum,
        fragment.raw_size,
        fragment.predictor,
        fragment.dtype.code,
        len(fragment.bases),
        0,
        len(fragment.params),
        0,
    )
    fields += b"".join(fragment.bases) + fragment.params
    return _pack_record(RecordKind.FRAGMENT, fields, fragment.payload), fragment.payload


def fragment_header_size(base_count: int) -> int:
    """Bytes of a fragment's record besides parameters and payload."""
    return _PLAIN_HEADER_SIZE + FRAGMENT_HEADER.size + 32 * base_count


def parse_fragment_record(
    data: bytes | memoryview, where: str, *, check_stored: bool = True
) -> Fragment:
    """Read a whole fragment record and check its header and its stored bytes.

    Args:
        data: Exactly the record, as `record_size` in the catalog says.
        where: "pack 12 at offset 4096", for messages.
        check_stored: False where the raw bytes will be decoded and checked anyway.

    Returns:
        The fragment; its payload is a view of `data`.

    Raises:
        IntegrityError: Header or payload differ from their checksums.
        FormatError: The record needs a newer fragfs.
    """
    view = memoryview(data)
    header = parse_record_header(view, where)
    if header.kind is not RecordKind.FRAGMENT or header.record_size != len(view):
        raise IntegrityError(f"another record than expected in {where}", remedy=_DAMAGED_REMEDY)
    payload = view[header.header_size :]
    if check_stored and (found := checksum(payload)) != header.payload_checksum:
        raise IntegrityError(
            f"stored bytes differ from their checksum in {where}",
            remedy=_DAMAGED_REMEDY,
            expected=f"{header.payload_checksum:016x}",
            actual=f"{found:016x}",
        )
    fields_end = RECORD_HEADER.size + FRAGMENT_HEADER.size
    if header.header_size < fields_end + _CHECKSUM_BYTES:
        raise IntegrityError(f"fragment header too short in {where}", remedy=_DAMAGED_REMEDY)
    values = FRAGMENT_HEADER.unpack(view, RECORD_HEADER.size)
    fragment_id, raw_checksum, raw_size, predictor, dtype_code, base_count, _, params_size, _ = (
        values
    )
    bases_end = fields_end + 32 * int(base_count)
    if bases_end + int(params_size) + _CHECKSUM_BYTES != header.header_size:
        raise IntegrityError(f"fragment header sizes disagree in {where}", remedy=_DAMAGED_REMEDY)
    dtype = Dtype.of_code(int(dtype_code))
    is_known = predictor in Predictor.__members__.values()
    if dtype is None or not is_known or bool(base_count) != (predictor in PREDICTORS_FROM_BASES):
        raise FormatError(
            f"fragment in {where} uses dtype {dtype_code}, predictor {predictor} with {base_count}"
            " bases, which this fragfs does not know",
            remedy="upgrade fragfs",
        )
    if int(raw_size) > FRAGMENT_BYTES_MAX:
        raise FormatError(
            f"fragment in {where} claims {raw_size} raw bytes", remedy="upgrade fragfs"
        )
    return Fragment(
        id=FragmentId(fragment_id),
        dtype=dtype,
        raw_size=int(raw_size),
        raw_checksum=int(raw_checksum),
        predictor=Predictor(int(predictor)),
        params=bytes(view[bases_end : bases_end + int(params_size)]),
        payload=payload,
        bases=tuple(
            FragmentId(view[start : start + 32]) for start in range(fields_end, bases_end, 32)
        ),
    )


# --- batches and the index


@dataclass(frozen=True, slots=True)
class BatchTrailer:
    """Ends a batch; without it the records before it do not count.

    Attributes:
        generation: The catalog's generation once the batch is committed.
        batch: Random id of the batch: 16 bytes.
        parent: Id of the batch that was committed before it, in whatever pack.
        batch_offset: Where the batch's first record starts in the pack.
        record_count: Records of the batch, the trailer not counted.
        records_checksum: XXH3-64 over the header checksums of those records, in order.
    """

    generation: int
    batch: bytes
    parent: bytes
    batch_offset: int
    record_count: int
    records_checksum: int


def pack_batch_trailer(trailer: BatchTrailer) -> bytes:
    """The record of a batch trailer."""
    fields = BATCH_TRAILER.pack(
        trailer.generation,
        trailer.batch,
        trailer.parent,
        trailer.batch_offset,
        trailer.record_count,
        0,
        trailer.records_checksum,
    )
    return _pack_record(RecordKind.BATCH_TRAILER, fields, b"")


def parse_batch_trailer(data: bytes | memoryview) -> BatchTrailer:
    """Read the fields of a trailer whose header `parse_record_header` has accepted.

    Raises:
        IntegrityError: The header is too short for them.
    """
    if len(data) < RECORD_HEADER.size + BATCH_TRAILER.size + _CHECKSUM_BYTES:
        raise IntegrityError("a batch trailer is too short", remedy=_DAMAGED_REMEDY)
    values = BATCH_TRAILER.unpack(data, RECORD_HEADER.size)
    generation, batch, parent, batch_offset, record_count, _, records_checksum = values
    return BatchTrailer(
        int(generation),
        bytes(batch),
        bytes(parent),
        int(batch_offset),
        int(record_count),
        int(records_checksum),
    )


@dataclass(frozen=True, slots=True)
class RetiredBatch:
    """A committed batch whose pack is gone: a link of the chain that tells what was committed."""

    generation: int
    batch: bytes
    parent: bytes


def pack_retirement(batches: Sequence[RetiredBatch]) -> bytes:
    """The payload of a RETIREMENT record."""
    return b"".join(
        RETIRED_BATCH.pack(batch.generation, batch.batch, batch.parent) for batch in batches
    )


def parse_retirement(payload: bytes) -> list[RetiredBatch]:
    """Read what `pack_retirement` wrote.

    Raises:
        FormatError: It is no whole number of entries.
    """
    if len(payload) % RETIRED_BATCH.size:
        raise FormatError("a retirement record ends inside an entry", actual=len(payload))
    return [
        RetiredBatch(int(generation), bytes(batch), bytes(parent))
        for generation, batch, parent in (
            RETIRED_BATCH.unpack(payload, offset)
            for offset in range(0, len(payload), RETIRED_BATCH.size)
        )
    ]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One fragment or other record of a sealed pack.

    Attributes:
        id: The fragment's id; 32 zero bytes for other records.
        offset: Where the record starts in the pack.
        record_size: Bytes of the whole record.
        raw_size: Bytes after decoding; 0 for other records.
        kind: What the record is.
    """

    id: bytes
    offset: int
    record_size: int
    raw_size: int
    kind: RecordKind


def pack_index(entries: Sequence[IndexEntry], offset: int) -> bytes:
    """The end of a sealed pack: index record and footer.

    Args:
        entries: Every record of the pack, by offset.
        offset: Where the index record itself will start in the pack.
    """
    payload = b"".join(
        INDEX_ENTRY.pack(entry.id, entry.offset, entry.record_size, entry.raw_size, entry.kind)
        for entry in entries
    )
    return pack_plain_record(RecordKind.PACK_INDEX, payload) + PACK_FOOTER.pack(
        offset, FOOTER_MAGIC
    )


def parse_index(data: bytes, where: str) -> list[IndexEntry]:
    """Read an index record (without the footer).

    Raises:
        IntegrityError: The record is damaged.
        FormatError: It needs a newer fragfs.
    """
    header = parse_record_header(data, where)
    payload = data[header.header_size : header.record_size]
    if (
        header.kind is not RecordKind.PACK_INDEX
        or checksum(payload) != header.payload_checksum
        or len(payload) % INDEX_ENTRY.size
    ):
        raise IntegrityError(f"the pack index is damaged in {where}", remedy=_DAMAGED_REMEDY)
    entries = []
    for position in range(0, len(payload), INDEX_ENTRY.size):
        fragment, offset, record_size, raw_size, kind = INDEX_ENTRY.unpack(payload, position)
        if kind not in RecordKind.__members__.values():
            raise FormatError(
                f"the pack index names a record of unknown kind {kind} in {where}",
                remedy="upgrade fragfs",
            )
        entries.append(
            IndexEntry(
                bytes(fragment),
                int(offset),
                int(record_size),
                int(raw_size),
                RecordKind(int(kind)),
            )
        )
    return entries
