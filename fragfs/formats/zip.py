"""zip archives, above all the ones that torch.save writes: storages as uncompressed members.

Members are only cut points. The pickle that knows their dtypes is never loaded; a probe of the
bytes guesses instead, and a wrong guess costs size, never bytes.
Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fragfs.formats.layout import (
    FileFormat,
    Layout,
    ReadAt,
    Span,
    cover,
    element_unit,
    opaque_layout,
)
from fragfs.formats.refusals import TRUNCATED_REMEDY
from fragfs.types import SpanKind

__all__ = ["MEMBER_SIZE_MIN", "parse_zip"]

MEMBER_SIZE_MIN = 4 << 10
"""Smaller members stay part of the bytes around them."""

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_DIRECTORY_SIZE_MAX = 1 << 26
_MEMBERS_MAX = 250_000
_COMMENT_SIZE_MAX = 0xFFFF
_IN_ZIP64_32, _IN_ZIP64_16 = 0xFFFFFFFF, 0xFFFF
_ZIP64_EXTRA = 1
_ENCRYPTED = 1

_LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22xHH")  # magic, name size, extra size
_CENTRAL_MAGIC = b"PK\x01\x02"
_CENTRAL = struct.Struct("<4s4xHH8xIIHHH8xI")
_END_MAGIC = b"PK\x05\x06"
_END = struct.Struct("<4s6xHII2x")  # magic, members, directory size, directory offset
_LOCATOR_MAGIC = b"PK\x06\x07"
_LOCATOR = struct.Struct("<4s4xQ4x")  # magic, offset of the zip64 end record
_END64_MAGIC = b"PK\x06\x06"
_END64 = struct.Struct("<4s28xQQQ")  # magic, members, directory size, directory offset


class _MalformedError(Exception):
    """The bytes are not a zip archive, or beyond the limits above."""


class _NoDirectoryError(_MalformedError):
    """The archive has no end: it was cut short, or never was one."""


@dataclass(frozen=True, slots=True)
class _Directory:
    offset: int
    size: int
    member_count: int


@dataclass(frozen=True, slots=True)
class _Member:
    """A stored member of the central directory."""

    header_offset: int
    size: int


def parse_zip(name: str, size: int, read_at: ReadAt) -> Layout | None:
    """Lay out a zip archive; None if it is none.

    Args:
        name: File name: a checkpoint that lacks its end is refused as truncated.
        size: Bytes of the file.
        read_at: Reads from it; asked for the directory, member headers and samples of members.
    """
    if size < _LOCAL.size + _END.size or read_at(0, 4) != _LOCAL_MAGIC:
        return None
    try:
        directory = _find_directory(size, read_at)
        members = _stored_members(read_at(directory.offset, directory.size), directory)
    except _NoDirectoryError:
        return _cut_short(size) if name.endswith(_CHECKPOINT_SUFFIXES) else None
    except (_MalformedError, struct.error):
        return None
    spans = [
        _member_span(offset, length, read_at)
        for offset, length in _data_ranges(members, directory.offset, read_at)
    ]
    covered = cover(spans, 0, size, SpanKind.OPAQUE, SpanKind.OPAQUE)
    return Layout(FileFormat.ZIP, size, tuple(covered))


def _cut_short(size: int) -> Layout:
    reason = "truncated: the archive lacks the directory at its end"
    return opaque_layout(
        size,
        verdict=f"torch.load rejects it: {reason}",
        refusal=reason,
        refusal_remedy=TRUNCATED_REMEDY,
    )


def _find_directory(size: int, read_at: ReadAt) -> _Directory:
    tail_size = min(size, _END.size + _COMMENT_SIZE_MAX)
    tail = read_at(size - tail_size, tail_size)
    index = tail.rfind(_END_MAGIC)
    if index < 0:
        raise _NoDirectoryError
    end_offset = size - tail_size + index
    _, count, directory_size, offset = _END.unpack_from(tail, index)
    if count == _IN_ZIP64_16 or _IN_ZIP64_32 in (directory_size, offset):
        end_offset, count, directory_size, offset = _read_zip64_end(end_offset, read_at)
    if directory_size > _DIRECTORY_SIZE_MAX or count > _MEMBERS_MAX:
        raise _MalformedError
    if offset + directory_size > end_offset:
        raise _MalformedError
    return _Directory(offset, directory_size, count)


def _read_zip64_end(end_offset: int, read_at: ReadAt) -> tuple[int, int, int, int]:
    """Offset of the zip64 end record and what it says."""
    locator_offset = end_offset - _LOCATOR.size
    if locator_offset < 0:
        raise _MalformedError
    magic, offset = _LOCATOR.unpack(read_at(locator_offset, _LOCATOR.size))
    if magic != _LOCATOR_MAGIC or offset + _END64.size > locator_offset:
        raise _MalformedError
    magic, *values = _END64.unpack(read_at(offset, _END64.size))
    if magic != _END64_MAGIC:
        raise _MalformedError
    return offset, *values


def _stored_members(raw: bytes, directory: _Directory) -> list[_Member]:
    """Members that are neither compressed nor encrypted and large enough to matter."""
    members = []
    position = 0
    for _ in range(directory.member_count):
        fields = _CENTRAL.unpack_from(raw, position)
        magic, flags, method, packed, size, name_size, extra_size, comment_size, offset = fields
        if magic != _CENTRAL_MAGIC:
            raise _MalformedError
        extra_start = position + _CENTRAL.size + name_size
        position = extra_start + extra_size + comment_size
        if method != 0 or flags & _ENCRYPTED:
            continue
        extra = raw[extra_start : extra_start + extra_size]
        size, packed, offset = _widen(size, packed, offset, extra)
        if size == packed and size >= MEMBER_SIZE_MIN:
            members.append(_Member(offset, size))
    return members


def _widen(size: int, packed: int, offset: int, extra: bytes) -> tuple[int, int, int]:
    """Replace the 32-bit values that stand for "see the zip64 extra field"."""
    wide = iter(_zip64_values(extra))
    return (
        next(wide, size) if size == _IN_ZIP64_32 else size,
        next(wide, packed) if packed == _IN_ZIP64_32 else packed,
        next(wide, offset) if offset == _IN_ZIP64_32 else offset,
    )


def _zip64_values(extra: bytes) -> tuple[int, ...]:
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == _ZIP64_EXTRA:
            field = extra[position : position + size]
            return struct.unpack_from(f"<{len(field) // 8}Q", field)
        position += size
    return ()


def _data_ranges(
    members: list[_Member], directory_offset: int, read_at: ReadAt
) -> Iterator[tuple[int, int]]:
    """(offset, size) of the members' bytes, in order; what cannot be true is left out."""
    position = 0
    for member in sorted(set(members), key=lambda member: (member.header_offset, member.size)):
        if not position <= member.header_offset <= directory_offset - _LOCAL.size:
            continue
        header = read_at(member.header_offset, _LOCAL.size)
        magic, name_size, extra_size = _LOCAL.unpack(header)
        offset = member.header_offset + _LOCAL.size + name_size + extra_size
        if magic == _LOCAL_MAGIC and offset + member.size <= directory_offset:
            yield offset, member.size
            position = offset + member.size


def _member_span(offset: int, size: int, read_at: ReadAt) -> Span:
    # Imported here: the probe needs numpy, and most commands parse no archive.
    from fragfs.formats.probe import guess_dtype

    dtype = guess_dtype(offset, size, read_at)
    return Span(offset, size, SpanKind.MEMBER, dtype, element_unit(dtype))
