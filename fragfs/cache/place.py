"""Where the shared fragment cache lives and how large it may grow.

In shared memory when there is room, else below a directory on disk that the caller names:
containers often give 64 MiB of shared memory. One directory per user and library, 0700, its owner
checked: what lies in it is served as the bytes of models.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fragfs.cache.users import remove_abandoned
from fragfs.errors import StorageError

__all__ = [
    "CACHE_BYTES_MIN",
    "SHARED_MEMORY",
    "CachePlace",
    "available_memory",
    "cgroup_room",
    "choose_place",
    "held_open",
    "measure_budget",
    "user_directory",
]

SHARED_MEMORY = Path("/dev/shm")

CACHE_BYTES_MIN = 64 << 20
"""Less room than this is no place for a cache: the bases of one reader would push each other
out."""

_SHARE_OF_MEMORY = 4
_SHARE_OF_TMPFS = 2
_SHARE_OF_DISK = 10
_DISK_BYTES_MAX = 8 << 30
_SHARE_HELD_OPEN = 4
_HELD_OPEN_BYTES_MAX = 128 << 20
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class CachePlace:
    """A directory for decoded fragments.

    Attributes:
        directory: It belongs to this user, and nobody else may enter it. It is there from when
            somebody becomes its user (`begin_use`) until the last one leaves.
        in_memory: True in shared memory, False on disk.
        bytes_max: The budget, by the room there was when it was chosen.
        asked: The budget the user named; None if none was named.
    """

    directory: Path
    in_memory: bool
    bytes_max: int
    asked: int | None

    @property
    def held_open_bytes_max(self) -> int:
        """Of the budget, what the processes of a mount may hold open of files that have left."""
        return held_open(self.bytes_max)


def held_open(budget: int) -> int:
    """The share of a budget that is not for files in the directory."""
    return min(budget // _SHARE_HELD_OPEN, _HELD_OPEN_BYTES_MAX)


def choose_place(
    library_uuid: bytes,
    *,
    asked: int | None = None,
    directory: Path | None = None,
    disk: Path | None = None,
    shared_memory: Path = SHARED_MEMORY,
) -> CachePlace | None:
    """Choose and make the directory of a library's fragment cache.

    Args:
        library_uuid: Identity of the library: 16 bytes.
        asked: Budget in bytes; None takes a share of the room there is. 0 means no cache.
        directory: Put it below this directory, whatever it is.
        disk: Where to put it if shared memory is too small.
        shared_memory: The tmpfs to prefer.

    Returns:
        The place; None if no cache is wanted, or there is no room for one.

    Raises:
        StorageError: The directory belongs to somebody else or others may enter it.
    """
    if asked == 0:
        return None
    parents = [directory] if directory is not None else [shared_memory, disk]
    for parent in parents:
        if parent is None or (parent is shared_memory and not parent.is_dir()):
            continue
        try:
            made = _make_private(parent, library_uuid)
        except OSError:
            continue
        # Its last user may remove it at any moment until this process is one: what is asked here
        # is asked of the directory that it is in, which stays.
        in_memory = _is_memory(made.parent)
        if in_memory:
            remove_abandoned(made.parent, keep=made)
        held = _held_bytes(made)
        budget = measure_budget(made.parent, in_memory=in_memory, asked=asked, held=held)
        if budget >= min(CACHE_BYTES_MIN, asked or CACHE_BYTES_MIN):
            return CachePlace(made, in_memory, budget, asked)
        with contextlib.suppress(OSError):  # somebody uses it, with a smaller budget
            made.rmdir()
    return None


def measure_budget(directory: Path, *, in_memory: bool, asked: int | None, held: int) -> int:
    """How many bytes the cache may hold now: the smallest of what is asked and what there is.

    Args:
        directory: A directory on the file system where it is.
        in_memory: Whether its files occupy memory.
        asked: What the user named.
        held: Bytes it holds already; they count as room.
    """
    status = os.statvfs(directory)
    room = status.f_bavail * status.f_frsize + held
    if in_memory:
        memory = available_memory() + held
        # Who names a budget wants it: only what would not fit at all is taken off.
        if asked is not None:
            return max(0, min(asked, room * 9 // 10, memory * 9 // 10))
        return max(0, min(room // _SHARE_OF_TMPFS, memory // _SHARE_OF_MEMORY))
    if asked is not None:
        return max(0, min(asked, room * 9 // 10))
    return max(0, min(room // _SHARE_OF_DISK, _DISK_BYTES_MAX))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can be had without pushing anybody out: of the machine, and of the control group.

    Args:
        root: Where /proc and /sys are.

    Source: Linux `Documentation/filesystems/proc.rst`, MemAvailable; `cgroup-v2.rst`, memory.max;
    `cgroup-v1/memory.rst`.
    """
    available = 1 << 62
    try:
        with open(root / "proc" / "meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    available = int(line.split()[1]) << 10
                    break
    except (OSError, ValueError):
        pass
    return min(available, cgroup_room(root))


@dataclass(frozen=True, slots=True)
class _Controller:
    """Names of the files of one kind of control groups."""

    limit: str
    used: str
    droppable: str


_UNIFIED = _Controller("memory.max", "memory.current", "inactive_file")
_SEPARATE = _Controller("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cgroup_room(root: Path = _ROOT) -> int:
    """What this process's control groups still allow; page cache that can be dropped counts."""
    room = 1 << 62
    try:
        own = (root / "proc" / "self" / "cgroup").read_text()
    except OSError:
        return room
    mounted = root / "sys" / "fs" / "cgroup"
    for line in own.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            room = min(room, _room_of_groups(mounted, path.strip(), _UNIFIED))
        elif "memory" in controllers.split(","):
            room = min(room, _room_of_groups(mounted / "memory", path.strip(), _SEPARATE))
    return room


def _room_of_groups(mounted: Path, path: str, names: _Controller) -> int:
    """The least room of a control group and of those that it is in."""
    room = 1 << 62
    group = mounted / path.lstrip("/")
    for directory in (group, *group.parents):
        if directory != mounted and mounted not in directory.parents:
            break
        try:
            limit = (directory / names.limit).read_text().strip()
            if limit == "max":
                continue
            used = int((directory / names.used).read_text())
            statistics = dict(
                line.split() for line in (directory / "memory.stat").read_text().splitlines()
            )
            droppable = int(statistics.get(names.droppable, 0))
            room = min(room, max(0, int(limit) - used + droppable))
        except (OSError, ValueError):
            continue
    return room


def user_directory(parent: Path) -> Path:
    """Where the caches of this user are, one directory for each library."""
    return parent / f"fragfs-{os.geteuid()}"


def _make_private(parent: Path, library_uuid: bytes) -> Path:
    """The directory for one user and library, made if it is not there."""
    user = user_directory(parent)
    directory = user / library_uuid.hex()
    for path in (user, directory):
        status = _make(path, parents=path is user and not parent.exists())
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StorageError(
                f"{path} is not a directory of this user: somebody else made it",
                path=str(path),
                remedy="have it removed, or name another place with --cache-dir",
            )
        if status.st_mode & 0o077:
            raise StorageError(
                f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):o})",
                path=str(path),
                remedy="remove it: it holds nothing that cannot be decoded again",
            )
    return directory


def _make(path: Path, *, parents: bool) -> os.stat_result:
    """Make a directory that its last user may remove at any moment, and say what it is."""
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=parents)
        with contextlib.suppress(FileNotFoundError):
            return path.lstat()


def _is_memory(directory: Path) -> bool:
    """Whether a directory is on a tmpfs."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    for line in table.splitlines():
        before, _, after = line.partition(b" - ")
        if before.split(b" ")[2:3] == [wanted.encode()]:
            return after.split(b" ")[0] in (b"tmpfs", b"ramfs")
    return False


def _held_bytes(directory: Path) -> int:
    """Bytes of the files in a directory; others may remove some meanwhile."""
    held = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                held += entry.stat(follow_symlinks=False).st_size
    return held
