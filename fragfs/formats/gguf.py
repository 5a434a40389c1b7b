"""gguf (versions 2 and 3, little-endian): typed metadata, tensor descriptions, aligned tensors.

The header is read in windows through `read_at`, so a vocabulary of megabytes costs a few reads.
Source: ggml's docs/gguf.md; block sizes as in gguf-py's table of quantization sizes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from fragfs.formats.bundle import bundle_small
from fragfs.formats.layout import (
    FileFormat,
    Layout,
    ReadAt,
    Span,
    TensorLabel,
    cover,
    element_unit,
    opaque_layout,
)
from fragfs.formats.ranges import TypedRange, tensor_spans
from fragfs.formats.refusals import TRUNCATED_REMEDY, promise_broken
from fragfs.types import Dtype, SpanKind

__all__ = ["parse_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_SIZE_MAX = 1 << 28
_WINDOW_SIZE_MIN, _WINDOW_SIZE_MAX = 1 << 16, 1 << 22
_STRING_SIZE_MAX = 1 << 26
_ITEMS_MAX = 4_000_000  # strings, arrays and pairs that parsing may step over
_TENSORS_MAX = 2_000_000
_DIMENSIONS_MAX = 8
_NESTING_MAX = 8
_ALIGNMENT_DEFAULT = 32
_ALIGNMENT_MAX = 1 << 20

_STRING, _ARRAY = 8, 9
_UINT32 = 4
_SCALAR_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True, slots=True)
class _TensorType:
    """A ggml tensor type: `block_size` bytes hold `block_elements` elements."""

    name: str
    block_elements: int
    block_size: int
    dtype: Dtype = Dtype.QUANT


def _plain(dtype: Dtype) -> _TensorType:
    return _TensorType(dtype.name, 1, element_unit(dtype), dtype)


_TENSOR_TYPES = {
    0: _plain(Dtype.F32),
    1: _plain(Dtype.F16),
    2: _TensorType("Q4_0", 32, 18),
    3: _TensorType("Q4_1", 32, 20),
    6: _TensorType("Q5_0", 32, 22),
    7: _TensorType("Q5_1", 32, 24),
    8: _TensorType("Q8_0", 32, 34),
    9: _TensorType("Q8_1", 32, 40),
    10: _TensorType("Q2_K", 256, 84),
    11: _TensorType("Q3_K", 256, 110),
    12: _TensorType("Q4_K", 256, 144),
    13: _TensorType("Q5_K", 256, 176),
    14: _TensorType("Q6_K", 256, 210),
    15: _TensorType("Q8_K", 256, 292),
    16: _TensorType("IQ2_XXS", 256, 66),
    17: _TensorType("IQ2_XS", 256, 74),
    18: _TensorType("IQ3_XXS", 256, 98),
    19: _TensorType("IQ1_S", 256, 50),
    20: _TensorType("IQ4_NL", 32, 18),
    21: _TensorType("IQ3_S", 256, 110),
    22: _TensorType("IQ2_S", 256, 82),
    23: _TensorType("IQ4_XS", 256, 136),
    24: _plain(Dtype.I8),
    25: _plain(Dtype.I16),
    26: _plain(Dtype.I32),
    27: _plain(Dtype.I64),
    28: _plain(Dtype.F64),
    29: _TensorType("IQ1_M", 256, 56),
    30: _plain(Dtype.BF16),
    34: _TensorType("TQ1_0", 256, 54),
    35: _TensorType("TQ2_0", 256, 66),
    39: _TensorType("MXFP4", 32, 17),
    40: _TensorType("NVFP4", 64, 36),
    41: _TensorType("Q1_0", 128, 18),
}


class _MalformedError(Exception):
    """The bytes are not gguf, or beyond the limits above."""


class _EndOfFileError(Exception):
    """The file ends inside the header."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor description; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int

    @property
    def known_type(self) -> _TensorType | None:
        """Its type, if it is known and rows are whole numbers of blocks."""
        found = _TENSOR_TYPES.get(self.type_number)
        row = self.shape[0] if self.shape else 1
        return found if found is not None and row % found.block_elements == 0 else None


@dataclass(frozen=True, slots=True)
class _Header:
    data_start: int
    tensors: list[_Tensor]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor and its absolute range, which may lie past the end of the file."""

    tensor: _Tensor
    type: _TensorType | None
    offset: int
    end: int


def parse_gguf(size: int, read_at: ReadAt) -> Layout | None:
    """Lay out a gguf file; None if it is none, or of an unknown version or byte order.

    Args:
        size: Bytes of the file.
        read_at: Reads from it; asked for the header only.
    """
    if size < 8 or read_at(0, 4) != _MAGIC:
        return None
    try:
        header = _parse_header(_Cursor(size, read_at))
    except _MalformedError:
        return None
    except _EndOfFileError:
        refusal = "truncated: the file ends inside its gguf header"
        return opaque_layout(
            size, verdict=refusal, refusal=refusal, refusal_remedy=TRUNCATED_REMEDY
        )
    return _layout(header, size)


class _Cursor:
    """Reads forward through the header, in windows that grow as it proves long."""

    def __init__(self, size: int, read_at: ReadAt) -> None:
        self.position = 0
        self._size = size
        self._read_at = read_at
        self._window = b""
        self._window_start = 0
        self._window_size = _WINDOW_SIZE_MIN
        self._items = 0

    def count_items(self, count: int) -> None:
        """Spend `count` of the steps that one header may take."""
        self._items += count
        if self._items > _ITEMS_MAX:
            raise _MalformedError

    def skip(self, size: int) -> None:
        """Move on without reading."""
        self.position += size
        if self.position > self._size:
            raise _EndOfFileError
        if self.position > _HEADER_SIZE_MAX:
            raise _MalformedError

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        start = self.position
        self.skip(size)
        if not self._window_start <= start <= self.position <= self._window_end:
            length = min(max(size, self._window_size), self._size - start)
            self._window = self._read_at(start, length)
            self._window_start = start
            self._window_size = min(self._window_size * 2, _WINDOW_SIZE_MAX)
        start -= self._window_start
        return self._window[start : start + size]

    @property
    def _window_end(self) -> int:
        return self._window_start + len(self._window)

    def uint32(self) -> int:
        """An unsigned 32-bit integer."""
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        """An unsigned 64-bit integer."""
        return int.from_bytes(self.take(8), "little")

    def string(self) -> bytes:
        """A length and that many bytes."""
        return self.take(self._string_size())

    def skip_string(self) -> None:
        """Move past a string."""
        self.skip(self._string_size())

    def _string_size(self) -> int:
        size = self.uint64()
        if size > _STRING_SIZE_MAX:
            raise _MalformedError
        return size


def _parse_header(cursor: _Cursor) -> _Header:
    cursor.skip(len(_MAGIC))
    if cursor.uint32() not in _VERSIONS:
        raise _MalformedError
    tensor_count, pair_count = cursor.uint64(), cursor.uint64()
    if tensor_count > _TENSORS_MAX:
        raise _MalformedError
    cursor.count_items(pair_count)
    alignment = _ALIGNMENT_DEFAULT
    for _ in range(pair_count):
        key, value_type = cursor.string(), cursor.uint32()
        if key == b"general.alignment" and value_type == _UINT32:
            alignment = cursor.uint32()
        else:
            _skip_value(cursor, value_type, 0)
    if alignment & (alignment - 1) or not 0 < alignment <= _ALIGNMENT_MAX:
        raise _MalformedError
    tensors = [_parse_tensor(cursor) for _ in range(tensor_count)]
    return _Header(-(-cursor.position // alignment) * alignment, tensors)


def _skip_value(cursor: _Cursor, value_type: int, nesting: int) -> None:
    if value_type in _SCALAR_SIZES:
        cursor.skip(_SCALAR_SIZES[value_type])
    elif value_type == _STRING:
        cursor.skip_string()
    elif value_type == _ARRAY and nesting < _NESTING_MAX:
        item_type, count = cursor.uint32(), cursor.uint64()
        if item_type in _SCALAR_SIZES:
            cursor.skip(count * _SCALAR_SIZES[item_type])
        else:
            cursor.count_items(count)
            for _ in range(count):
                _skip_value(cursor, item_type, nesting + 1)
    else:
        raise _MalformedError


def _parse_tensor(cursor: _Cursor) -> _Tensor:
    name = cursor.string().decode(errors="surrogateescape")
    dimensions = cursor.uint32()
    if dimensions > _DIMENSIONS_MAX:
        raise _MalformedError
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    return _Tensor(name, shape, cursor.uint32(), cursor.uint64())


def _layout(header: _Header, size: int) -> Layout:
    placed = _place(header, size)
    promised = max((item.end for item in placed if item.end > item.offset), default=0)
    refusal = promise_broken(promised, size) if promised > size else None
    labels = tuple(
        TensorLabel(
            item.tensor.name,
            item.type.name if item.type else f"TYPE_{item.tensor.type_number}",
            item.tensor.shape,
            item.offset,
            item.end - item.offset,
        )
        for item in placed
        if item.end <= size
    )
    return Layout(
        format=FileFormat.GGUF,
        size=size,
        spans=tuple(_spans(header, placed, size)),
        tensors=labels,
        verdict=refusal or "",
        refusal=refusal,
        refusal_remedy=TRUNCATED_REMEDY if refusal else None,
    )


def _place(header: _Header, size: int) -> list[_Placed]:
    """Absolute ranges; a tensor of unknown type reaches to the next one, or to the end."""
    starts = sorted({tensor.offset for tensor in header.tensors})
    following = dict(pairwise(starts))
    placed = []
    for tensor in header.tensors:
        known = tensor.known_type
        offset = header.data_start + tensor.offset
        if known is not None:
            end = offset + prod(tensor.shape) // known.block_elements * known.block_size
        elif tensor.offset in following:
            end = header.data_start + following[tensor.offset]
        else:
            end = max(offset + 1, size)  # it has bytes, so past the end it is missing some
        placed.append(_Placed(tensor, known, offset, end))
    return placed


def _spans(header: _Header, placed: list[_Placed], size: int) -> list[Span]:
    ranges = []
    for item in placed:
        dtype, unit = (item.type.dtype, item.type.block_size) if item.type else (Dtype.BYTES, 1)
        end = min(item.end, item.offset + (size - item.offset) // unit * unit)
        if item.offset < end:
            ranges.append(TypedRange(item.offset, end, dtype, unit))
    start = min(header.data_start, size)
    spans = cover(list(tensor_spans(ranges)), start, size, SpanKind.GAP, SpanKind.TAIL)
    return [Span(0, start, SpanKind.HEADER), *bundle_small(spans)]
