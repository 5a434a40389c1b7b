"""Reading mounted files ahead of their readers, and what of them is in memory.

What is read goes through the mount: its fragments come into the fragment cache, its pages into the
kernel's page cache. Files are read in parts, by few threads; as much as memory holds without
pushing everything else out.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fragfs.cache.place import available_memory
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.mount.residency import Residency, count_resident, drop_pages

__all__ = [
    "MEMORY_KEPT_BYTES",
    "FileResidency",
    "WarmFile",
    "WarmReport",
    "check_files",
    "drop_files",
    "find_files",
    "measure_need",
    "warm_files",
]

MEMORY_KEPT_BYTES = 512 << 20
"""Memory that is left to others. Prefill stops at half of it."""

_THREADS = 4
_READ_BYTES = 1 << 20
_PART_BYTES = 256 << 20
_MEASURED_EVERY_BYTES = 64 << 20
_POLL_S = 0.2
_PLENTY = 1 << 62


@dataclass(frozen=True, slots=True)
class WarmFile:
    """A file of the mount.

    Attributes:
        name: Model and path, as in `fragfs ls`.
        path: Where it is mounted.
        size: Its bytes.
        inode: Files of one inode share their pages.
    """

    name: bytes
    path: Path
    size: int
    inode: int


@dataclass(frozen=True, slots=True)
class FileResidency:
    """How much of a file is in memory; `error` says why that is not known."""

    file: WarmFile
    residency: Residency | None
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of it is known to be in memory."""
        return self.residency is not None and self.residency.is_complete


@dataclass(slots=True)
class WarmReport:
    """What was read.

    Attributes:
        file_count: Files that were asked for.
        total_bytes: Their bytes; what several share counts once.
        read_bytes: Bytes read.
        left_out_bytes: Bytes not read, to leave memory to others.
        failed: Files that could not be read, and why.
    """

    file_count: int
    total_bytes: int
    read_bytes: int = 0
    left_out_bytes: int = 0
    failed: list[tuple[WarmFile, OSError]] = field(default_factory=list)


def find_files(
    mountpoint: Path, names: Iterable[bytes]
) -> tuple[list[WarmFile], list[tuple[bytes, OSError]]]:
    """Look files up in a mount that answers.

    Args:
        mountpoint: Where it is.
        names: Model and path of each.

    Returns:
        The files, and the names that are not there with the reason: the mount may show only some
        models.
    """
    files, missing = [], []
    for name in names:
        path = mountpoint / os.fsdecode(name)
        try:
            status = path.stat()
        except OSError as error:
            missing.append((name, error))
        else:
            files.append(WarmFile(name, path, status.st_size, status.st_ino))
    return files, missing


def check_files(files: Sequence[WarmFile]) -> list[FileResidency]:
    """Count what of each file is in memory; reads nothing."""
    return [_with_open(file, lambda _: None) for file in files]


def drop_files(files: Sequence[WarmFile]) -> list[FileResidency]:
    """Drop the pages of each file, and count what is left: pages that somebody has mapped."""
    return [_with_open(file, drop_pages) for file in files]


def _with_open(file: WarmFile, action: Callable[[int], None]) -> FileResidency:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            action(descriptor)
            return FileResidency(file, count_resident(descriptor))
        finally:
            os.close(descriptor)
    except OSError as error:
        return FileResidency(file, None, error.strerror or str(error))


@dataclass(frozen=True, slots=True)
class _Part:
    file: WarmFile
    start: int
    stop: int
    cold_share: float


def measure_need(
    files: Iterable[WarmFile], memory: Callable[[], int] = available_memory
) -> tuple[int, int]:
    """How many bytes of files are not in memory yet, and for how many there is room."""
    distinct = _distinct(files)
    total = sum(file.size for file in distinct)
    found = [_resident_bytes(file) for file in distinct]
    resident, droppable = (sum(column) for column in zip((0, 0), *found, strict=True))
    return total - resident, max(0, memory() - droppable - MEMORY_KEPT_BYTES)


def _distinct(files: Iterable[WarmFile]) -> list[WarmFile]:
    return list({file.inode: file for file in files}.values())


