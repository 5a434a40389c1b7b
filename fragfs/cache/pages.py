"""Large pages for a file in shared memory that was not written in them.

Source: madvise(2), `MADV_COLLAPSE`, since Linux 6.1; it works whatever the tmpfs was told (`huge`).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

__all__ = ["LARGE_PAGE_BYTES", "collapse_pages"]

LARGE_PAGE_BYTES = 2 << 20

_COLLAPSE = 25
_FIXED = 0x10
_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


def collapse_pages(descriptor: int, start: int, size: int) -> bool:
    """Have the kernel copy some of a file into large pages; nobody sees a difference but in speed.

    Args:
        descriptor: The file, open for reading; its bytes there are written.
        start: First byte: a multiple of `LARGE_PAGE_BYTES`.
        size: Bytes: a multiple of it as well.

    Returns:
        False if the kernel could not, or not for all of it.
    """
    libc = _libc()
    # A mapping collapses only where its address is a multiple as well: one is cut out of a larger.
    spread = size + LARGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    reserved = libc.mmap(None, spread, 0, flags, -1, 0)
    if reserved == _MAP_FAILED:
        return False
    try:
        address = -(-reserved // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        flags = mmap.MAP_SHARED | _FIXED
        if libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, start) == _MAP_FAILED:
            return False
        return bool(libc.madvise(address, size, _COLLAPSE) == 0)
    finally:
        libc.munmap(reserved, spread)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc
