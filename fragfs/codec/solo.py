"""Best-of encoding of bytes that are predicted from nothing, and its decoding.

Pure and thread-safe: bytes to bytes. Identity, checksums and records belong to `library`, which
also decodes every encoding once before it trusts it.
Format: library/FORMAT.md, "Predictors".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import (
    Bytes,
    compress_bytes,
    compress_plane,
    decompress,
    estimate_matches,
)
from fragfs.codec.planes import decode_planes, encode_planes
from fragfs.codec.predict import unit_size
from fragfs.errors import FormatError, LimitError, UsageError
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, Predictor

__all__ = ["Buffer", "Encoding", "decode_solo", "encode_solo"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes."""

_CONSTANT_BYTES_MAX = 16
"""Largest element that can be repeated: one of complex128."""

_LEAD_BITS = {8: 1, 11: 4}
"""Bits above the window, by width of the exponent. 8: the window is the exponent. 11: it is the low
eight exponent bits, those that vary. 5 (f16): at 0 the window is sign, exponent and two mantissa
bits, which stores 0.8480 where 1 stores 0.8477 and decodes with one pass less."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """A fragment's bytes in stored form.

    Attributes:
        predictor: How to decode.
        params: Parameters of the predictor.
        payload: The encoded bytes; for RAW a view of the bytes given to `encode`.
    """

    predictor: Predictor
    params: bytes
    payload: bytes | memoryview

    @property
    def size(self) -> int:
        """Bytes of parameters and payload together."""
        return len(self.params) + len(self.payload)


def encode_solo(raw: Buffer, dtype: Dtype, *, zstd_level: int) -> Encoding:
    """Encode a fragment the smallest way that its bytes suggest.

    Never blocks on anything but the processor; releases the GIL while it compresses.

    Args:
        raw: The fragment's bytes, at most FRAGMENT_BYTES_MAX; any size, whole elements or not.
        dtype: How to read them as elements. Wrong or damaged elements cost space, never bytes.
        zstd_level: zstd level where match finding pays, 1 to 19.

    Returns:
        An encoding whose parameters and payload together are never larger than `raw`.

    Raises:
        LimitError: `raw` is larger than a fragment may be.
        UsageError: `zstd_level` is out of range.
    """
    view = memoryview(raw).cast("B")
    if len(view) > FRAGMENT_BYTES_MAX:
        raise LimitError(
            "a fragment is too large to encode", expected=FRAGMENT_BYTES_MAX, actual=len(view)
        )
    if not 1 <= zstd_level <= 19:
        raise UsageError(f"zstd_level must be from 1 to 19, not {zstd_level}")
    if not len(view):
        return Encoding(Predictor.RAW, b"", view)
    return (
        _encode_constant(view, dtype)
        or _encode_varied(view, dtype, zstd_level)
        or Encoding(Predictor.RAW, b"", view)
    )


def decode_solo(
    predictor: int, dtype: Dtype, params: Bytes, payload: memoryview, raw_size: int
) -> memoryview:
    """Decode a fragment; every argument may come from a damaged or hostile file.

    Args:
        predictor: Code of the predictor.
        dtype: Element type the encoding works on.
        params: Parameters of the predictor.
        payload: The encoded bytes.
        raw_size: Bytes after decoding.

    Returns:
        Exactly `raw_size` bytes, read-only: a view of `payload` for RAW, else of fresh memory.

    Raises:
        FormatError: The stored bytes break a rule of the format. Memory in use never exceeds a
            small multiple of FRAGMENT_BYTES_MAX.
    """
    if not 0 <= raw_size <= FRAGMENT_BYTES_MAX:
        raise FormatError(
            "a fragment states an impossible size", expected=FRAGMENT_BYTES_MAX, actual=raw_size
        )
    match predictor:
        case Predictor.RAW:
            return _decode_raw(params, payload, raw_size)
        case Predictor.CONSTANT:
            return _decode_constant(params, payload, raw_size)
        case Predictor.ZSTD:
            if len(params) or not raw_size:
                raise FormatError("a zstd fragment has parameters or no bytes", actual=len(params))
            return memoryview(decompress(payload, raw_size))
        case Predictor.PLANES:
            unit = unit_size(dtype)
            if unit == 1 or raw_size < unit:
                raise FormatError("a fragment in planes has no elements to cut", actual=raw_size)
            return decode_planes(params, payload, unit, raw_size)
        case _:
            raise FormatError(f"unknown predictor {predictor}", remedy="upgrade fragfs")


def _decode_raw(params: Bytes, payload: memoryview, raw_size: int) -> memoryview:
    if len(params) or len(payload) != raw_size:
        raise FormatError(
            "a raw fragment has the wrong size", expected=raw_size, actual=len(payload)
        )
    return payload.toreadonly()


def _decode_constant(params: Bytes, payload: memoryview, raw_size: int) -> memoryview:
    if len(payload) or not 1 <= len(params) <= _CONSTANT_BYTES_MAX:
        raise FormatError("a constant fragment is malformed", actual=len(params))
    repeats = -(-raw_size // len(params))
    return memoryview(bytes(params) * repeats)[:raw_size]


def _encode_constant(view: memoryview, dtype: Dtype) -> Encoding | None:
    """One element, repeated; the last repetition may be cut short."""
    period = dtype.bits // 8 or 1
    if len(view) <= period:
        return None
    data = np.frombuffer(view, np.uint8)
    probe = data[: 64 * period]
    if not _repeats(probe, period) or not _repeats(data, period):
        return None
    return Encoding(Predictor.CONSTANT, bytes(view[:period]), b"")


def _repeats(data: NDArray[np.uint8], period: int) -> bool:
    return np.array_equal(data[period:], data[:-period])


def _encode_varied(view: memoryview, dtype: Dtype, level: int) -> Encoding | None:
    data = np.frombuffer(view, np.uint8)
    if dtype is Dtype.BYTES:
        frame = compress_bytes(view, level)
        return _if_smaller(view, frame)
    unit = unit_size(dtype)
    if unit == 1 or len(view) < unit:
        return _if_smaller(view, compress_plane(data, level))
    params, payload = encode_planes(view, unit, _lead_bits(dtype), level)
    size = len(params) + len(payload)
    # Repeated rows and few distinct values are seen by match finding over whole elements only.
    if estimate_matches(data) * len(view) < min(size, len(view)):
        frame = compress_bytes(view, level)
        if frame is not None and len(frame) < size:
            return _if_smaller(view, frame)
    return Encoding(Predictor.PLANES, params, payload) if size < len(view) else None


def _if_smaller(view: memoryview, frame: bytes | None) -> Encoding | None:
    if frame is None or len(frame) >= len(view):
        return None
    return Encoding(Predictor.ZSTD, b"", frame)


def _lead_bits(dtype: Dtype) -> int:
    """Where the window of a dtype's planes lies (see `planes`)."""
    return _LEAD_BITS.get(dtype.exponent_bits, 0)
