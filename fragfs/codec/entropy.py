"""Entropy coding of one run of bytes: three ways to compress, one way back.

Every compressed form is a single zstd frame that states its content size, so a decoder needs no
method number and never allocates more than the size it already expects.

zstd objects must not be used by two threads at once, so each thread keeps its own.
"""

from __future__ import annotations

import enum
import threading
from typing import TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from fragfs.errors import FormatError

__all__ = [
    "Bytes",
    "Method",
    "compress_bytes",
    "compress_plane",
    "decompress",
    "decompress_into",
    "estimate_matches",
    "store_plane",
]

Bytes: TypeAlias = bytes | memoryview
"""What is stored: bytes of our own, or a view of the caller's."""

_SHRINK_MIN = 0.97
"""A plane that does not get below this share of its size stays raw: entropy decoding runs at 2 to 3
GB/s per core, a raw plane is free, and mantissa bytes of real f32 weights sit at 0.98 to 1."""

_MATCHES_PAY = 0.9
"""Match finding is used where it beats plain Huffman coding by this factor on the sample; on planes
of real weights it loses to it (bf16 exponents: 0.327 Huffman, 0.361 level 1, 0.402 level 3)."""

_SAMPLE_SLICE_COUNT = 4
_SAMPLE_SLICE_BYTES = 4096
_SAMPLED_BYTES_MIN = 8192
_SAMPLE_SHARE = 32
"""Shorter planes are compressed whole, twice; longer ones are tried on an eighth of them."""

_QUICK_LEVEL = 1

_THOROUGH_BELOW = 0.98
"""Bytes that the quick level cannot bring below this share are as good as random: level 12 would
spend 20 ms per MiB on them."""

_LEVEL_HUFFMAN = 0
"""Key of the compressor that is tuned to do nothing but Huffman coding; levels start at 1."""


class Method(enum.IntEnum):
    """How one run of bytes is stored. Codes are on disk."""

    RAW = 0
    CONSTANT = 1
    ZSTD = 2


class _Coders(threading.local):
    """The calling thread's zstd objects, made on first use."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        found = self.compressors.get(level)
        if found is None:
            found = self.compressors[level] = _new_compressor(level)
        return found


def _new_compressor(level: int) -> zstandard.ZstdCompressor:
    if level != _LEVEL_HUFFMAN:
        return zstandard.ZstdCompressor(level=level)
    # The smallest tables and the longest minimum match: the match finder gives up at once, and
    # each 128 KiB block becomes literals under one Huffman table. On planes of weights smaller and
    # faster than any level: bf16 exponents 0.327 at 1.0 GB/s, level 1 0.361 at 0.36 GB/s.
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=17,
            chain_log=6,
            hash_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
        )
    )


_coders = _Coders()


def compress_bytes(data: memoryview, level: int) -> bytes | None:
    """Compress bytes in which matches are likely: headers, text, files of unknown kind.

    Args:
        data: The bytes; not empty.
        level: zstd level of the thorough attempt, 1 to 19.

    Returns:
        One zstd frame smaller than `data`, or None if there is none. Incompressible bytes cost one
        quick pass, not one at `level`.
    """
    quick = _coders.compressor(_QUICK_LEVEL).compress(data)
    huffman = _coders.compressor(_LEVEL_HUFFMAN).compress(data)
    found = [quick, huffman]
    if len(quick) < _THOROUGH_BELOW * len(data) and level > _QUICK_LEVEL:
        found.append(_coders.compressor(level).compress(data))
    best = min(found, key=len)
    return best if len(best) < len(data) else None


def store_plane(plane: NDArray[np.uint8], level: int) -> tuple[Method, Bytes]:
    """Store one plane the smallest way that a sample suggests.

    Args:
        plane: uint8, one-dimensional, contiguous, not empty.
        level: zstd level for planes in which matches pay, 1 to 19.

    Returns:
        The method and what to store: for RAW a view of `plane`.
    """
    if plane[0] == plane[-1] and plane.min() == plane.max():
        return Method.CONSTANT, plane[:1].tobytes()
    stored = compress_plane(plane, level)
    return (Method.RAW, plane.data) if stored is None else (Method.ZSTD, stored)


def compress_plane(plane: NDArray[np.uint8], level: int) -> bytes | None:
    """Compress one byte plane, choosing by a sample between Huffman, match finding and nothing.

    Args:
        plane: uint8, one-dimensional, contiguous, not empty.
        level: zstd level for planes in which matches pay, 1 to 19.

    Returns:
        One zstd frame, or None if the plane should stay as it is.
    """
    sample = _sample(plane)
    huffman = _coders.compressor(_LEVEL_HUFFMAN).compress(sample)
    quick = _coders.compressor(_QUICK_LEVEL).compress(sample)
    huffman_size, quick_size = len(huffman), len(quick)
    if min(huffman_size, quick_size) > _SHRINK_MIN * len(sample):
        return None
    is_whole = len(sample) == plane.size
    stored = huffman if is_whole else _coders.compressor(_LEVEL_HUFFMAN).compress(plane.data)
    if quick_size < _MATCHES_PAY * huffman_size:
        stored = min(stored, _coders.compressor(level).compress(plane.data), key=len)
    return stored if len(stored) <= _SHRINK_MIN * plane.size else None


def estimate_matches(data: NDArray[np.uint8]) -> float:
    """Share of its size that `data` would roughly take under match finding, from a sample."""
    sample = _sample(data)
    return len(_coders.compressor(_QUICK_LEVEL).compress(sample)) / len(sample)


def decompress(stored: Bytes, size: int) -> bytes:
    """Undo `compress_bytes` or `compress_plane`.

    Args:
        stored: One zstd frame, from disk.
        size: Bytes it must expand to; at least 1. Nothing larger is ever allocated.

    Raises:
        FormatError: `stored` is not exactly one frame of exactly `size` bytes.
    """
    try:
        _check_declared_size(stored, size)
        return _coders.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise FormatError(f"compressed bytes do not decode: {exc}") from exc


def decompress_into(stored: Bytes, into: memoryview) -> None:
    """Undo `compress_plane` into memory of the caller's, all of it.

    Raises:
        FormatError: `stored` does not start with a frame of exactly `len(into)` bytes. What `into`
            holds is then undefined.
    """
    try:
        _check_declared_size(stored, len(into))
        with _coders.decompressor.stream_reader(stored) as reader:
            found = reader.readinto(into)
            # Reading on makes zstd look for the end of the frame: there must be nothing more.
            found += len(reader.read(1))
    except zstandard.ZstdError as exc:
        raise FormatError(f"a compressed plane does not decode: {exc}") from exc
    if found != len(into):
        raise FormatError("a compressed plane ends early", expected=len(into), actual=found)


def _check_declared_size(stored: Bytes, size: int) -> None:
    """Refuse a frame before it can ask for memory."""
    declared = zstandard.frame_content_size(stored)
    if declared != size:
        raise FormatError("a zstd frame declares the wrong size", expected=size, actual=declared)


def _sample(data: NDArray[np.uint8]) -> bytes:
    """A few slices spread evenly over `data`, or all of it if it is short."""
    if data.size <= _SAMPLED_BYTES_MIN:
        return data.tobytes()
    size = min(_SAMPLE_SLICE_BYTES, data.size // _SAMPLE_SHARE)
    starts = (
        (data.size - size) * index // (_SAMPLE_SLICE_COUNT - 1)
        for index in range(_SAMPLE_SLICE_COUNT)
    )
    return b"".join(data[start : start + size].tobytes() for start in starts)
