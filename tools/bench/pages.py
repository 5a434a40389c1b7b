"""The page cache of one file: how much of it there is, and how to be rid of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np

__all__ = ["drop_pages", "resident_share"]

_PAUSE_S = 0.03
_TRIES = 60
_GONE = 0.002
"""Share of pages that may stay: some are in a list of a processor and leave later."""


def resident_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    size = os.stat(path).st_size
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    view = np.frombuffer(mapping, np.uint8)
    states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if libc.mincore(view.ctypes.data, size, states.ctypes.data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(path))
    return float((states & 1).mean())


def drop_pages(path: Path) -> float:
    """Take a file out of the page cache; gives the share that would not go.

    Nobody may have it mapped. A server that still pushes pages is waited for.
    """
    share = 1.0
    for _ in range(_TRIES):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(_PAUSE_S)
        share = resident_share(path)
        if share <= _GONE:
            break
    return share
