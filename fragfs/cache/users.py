"""Who uses a cache directory: the last one to leave shared memory gives it back.

Each user holds a shared flock as long as it lives; the kernel frees it however it ends. What a
killed user left in shared memory is removed by the next one to come.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

__all__ = [
    "USERS_NAME",
    "begin_use",
    "end_use",
    "find_abandoned",
    "lock_alone",
    "remove_abandoned",
]

USERS_NAME = ".users"
_NEW_S = 60.0
_POLL_S = 0.002
_GONE = "gone-"
"""Starts the name of what is being removed: nobody uses it, or ever will."""


def begin_use(directory: Path) -> int:
    """Become a user of a directory; returns what `end_use` takes.

    Raises:
        OSError: It cannot be used, or the directory that it is in is gone.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            descriptor = os.open(directory / USERS_NAME, flags, 0o600)
        except FileNotFoundError:
            # Its last user has just removed it; what it is in belongs to this user alone.
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # Somebody may have removed the file, with the directory, before the lock was ours.
            if _is_of(descriptor, directory):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def end_use(descriptor: int, directory: Path, *, remove: bool) -> None:
    """Stop using a directory, and remove it if nobody else uses it.

    Args:
        descriptor: What `begin_use` returned.
        directory: The directory.
        remove: Whether it is to be removed after its last user.
    """
    try:
        if remove and lock_alone(descriptor) and _is_of(descriptor, directory):
            _remove(directory)
    finally:
        os.close(descriptor)


def find_abandoned(parent: Path) -> list[tuple[Path, int]]:
    """The directories below one user's directory that nobody uses any more, and their bytes."""
    found = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                directory = Path(entry.path)
                if entry.is_dir(follow_symlinks=False) and _is_abandoned(directory):
                    with os.scandir(directory) as files:
                        size = sum(file.stat(follow_symlinks=False).st_size for file in files)
                    found.append((directory, size))
    return found


def _is_abandoned(directory: Path) -> bool:
    if directory.name.startswith(_GONE):
        return True
    try:
        descriptor = os.open(directory / USERS_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - directory.lstat().st_mtime > _NEW_S
    try:
        return lock_alone(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(parent: Path, keep: Path | None = None) -> None:
    """Remove the directories below one user's directory that nobody uses any more, but for one."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if keep is not None and entry.name == keep.name:
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(directory: Path) -> None:
    if directory.name.startswith(_GONE):
        # Whoever began was killed, or is at it: then both are, and what it held is free sooner.
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        descriptor = os.open(directory / USERS_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - directory.lstat().st_mtime > _NEW_S:
            _remove(directory)
        return
    end_use(descriptor, directory, remove=True)


def _remove(directory: Path) -> None:
    """Remove a directory of which nobody is a user, whoever becomes one meanwhile.

    It goes under another name first: who comes now makes a new one, of which nothing is removed.
    """
    gone = directory.with_name(f"{_GONE}{os.getpid()}-{time.time_ns()}")
    with contextlib.suppress(OSError):
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _is_of(descriptor: int, directory: Path) -> bool:
    """Whether this is the file of the directory that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(directory / USERS_NAME))
    except FileNotFoundError:
        return False


def lock_alone(descriptor: int, wait_s: float = 0.0) -> bool:
    """Whether an exclusive flock could be had in time.

    Args:
        descriptor: Of the file.
        wait_s: How long to wait for others who have locked it.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return False
        else:
            return True
