"""The few file operations a library is built from, behind one interface.

Every write below a library's directory goes through `Files`, so that a test can stop, tear, lose or
reorder any of them. `OsFiles` is the real one. Foreign errors are translated here, at the edge:
callers see `StorageError` with the path and a remedy, never a bare `OSError`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from fragfs.errors import StorageError

__all__ = ["Files", "OsFiles", "remedy_of", "storage_error"]

P = ParamSpec("P")
T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "free some space and run the command again; what was committed is reused",
    errno.EDQUOT: "free some of your quota and run the command again",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the file system is read-only: use a writable one, or only read from this library",
    errno.ENFILE: "close programs: the machine has no room for more open files",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ELOOP: "it is a link: put a file in its place",
    errno.ESPIPE: "it is a pipe: put a file in its place, or remove it",
    errno.EISDIR: "it is a directory: put a file in its place, or remove it",
    errno.EIO: "the disk reports errors: check its health and your backups",
}


def remedy_of(error: OSError) -> str | None:
    """What a user can do about an error of the operating system, if that is known."""
    return _REMEDIES.get(error.errno or 0)


def storage_error(error: OSError, what: str) -> StorageError:
    """Translate an operating system error; `what` says what could not be done to which file."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(
        f"{what}: {reason}",
        errno=error.errno,
        remedy=remedy_of(error),
        retryable=error.errno in (errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE),
        path=str(error.filename) if error.filename else None,
    )


_VERBS = {"open_read": "open", "open_append": "open", "read_at": "read", "names": "list"}


def _translated(function: Callable[P, T]) -> Callable[P, T]:
    verb = _VERBS.get(function.__name__, function.__name__.replace("_", " "))

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            target = args[1] if len(args) > 1 else ""
            place = target if isinstance(target, Path) else _opened(target)
            raise storage_error(error, f"cannot {verb} {place}") from error

    return wrapper


def _opened(descriptor: object) -> str:
    """The file behind a descriptor, for a message."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return f"descriptor {descriptor}"


class Files(Protocol):
    """File operations on a library. Descriptors are plain integers, closed by `close`."""

    def make_directory(self, path: Path) -> None:
        """Create one directory; an existing one is fine."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist; open it for appending."""

    def open_append(self, path: Path) -> int:
        """Open an existing file for appending."""

    def append(self, descriptor: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Append all of the buffers, in order."""

    def sync(self, descriptor: int) -> None:
        """Make the file's bytes durable."""

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing `new` atomically if it exists."""

    def unlink(self, path: Path) -> None:
        """Remove a name; a missing one is fine."""

    def open_read(self, path: Path) -> int:
        """Open for reading."""

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes at `offset`; short only at the end of the file."""

    def size(self, path: Path) -> int:
        """Bytes in the file."""

    def names(self, path: Path) -> list[str]:
        """Names in a directory, in no particular order."""

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""


# IOV_MAX on Linux; one writev takes no more buffers.
_BUFFERS_MAX = 1024


class OsFiles:
    """`Files` on the real file system. Stateless; safe in any thread."""

    @_translated
    def make_directory(self, path: Path) -> None:
        """See `Files`."""
        path.mkdir(exist_ok=True)

    @_translated
    def create(self, path: Path) -> int:
        """See `Files`."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)

    @_translated
    def open_append(self, path: Path) -> int:
        """See `Files`."""
        # No link is followed: what is written to must lie in the library.
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    @_translated
    def append(self, descriptor: int, buffers: Sequence[bytes | memoryview]) -> None:
        """See `Files`."""
        waiting = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while waiting:
            written = os.writev(descriptor, waiting[:_BUFFERS_MAX])
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:
                waiting[0] = waiting[0][written:]

    @_translated
    def sync(self, descriptor: int) -> None:
        """See `Files`."""
        os.fsync(descriptor)

    @_translated
    def sync_directory(self, path: Path) -> None:
        """See `Files`."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @_translated
    def rename(self, old: Path, new: Path) -> None:
        """See `Files`."""
        os.replace(old, new)

    @_translated
    def unlink(self, path: Path) -> None:
        """See `Files`."""
        path.unlink(missing_ok=True)

    @_translated
    def open_read(self, path: Path) -> int:
        """See `Files`."""
        # Without O_NONBLOCK a pipe in the place of a file would hold its reader forever.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    @_translated
    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        """See `Files`."""
        data = os.pread(descriptor, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        done = len(data)
        while done < size and (data := os.pread(descriptor, size - done, offset + done)):
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    @_translated
    def size(self, path: Path) -> int:
        """See `Files`."""
        return path.stat().st_size

    @_translated
    def names(self, path: Path) -> list[str]:
        """See `Files`."""
        return os.listdir(path)

    @_translated
    def close(self, descriptor: int) -> None:
        """See `Files`."""
        os.close(descriptor)
