"""Looks at mounts and the machine, and repairs what this user may. Never waits for a mount.

Mounts are asked in child processes with a time limit; everything else is read from /proc and /sys.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fragfs.cache.place import SHARED_MEMORY, available_memory, cgroup_room, user_directory
from fragfs.cache.users import find_abandoned, remove_abandoned
from fragfs.errors import FragmentError, NotFoundError
from fragfs.library.version import read_format_version
from fragfs.mount.findings import (
    BACKGROUND_WANTED,
    LARGE_PAGES,
    Finding,
    MountFacts,
    Severity,
    SystemFacts,
    examine_system,
    wants_background,
    wants_read_ahead,
)
from fragfs.mount.live import reachable_mounts
from fragfs.mount.mount_findings import examine_mount
from fragfs.mount.options import READ_AHEAD_KB
from fragfs.mount.probe import MountAnswer, MountState, ask_mounts
from fragfs.mount.table import (
    MountEntry,
    canonical_mountpoint,
    find_mount,
    read_mount_table,
    read_number,
)
from fragfs.mount.unmount import detach
from fragfs.mount.users import find_servers

__all__ = [
    "Diagnosis",
    "Repair",
    "diagnose",
    "find_entries",
    "has_small_pages",
    "read_system",
    "repair",
]

_ANSWER_S = 3.0
_SYSCTL = Path("/proc/sys/fs/fuse")
_REMOUNT_S_MAX = 10.0
_UNLIMITED = 1 << 60
_LARGE_PAGES_SINCE = (6, 14)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was seen, and what it means.

    Attributes:
        system: The machine.
        mounts: The mounts, in the order of the mount table.
        findings: First those of the machine, then those of each mount.
    """

    system: SystemFacts
    mounts: tuple[MountFacts, ...]
    findings: tuple[Finding, ...]

    @property
    def has_problem(self) -> bool:
        """Whether anything needs to be done."""
        return any(finding.severity is Severity.PROBLEM for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Repair:
    """Something that was tried; `error` says why it did not work."""

    text: str
    error: str | None = None


def find_entries(mountpoint: Path | None) -> list[MountEntry]:
    """All fragfs mounts, or the one on a directory.

    Raises:
        NotFoundError: Nothing of fragfs is mounted there.
    """
    if mountpoint is None:
        return reachable_mounts()
    place = canonical_mountpoint(mountpoint)
    entry = find_mount(place)
    if entry is None or not entry.is_fragfs:
        raise NotFoundError(
            f"no fragfs library is mounted on {place}",
            path=os.fspath(place),
            remedy="see all mounts with: fragfs doctor",
        )
    return [entry]


def diagnose(entries: Sequence[MountEntry], *, timeout_s: float = _ANSWER_S) -> Diagnosis:
    """Look at mounts and the machine; takes little longer than `timeout_s`, however many hang."""
    system = read_system()
    answers = ask_mounts([entry.mountpoint for entry in entries], timeout_s)
    mounts = [_read_mount(*pair) for pair in zip(entries, answers, strict=True)]
    findings = examine_system(system)
    for facts in mounts:
        findings += examine_mount(facts, system)
    return Diagnosis(system, tuple(mounts), tuple(findings))


def read_system(shared_memory: Path = SHARED_MEMORY) -> SystemFacts:
    """What the machine says of itself."""
    group = cgroup_room()
    try:
        status = os.statvfs(shared_memory)
    except OSError:
        status = None
    return SystemFacts(
        is_root=os.geteuid() == 0,
        has_device=os.path.exists("/dev/fuse"),
        has_fusermount=shutil.which("fusermount3") is not None,
        has_control=any(entry.filesystem_type == "fusectl" for entry in read_mount_table()),
        default_timeout_s=read_number(_SYSCTL / "default_request_timeout"),
        max_timeout_s=read_number(_SYSCTL / "max_request_timeout"),
        max_pages=read_number(_SYSCTL / "max_pages_limit"),
        page_bytes=mmap.PAGESIZE,
        memory_bytes=available_memory(),
        group_bytes=group if group < _UNLIMITED else None,
        shared_bytes=status.f_blocks * status.f_frsize if status else None,
        shared_free_bytes=status.f_bavail * status.f_frsize if status else None,
        shared_small_pages=has_small_pages(shared_memory),
        abandoned=tuple(find_abandoned(user_directory(shared_memory))),
    )


def has_small_pages(place: Path) -> bool:
    """Whether a tmpfs could hold files in larger pages, but was not told to.

    Source: tmpfs(5), `huge`; since Linux 6.14 that means pages as large as what is written.
    """
    entry = find_mount(place)
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return (
        entry is not None
        and entry.filesystem_type == "tmpfs"
        and not any(option.startswith("huge=") for option in entry.options)
        and release >= _LARGE_PAGES_SINCE
        and os.path.isdir("/sys/kernel/mm/transparent_hugepage")
    )


def _read_mount(entry: MountEntry, answer: MountAnswer) -> MountFacts:
    status = answer.status or {}
    library = status.get("library")
    helpers = status.get("helpers", [])
    # In another process namespace the numbers mean other processes, or none.
    knows_pids = os.path.exists(f"/proc/{status.get('pid')}")
    servers = find_servers(entry) if answer.state is MountState.HANGS else []
    return MountFacts(
        entry=entry,
        answer=answer,
        read_ahead_kb=entry.read_ahead_kb,
        max_background=entry.max_background,
        congestion_threshold=read_number(entry.control / "congestion_threshold"),
        waiting=read_number(entry.control / "waiting"),
        servers=tuple(servers),
        stopped=tuple(filter(_is_stopped, servers)),
        dead_decoders=tuple(
            pid for pid in helpers if knows_pids and not os.path.exists(f"/proc/{pid}")
        ),
        library_format=read_format_version(Path(library)) if library else None,
    )


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped; source: proc_pid_stat(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])


