"""Elements regrouped into planes of bytes, so that alike bytes stand together.

An element of `unit` bytes (2, 4 or 8) is cut into a *window* of 8 bits that starts `lead` bits
below its top, the *rim* (the `lead` bits above the window and the `8 - lead` below it), and the
bytes below those. For floats the window is put over the exponent, which is what compresses; with
`lead` = 0 window and rim are simply the two top bytes. Planes run from the least significant bytes
up: low planes, rim, window. Neighbouring low planes that stay raw are kept as one wider plane,
because merging it back takes one pass over memory instead of one for each byte.

Only integer arithmetic on bit patterns, little-endian on disk whatever the host.
Format: library/FORMAT.md, "Planes".
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes, compress_plane, decompress
from fragfs.errors import FormatError

__all__ = ["LEAD_BITS_MAX", "decode_planes", "encode_planes"]

LEAD_BITS_MAX = 7

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

_HEADER = struct.Struct("<BB")  # lead, plane count
_PLANE = struct.Struct("<BI")  # method | log2(width) << 4, stored size

_BLOCK_BYTES = 1 << 17
"""Output merged at a time: output, scratch and their planes then stay in a core's L2 cache."""

_UPGRADE = "upgrade fragfs"


class _Method(enum.IntEnum):
    """How one plane is stored. Codes are on disk."""

    RAW = 0
    CONSTANT = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where window and rim lie in a word of `unit` bytes."""

    unit: int
    lead: int

    @property
    def word(self) -> np.dtype[np.unsignedinteger[Any]]:
        return np.dtype(f"<u{self.unit}")

    @property
    def window_shift(self) -> int:
        return 8 * self.unit - 8 - self.lead

    @property
    def low_size(self) -> int:
        """Bytes of an element below window and rim."""
        return self.unit - 2

    @property
    def rim_mask(self) -> int:
        """The rim's bits in the top 16 bits of a word, `lead` of them above the window."""
        return (0xFF00 << (8 - self.lead)) & 0xFF00 | 0xFF >> self.lead


@dataclass(frozen=True, slots=True)
class _Plane:
    """One plane as stored: `position` and `width` are bytes of an element, from its low end."""

    method: _Method
    position: int
    width: int
    stored: Bytes


def encode_planes(words_raw: memoryview, unit: int, lead: int, level: int) -> tuple[bytes, bytes]:
    """Cut elements into planes and store each the smallest way.

    Args:
        words_raw: Little-endian elements back to back, at least one; a rest shorter than an
            element is kept verbatim.
        unit: Bytes per element: 2, 4 or 8.
        lead: Bits of an element above the window, 0 to LEAD_BITS_MAX.
        level: zstd level for planes in which matches pay.

    Returns:
        Parameters and payload. Copies; `words_raw` may be released.
    """
    layout = _Layout(unit, lead)
    count = len(words_raw) // unit
    words: Words = np.frombuffer(words_raw, layout.word, count)
    planes = _group_raw([_encode_plane(words, layout, p, level) for p in range(unit)], words)
    params = _HEADER.pack(lead, len(planes)) + b"".join(
        _PLANE.pack(plane.method | (plane.width.bit_length() - 1) << 4, len(plane.stored))
        for plane in planes
    )
    tail = words_raw[count * unit :]
    return params, b"".join([*(plane.stored for plane in planes), tail])


def decode_planes(params: Bytes, payload: memoryview, unit: int, raw_size: int) -> memoryview:
    """Undo `encode_planes`.

    Args:
        params: Parameters, from disk.
        payload: Payload, from disk.
        unit: Bytes per element: 2, 4 or 8.
        raw_size: Bytes to return; at most FRAGMENT_BYTES_MAX.

    Returns:
        A read-only view of fresh memory.

    Raises:
        FormatError: The stored bytes break a rule of the format.
    """
    count, tail_size = divmod(raw_size, unit)
    layout, planes = _parse(params, payload, unit, tail_size)
    parts, constant = _parts(planes, layout, count)
    raw = np.empty(raw_size, np.uint8)
    _merge(parts, constant, raw[: count * unit].view(layout.word))
    if tail_size:
        raw[count * unit :] = np.frombuffer(payload, np.uint8)[-tail_size:]
    return raw.data.toreadonly()


def _encode_plane(words: Words, layout: _Layout, position: int, level: int) -> _Plane:
    plane = _cut(words, layout, position)
    if plane.min() == plane.max():
        return _Plane(_Method.CONSTANT, position, 1, plane[:1].tobytes())
    stored = compress_plane(plane, level)
    if stored is None:
        return _Plane(_Method.RAW, position, 1, plane.data)
    return _Plane(_Method.ZSTD, position, 1, stored)


def _cut(words: Words, layout: _Layout, position: int) -> NDArray[np.uint8]:
    """The byte plane at `position`; a contiguous copy."""
    one = layout.word.type
    if position == layout.unit - 1:
        return (words >> one(layout.window_shift)).astype(np.uint8)
    if position < layout.low_size:
        return (words >> one(8 * position)).astype(np.uint8)
    top = (words >> one(8 * layout.low_size)).astype("<u2")
    np.bitwise_and(top, np.uint16(layout.rim_mask), out=top)
    # The rim's two parts never meet: one ends where the other begins.
    plane: NDArray[np.uint8] = (top | top >> np.uint16(8)).astype(np.uint8)
    return plane


