"""Ending a connection to the kernel from outside: what is in flight fails, no page stays locked.

Needed when a daemon is gone and something still holds its device: until then its readers wait.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fragfs.mount.table import MountEntry, find_mount

__all__ = ["abort_connection", "can_abort"]

_MNT_FORCE = 1
_UMOUNT_NOFOLLOW = 8


def can_abort(entry: MountEntry) -> bool:
    """Whether this process would be allowed to abort a mount's connection."""
    return os.access(_control_file(entry), os.W_OK) or os.geteuid() == 0


def abort_connection(entry: MountEntry) -> bool:
    """Abort a mount's connection; False if that was not possible.

    Through the control file system, which belongs to who mounted. It is missing in most containers;
    root then has the kernel begin a forced unmount, which aborts first and may fail afterwards.

    Source: Linux `Documentation/filesystems/fuse/fuse.rst`, "Control filesystem"; umount(2).
    """
    try:
        _control_file(entry).write_text("1")
    except OSError:
        pass
    else:
        return True
    found = find_mount(entry.mountpoint)
    if found is None or found.device != entry.device or os.geteuid() != 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(entry.mountpoint), _MNT_FORCE | _UMOUNT_NOFOLLOW)
    return True


def _control_file(entry: MountEntry) -> Path:
    return Path(f"/sys/fs/fuse/connections/{entry.minor}/abort")
