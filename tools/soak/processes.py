"""Looking at processes through /proc: what they wait for, what they take, whether they are ours."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "MARK",
    "anonymous_bytes",
    "children",
    "command_line",
    "describe",
    "descriptor_count",
    "is_alive",
    "kill",
    "marked",
    "mounts_below",
    "tree",
]

MARK = "FRAGFS_SOAK"
"""Environment variable of every process of a soak: what is left behind is found by it."""


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="backslashreplace")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] not in "ZX"


def command_line(pid: int) -> str:
    """Its arguments, separated by spaces."""
    return _text(pid, "cmdline").replace("\0", " ").strip()


def _parent(pid: int) -> int:
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _all() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def children(pid: int) -> list[int]:
    """Processes that it started, and that live."""
    return [child for child in _all() if _parent(child) == pid and is_alive(child)]


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for known in found:
        found += children(known)
    return found


def marked(mark: str) -> list[int]:
    """Processes that carry this mark, this one excepted."""
    wanted = f"{MARK}={mark}"
    return [
        pid
        for pid in _all()
        if pid != os.getpid() and is_alive(pid) and wanted in _text(pid, "environ").split("\0")
    ]


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if there is nobody to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def anonymous_bytes(pid: int) -> int:
    """Memory of its own; 0 if it has ended."""
    for line in _text(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def descriptor_count(pid: int) -> int:
    """Open descriptors; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def describe(pid: int) -> str:
    """What a process and its descendants wait for, thread by thread."""
    lines = []
    for member in tree(pid):
        lines.append(f"process {member}: {command_line(member)}")
        try:
            threads = sorted(map(int, os.listdir(f"/proc/{member}/task")))
        except OSError:
            continue
        for thread in threads:
            place = f"{member}/task/{thread}"
            state = _text(thread, "stat").rpartition(")")[2].split()[:1]
            name = _text(thread, "comm").strip()
            wait = Path(f"/proc/{place}/wchan")
            where = wait.read_text() if wait.exists() else ""
            lines.append(f"  thread {thread} {name} {''.join(state)} waits in {where or '?'}")
            try:
                stack = Path(f"/proc/{place}/stack").read_text()
            except OSError:
                continue  # only root may look
            lines += [f"    {line}" for line in stack.splitlines()]
    return "\n".join(lines)


def mounts_below(directory: Path) -> list[Path]:
    """Mount points below a directory, innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape").encode("latin-1")
        if point.startswith(os.fsencode(directory) + b"/"):
            found.append(Path(os.fsdecode(point)))
    return sorted(found, reverse=True)


def wait_for_end(pids: list[int], timeout_s: float) -> list[int]:
    """Wait until the processes have ended; gives those that have not."""
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []
