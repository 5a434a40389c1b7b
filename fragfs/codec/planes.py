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

import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes, Method, decompress_into, store_plane
from fragfs.codec.kernels import find_kernels
from fragfs.codec.scratch import ScratchMemory
from fragfs.errors import FormatError

__all__ = ["LEAD_BITS_MAX", "decode_planes", "encode_planes"]

LEAD_BITS_MAX = 7

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

_HEADER = struct.Struct("<BB")  # lead, plane count
_PLANE = struct.Struct("<BI")  # method | log2(width) << 4, stored size

_BLOCK_ELEMENTS = 1 << 18
"""Elements merged at a time. Smaller blocks fit a faster cache but pay more for numpy calls: 1 MiB
of bf16 takes 180 us in blocks of 2**15, 108 us in blocks of 2**18 (EPYC, 1 MiB L2 per core)."""

_UPGRADE = "upgrade fragfs"


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

    method: Method
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
    scratch = _Scratch(layout, planes, count)
    parts = _decode_parts(planes, layout, count, scratch)
    raw = np.empty(raw_size, np.uint8)
    words = raw[: count * unit].view(layout.word)
    if _kernels is None:
        _merge(parts, layout, scratch, words)
    else:
        low = tuple((position, values.itemsize, values) for position, values in parts.low)
        _kernels.put_together(
            unit, layout.lead, parts.constant, parts.rim, parts.window, low, words
        )
    if tail_size:
        raw[count * unit :] = np.frombuffer(payload, np.uint8)[-tail_size:]
    return raw.data.toreadonly()


def _encode_plane(words: Words, layout: _Layout, position: int, level: int) -> _Plane:
    method, stored = store_plane(_cut(words, layout, position), level)
    return _Plane(method, position, 1, stored)


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
        while position + run < low_size and planes[position + run].method is Method.RAW:
            run += 1
        width = next((width for width in (4, 2) if width <= run), 1)
        if width == 1:
            grouped.append(planes[position])
        else:
            joined = (words >> words.dtype.type(8 * position)).astype(f"<u{width}")
            grouped.append(_Plane(Method.RAW, position, width, joined.tobytes()))
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


def _parse_method(packed: int) -> tuple[Method, int]:
    width = 1 << (packed >> 4)
    try:
        method = Method(packed & 0xF)
    except ValueError:
        raise FormatError("unknown plane method", remedy=_UPGRADE, actual=packed) from None
    if width > 4 or (width > 1 and method is not Method.RAW):
        raise FormatError("unknown plane width", remedy=_UPGRADE, actual=packed)
    return method, width


@dataclass(frozen=True, slots=True)
class _Parts:
    """The decoded planes of one fragment.

    Attributes:
        rim: The rim of each element as stored, or None if constant.
        window: The window of each element as stored, or None if constant.
        low: Byte position and values of each low plane that is not constant.
        constant: The bits that constant planes give every element.
    """

    rim: NDArray[np.uint8] | None
    window: NDArray[np.uint8] | None
    low: list[tuple[int, Words]]
    constant: int


_kernels = find_kernels()
_memory = ScratchMemory()


class _Scratch:
    """Where one fragment is taken apart; valid until this thread decodes the next one."""

    def __init__(self, layout: _Layout, planes: list[_Plane], count: int) -> None:
        block = min(_BLOCK_ELEMENTS, count)
        wide_size = layout.unit * block
        words_size = wide_size + 4 * block
        plane_count = sum(plane.method is Method.ZSTD for plane in planes)
        memory = _memory.take(words_size + plane_count * count)
        self.wide: Words = memory[:wide_size].view(layout.word)
        self.tops, self.spares = memory[wide_size:words_size].view("<u2").reshape(2, block)
        self.planes = iter(memory[words_size:].reshape(plane_count, count))


