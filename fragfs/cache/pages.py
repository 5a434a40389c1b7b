"""The memory of files in a tmpfs: whether it would be free if they left, and in which pages it is.

Source: fcntl(2), `F_SETLEASE`; madvise(2), `MADV_COLLAPSE`, since Linux 6.1: it works whatever the
tmpfs was told (`huge`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
from functools import cache

__all__ = ["LARGE_PAGE_BYTES", "collapse_pages", "is_in_use"]

LARGE_PAGE_BYTES = 2 << 20

_COLLAPSE = 25
_FIXED = 0x10
_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


def is_in_use(path: str) -> bool:
    """Whether anybody has a file of this user open or mapped, so that its memory would stay."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK  # somebody asks the same now
    try:
        # Whoever opens it in this moment ends the lease; the signal that tells of it does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return False


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
