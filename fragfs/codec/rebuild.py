"""From a prediction and what is stored about its errors to words: the way back from `residual`.

Two steps. The first reads parameters and decompresses streams; everything that may be hostile is
checked there or in the second, which expands codes and planes, sorts the residuals of all groups
into their places and adds them to the prediction. That is one compiled loop, or numpy. Format:
library/FORMAT.md, "Residuals".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Method, decompress_into
from fragfs.codec.groups import GROUPS_MAX, Groups, Words, join_groups, key_field
from fragfs.codec.kernels import find_kernels
from fragfs.codec.packing import PACKED_BITS, escape_code, packed_size, unpack_codes, zero_code
from fragfs.codec.scratch import ScratchMemory
from fragfs.errors import FormatError
from fragfs.types import Dtype

__all__ = ["decode_residual", "parse_streams"]

Plane: TypeAlias = NDArray[np.uint8]
"""A byte for each word, or a single one that all of them have."""

_GROUP_COUNT = struct.Struct("<B")
_GROUP = struct.Struct("<BIB")  # last key, words, bits of a code (0: all zero, 8: planes)
_STREAM = struct.Struct("<BI")  # method, stored size
_ESCAPES = struct.Struct("<I")

_PLANES = 8
_UPGRADE = "upgrade fragfs"

_ESCAPES_ROOM = 16
"""Words behind the escapes that the compiled loop may load, but does not use."""

_kernels = find_kernels()
_planes_memory = ScratchMemory()
_escapes_memory = ScratchMemory()
_words_memory = ScratchMemory()


def _bias(unit: int) -> int:
    return int("80" * unit, 16)


@dataclass(slots=True)
class _Reader:
    """Parameters and payload of a residual, consumed in step. Everything here may be hostile.

    Attributes:
        params: What is left of the parameters.
        payload: The payload.
        room: Where planes are decompressed to: what is left of it.
        offset: Bytes of the payload that are consumed.
    """

    params: memoryview
    payload: memoryview
    room: NDArray[np.uint8]
    offset: int = 0

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next fields of the parameters."""
        if len(self.params) < layout.size:
            raise FormatError("parameters of a residual end early", actual=len(self.params))
        values = layout.unpack_from(self.params)
        self.params = self.params[layout.size :]
        return values

    def plane(self, size: int) -> Plane:
        """The next stream, of `size` bytes or of one that is repeated."""
        code, stored_size = self.take(_STREAM)
        stored = self.payload[self.offset : self.offset + stored_size]
        if len(stored) != stored_size:
            raise FormatError("a stream reaches behind its payload", expected=stored_size)
        self.offset += stored_size
        if code == Method.ZSTD:
            plane, self.room = self.room[:size], self.room[size:]
            decompress_into(stored, plane.data)
            return plane
        if code == Method.CONSTANT:
            if stored_size != 1:
                raise FormatError("a constant stream is not one byte", actual=stored_size)
        elif code != Method.RAW:
            raise FormatError("unknown stream method", remedy=_UPGRADE, actual=code)
        elif stored_size != size:
            raise FormatError("a raw stream has the wrong size", expected=size, actual=stored_size)
        return np.frombuffer(stored, np.uint8)

    def planes(self, size: int, unit: int) -> tuple[Plane, ...]:
        """The next streams: one for each byte of a word."""
        return tuple(self.plane(size) for _ in range(unit))


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of residuals, decompressed.

    Attributes:
        last_key: The highest key of its words.
        size: How many words.
        form: 0 for all zero, 1, 2 or 4 for packed codes of so many bits, 8 for planes.
        escape_count: Escapes among its codes.
        planes: The packed codes, or a plane for each byte of a word.
    """

    last_key: int
    size: int
    form: int
    escape_count: int = 0
    planes: tuple[Plane, ...] = ()


def parse_streams(
    params: memoryview, payload: memoryview, count: int, word: np.dtype[np.unsignedinteger]
) -> tuple[Words, memoryview, memoryview]:
    """Undo `store_streams`: `count` words, and what is left of parameters and payload."""
    # Memory of its own: what is parsed here is large only where somebody means harm.
    reader = _Reader(params, payload, np.empty(count * word.itemsize, np.uint8))
    out: Words = np.empty(count, word)
    _merge(reader.planes(count, word.itemsize), 0, out)
    return out, reader.params, payload[reader.offset :]


def decode_residual(
    params: memoryview,
    payload: memoryview,
    prediction: Words,
    dtype: Dtype,
    *,
    overwrite: bool = False,
) -> tuple[Words, memoryview, memoryview]:
    """Undo `encode_residual`.

    Args:
        params: Starts with the residual's parameters; from disk.
        payload: Starts with its payload; from disk.
        prediction: What the words were predicted to be, at least one.
        dtype: How they read.
        overwrite: Put the words where the prediction is: memory that was just written is faster
            than fresh memory.

    Returns:
        The words, and what is left of `params` and `payload`. The words are in fresh memory, or
        in that of `prediction` if it is to be overwritten or was right throughout.

    Raises:
        FormatError: The stored bytes break a rule of the format. What a prediction that is to be
            overwritten holds is then undefined.
    """
    count, unit = prediction.size, prediction.itemsize
    reader = _Reader(params, payload, _planes_memory.take(count * unit))
    (group_count,) = reader.take(_GROUP_COUNT)
    if group_count == 0:
        return prediction, reader.params, payload
    if group_count > GROUPS_MAX:
        raise FormatError("too many groups", remedy=_UPGRADE, actual=group_count)
    groups: list[_Group] = []
    left = count
    for _ in range(group_count):
        group = _read_group(reader, left, unit)
        groups.append(group)
        left -= group.size
    last_keys = [group.last_key for group in groups]
    if left or last_keys != sorted(set(last_keys)) or last_keys[-1] != 255:
        raise FormatError("groups do not cover the words", expected=count, actual=count - left)
    escapes = _read_escapes(reader, sum(group.escape_count for group in groups), prediction.dtype)
    out = prediction if overwrite else np.empty_like(prediction)
    if _kernels is None:
        _rebuild(groups, escapes, prediction, dtype, out)
    else:
        given = tuple((g.last_key, g.size, g.form, g.escape_count, g.planes) for g in groups)
        try:
            _kernels.rebuild(unit, prediction, out, *key_field(dtype), given, escapes)
        except ValueError as error:
            raise FormatError(f"groups of a residual: {error}") from error
    return out, reader.params, payload[reader.offset :]


def _read_group(reader: _Reader, left: int, unit: int) -> _Group:
    """The next group, of no more than `left` words."""
    last_key, size, form = reader.take(_GROUP)
    if not 0 < size <= left:
        raise FormatError("a group has more words than there are", actual=size)
    if form == 0:
        return _Group(last_key, size, form)
    if form == _PLANES:
        return _Group(last_key, size, form, 0, reader.planes(size, unit))
    if form not in PACKED_BITS:
        raise FormatError("unknown form of a group", remedy=_UPGRADE, actual=form)
    (escape_count,) = reader.take(_ESCAPES)
    if escape_count > size:
        raise FormatError("more escapes than residuals", actual=escape_count)
    stored_size = packed_size(size, form)
    packed = reader.plane(stored_size)
    if packed.size != stored_size:
        packed = np.full(stored_size, packed[0])
    return _Group(last_key, size, form, escape_count, (packed,))


def _read_escapes(reader: _Reader, count: int, word: np.dtype[np.unsignedinteger]) -> Words:
    """The residuals of all escapes, and room behind them."""
    size = (count + _ESCAPES_ROOM) * word.itemsize
    memory = _escapes_memory.take(size + count * word.itemsize)
    escapes: Words = memory[:size].view(word)
    if count:
        reader.room = memory[size:]
        _merge(reader.planes(count, word.itemsize), _bias(word.itemsize), escapes[:count])
    return escapes


def _merge(planes: tuple[Plane, ...], bias: int, out: Words) -> None:
    """Fill words from their bytes, lowest first, less a bias."""
    if _kernels is not None:
        _kernels.merge_planes(out.itemsize, planes, bias, out)
        return
    out.fill(-bias % (1 << 8 * out.itemsize))
    for position, plane in enumerate(planes):
        wide: Words = plane.astype(out.dtype)
        np.multiply(wide, wide.dtype.type(1 << 8 * position), out=wide)
        np.add(out, wide, out=out)


# --- without the compiled loop


def _rebuild(
    groups: list[_Group], escapes: Words, prediction: Words, dtype: Dtype, out: Words
) -> None:
    """What the compiled loop does: fill `out`, which may be the prediction."""
    count, unit = prediction.size, prediction.itemsize
    residual: Words = _words_memory.take(count * unit).view(prediction.dtype)
    start = first_escape = 0
    for group in groups:
        values = residual[start : start + group.size]
        start += group.size
        if group.form == 0:
            values.fill(0)
        elif group.form == _PLANES:
            _merge(group.planes, _bias(unit), values)
        else:
            outside = escapes[first_escape : first_escape + group.escape_count]
            first_escape += group.escape_count
            _expand_codes(group.planes[0], group.form, outside, values)
    sizes = Groups(tuple(g.last_key for g in groups), tuple(g.size for g in groups))
    join_groups(residual, prediction, sizes, dtype, out)


def _expand_codes(packed: Plane, bits: int, escapes: Words, values: Words) -> None:
    codes = np.empty(packed.size * 8 // bits, np.uint8)
    unpack_codes(packed, bits, codes)
    codes = codes[: values.size]
    np.copyto(values, codes)
    np.subtract(values, values.dtype.type(zero_code(bits)), out=values)
    places = np.flatnonzero(codes == escape_code(bits))
    if places.size != escapes.size:
        raise FormatError("a wrong number of escapes", expected=escapes.size, actual=places.size)
    values[places] = escapes
