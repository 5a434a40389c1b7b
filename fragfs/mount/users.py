"""Which processes use a mount, found in /proc without touching the mount.

Seen are open files, mapped files, working and root directories, and programs run from the mount.
Processes of other users are only visible to root.

Source: proc(5): fdinfo, maps, cwd, root, exe.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fragfs.library.names import printable
from fragfs.mount.table import MountEntry

__all__ = ["MountUser", "describe_users", "find_servers", "find_users"]

_LISTED_MAX = 10
_COMMAND_LENGTH_MAX = 80


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that uses a mount.

    Attributes:
        pid: Its process id.
        command: Its command line, or its name where that is empty.
        how: Of "open", "mapped", "working directory", "root directory", "program": those that hold.
    """

    pid: int
    command: str
    how: tuple[str, ...]


def find_users(entry: MountEntry) -> list[MountUser]:
    """The processes that keep a mount busy, by process id. Blocks on /proc only."""
    users = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        process = Path("/proc", name)
        how = tuple(_uses(process, entry))
        if how:
            users.append(MountUser(int(name), _command(process), how))
    return sorted(users, key=lambda user: user.pid)


def find_servers(entry: MountEntry) -> list[int]:
    """Process ids of the daemons that serve a mount, as far as this user may see; at most one.

    Source: Linux 6.13 fs/fuse/dev.c, `fuse_dev_show_fdinfo`; older kernels do not tell.
    """
    wanted = b"fuse_connection:\t%d\n" % entry.minor
    pids = (name for name in os.listdir("/proc") if name.isdigit())
    return [int(pid) for pid in pids if _has_descriptor(Path("/proc", pid), wanted)]


def describe_users(users: list[MountUser]) -> str:
    """For messages: "python3 train.py (process 12: open, mapped), bash (process 9: ...)"."""
    parts = [f"{user.command} (process {user.pid}: {', '.join(user.how)})" for user in users]
    more = len(parts) - _LISTED_MAX
    return ", ".join(parts[:_LISTED_MAX]) + (f" and {more} more" if more > 0 else "")


def _uses(process: Path, entry: MountEntry) -> Iterator[str]:
    if _has_descriptor(process, b"mnt_id:\t%d\n" % entry.mount_id):
        yield "open"
    if _has_mapping(process, entry.device):
        yield "mapped"
    # Links are read, never followed: following them would look at the mount. A directory that the
    # mount hides looks the same, which is why the kernel, not this list, decides what is busy.
    for link, how in (
        ("cwd", "working directory"),
        ("root", "root directory"),
        ("exe", "program"),
    ):
        try:
            target = Path(os.readlink(process / link))
        except OSError:
            continue
        if target == entry.mountpoint or entry.mountpoint in target.parents:
            yield how


def _has_descriptor(process: Path, wanted: bytes) -> bool:
    """Whether a line is in the information on any descriptor of a process."""
    try:
        for info in (process / "fdinfo").iterdir():
            with contextlib.suppress(OSError):  # closed in between
                if wanted in info.read_bytes():
                    return True
    except OSError:  # ended, or another user's
        pass
    return False


def _has_mapping(process: Path, device: str) -> bool:
    major, _, minor = device.partition(":")
    wanted = b"%02x:%02x" % (int(major), int(minor))
    try:
        maps = (process / "maps").read_bytes()
    except OSError:
        return False
    return any(fields[3:4] == [wanted] for fields in (line.split() for line in maps.splitlines()))


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        text = b" ".join(words).strip() or (process / "comm").read_bytes().strip()
    except OSError:
        return "?"
    # Anybody chooses their own command line: no line breaks and no novels in logs and messages.
    shown = printable(text)
    return shown if len(shown) <= _COMMAND_LENGTH_MAX else shown[:_COMMAND_LENGTH_MAX] + "..."
