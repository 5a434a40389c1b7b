"""Memory before and during a measurement: made ready, dropped, and watched.

A host takes back pages that a virtual machine has not used for a few seconds; getting one again
costs several times what reading a page costs, and a file that enters the page cache needs pages.
So whatever is timed comes right after `pretouch`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryPeak", "drop_caches", "pretouch", "warm_cache", "watch_memory"]

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; `mmap` does not name it
_SAMPLE_S = 0.01


def pretouch(size: int) -> None:
    """Make the host give this machine `size` bytes of memory, and free them for what follows."""
    available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    size = max(mmap.PAGESIZE, min(size, available // 2))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        # Page by page, as the page cache will ask for it.
        with suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        try:
            pages.madvise(_POPULATE_WRITE)
        except OSError:
            for offset in range(0, size, mmap.PAGESIZE):
                pages[offset] = 1


def drop_caches(*, sync: bool = True) -> bool:
    """Empty the page cache; False if only root may.

    Args:
        sync: Write to disk first what is not there yet, of all programs: only then is all dropped.
    """
    if sync:
        os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def warm_cache(directory: Path) -> None:
    """Read every file below `directory` (or this one file) into the page cache."""
    buffer = bytearray(1 << 20)
    paths = directory.rglob("*") if directory.is_dir() else [directory]
    for path in paths:
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@dataclass
class MemoryPeak:
    """Most memory a process was seen to have, in bytes.

    Attributes:
        anon: RssAnon: its own memory.
        resident: RSS: that, and mapped files.
        samples: Times it was looked at.
    """

    anon: int = 0
    resident: int = 0
    samples: int = 0


@contextmanager
def watch_memory(pid: int) -> Iterator[MemoryPeak]:
    """Sample a process while the block runs; the peak is complete once the block has ended."""
    peak = MemoryPeak()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S if peak.samples else 0):
            try:
                fields = _status(pid)
            except (OSError, ValueError):
                return
            peak.anon = max(peak.anon, fields.get("RssAnon", 0))
            peak.resident = max(peak.resident, fields.get("VmRSS", 0))
            peak.samples += 1

    thread = threading.Thread(target=sample, name="bench-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found
