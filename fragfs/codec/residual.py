"""What a prediction got wrong: residual words, grouped, and each group stored the smallest way.

A residual is `word - prediction` modulo the width of the word. A group of residuals (see `groups`)
is stored in one of three ways: as nothing if all are zero; as packed codes of 1, 2 or 4 bits if
nearly all are close to zero (see `packing`); else as byte planes. In planes a bias of 0x80 in every
byte makes small residuals of both signs differ in one plane only, where sign extension would fill
all. Format: library/FORMAT.md, "Residuals".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes, Method, decompress_into, store_plane
from fragfs.codec.forms import PLANES, choose_forms
from fragfs.codec.groups import (
    GROUPS_MAX,
    Groups,
    Words,
    join_groups,
    plan_groups,
    split_groups,
)
from fragfs.codec.kernels import find_kernels
from fragfs.codec.packing import (
    PACKED_BITS,
    escape_code,
    pack_codes,
    packed_size,
    unpack_codes,
    zero_code,
)
from fragfs.codec.scratch import ScratchMemory
from fragfs.errors import FormatError
from fragfs.types import Dtype

__all__ = [
    "decode_residual",
    "encode_residual",
    "estimate_residual",
    "parse_streams",
    "store_streams",
]

_GROUP = struct.Struct("<BIB")  # last key, words, bits of a code (0: all zero, 8: planes)
_STREAM = struct.Struct("<BI")  # method, stored size
_COUNT = struct.Struct("<I")

_UPGRADE = "upgrade fragfs"

_kernels = find_kernels()
_memory = ScratchMemory()


def _bias(unit: int) -> int:
    return int("80" * unit, 16)


def store_streams(
    words: Words, level: int, params: list[bytes], payload: list[Bytes], bias: int = 0
) -> None:
    """Append the planes of some words, lowest byte first: descriptors to `params`.

    Args:
        words: The words, contiguous.
        level: zstd level for planes in which matches pay.
        params: Gets a descriptor of each plane.
        payload: Gets what is stored of each plane.
        bias: Added to each word, modulo its width.
    """
    planes = np.empty((words.itemsize, words.size), np.uint8)
    if _kernels is not None:
        _kernels.planes(words.itemsize, words, bias, planes)
    else:
        biased = words + words.dtype.type(bias)
        np.copyto(planes, biased.view(np.uint8).reshape(-1, words.itemsize).T)
    for plane in planes:
        _store(plane, level, params, payload)


def _store(plane: NDArray[np.uint8], level: int, params: list[bytes], payload: list[Bytes]) -> None:
    method, stored = store_plane(plane, level)
    params.append(_STREAM.pack(method, len(stored)))
    payload.append(stored)


def encode_residual(
    words: Words, prediction: Words, dtype: Dtype, *, grouped: bool, level: int
) -> tuple[bytes, list[Bytes]]:
    """Store what `prediction` got wrong about `words`.

    Args:
        words: What is to be stored; at least one.
        prediction: As many words of the same type, native byte order on little-endian machines.
        dtype: How they read.
        grouped: Group them by the exponent of the prediction, if there are enough of them.
        level: zstd level for planes in which matches pay.

    Returns:
        Parameters and payload; parameters are one zero byte if the prediction is right throughout.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype)
    residual = split_groups(words, prediction, groups, dtype)
    forms = choose_forms(residual, groups.sizes).forms
    if not any(forms):
        return b"\0", []
    params = [bytes([len(groups.sizes)])]
    payload: list[Bytes] = []
    escapes: list[Words] = []
    start = 0
    for last_key, size, bits in zip(groups.last_keys, groups.sizes, forms, strict=True):
        values = residual[start : start + size]
        start += size
        params.append(_GROUP.pack(last_key, size, bits))
        if bits == PLANES:
            store_streams(values, level, params, payload, _bias(values.itemsize))
        elif bits:
            packed, outside = _pack(values, bits)
            params.append(_COUNT.pack(outside.size))
            escapes.append(outside)
            _store(packed, level, params, payload)
    outside = np.concatenate(escapes) if escapes else residual[:0]
    if outside.size:
        store_streams(outside, level, params, payload, _bias(outside.itemsize))
    return b"".join(params), payload