def _group_raw(planes: list[_Plane], words: Words) -> list[_Plane]:
    """Join raw low planes into planes of 4 or 2 bytes where enough of them are neighbours."""
    low_size = len(planes) - 2
    grouped: list[_Plane] = []
    position = 0
    while position < len(planes):
        run = 0
        while position + run < low_size and planes[position + run].method is _Method.RAW:
            run += 1
        width = next((width for width in (4, 2) if width <= run), 1)
        if width == 1:
            grouped.append(planes[position])
        else:
            joined = (words >> words.dtype.type(8 * position)).astype(f"<u{width}")
            grouped.append(_Plane(_Method.RAW, position, width, joined.tobytes()))
        position += width
    return grouped


def _parse(
    params: Bytes, payload: memoryview, unit: int, tail_size: int
) -> tuple[_Layout, list[_Plane]]:
    """Read the parameters and cut the payload; everything but plane contents is checked here."""
    if len(params) < _HEADER.size:
        raise FormatError("plane parameters end early", actual=len(params))
    lead, plane_count = _HEADER.unpack_from(params)
    if lead > LEAD_BITS_MAX:
        raise FormatError("unknown plane layout", remedy=_UPGRADE, actual=lead)
    expected_size = _HEADER.size + plane_count * _PLANE.size
    if len(params) != expected_size:
        raise FormatError(
            "plane parameters have the wrong size", expected=expected_size, actual=len(params)
        )
    planes = []
    position = offset = 0
    for packed, size in _PLANE.iter_unpack(params[_HEADER.size :]):
        method, width = _parse_method(packed)
        if width > 1 and position + width > unit - 2:
            raise FormatError("a wide plane reaches into the top bytes", offset=position)
        planes.append(_Plane(method, position, width, payload[offset : offset + size]))
        position += width
        offset += size
    if position != unit:
        raise FormatError("planes do not cover an element", expected=unit, actual=position)
    if offset + tail_size != len(payload):
        raise FormatError(
            "planes do not cover the payload", expected=offset + tail_size, actual=len(payload)
        )
    return _Layout(unit, lead), planes


def _parse_method(packed: int) -> tuple[_Method, int]:
    width = 1 << (packed >> 4)
    try:
        method = _Method(packed & 0xF)
    except ValueError:
        raise FormatError("unknown plane method", remedy=_UPGRADE, actual=packed) from None
    if width > 4 or (width > 1 and method is not _Method.RAW):
        raise FormatError("unknown plane width", remedy=_UPGRADE, actual=packed)
    return method, width


@dataclass(frozen=True, slots=True)
class _Part:
    """What one plane adds to each word: `values * factor & mask`; no mask if None."""

    values: Words
    factor: np.unsignedinteger[Any]
    mask: np.unsignedinteger[Any] | None


def _parts(planes: list[_Plane], layout: _Layout, count: int) -> tuple[list[_Part], int]:
    """Decode the planes; those that are constant come back folded into one word."""
    one = layout.word.type
    constant = 0
    parts = []
    for plane in planes:
        factor, mask = 1 << 8 * plane.position, None
        if plane.position == layout.unit - 1:
            factor = 1 << layout.window_shift
        elif plane.position == layout.low_size:
            # One product puts a copy of the rim at each of its two places; the mask picks.
            factor = 0x0101 << 8 * layout.low_size
            mask = layout.rim_mask << 8 * layout.low_size
        if plane.method is _Method.CONSTANT:
            value = _constant(plane) * factor
            constant |= value if mask is None else value & mask
        else:
            values = _values(plane, count)
            parts.append(_Part(values, one(factor), None if mask is None else one(mask)))
    return parts, constant


def _constant(plane: _Plane) -> int:
    if len(plane.stored) != 1:
        raise FormatError("a constant plane is not one byte", actual=len(plane.stored))
    return plane.stored[0]


def _values(plane: _Plane, count: int) -> Words:
    stored = plane.stored
    if plane.method is _Method.ZSTD:
        stored = decompress(stored, count)
    elif len(stored) != count * plane.width:
        raise FormatError(
            "a raw plane has the wrong size", expected=count * plane.width, actual=len(stored)
        )
    return np.frombuffer(stored, f"<u{plane.width}")


def _merge(parts: list[_Part], constant: int, out: Words) -> None:
    """Write `constant | part | part ...` into `out`, a block at a time.

    Widening copies and in-place arithmetic only: each pass runs at 25 to 80 GB/s in cache, where
    writing every second or fourth byte of the output runs at 7 to 14 (EPYC, numpy 2.4).
    """
    if constant or not parts:
        out.fill(constant)
    block = _BLOCK_BYTES // out.itemsize
    scratch = np.empty(min(block, out.size), out.dtype)
    for start in range(0, out.size, block):
        target = out[start : start + block]
        fresh = not constant
        for part in parts:
            into = target if fresh else scratch[: target.size]
            np.copyto(into, part.values[start : start + block])
            if part.factor != 1:
                np.multiply(into, part.factor, out=into)
            if part.mask is not None:
                np.bitwise_and(into, part.mask, out=into)
            if not fresh:
                np.bitwise_or(target, into, out=target)
            fresh = False
