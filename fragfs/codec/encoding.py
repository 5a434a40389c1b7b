"""Best-of encoding of one fragment: bytes in, the smallest stored form out, and back.

Pure: the caller keeps checksums and the record around it, and verifies what was encoded by
decoding it. Safe in any number of threads.

Source: library/FORMAT.md, "Predictors".
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import numpy as np

from fragfs.codec.entropy import Coder, sample_of
from fragfs.codec.planes import BLOCK_BYTES, Bytes, Layout, Scratch, Value
from fragfs.errors import FormatError
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, Predictor

__all__ = ["Encoding", "decode", "encode"]

ELEMENT_BYTES_MAX = 16

_RAW, _CONSTANT, _ZSTD, _PAIR = range(4)  # how a plane is stored: codes on disk

_PROBE_LEVEL = 1
_INCOMPRESSIBLE = 0.98
_GUESSES = (Layout(2, 1), Layout(4, 1), Layout(2, 0), Layout(8, 4))


@dataclass(frozen=True, slots=True)
class Encoding:
    """A fragment in stored form.

    Attributes:
        predictor: What the residual is taken against.
        params: Parameters of the predictor.
        payload: The encoded residual; a view of the raw bytes if they are stored as they are.
    """

    predictor: Predictor
    params: bytes
    payload: bytes | memoryview

    @property
    def size(self) -> int:
        """Bytes of parameters and payload."""
        return len(self.params) + len(self.payload)


class _Tools(threading.local):
    """What encoding and decoding reuse from call to call, one set per thread."""

    def __init__(self) -> None:
        self.coder = Coder()
        self.scratch = Scratch()


_tools = _Tools()


def encode(raw: bytes | memoryview, dtype: Dtype, *, zstd_level: int) -> Encoding:
    """Find the smallest encoding of a fragment.

    Args:
        raw: The fragment, contiguous, at most FRAGMENT_BYTES_MAX bytes.
        dtype: How to read it as elements; a size that is no multiple of the element's is fine.
        zstd_level: Level for bytes in which finding matches pays; 1 to 19.

    Returns:
        An encoding of at most len(raw) bytes, parameters and payload together.
    """
    if not len(raw):
        return Encoding(Predictor.RAW, b"", b"")
    view = memoryview(raw).cast("B")
    stored = Encoding(Predictor.RAW, b"", view)
    data = np.frombuffer(view, np.uint8)
    period = _constant_period(data, dtype)
    if period:
        return Encoding(Predictor.CONSTANT, bytes(view[:period]), b"")
    if dtype is Dtype.BYTES:
        candidates = _encode_bytes(data, zstd_level)
    else:
        candidates = _encode_elements(data, Layout.of_dtype(dtype), zstd_level)
    return min([stored, *candidates], key=lambda encoding: encoding.size)


def _constant_period(data: Bytes, dtype: Dtype) -> int:
    """Bytes of the one element that `data` repeats, or 0. It must be shorter than `data`."""
    element = 3 if dtype.bits == 6 else max(1, dtype.bits // 8)
    for period in {1, element}:
        if period < data.size and np.array_equal(data[period:64], data[: max(0, min(64, data.size) - period)]) and np.array_equal(data[period:], data[:-period]):
            return period
    return 0


def _encode_bytes(data: Bytes, zstd_level: int) -> list[Encoding]:
    """Candidates for bytes without known elements: match finding, and floats in disguise."""
    coder = _tools.coder
    probe = len(coder.compress(data, _PROBE_LEVEL))
    found: list[Encoding] = []
    if probe > data.size // 2:
        layout = min(_GUESSES, key=lambda layout: _estimate_planes(data, layout))
        if _estimate_planes(data, layout) < probe / data.size:
            found.append(_encode_planes(data, layout, zstd_level))
    if probe < data.size * _INCOMPRESSIBLE and all(e.size > 0.85 * probe for e in found):
        found.append(Encoding(Predictor.ZSTD, b"", coder.compress(data, zstd_level)))
    return found


def _estimate_planes(data: Bytes, layout: Layout) -> float:
    """Share of its size that a sample of `data` keeps as entropy-coded planes."""
    sample = sample_of(data, 4, 1 << 13)
    sample = sample[: sample.size // layout.word_size * layout.word_size]
    if not sample.size:
        return 1.0
    planes = layout.split(sample)
    sizes = [min(plane.size, len(_tools.coder.compress(plane, None))) for plane in planes]
    return sum(sizes) / sample.size


def _encode_elements(data: Bytes, layout: Layout, zstd_level: int) -> list[Encoding]:
    """Candidates for elements of a tensor: planes, and match finding where it does better."""
    coder = _tools.coder
    planes = _encode_planes(data, layout, zstd_level)
    sample = sample_of(data, 4, 1 << 13)
    if len(coder.compress(sample, _PROBE_LEVEL)) * data.size >= 0.98 * planes.size * sample.size:
        return [planes]
    return [planes, Encoding(Predictor.ZSTD, b"", coder.compress(data, zstd_level))]


def _encode_planes(data: Bytes, layout: Layout, zstd_level: int) -> Encoding:
    size = layout.word_size
    whole = data.size // size * size
    params = bytearray([layout.code])
    payload: list[bytes | Bytes] = []
    if whole:
        planes = layout.split(data[:whole])
        coded = [_encode_plane(plane, BLOCK_BYTES // size, zstd_level) for plane in planes]
        for index, (method, fields, sections) in enumerate(coded):
            if index % 2 and coded[index - 1][0] == method == _RAW and (index > 1 or not layout.lead_bits):
                params[-1] = _PAIR
                column = size // 2 - 1 - index // 2
                pairs = data[:whole].view("<u2").reshape(-1, size // 2)
                payload[-1] = np.ascontiguousarray(pairs[:, column]).view(np.uint8)
                continue
            params.append(method)
            params += fields
            payload += sections
    payload.append(data[whole:])
    return Encoding(Predictor.PLANES, bytes(params), b"".join(payload))


def _encode_plane(plane: Bytes, block_size: int, zstd_level: int) -> tuple[int, bytes, list[bytes | Bytes]]:
    """Method, fields that follow it, and payload of one plane."""
    if np.array_equal(plane[:64], np.full(min(64, plane.size), plane[0])) and not (plane != plane[0]).any():
        return _CONSTANT, plane[:1].tobytes(), []
    frames = _tools.coder.compress_plane(plane, block_size, zstd_level)
    if frames is None:
        return _RAW, b"", [plane]
    return _ZSTD, struct.pack(f"<{len(frames)}I", *map(len, frames)), list(frames)


def decode(
    predictor: int,
    dtype: Dtype,
    params: bytes | memoryview,
    payload: memoryview,
    raw_size: int,
) -> memoryview:
    """Give a fragment's raw bytes back.

    Args:
        predictor: As the encoding says, or any other number found on disk.
        dtype: How the fragment was read as elements; for messages, since encodings say themselves
            how they cut elements.
        params: Parameters of the predictor.
        payload: The encoded residual, contiguous.
        raw_size: Bytes the fragment must have.

    Returns:
        Exactly raw_size bytes, one-dimensional, format "B", read-only. Fresh memory, but for
        RAW: there it is `payload`.

    Raises:
        FormatError: What is stored breaks a rule of the format, or a newer fragfs wrote it.
    """
    if not 0 <= raw_size <= FRAGMENT_BYTES_MAX:
        raise FormatError(
            f"a fragment of {dtype.name} claims a size beyond the limit of {FRAGMENT_BYTES_MAX}",
            actual=raw_size,
        )
    if predictor == Predictor.RAW:
        if len(params) or payload.nbytes != raw_size:
            raise FormatError(
                f"a {dtype.name} fragment stored as it is has the wrong size",
                expected=raw_size,
                actual=payload.nbytes,
            )
        return payload.cast("B").toreadonly() if raw_size else memoryview(b"")
    out = np.empty(raw_size, np.uint8)
    if predictor == Predictor.CONSTANT:
        _decode_constant(bytes(params), payload, out)
    elif predictor == Predictor.ZSTD:
        if len(params):
            raise FormatError("a fragment in one zstd frame has parameters")
        _tools.coder.decompress_into(payload, out)
    elif predictor == Predictor.PLANES:
        _decode_planes(bytes(params), np.frombuffer(payload,np.uint8), out)
    else:
        raise FormatError(
            f"a {dtype.name} fragment has unknown predictor {predictor}", remedy="upgrade fragfs"
        )
    return memoryview(out).toreadonly()


def _decode_constant(element: bytes, payload: memoryview, out: Bytes) -> None:
    if not 1 <= len(element) <= ELEMENT_BYTES_MAX or payload.nbytes:
        raise FormatError("a constant fragment is malformed", actual=len(element))
    repeats = -(-out.size // len(element))
    out[...] = np.frombuffer(element * repeats, np.uint8, out.size)


class _Fields:
    """Takes parameters and payload of planes apart, front to back."""

    def __init__(self, params: bytes, payload: Bytes) -> None:
        self._params, self._payload = params, payload
        self._param = self._offset = 0

    def param(self) -> int:
        self._param += 1
        if self._param > len(self._params):
            raise FormatError("the parameters of a fragment's planes end too early")
        return self._params[self._param - 1]

    def sizes(self, count: int) -> tuple[int, ...]:
        start, self._param = self._param, self._param + 4 * count
        if self._param > len(self._params):
            raise FormatError("the parameters of a fragment's planes end too early")
        return struct.unpack_from(f"<{count}I", self._params, start)

    def section(self, size: int) -> Bytes:
        start, self._offset = self._offset, self._offset + size
        if self._offset > self._payload.size:
            raise FormatError("the payload of a fragment's planes ends too early")
        return self._payload[start : self._offset]

    def finish(self) -> None:
        if self._param != len(self._params) or self._offset != self._payload.size:
            raise FormatError("a fragment's planes leave bytes over")


Section = int | Bytes | list[memoryview]


def _decode_planes(params: bytes, payload: Bytes, out: Bytes) -> None:
    fields = _Fields(params, payload)
    code = fields.param()
    layout = Layout.of_code(code)
    if layout is None:
        raise FormatError(f"unknown plane layout {code}", remedy="upgrade fragfs")
    size = layout.word_size
    count = out.size // size
    block = BLOCK_BYTES // size
    sections: list[Section] = []
    pairs: list[Bytes | None] = [None] * (size // 2)
    while len(sections) < size:
        method = fields.param()
        if method == _RAW:
            sections.append(fields.section(count))
        elif method == _CONSTANT:
            sections.append(fields.param())
        elif method == _ZSTD:
            sizes = fields.sizes(-(-count // block))
            sections.append([fields.section(n).data for n in sizes])
        elif method == _PAIR and len(sections) % 2 == 0 and size > 1:
            pairs[len(sections) // 2] = fields.section(2 * count).view("<u2")
            sections += [0, 0]
        else:
            raise FormatError(f"unknown plane method {method}", remedy="upgrade fragfs")
    tail = fields.section(out.size - count * size)
    fields.finish()
    words = out[: count * size].view(f"<u{size}")
    scratch, coder = _tools.scratch, _tools.coder
    for number, start in enumerate(range(0, count, block)):
        into = words[start : start + block]
        values: list[Value] = []
        for index, section in enumerate(sections):
            if isinstance(section, int):
                values.append(section)
            elif isinstance(section, list):
                plane = into if size == 1 else scratch.plane(index, into.size, size)
                coder.decompress_into(section[number], plane)
                values.append(plane)
            else:
                values.append(section[start : start + block])
        layout.join(values, [p if p is None else p[start : start + block] for p in pairs], into, scratch)
    out[count * size :] = tail