def _pack(values: Words, bits: int) -> tuple[NDArray[np.uint8], Words]:
    """Packed codes of some residuals, and the residuals that got the escape."""
    if _kernels is not None:
        packed = np.empty(packed_size(values.size, bits), np.uint8)
        outside = np.empty_like(values)
        count = _kernels.pack(values.itemsize, values, bits, packed, outside)
        return packed, outside[:count]
    shifted = values + values.dtype.type(zero_code(bits))
    escape = values.dtype.type(escape_code(bits))
    outside = values[shifted >= escape]
    codes = np.minimum(shifted, escape, out=shifted).astype(np.uint8)
    return pack_codes(codes, bits), outside


def estimate_residual(words: Words, prediction: Words, dtype: Dtype, *, grouped: bool) -> int:
    """Bytes that `encode_residual` would roughly store, at a tenth of its time.

    Sees how often residuals occur but not in which order, so it knows nothing of runs.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype)
    residual = split_groups(words, prediction, groups, dtype)
    return choose_forms(residual, groups.sizes).size


# --- decoding


@dataclass(slots=True)
class _Reader:
    """Parameters and payload of a residual, consumed in step. Everything here may be hostile."""

    params: memoryview
    payload: memoryview
    offset: int = 0

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next fields of the parameters."""
        if len(self.params) < layout.size:
            raise FormatError("parameters of a residual end early", actual=len(self.params))
        values = layout.unpack_from(self.params)
        self.params = self.params[layout.size :]
        return values

    def stream(self) -> tuple[Method, memoryview]:
        """Method and stored bytes of the next stream."""
        code, size = self.take(_STREAM)
        stored = self.payload[self.offset : self.offset + size]
        if len(stored) != size:
            raise FormatError("a stream reaches behind its payload", expected=size)
        self.offset += size
        try:
            return Method(code), stored
        except ValueError:
            raise FormatError("unknown stream method", remedy=_UPGRADE, actual=code) from None


def parse_streams(
    params: memoryview, payload: memoryview, count: int, word: np.dtype[np.unsignedinteger]
) -> tuple[Words, memoryview, memoryview]:
    """Undo `store_streams`: `count` words, and what is left of parameters and payload."""
    reader = _Reader(params, payload)
    out: Words = np.empty(count, word)
    _read_planes(reader, out, np.empty(2 * count * word.itemsize + 64, np.uint8))
    return out, reader.params, payload[reader.offset :]


def decode_residual(
    params: memoryview, payload: memoryview, prediction: Words, dtype: Dtype
) -> tuple[Words, memoryview, memoryview]:
    """Undo `encode_residual`.

    Args:
        params: Starts with the residual's parameters; from disk.
        payload: Starts with its payload; from disk.
        prediction: What the words were predicted to be, at least one.
        dtype: How they read.

    Returns:
        The words, and what is left of `params` and `payload`. The words are in fresh memory, or
        are `prediction` itself if it was right throughout.

    Raises:
        FormatError: The stored bytes break a rule of the format.
    """
    reader = _Reader(params, payload)
    (group_count,) = reader.take(struct.Struct("<B"))
    if group_count == 0:
        return prediction, reader.params, payload
    if group_count > GROUPS_MAX:
        raise FormatError("too many groups", remedy=_UPGRADE, actual=group_count)
    count, unit = prediction.size, prediction.itemsize
    # Room for the residual, for a plane or codes (padded to whole words), and for widening.
    memory = _memory.take(2 * count * unit + count + 64)
    residual: Words = memory[: count * unit].view(prediction.dtype)
    room = memory[_round_up(count * unit) :]
    last_keys, sizes = [], []
    escaped: list[tuple[Words, int, int]] = []
    start = 0
    for _ in range(group_count):
        last_key, size, bits = reader.take(_GROUP)
        values = residual[start : start + size]
        if values.size != size or size == 0:
            raise FormatError("a group has more words than there are", actual=size)
        if bits == 0:
            values.fill(0)
        elif bits == PLANES:
            _read_planes(reader, values, room)
            np.subtract(values, values.dtype.type(_bias(unit)), out=values)
        elif bits in PACKED_BITS:
            escaped.append((values, bits, _read_codes(reader, values, bits, room)))
        else:
            raise FormatError("unknown form of a group", remedy=_UPGRADE, actual=bits)
        last_keys.append(last_key)
        sizes.append(size)
        start += size
    if start != count or last_keys != sorted(set(last_keys)) or last_keys[-1] != 255:
        raise FormatError("groups do not cover the words", expected=count, actual=start)
    if escaped:
        _read_escapes(reader, escaped, room)
    words = join_groups(residual, prediction, Groups(tuple(last_keys), tuple(sizes)), dtype)
    return words, reader.params, payload[reader.offset :]


