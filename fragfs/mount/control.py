"""The control file system of FUSE, also where it is not mounted, as in most containers.

Root then makes a mount of it that is nowhere in the tree: there is nothing to clean up, and no
namespace that would keep other mounts.

Source: Linux `Documentation/filesystems/fuse/fuse.rst`, "Control filesystem"; fsopen(2),
fsmount(2), Linux 5.2.
"""

from __future__ import annotations

import ctypes
import os

from fragfs.mount.table import MountEntry

__all__ = ["open_control", "write_control"]

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
"""The same on every machine that Python runs on but Alpha."""

_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


def open_control(entry: MountEntry, name: str) -> int:
    """Open a control file of a mount's connection for writing.

    The descriptor stays with this connection: once that has ended, writing does nothing, whoever
    has its number then. Until it is opened, a number is all there is to name the connection by:
    check afterwards that the mount is still there.

    Args:
        entry: The mount.
        name: Such as "abort".

    Raises:
        OSError: This user may not, or there is no such connection.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(entry.control / name, flags)
    except FileNotFoundError:
        root = _mount_nowhere()
    try:
        return os.open(f"{entry.minor}/{name}", flags, dir_fd=root)
    finally:
        os.close(root)


def write_control(entry: MountEntry, name: str, value: int) -> None:
    """Write a number into a control file of a mount's connection.

    Raises:
        OSError: This user may not, or there is no such connection.
    """
    opened = open_control(entry, name)
    try:
        os.write(opened, b"%d" % value)
    finally:
        os.close(opened)


def _mount_nowhere() -> int:
    """The root of a mount of the control file system that lives as long as what is open in it."""
    context = _call(_SYS_FSOPEN, b"fusectl", _FSOPEN_CLOEXEC)
    try:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
