"""The device of this process's mount, and what is told to the kernel through it unasked.

Source: Linux `include/uapi/linux/fuse.h`, `FUSE_NOTIFY_INVAL_ENTRY`, `FUSE_NOTIFY_INVAL_INODE`.
"""

from __future__ import annotations

import contextlib
import os
import struct

from fragfs.errors import FragmentError

__all__ = ["OUT_HEADER", "DeviceNotifier", "find_device"]

OUT_HEADER = struct.Struct("=IiQ")
"""Bytes of the whole message, negative errno (or what is notified), request that is answered."""

_DEVICE = "/dev/fuse"
_INVAL_INODE, _INVAL_INODE_CODE = struct.Struct("=Qqq"), 2
_INVAL_ENTRY, _INVAL_ENTRY_CODE = struct.Struct("=QII"), 3
_ATTRIBUTES_ONLY = -1


def find_device() -> int:
    """The descriptor of this process's one FUSE session.

    Raises:
        FragmentError: It has none.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == _DEVICE:
                return int(name)
    raise FragmentError("this process has no FUSE session")


class DeviceNotifier:
    """`KernelCaches` of one mount. Blocks while a request about the same directory is answered.

    Not through pyfuse3: what it sends may wait behind the very answer that the kernel waits for.

    Args:
        device: The mount's device.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel look an entry up again; OSError if it refuses."""
        self._notify(_INVAL_ENTRY_CODE, _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0")

    def forget_attributes(self, number: int) -> None:
        """Make the kernel ask for an inode's attributes again; OSError if it refuses."""
        self._notify(_INVAL_INODE_CODE, _INVAL_INODE.pack(number, _ATTRIBUTES_ONLY, 0))

    def _notify(self, code: int, body: bytes) -> None:
        os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body)
