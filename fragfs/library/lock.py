"""One writer at a time: the library's lock file.

The lock is an flock, so the kernel frees it the moment its holder dies. A long add gives it up
between batches; a second file, the turnstile, lets the one who waits have the next turn: without it
the same process would take the lock again before anybody else woke up.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fragfs.errors import StorageError
from fragfs.library.files import storage_error
from fragfs.library.filesystem import lock_error

__all__ = ["LOCK_NAME", "TURNSTILE_NAME", "writer_lock"]

LOCK_NAME = "lock"
TURNSTILE_NAME = "lock.next"

_POLL_S = 0.02


def _open(path: Path) -> int:
    try:
        # No link is followed: the file is truncated, and the library may be somebody else's.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise storage_error(error, f"cannot open {path} for writing") from error


def _acquire(
    descriptor: int, lock_path: Path, timeout_s: float, sign_of_life: Callable[[], object]
) -> None:
    seen = sign_of_life()
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if (now := sign_of_life()) != seen:
                seen, deadline_s = now, time.monotonic() + timeout_s
            elif time.monotonic() >= deadline_s:
                raise StorageError(
                    f"another fragfs is writing to this library ({_holder(lock_path)})",
                    path=str(lock_path),
                    remedy="wait for it to finish and run the command again",
                    retryable=True,
                ) from None
            time.sleep(_POLL_S)
        except OSError as error:
            raise lock_error(error, f"cannot lock {lock_path}", lock_path) from error
        else:
            return


def _holder(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "an unknown process"
    try:
        text = os.read(descriptor, 200).decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    finally:
        os.close(descriptor)
    return text or "an unknown process"


@contextmanager
def writer_lock(
    directory: Path, timeout_s: float, sign_of_life: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the library's writer lock.

    Args:
        directory: The library's directory.
        timeout_s: How long to wait without a sign of life of other writers before giving up.
        sign_of_life: Gives another value whenever a writer has got on: somebody who queues behind
            busy writers waits for as long as they are busy.

    Raises:
        StorageError: Another process kept the lock all that time (retryable, names it), or this
            user may not write here.
    """
    lock_path = directory / LOCK_NAME
    turnstile = _open(directory / TURNSTILE_NAME)
    try:
        _acquire(turnstile, lock_path, timeout_s, sign_of_life)
        lock = _open(lock_path)
        try:
            _acquire(lock, lock_path, timeout_s, sign_of_life)
            fcntl.flock(turnstile, fcntl.LOCK_UN)
            # Only for the message another writer shows: a stale or missing text is harmless.
            with suppress(OSError):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()}".encode(), 0)
            yield
        finally:
            # Closing would not free it while a child process holds a copy of the descriptor.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)
    finally:
        os.close(turnstile)
