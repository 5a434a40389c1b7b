"""Taking mounts down: politely, lazily, by force, and clearing dead ones.

The kernel decides whether a mount is busy; /proc then tells who keeps it so. Nothing here looks at
the mount itself, except a child process that asks whether it answers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from fragfs.errors import NotFoundError, StorageError, UsageError
from fragfs.mount.abort import abort_connection
from fragfs.mount.probe import MountState, probe_mount
from fragfs.mount.table import (
    MountEntry,
    canonical_mountpoint,
    find_mount,
    is_mounted,
    read_mount_table,
)
from fragfs.mount.users import MountUser, describe_users, find_servers, find_users

__all__ = ["UnmountReport", "detach", "fragfs_mounts", "unmount"]

_POLL_S = 0.02
_PROBE_S_MAX = 2.0


@dataclass(frozen=True, slots=True)
class UnmountReport:
    """What was taken down.

    Attributes:
        mountpoint: Where.
        was_dead: True if its daemon was gone already.
        users: Processes that keep using it (lazy) or were cut off (forced).
    """

    mountpoint: Path
    was_dead: bool
    users: tuple[MountUser, ...]


def fragfs_mounts() -> list[MountEntry]:
    """Every fragfs mount this process sees, in the order of the mount table."""
    return [entry for entry in read_mount_table() if entry.is_fragfs]


def unmount(
    mountpoint: Path, *, lazy: bool = False, force: bool = False, timeout_s: float = 10.0
) -> UnmountReport:
    """Unmount a fragfs mount; a dead one is cleared whoever still holds it.

    Args:
        mountpoint: Where it is mounted.
        lazy: Detach now even if it is busy; open files stay readable until they are closed.
        force: Cut off every reader, then detach. For root, or the user who mounted.
        timeout_s: How long the mount may take to leave the mount table.

    Raises:
        NotFoundError: Nothing is mounted there.
        UsageError: Something else than fragfs is.
        StorageError: It is busy (names the processes), or the system refused.
    """
    place = canonical_mountpoint(mountpoint)
    entry = find_mount(place)
    if entry is None:
        raise NotFoundError(
            f"nothing is mounted on {place}",
            path=os.fspath(place),
            remedy="see the mounts with: grep fuse.fragfs /proc/self/mounts",
        )
    if not entry.is_fragfs:
        raise UsageError(
            f"{place} is a mount of type {entry.filesystem_type}, not fragfs",
            path=os.fspath(place),
            remedy="use umount",
        )
    was_dead = probe_mount(place, min(timeout_s, _PROBE_S_MAX)) is MountState.DEAD
    users = tuple(find_users(entry)) if lazy or force else ()
    if force and not was_dead:
        _abort(entry)
    if lazy or force or was_dead:
        detach(entry, timeout_s=timeout_s)
    else:
        _unmount_idle(entry, timeout_s)
    _wait_gone(entry, timeout_s)
    return UnmountReport(place, was_dead, users)


def detach(entry: MountEntry, *, timeout_s: float = 10.0) -> None:
    """Take a mount out of the tree at once; who has files open keeps them.

    Raises:
        StorageError: The system refused, or another mount lies on top.
    """
    _check_topmost(entry)
    refused = _run_fusermount(entry.mountpoint, ("-u", "-z"), timeout_s)
    if refused is not None and is_mounted(entry):
        raise StorageError(
            f"cannot detach {entry.mountpoint}: {refused}", path=os.fspath(entry.mountpoint)
        )


def _unmount_idle(entry: MountEntry, timeout_s: float) -> None:
    _check_topmost(entry)
    refused = _run_fusermount(entry.mountpoint, ("-u",), timeout_s)
    if refused is None or not is_mounted(entry):
        return
    if "busy" in refused.lower():
        users = find_users(entry)
        who = describe_users(users) if users else "processes that only root can see"
        raise StorageError(
            f"{entry.mountpoint} is in use by {who}",
            path=os.fspath(entry.mountpoint),
            retryable=True,
            remedy="close the files, or detach it with --lazy",
        )
    raise StorageError(
        f"cannot unmount {entry.mountpoint}: {refused}", path=os.fspath(entry.mountpoint)
    )


def _check_topmost(entry: MountEntry) -> None:
    top = find_mount(entry.mountpoint)
    if top is not None and top.mount_id != entry.mount_id:
        raise StorageError(
            f"another mount ({top.filesystem_type}) lies on top of {entry.mountpoint}",
            path=os.fspath(entry.mountpoint),
            remedy="unmount that one first",
        )


def _run_fusermount(mountpoint: Path, flags: tuple[str, ...], timeout_s: float) -> str | None:
    """Run fusermount3; None if it succeeded, else what it said."""
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise StorageError("fusermount3 is not installed", remedy="install fuse3")
    try:
        done = subprocess.run(
            [program, *flags, "--", mountpoint],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except subprocess.TimeoutExpired:
        return f"{program} did not finish in {timeout_s:g} s"
    if done.returncode == 0:
        return None
    return done.stderr.decode(errors="replace").strip() or f"{program} failed"


def _abort(entry: MountEntry) -> None:
    """End the connection: have the kernel do it if this user may, else end the daemon."""
    if abort_connection(entry):
        return
    servers = find_servers(entry)
    if not servers:
        raise StorageError(
            f"cannot cut off the readers of {entry.mountpoint}: neither its control file nor its"
            " daemon is accessible",
            path=os.fspath(entry.mountpoint),
            remedy="detach it with --lazy, or run as root",
        )
    for pid in servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_gone(entry: MountEntry, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while is_mounted(entry):
        if time.monotonic() > deadline:
            raise StorageError(
                f"{entry.mountpoint} is still mounted after {timeout_s:g} s",
                path=os.fspath(entry.mountpoint),
                retryable=True,
                remedy="detach it with --lazy",
            )
        time.sleep(_POLL_S)
