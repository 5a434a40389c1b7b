"""The kernel's mount table, read without touching any mount.

A stat of a mount whose daemon hangs would hang as well, so everything here comes from
/proc/self/mountinfo and /sys.

Source: proc_pid_mountinfo(5); https://docs.kernel.org/filesystems/fuse.html, "Control filesystem".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FILESYSTEM_TYPE",
    "SOURCE_NAME",
    "MountEntry",
    "canonical_mountpoint",
    "find_mount",
    "is_mounted",
    "name_warning",
    "parse_mountinfo",
    "read_mount_table",
    "read_number",
]

SOURCE_NAME = "fragfs"
"""Source in the mount table. Loaders look at it: transformers stops mapping files on "hf-mount"."""

FILESYSTEM_TYPE = "fuse.fragfs"

_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of the mount table.

    Attributes:
        mount_id: The kernel's number of the mount, as in /proc/PID/fdinfo.
        device: "major:minor" of the file system, as in st_dev and /proc/PID/maps.
        mountpoint: Where it is mounted.
        options: Options of the mount and of the file system.
        filesystem_type: Such as "fuse.fragfs".
        source: Such as "fragfs".
    """

    mount_id: int
    device: str
    mountpoint: Path
    options: tuple[str, ...]
    filesystem_type: str
    source: str

    @property
    def is_fragfs(self) -> bool:
        """True for a mount of ours."""
        return self.filesystem_type == FILESYSTEM_TYPE

    @property
    def minor(self) -> int:
        """Number of the connection in /sys/fs/fuse/connections."""
        return int(self.device.partition(":")[2])

    @property
    def read_ahead_kb(self) -> int | None:
        """How far the kernel reads ahead here; None if it does not say."""
        return read_number(Path(f"/sys/class/bdi/{self.device}/read_ahead_kb"))

    @property
    def control(self) -> Path:
        """Its directory in the control file system, which is not mounted in most containers."""
        return Path(f"/sys/fs/fuse/connections/{self.minor}")

    def raise_read_ahead(self, read_ahead_kb: int) -> bool:
        """Have the kernel read ahead further; False if this user may not say so.

        Only once the mount has answered something: until then the kernel puts back what it had.
        """
        try:
            Path(f"/sys/class/bdi/{self.device}/read_ahead_kb").write_text(str(read_ahead_kb))
        except OSError:
            return False
        return True

    @property
    def max_background(self) -> int | None:
        """Background requests the kernel keeps in flight; None where only root may know."""
        return read_number(self.control / "max_background")


def parse_mountinfo(data: bytes) -> list[MountEntry]:
    """Parse the text of /proc/PID/mountinfo; lines that are cut short are left out.

    Returns:
        Entries in the order of the table: of mounts stacked on one directory, the last is on top.
    """
    entries = []
    for line in data.splitlines():
        before, separator, after = line.partition(b" - ")
        head, tail = before.split(b" "), after.split(b" ")
        if not separator or len(head) < 6 or len(tail) < 3:
            continue
        options = dict.fromkeys((head[5] + b"," + tail[2]).decode().split(","))
        entries.append(
            MountEntry(
                mount_id=int(head[0]),
                device=head[2].decode(),
                mountpoint=Path(os.fsdecode(_unescape(head[4]))),
                options=tuple(options),
                filesystem_type=os.fsdecode(_unescape(tail[0])),
                source=os.fsdecode(_unescape(tail[1])),
            )
        )
    return entries


def read_mount_table() -> list[MountEntry]:
    """The mounts this process sees."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def canonical_mountpoint(path: Path) -> Path:
    """The path as the mount table spells it.

    Resolves links in the parents but never looks at the last component, which may be the root of a
    mount that hangs. A link in the last place is resolved when it is not itself a mount point.
    """
    absolute = Path(os.path.abspath(path))
    spelled = Path(os.path.realpath(absolute.parent)) / absolute.name
    if find_mount(spelled) is not None:
        return spelled
    return Path(os.path.realpath(spelled))


def find_mount(mountpoint: Path) -> MountEntry | None:
    """The topmost mount on a directory; `mountpoint` as the mount table spells it."""
    found = None
    for entry in read_mount_table():
        if entry.mountpoint == mountpoint:
            found = entry
    return found


def is_mounted(entry: MountEntry) -> bool:
    """Whether this very mount, not another at the same place, is still in the mount table."""
    return any(
        other.mount_id == entry.mount_id and other.device == entry.device
        for other in read_mount_table()
    )


def name_warning(mountpoint: Path) -> str | None:
    """What is wrong with the name of a mount point; None if nothing is."""
    if any(character in os.fspath(mountpoint) for character in " \t\n\\"):
        return (
            f"{mountpoint} has spaces or backslashes in its name: vLLM and transformers do not find"
            " such mount points in the mount table"
        )
    return None


def _unescape(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def read_number(path: Path) -> int | None:
    """The number in a file of the kernel's; None if it is not there or not for this user."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
