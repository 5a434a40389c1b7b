"""What the file system under a library can do, and what to tell the user where it cannot.

A library needs locks (flock), and a database whose users share memory (SQLite's write-ahead log).
Network file systems often lack one or the other, and SQLite only says "disk I/O error" then.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

from fragfs.errors import StorageError
from fragfs.library.files import storage_error

__all__ = ["database_error", "lacks_locks", "lock_error", "network_kind", "unwritable_error"]

_NETWORK_KINDS = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "davfs",
    "fuse.glusterfs",
    "fuse.juicefs",
    "fuse.rclone",
    "fuse.s3fs",
    "fuse.sshfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
}
"""As the kernel's mount table names them."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_LOCAL_REMEDY = (
    "keep the library on a local disk, and give other machines its files with 'fragfs export'"
)
_FULL_REMEDY = "free some space and run the command again"

_SHARED_MEMORY_SIZE = 64 << 10
"""What SQLite needs beside a database that is only read: its -shm file grows by 32 KiB."""


def network_kind(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of network file system that `path` is on, as the kernel names it; None if none.

    Args:
        path: A file or directory that exists.
        table: The kernel's mount table.
    """
    try:
        device = path.stat().st_dev
        lines = table.read_bytes().splitlines()
    except OSError:
        return None
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    for line in lines:
        before, _, after = line.partition(b" - ")
        if before.split(b" ")[2:3] == [wanted]:
            kind = os.fsdecode(after.split(b" ")[0])
            return kind if kind in _NETWORK_KINDS else None
    return None


def lacks_locks(error: OSError) -> bool:
    """Whether a lock was refused because the file system has none."""
    return error.errno in _NO_LOCKS


def lock_error(error: OSError, what: str, path: Path) -> StorageError:
    """Translate a lock that was refused; `what` says what could not be locked."""
    if not lacks_locks(error):
        return storage_error(error, what)
    kind = network_kind(path)
    where = f" ({kind}, over the network)" if kind else ""
    return StorageError(
        f"{what}: this file system{where} has no file locks: {error.strerror}",
        errno=error.errno,
        path=str(path),
        remedy=_LOCAL_REMEDY,
    )


def unwritable_error(directory: Path) -> StorageError:
    """Why a library that can be read cannot be changed."""
    try:
        is_read_only = bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        is_read_only = False
    if is_read_only:
        cause = OSError(errno.EROFS, os.strerror(errno.EROFS), str(directory))
        return storage_error(cause, f"cannot change the library in {directory}")
    return StorageError(
        f"this user cannot change the library in {directory}",
        path=str(directory),
        errno=errno.EACCES,
        remedy="run the command as the library's owner",
    )


def _try_descriptors(directory: Path) -> None:
    """Open as many as a connection has: database, log, shared memory, and a temporary file."""
    opened = []
    try:
        for _ in range(4):
            # Not the database itself: to close it would free the locks that SQLite holds on it.
            opened.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def database_error(error: sqlite3.OperationalError, path: Path) -> StorageError:
    """Translate what SQLite could not do to the catalog at `path`; looks for the cause itself."""
    text = str(error)
    name = getattr(error, "sqlite_errorname", "") or ""
    what = f"catalog {path}: {text}"

    def found(remedy: str, number: int | None = None) -> StorageError:
        return StorageError(
            what, path=str(path), remedy=remedy, errno=number, retryable="locked" in text
        )

    if "locked" in text or "busy" in text:
        return found("wait for the other fragfs to finish, or see which process holds it")
    try:
        _try_descriptors(path.parent)
        status = os.statvfs(path.parent)
    except OSError as cause:
        return storage_error(cause, what)
    if "disk is full" in text:
        return found(_FULL_REMEDY, errno.ENOSPC)
    if status.f_flag & os.ST_RDONLY:
        return storage_error(OSError(errno.EROFS, os.strerror(errno.EROFS), str(path)), what)
    if not os.access(path, os.R_OK | os.W_OK) or "readonly" in text:
        return found("check the owner and the permissions", errno.EACCES)
    if status.f_bavail * status.f_frsize < _SHARED_MEMORY_SIZE:
        return found(f"the disk is full: {_FULL_REMEDY}", errno.ENOSPC)
    kind = network_kind(path)
    if kind is not None:
        return found(f"it is on a network file system ({kind}): {_LOCAL_REMEDY}")
    if name.startswith(("SQLITE_IOERR_SHM", "SQLITE_IOERR_LOCK", "SQLITE_PROTOCOL")):
        return found(f"this file system cannot share it between processes: {_LOCAL_REMEDY}")
    return found("check that the directory is readable, its disk's health and your backups")
