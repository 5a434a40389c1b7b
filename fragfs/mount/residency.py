"""Which pages of a mounted file are in memory, and dropping them. Reads no byte of it.

Source: mincore(2), posix_fadvise(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

__all__ = ["XATTR_PASSTHROUGH", "Residency", "count_resident", "drop_pages"]

XATTR_PASSTHROUGH = b"user.fragfs.passthrough"
"""Of a file that is open: 1 if the kernel reads it itself from the fragment cache, else 0."""

_STEP_BYTES = 1 << 30
_MAP_FAILED = ctypes.c_void_p(-1).value
_IS_RESIDENT = bytes(value & 1 for value in range(256))
"""mincore leaves all bits but the lowest undefined."""


@dataclass(frozen=True, slots=True)
class Residency:
    """What of a file is in memory.

    Attributes:
        pages: Pages it has.
        resident: Those in memory; None if the kernel does not tell this user: of files that belong
            to somebody else it says that all are.
        is_cache: They are the fragment cache's own, not pages that can be dropped.
    """

    pages: int
    resident: int | None
    is_cache: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all of it is known to be in memory."""
        return self.resident == self.pages


def count_resident(descriptor: int) -> Residency:
    """Count the pages of an open file that are in memory; maps it, touches nothing.

    Raises:
        OSError: It cannot be mapped.
    """
    status = os.fstat(descriptor)
    page = mmap.PAGESIZE
    pages = -(-status.st_size // page)
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        return Residency(pages, None)
    resident = 0
    for start in range(0, status.st_size, _STEP_BYTES):
        resident += _count_step(descriptor, start, min(_STEP_BYTES, status.st_size - start))
    return Residency(pages, resident, _is_passed_through(descriptor))


def _is_passed_through(descriptor: int) -> bool:
    try:
        return os.getxattr(descriptor, XATTR_PASSTHROUGH) == b"1"
    except OSError:
        return False


def _count_step(descriptor: int, start: int, size: int) -> int:
    # Not Python's mmap: it does not give the address of a mapping that cannot be written.
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise _error()
    try:
        vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        while libc.mincore(address, size, vector) != 0:
            if ctypes.get_errno() != errno.EAGAIN:
                raise _error()
        return bytes(vector).translate(_IS_RESIDENT).count(1)
    finally:
        libc.munmap(address, size)


def drop_pages(descriptor: int) -> None:
    """Drop the pages of an open file that no process has mapped.

    Raises:
        OSError: The kernel refused.
    """
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
