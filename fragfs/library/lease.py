"""Leases: who may still need fragments that no model names.

A mount keeps files readable that are open while their model is removed, and an add stores fragments
before a model names them. Both hold a lease as long as they live: a shared flock, which the kernel
frees when they die. Fragments that nothing needs are dropped only while nobody holds one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fragfs.library.files import storage_error

__all__ = ["LEASES_NAME", "hold_lease", "make_lease_file", "no_leases"]

LEASES_NAME = "leases"
_FILE_NAME = "shared"


def make_lease_file(directory: Path) -> None:
    """Make what is locked, so that those can hold a lease who may only read."""
    descriptor = _open(directory)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def hold_lease(directory: Path) -> Iterator[None]:
    """Keep fragments that no model names, for as long as the context lasts.

    Where this user may not write and no lease was ever taken there is nothing to hold.

    Args:
        directory: The library's directory.

    Raises:
        StorageError: The lease cannot be taken.
    """
    descriptor = _open(directory)
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            raise storage_error(error, f"cannot take a lease in {directory}") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def no_leases(directory: Path) -> Iterator[bool]:
    """Whether nobody holds a lease; if so, nobody gets one while the context lasts.

    Args:
        directory: The library's directory.
    """
    descriptor = _open(directory)
    if descriptor is None:
        yield False
        return
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _open(directory: Path) -> int | None:
    """The file that is locked, made where this user may; None where it is not to be had."""
    path = directory / LEASES_NAME / _FILE_NAME
    try:
        path.parent.mkdir(exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        pass
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