# --- repairs


def repair(
    diagnosis: Diagnosis, *, machine: bool = True, shared_memory: Path = SHARED_MEMORY
) -> list[Repair]:
    """Do what this user may: clear dead mounts, raise limits of the kernel, remove what is left.

    Nothing that works is ended, and a mount that hangs is left to `umount`.

    Args:
        diagnosis: What was found.
        machine: Also what is no mount's own: have shared memory use large pages, and remove the
            fragment caches that nobody uses.
        shared_memory: Where those are.
    """
    done = []
    for facts in diagnosis.mounts:
        place = facts.entry.mountpoint
        if facts.answer.state is MountState.DEAD:
            done.append(_clear(facts.entry))
        if wants_read_ahead(facts):
            path = Path(f"/sys/class/bdi/{facts.entry.device}/read_ahead_kb")
            text = f"read-ahead of {place}: {facts.read_ahead_kb} KiB to {READ_AHEAD_KB} KiB"
            done.append(_write(path, READ_AHEAD_KB, text))
        if wants_background(facts):
            text = f"background requests of {place}: {facts.max_background} to {BACKGROUND_WANTED}"
            done.append(_write(facts.entry.control / "max_background", BACKGROUND_WANTED, text))
            threshold = BACKGROUND_WANTED * 3 // 4
            text = f"where read-ahead of {place} pauses: at {threshold} requests"
            done.append(_write(facts.entry.control / "congestion_threshold", threshold, text))
    if machine and diagnosis.system.shared_small_pages:
        done.append(_enlarge_pages(shared_memory))
    if machine and diagnosis.system.abandoned:
        remove_abandoned(user_directory(shared_memory))
        done += (
            Repair(
                f"removed the unused fragment cache {directory}",
                "it is still there" if directory.exists() else None,
            )
            for directory, _ in diagnosis.system.abandoned
        )
    return done


def _clear(entry: MountEntry) -> Repair:
    text = f"cleared the dead mount on {entry.mountpoint}"
    try:
        detach(entry)
    except FragmentError as error:
        return Repair(text, str(error))
    return Repair(text)


def _enlarge_pages(place: Path) -> Repair:
    """Have a tmpfs hold what is written from now on in large pages.

    Its other options stay as they are in the mount table, whatever /etc/fstab says of them.
    """
    text = f"large pages for {place}, until the next boot"
    try:
        done = subprocess.run(
            ["mount", "--options-source=mtab", "-o", f"remount,{LARGE_PAGES}", place],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_REMOUNT_S_MAX,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Repair(text, f"mount: {error}")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["mount failed"]
        return Repair(text, f"{said[0].rstrip('.')}; root may do it, outside of containers")
    return Repair(text)


def _write(path: Path, value: int, text: str) -> Repair:
    try:
        path.write_text(str(value))
    except OSError as error:
        return Repair(text, f"{path}: {error.strerror}; root may do it")
    return Repair(text)
