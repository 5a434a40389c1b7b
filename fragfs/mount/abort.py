"""Ending a connection to the kernel from outside: what is in flight fails, no page stays locked.

Needed when a daemon is gone and something still holds its device: until then its readers wait.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fragfs.mount.control import open_control
from fragfs.mount.table import MountEntry, is_mounted

__all__ = ["abort_connection", "can_abort", "open_abort"]

_MNT_FORCE = 1
_UMOUNT_NOFOLLOW = 8
_CAP_SYS_ADMIN = 21
_ALL_IDS = ["0", "0", "4294967295"]


def can_abort(entry: MountEntry) -> bool:
    """Whether this process would be allowed to abort a mount's connection."""
    opened = open_abort(entry)
    if opened is None:
        return _may_force()
    os.close(opened)
    return True


def open_abort(entry: MountEntry) -> int | None:
    """What aborts this very connection once "1" is written to it; None if that is not to be had.

    Whoever opens it must know that the mount is still there afterwards: see `open_control`.
    """
    try:
        return open_control(entry, "abort")
    except OSError:
        return None


def abort_connection(entry: MountEntry, opened: int | None = None) -> bool:
    """Abort a mount's connection; False if that was not possible.

    Through the control file system, which belongs to who mounted. Where that is not to be had, root
    has the kernel begin a forced unmount, which aborts first; an idle mount is gone then.

    Source: Linux `Documentation/filesystems/fuse/fuse.rst`, "Control filesystem"; umount(2).

    Args:
        entry: The mount. A number may have passed to another connection by now, so without
            `opened` it has to be in the mount table still.
        opened: What `open_abort` gave.
    """
    control = open_abort(entry) if opened is None else opened
    try:
        # A mount that is looked for after the file was opened had that number when it was.
        if opened is None and not is_mounted(entry):
            return False
        if control is not None:
            os.write(control, b"1")
            return True
    except OSError:
        pass
    finally:
        if opened is None and control is not None:
            os.close(control)
    if not is_mounted(entry) or not _may_force():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(entry.mountpoint), _MNT_FORCE | _UMOUNT_NOFOLLOW)
    return True


def _may_force() -> bool:
    """Whether the kernel would begin a forced unmount for this process: only for the true root."""
    try:
        status = Path("/proc/self/status").read_text()
        ids = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    return ids == _ALL_IDS and bool(capabilities >> _CAP_SYS_ADMIN & 1)
