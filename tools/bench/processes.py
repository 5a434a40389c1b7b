"""Processes of a server: which they are, what processor time and memory they take.

A daemon may start helpers, and those may end up under init. All of them inherit the environment of
the command that started the first: a word in it marks them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "AnonPeak", "anon_bytes", "cpu_seconds", "end", "marked", "watch_anon"]

MARK = "FRAGFS_BENCH_MOUNT"
"""The environment variable; its value is the mount point."""

_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.05
_ENDS_S = 10.0


def marked(value: str) -> list[int]:
    """The processes that have MARK=value in their environment."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of processes so far, in user and kernel."""
    ticks = 0
    for pid in pids:
        with suppress(OSError, ValueError):
            # The name in brackets may have spaces and brackets of its own.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def anon_bytes(pids: Iterable[int]) -> int:
    """RssAnon of processes: memory of their own, without mapped files and shared memory."""
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total


@dataclass
class AnonPeak:
    """Most RssAnon that processes were seen to have together, in bytes."""

    size: int = 0


@contextmanager
def watch_anon(pids: list[int]) -> Iterator[AnonPeak]:
    """Sample processes while the block runs; the peak is complete once it has ended."""
    peak = AnonPeak(anon_bytes(pids))
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            peak.size = max(peak.size, anon_bytes(pids))

    thread = threading.Thread(target=sample, name="bench-anon", daemon=True)
    if pids:
        thread.start()
    try:
        yield peak
    finally:
        stop.set()
        if pids:
            thread.join()
        peak.size = max(peak.size, anon_bytes(pids))


def end(pids: Iterable[int], wait_s: float = _ENDS_S) -> None:
    """Wait until processes have ended: what follows shall have the machine to itself.

    What has not ended by itself in time is killed.
    """
    left = list(pids)
    deadline = time.monotonic() + wait_s
    while left := [pid for pid in left if _runs(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
