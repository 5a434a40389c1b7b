"""One writer at a time: the library's lock file.

The lock is an flock, so the kernel frees it the moment its holder dies. A long add gives it up
between batches; a second file, the turnstile, lets the one who waits have the next turn: without it
the same process would take the lock again before anybody else woke up.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fragfs.errors import StorageError
from fragfs.library.files import storage_error

__all__ = ["LOCK_NAME", "TURNSTILE_NAME", "writer_lock"]

LOCK_NAME = "lock"
TURNSTILE_NAME = "lock.next"

_POLL_S = 0.02


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(error, f"cannot open {path} for writing") from error


def _acquire(descriptor: int, deadline_s: float, lock_path: Path) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise StorageError(
                    f"another fragfs is writing to this library ({_holder(lock_path)})",
                    path=str(lock_path),
                    remedy="wait for it to finish and run the command again",
                    retryable=True,
                ) from None
            time.sleep(_POLL_S)
        except OSError as error:
            raise storage_error(error, f"cannot lock {lock_path}") from error
        else:
            return


def _holder(path: Path) -> str:
    try:
        text = path.read_bytes()[:200].decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    return text or "an unknown process"


@contextmanager
def writer_lock(directory: Path, timeout_s: float) -> Iterator[None]:
    """Hold the library's writer lock.

    Args:
        directory: The library's directory.
        timeout_s: How long to wait for another writer before giving up.

    Raises:
        StorageError: Another process kept the lock all that time (retryable, names it), or this
            user may not write here.
    """
    deadline_s = time.monotonic() + timeout_s
    lock_path = directory / LOCK_NAME
    turnstile = _open(directory / TURNSTILE_NAME)
    try:
        _acquire(turnstile, deadline_s, lock_path)
        lock = _open(lock_path)
        try:
            _acquire(lock, deadline_s, lock_path)
            fcntl.flock(turnstile, fcntl.LOCK_UN)
            # Only for the message another writer shows: a stale text is harmless.
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()}".encode(), 0)
            yield
        finally:
            os.close(lock)
    finally:
        os.close(turnstile)