def _read_planes(reader: _Reader, values: Words, room: NDArray[np.uint8]) -> None:
    """Fill `values` with the next streams, lowest byte first.

    Args:
        reader: What to read from.
        values: Where to.
        room: Scratch memory that starts at a multiple of 8 bytes: a word and a byte for each value,
            and 64 bytes more.
    """
    count, unit = values.size, values.itemsize
    wide: Words = room[: count * unit].view(values.dtype)
    constant = 0
    for position in range(unit):
        method, stored = reader.stream()
        if method is Method.CONSTANT:
            if len(stored) != 1:
                raise FormatError("a constant stream is not one byte", actual=len(stored))
            constant |= stored[0] << 8 * position
            if position == 0:
                values.fill(0)
            continue
        if method is Method.RAW:
            if len(stored) != count:
                raise FormatError(
                    "a raw stream has the wrong size", expected=count, actual=len(stored)
                )
            plane = np.frombuffer(stored, np.uint8)
        else:
            plane = room[-count:]
            decompress_into(stored, plane.data)
        if position == 0:
            np.copyto(values, plane)
            continue
        np.copyto(wide, plane)
        np.multiply(wide, wide.dtype.type(1 << 8 * position), out=wide)
        np.bitwise_or(values, wide, out=values)
    if constant:
        np.bitwise_or(values, values.dtype.type(constant), out=values)


def _round_up(size: int) -> int:
    """The next multiple of 8: where words of any width may begin."""
    return -(-size // 8) * 8


def _read_codes(reader: _Reader, values: Words, bits: int, room: NDArray[np.uint8]) -> int:
    """Fill `values` from packed codes; gives how many of them are escapes."""
    (escape_count,) = reader.take(_COUNT)
    method, stored = reader.stream()
    size = packed_size(values.size, bits)
    packed: NDArray[np.uint8]
    if method is Method.CONSTANT:
        if len(stored) != 1:
            raise FormatError("a constant stream is not one byte", actual=len(stored))
        packed = np.full(size, stored[0], np.uint8)
    elif method is Method.RAW:
        if len(stored) != size:
            raise FormatError("a raw stream has the wrong size", expected=size, actual=len(stored))
        packed = np.frombuffer(stored, np.uint8)
    else:
        packed = room[-size:]
        decompress_into(stored, packed.data)
    codes = room[: size * 8 // bits]
    unpack_codes(packed, bits, codes)
    np.copyto(values, codes[: values.size])
    np.subtract(values, values.dtype.type(zero_code(bits)), out=values)
    if escape_count > values.size:
        raise FormatError("more escapes than residuals", actual=escape_count)
    return escape_count


def _read_escapes(
    reader: _Reader, escaped: list[tuple[Words, int, int]], room: NDArray[np.uint8]
) -> None:
    """Put the residuals of escapes in their places.

    Args:
        reader: What to read them from.
        escaped: Values of a group, bits of its codes, and how many escapes are among them.
        room: As for `_read_planes`.
    """
    outside: Words = np.empty(sum(count for *_, count in escaped), escaped[0][0].dtype)
    if outside.size:
        _read_planes(reader, outside, room)
        np.subtract(outside, outside.dtype.type(_bias(outside.itemsize)), out=outside)
    start = 0
    for values, bits, count in escaped:
        # What an escape code became is what no other code stands for.
        marker = escape_code(bits) - zero_code(bits)
        found = _patch(values, marker, outside[start : start + count])
        if found != count:
            raise FormatError("a wrong number of escapes", expected=count, actual=found)
        start += count


def _patch(values: Words, marker: int, replacements: Words) -> int:
    """Put replacements where the marker is; gives how many markers there are."""
    if _kernels is not None:
        found: int = _kernels.patch(values.itemsize, values, marker, replacements)
        return found
    places = np.flatnonzero(values == values.dtype.type(marker))
    if places.size == replacements.size:
        values[places] = replacements
    return int(places.size)
