"""Entropy coding of byte planes, block by block, with zstd as the coder of every method.

A plane is stored verbatim, as one byte if it is constant, or as one zstd frame per block. The
encoder tunes zstd to be a plain Huffman coder, or lets it find matches; decoders see no
difference. Objects of zstandard serve one call at a time, so a `Coder` belongs to one thread.

Source: library/FORMAT.md, "Planes".
"""

from __future__ import annotations

import numpy as np
import zstandard

from fragfs.codec.planes import Bytes
from fragfs.errors import FormatError

__all__ = ["SHRINKS", "Coder", "sample_of"]

SHRINKS = 0.97
"""A plane is stored verbatim unless coding it leaves less than this share of it: below three
per cent, decoding costs more time than reading the bytes saved."""

_MATCH_GAIN = 0.90  # finding matches slows encoding 20-fold and decoding 2-fold: it must pay
_MATCH_PROBE_LEVEL = 1

# zstd with a match finder that finds next to nothing: literals go through its Huffman coder. On
# the exponents of bf16 weights 0.328 at 1 GB/s, where level 1 gives 0.37 at 0.2 GB/s.
_HUFFMAN = zstandard.ZstdCompressionParameters(
    window_log=17,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=1,
)


def sample_of(raw: Bytes, slice_count: int, slice_size: int) -> Bytes:
    """Slices spread evenly over `raw`, joined; `raw` itself if it is no larger than they are.

    Slices start at multiples of 16 bytes, so that elements of every dtype stay whole.
    """
    if raw.size <= slice_count * slice_size:
        return raw
    step = (raw.size - slice_size) // (slice_count - 1) & -16
    return np.concatenate([raw[i * step : i * step + slice_size] for i in range(slice_count)])


class Coder:
    """The zstd coders of one thread."""

    __slots__ = ("_decompressor", "_huffman", "_levels")

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._huffman: zstandard.ZstdCompressor | None = None
        self._levels: dict[int, zstandard.ZstdCompressor] = {}

    def compress(self, raw: Bytes | memoryview, level: int | None) -> bytes:
        """One zstd frame; `level` None for Huffman coding alone."""
        if level is None:
            if self._huffman is None:
                self._huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
            return self._huffman.compress(raw)
        if level not in self._levels:
            self._levels[level] = zstandard.ZstdCompressor(level=level)
        return self._levels[level].compress(raw)

    def decompress_into(self, frame: memoryview, out: Bytes) -> None:
        """Decode one zstd frame that must give exactly the bytes that `out` has room for.

        Nothing is allocated: with the whole frame and room for all of it, zstd decodes in place.

        Raises:
            FormatError: The frame is damaged, or announces or gives another size.
        """
        try:
            announced = zstandard.frame_content_size(frame)
            if announced != out.size:
                raise FormatError(
                    "a zstd frame announces another size than the fragment's",
                    expected=out.size,
                    actual=announced,
                )
            given = self._decompressor.stream_reader(frame).readinto(out.data)
        except zstandard.ZstdError as error:
            raise FormatError(f"a zstd frame is damaged: {error}") from error
        if given != out.size:
            raise FormatError("a zstd frame is cut short", expected=out.size, actual=given)

    def compress_plane(self, plane: Bytes, block_size: int, level: int) -> list[bytes] | None:
        """One zstd frame per block of a plane, or None where that would not pay.

        Args:
            plane: The plane, at least one byte.
            block_size: Bytes of the plane per frame.
            level: zstd level for planes in which finding matches pays.
        """
        chosen: int | None = None
        sample = sample_of(plane, 4, 1 << 12)
        size = len(self.compress(sample, None))
        if len(self.compress(sample, _MATCH_PROBE_LEVEL)) < size * _MATCH_GAIN:
            chosen = level
        elif size >= sample.size * SHRINKS and sample.size < plane.size:
            return None
        frames = [
            self.compress(plane[start : start + block_size], chosen)
            for start in range(0, plane.size, block_size)
        ]
        return frames if sum(map(len, frames)) < plane.size * SHRINKS else None
