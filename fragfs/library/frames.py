"""zstd frames of the catalog and of packs, read without trusting the size they state. Pure."""

from __future__ import annotations

import zstandard

__all__ = ["read_frame"]

_AT_ONCE_MAX = 16 << 20


def read_frame(data: bytes | memoryview, size_min: int, size_max: int) -> bytes:
    """Decompress the frame that `data` starts with.

    A frame that states a large size is decompressed piece by piece: otherwise a few bytes could
    have gigabytes allocated.

    Args:
        data: The frame; what follows it is not looked at.
        size_min: Fewest bytes that it may hold.
        size_max: Most bytes that it may hold.

    Raises:
        zstandard.ZstdError: It is damaged, or states another size.
    """
    size = zstandard.frame_content_size(data)
    if not size_min <= size <= size_max:
        raise zstandard.ZstdError(f"a content size of {size}")
    if size <= _AT_ONCE_MAX:
        return zstandard.ZstdDecompressor().decompress(data)
    reader = zstandard.ZstdDecompressor().decompressobj()
    found = reader.decompress(data)
    if not reader.eof:
        raise zstandard.ZstdError("the frame ends early")
    return found
