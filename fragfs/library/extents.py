"""How a file is assembled: its extents, as compact arrays.

A file of 28,000 extents must open in milliseconds, so extents are columns of one compressed blob,
never a row or an object each. Standard-library arrays: a mount's `open` needs no numpy.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import xxhash
import zstandard

from fragfs.errors import FormatError
from fragfs.library.frames import read_frame
from fragfs.types import FRAGMENT_BYTES_MAX, Extent, SpanKind

__all__ = ["EXTENTS_MAX", "ExtentMap", "ExtentMapBuilder", "OpenContent", "check_seal"]

EXTENTS_MAX = 1 << 26
"""Most extents of one file: 64 TiB of 1 MiB fragments. Bounds what a damaged blob may allocate."""

_FIRST = 0x80
_ROW_BYTES = 4 + 8 + 4 + 1
_KIND_BYTES = bytes(kind | first for kind in SpanKind for first in (0, _FIRST))
_SEAL_BYTES = 8
_REMEDY = "restore the catalog from a backup"


def _little(values: array[int]) -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _native(typecode: str, data: bytes) -> array[int]:
    values = array(typecode, data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


class ExtentMap:
    """The extents of one file, in order, covering `[0, size)` exactly once.

    Immutable; safe to share between threads.

    Attributes:
        size: Bytes of the file.
        ends: Where each extent ends in the file, array("q").
        fragments: Fragment number per extent, array("q").
    """

    __slots__ = ("_kinds", "_offsets", "_sizes", "ends", "fragments", "size")

    def __init__(
        self, sizes: array[int], fragments: array[int], offsets: array[int], kinds: bytes
    ) -> None:
        self._sizes = sizes
        self.fragments = fragments
        self._offsets = offsets
        self._kinds = kinds
        self.ends = array("q", accumulate(sizes))
        self.size = self.ends[-1] if sizes else 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> Extent:
        end, size, kind = self.ends[index], self._sizes[index], self._kinds[index]
        return Extent(
            end - size,
            size,
            self.fragments[index],
            self._offsets[index],
            SpanKind(kind & ~_FIRST),
            bool(kind & _FIRST),
        )

    def __iter__(self) -> Iterator[Extent]:
        return (self[index] for index in range(len(self)))

    def index_at(self, offset: int) -> int:
        """Index of the extent that holds byte `offset`; binary search.

        Raises:
            IndexError: `offset` is outside `[0, size)`.
        """
        if not 0 <= offset < self.size:
            raise IndexError(f"byte {offset} is outside a file of {self.size} bytes")
        return bisect_right(self.ends, offset)

    def columns(self) -> tuple[array[int], array[int], bytes]:
        """(sizes, offsets in the fragment, kind bytes): the columns that name no fragment."""
        return self._sizes, self._offsets, bytes(self._kinds)

    def pack(self, content: int, sha256: bytes) -> bytes:
        """The blob kept in the catalog (FORMAT.md, "Extents").

        Fragment numbers are stored as differences: neighbours in a file are mostly neighbours in
        the catalog, so the column compresses to nearly nothing. SQLite has no checksums, and a
        flipped bit here would be another fragment's bytes: hence the frame's own, and the seal
        that ties the frame to its content.

        Args:
            content: The content's number.
            sha256: Its SHA-256: 32 bytes.
        """
        steps = array(
            "q", (b - a for a, b in zip([0, *self.fragments], self.fragments, strict=False))
        )
        body = b"".join(
            (_little(self._sizes), _little(steps), _little(self._offsets), bytes(self._kinds))
        )
        compressor = zstandard.ZstdCompressor(level=6, write_checksum=True)
        frame = compressor.compress(len(self).to_bytes(4, "little") + body)
        return frame + _seal(frame, content, sha256)

    @classmethod
    def parse(cls, blob: bytes) -> ExtentMap:
        """Read what `pack` wrote; whose extents they are is left to `check_seal`.

        Raises:
            FormatError: The blob is damaged.
        """
        try:
            data = read_frame(blob, 4, 4 + _ROW_BYTES * EXTENTS_MAX)
        except zstandard.ZstdError as error:
            raise FormatError("the extents of a file do not decompress", remedy=_REMEDY) from error
        count = int.from_bytes(data[:4], "little")
        if len(data) != 4 + _ROW_BYTES * count:
            raise FormatError(
                f"the extents of a file have {len(data)} bytes, {count} extents need"
                f" {4 + _ROW_BYTES * count}",
                remedy=_REMEDY,
            )
        body = data[4:]
        sizes = _native("I", body[: 4 * count])
        steps = _native("q", body[4 * count : 12 * count])
        offsets = _native("I", body[12 * count : 16 * count])
        kinds = body[16 * count :]
        try:
            fragments = array("q", accumulate(steps))
        except OverflowError:
            fragments = array("q", [0])
        if count and (
            min(sizes) < 1
            or max(sizes) > FRAGMENT_BYTES_MAX
            or min(fragments) < 1
            or max(offsets) >= FRAGMENT_BYTES_MAX
            or kinds.translate(None, _KIND_BYTES)
        ):
            raise FormatError(
                "the extents of a file name what cannot be: an empty or too large range, or a"
                " fragment or kind that does not exist",
                remedy=_REMEDY,
            )
        return cls(sizes, fragments, offsets, kinds)


def check_seal(blob: bytes, content: int, sha256: bytes) -> None:
    """Check that packed extents are those of a content.

    Raises:
        FormatError: They are another's, or damaged.
    """
    try:
        is_sealed = zstandard.get_frame_parameters(blob).has_checksum
    except (zstandard.ZstdError, TypeError):
        is_sealed = True  # of no frame: damaged
    if is_sealed and blob[-_SEAL_BYTES:] != _seal(blob[:-_SEAL_BYTES], content, sha256):
        raise FormatError(
            f"the extents of content {content} differ from their checksum", remedy=_REMEDY
        )


def _seal(frame: bytes, content: int, sha256: bytes) -> bytes:
    tied = content.to_bytes(8, "little", signed=True) + sha256 + frame
    return xxhash.xxh3_64_digest(tied)[::-1]


class ExtentMapBuilder:
    """Collects the extents of a file front to back."""

    def __init__(self) -> None:
        self._sizes = array("I")
        self._fragments = array("q")
        self._offsets = array("I")
        self._kinds = bytearray()

    def append(
        self, size: int, fragment: int, fragment_offset: int, kind: SpanKind, *, first: bool
    ) -> None:
        """Add the next extent; see `Extent` for the fields."""
        self._sizes.append(size)
        self._fragments.append(fragment)
        self._offsets.append(fragment_offset)
        self._kinds.append(kind | (_FIRST if first else 0))

    def build(self) -> ExtentMap:
        """The finished map."""
        return ExtentMap(self._sizes, self._fragments, self._offsets, bytes(self._kinds))


@dataclass(frozen=True, slots=True)
class OpenContent:
    """A file content with everything needed to read it.

    Attributes:
        number: The content's number: its inode in a mount.
        size: Bytes of the file.
        mtime_ns: Modification time of the first file that had this content.
        sha256: SHA-256 of the whole content: 32 bytes.
        stored_bytes: Record bytes of its own fragments, bases not included.
        extents: How it is assembled.
    """

    number: int
    size: int
    mtime_ns: int
    sha256: bytes
    stored_bytes: int
    extents: ExtentMap