def warm_files(
    files: Sequence[WarmFile],
    progress: Progress = NO_PROGRESS,
    *,
    memory: Callable[[], int] = available_memory,
    threads: int = _THREADS,
) -> WarmReport:
    """Read files, so that the next reader finds them in memory.

    Args:
        files: What to read; an inode that comes twice is read once.
        progress: Told from the calling thread.
        memory: Bytes that can be had without pushing anybody out. What is in the page cache counts
            as such, so what has been read here is taken off it.
        threads: How many read at once.
    """
    distinct = _distinct(files)
    report = WarmReport(len(files), sum(file.size for file in distinct))
    parts: list[_Part] = []
    droppable = 0
    for file in distinct:
        held, of_page_cache = _resident_bytes(file)
        droppable += of_page_cache
        cold_share = 1 - held / file.size if file.size else 0.0
        parts += (
            _Part(file, start, min(start + _PART_BYTES, file.size), cold_share)
            for start in range(0, file.size, _PART_BYTES)
        )
    progress.start("warming", report.total_bytes)
    work = _Work(parts, _Budget(memory, droppable))

    def advance(file: WarmFile, size: int) -> None:
        progress.note(os.fsdecode(file.name))
        progress.advance(size)
        report.read_bytes += size

    _run(work, min(threads, len(parts)), advance)
    report.failed = list(work.failed.values())
    if work.is_short:
        unread = sum(file.size for file, _ in report.failed)
        report.left_out_bytes = max(0, report.total_bytes - report.read_bytes - unread)
    else:
        _read_holes([part for part in parts if part.file.inode not in work.failed], threads)
    return report


def _run(work: _Work, threads: int, advance: Callable[[WarmFile, int], None]) -> None:
    """Have parts read by threads, and say how far they are from this one."""
    workers = [
        threading.Thread(target=work.run, name=f"warm-{number}", daemon=True)
        for number in range(threads)
    ]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not work.done.empty():
            try:
                file, size = work.done.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            advance(file, size)
    finally:
        work.stop.set()


def _read_holes(parts: Sequence[_Part], threads: int) -> None:
    """Read again what is not in memory although it was read: here and there a page is not.

    Seen after cold reads with prefill: up to 0.4 % of the pages, with no reclaim counted (Linux
    6.18, 2026-11). What is in memory costs a copy.
    """
    files = {part.file.inode: part.file for part in parts}
    shares = check_files(list(files.values()))
    holed = {
        share.file.inode
        for share in shares
        if share.residency is not None
        and share.residency.resident is not None
        and not share.is_complete
    }
    again = [part for part in parts if part.file.inode in holed]
    _run(_Work(again, _Budget(lambda: _PLENTY, 0)), min(threads, len(again)), lambda *_: None)


def _resident_bytes(file: WarmFile) -> tuple[int, int]:
    """Bytes of a file that are in memory, and how many of them are in the page cache.

    What the page cache has counts as memory that can be had; what the fragment cache has does not.
    """
    found = _with_open(file, lambda _: None).residency
    if found is None or found.resident is None or not found.pages:
        return 0, 0
    resident = file.size * found.resident // found.pages
    return resident, 0 if found.is_cache else resident


class _Budget:
    """Says when to stop: before what was read would push itself, or others, out."""

    def __init__(self, memory: Callable[[], int], droppable: int) -> None:
        self._memory = memory
        # What was in the page cache before is in the figure of available memory as well.
        self._held = droppable

    def has_room_for(self, size: int) -> bool:
        """Whether `size` more bytes of page cache fit."""
        return self._memory() - self._held - size >= MEMORY_KEPT_BYTES

    def hold(self, size: int) -> None:
        """Note that bytes were read."""
        self._held += size


class _Work:
    """The parts that are still to be read. `run` is what each thread does."""

    def __init__(self, parts: list[_Part], budget: _Budget) -> None:
        self._parts = iter(parts)
        self._budget = budget
        self._lock = threading.Lock()
        self.done: queue.SimpleQueue[tuple[WarmFile, int]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.failed: dict[int, tuple[WarmFile, OSError]] = {}
        self.is_short = False

    def run(self) -> None:
        """Read parts until there are none, memory is short, or `stop` is set."""
        buffer = bytearray(_READ_BYTES)
        while not self.stop.is_set():
            with self._lock:
                part = next(self._parts, None)
            if part is None:
                return
            if part.file.inode in self.failed:
                continue
            try:
                self._read(part, buffer)
            except OSError as error:
                with self._lock:
                    self.failed.setdefault(part.file.inode, (part.file, error))

    def _read(self, part: _Part, buffer: bytearray) -> None:
        descriptor = os.open(part.file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position = part.start
            while position < part.stop and not self.stop.is_set():
                if (position - part.start) % _MEASURED_EVERY_BYTES == 0:
                    size = min(_MEASURED_EVERY_BYTES, part.stop - position)
                    if not self._reserve(int(size * part.cold_share)):
                        return
                view = memoryview(buffer)[: part.stop - position]
                count = os.preadv(descriptor, [view], position)
                if not count:
                    return
                position += count
                self.done.put((part.file, count))
        finally:
            os.close(descriptor)

    def _reserve(self, size: int) -> bool:
        with self._lock:
            if not self._budget.has_room_for(size):
                self.is_short = True
                self.stop.set()
                return False
            self._budget.hold(size)
            return True