def _decode_parts(planes: list[_Plane], layout: _Layout, count: int, scratch: _Scratch) -> _Parts:
    constant = 0
    decoded: list[Words | None] = []
    for plane in planes:
        if plane.method is Method.CONSTANT:
            constant |= _place(_constant(plane), plane.position, layout)
            decoded.append(None)
        elif plane.method is Method.ZSTD:
            into = next(scratch.planes)
            decompress_into(plane.stored, into.data)
            decoded.append(into)
        else:
            decoded.append(_raw_values(plane, count))
    *low, rim, window = decoded
    placed = [
        (plane.position, values)
        for plane, values in zip(planes[:-2], low, strict=True)
        if values is not None
    ]
    return _Parts(rim, window, placed, constant)


def _place(value: int, position: int, layout: _Layout) -> int:
    """Where the bits of one byte of the plane at `position` lie in an element."""
    if position == layout.unit - 1:
        return value << layout.window_shift
    if position == layout.low_size:
        return (value * 0x0101 & layout.rim_mask) << 8 * position
    return value << 8 * position


def _constant(plane: _Plane) -> int:
    if len(plane.stored) != 1:
        raise FormatError("a constant plane is not one byte", actual=len(plane.stored))
    return plane.stored[0]


def _raw_values(plane: _Plane, count: int) -> Words:
    if len(plane.stored) != count * plane.width:
        raise FormatError(
            "a raw plane has the wrong size",
            expected=count * plane.width,
            actual=len(plane.stored),
        )
    return np.frombuffer(plane.stored, f"<u{plane.width}")


def _merge(parts: _Parts, layout: _Layout, scratch: _Scratch, out: Words) -> None:
    """Put the parts of every element together in `out`, a block at a time, without the kernels.

    Only widening copies and arithmetic in place: such a pass runs at 25 to 80 GB/s in cache, where
    writing every second or fourth byte of the output runs at 7 to 14 (EPYC, numpy 2.4). Window and
    rim are joined as 16-bit words first, so that their passes touch no byte of the low planes.
    """
    shift = out.dtype.type(1 << 8 * layout.low_size)
    constant = out.dtype.type(parts.constant)
    for start in range(0, out.size, _BLOCK_ELEMENTS):
        target = out[start : start + _BLOCK_ELEMENTS]
        part = slice(start, start + target.size)
        top = target if layout.unit == 2 else scratch.tops[: target.size]
        _merge_top(parts, layout, part, top, scratch.spares[: target.size])
        if layout.unit > 2:
            np.copyto(target, top)
            np.multiply(target, shift, out=target)
        for position, values in parts.low:
            _add_low(target, values[part], position, scratch.wide[: target.size])
        if constant:
            np.bitwise_or(target, constant, out=target)


def _merge_top(parts: _Parts, layout: _Layout, part: slice, top: Words, spare: Words) -> None:
    """Write the top 16 bits of some elements into `top`; 0 where rim or window is constant."""
    if parts.rim is None:
        top.fill(0)
    elif layout.lead == 1:
        # Sign extension carries the sign up to the top bit: one pass less than a product.
        np.copyto(top.view("<i2"), parts.rim[part].view(np.int8))
        np.bitwise_and(top, np.uint16(layout.rim_mask), out=top)
    else:
        np.copyto(top, parts.rim[part])
        if layout.lead:
            np.multiply(top, np.uint16(0x0101), out=top)
            np.bitwise_and(top, np.uint16(layout.rim_mask), out=top)
    if parts.window is not None:
        np.copyto(spare, parts.window[part])
        np.multiply(spare, np.uint16(1 << (8 - layout.lead)), out=spare)
        np.bitwise_or(top, spare, out=top)


def _add_low(target: Words, values: Words, position: int, wide: Words) -> None:
    if position == 0:
        np.bitwise_or(target, values, out=target)
    else:
        np.copyto(wide, values)
        np.multiply(wide, wide.dtype.type(1 << 8 * position), out=wide)
        np.bitwise_or(target, wide, out=target)
