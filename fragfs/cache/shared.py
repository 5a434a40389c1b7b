"""Decoded fragments as files that every process of a user maps: the shared fragment cache.

A file holds one fragment's raw bytes and a footer; its name is the fragment's id, so a file is
right or it is damaged, whatever happens to the library. Files are written under another name,
published by rename, and evicted by unlink: never truncated, never written again. Who has one mapped
keeps it.

The modification time of a file is its place in the order of leaving: now, when it was last used,
plus what its decode costs and how many need it, minus an hour once a fragment of a single use was
served. The oldest leave first, down to nine tenths of what is for files: the rest of the budget is
for those that have left and are held open. Whole files (`whole`) stay while anybody has them open
or mapped: their memory would not be free.

Every failure to keep something is harmless: `put` says False, `get` says None.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass

import xxhash

from fragfs.cache.pages import is_in_use
from fragfs.cache.place import CachePlace, held_open, measure_budget
from fragfs.cache.users import USERS_NAME, begin_use, end_use, lock_alone
from fragfs.errors import FragmentError, StorageError
from fragfs.types import FragmentId

__all__ = [
    "FOOTER",
    "WHOLE_PREFIX",
    "CacheStatistics",
    "FragmentFile",
    "SharedFragmentCache",
    "file_name",
]

log = logging.getLogger(__name__)

FOOTER = struct.Struct("<8sQQ32s")
"""Magic, bytes of the fragment, XXH3-64 of them, fragment id; right after the fragment's bytes."""

MAGIC = b"fragfsC1"

WHOLE_PREFIX = "w"
"""What names of whole files (`whole`) begin with; those of fragments are hexadecimal."""

_TEMPORARY = "."
_LOCK_NAME = ".lock"
_CLAIMS_NAME = ".claims"
_DAMAGED = b"D"
_TEMPORARY_S_MAX = 60.0
_KEEP_AFTER_TRIM = 0.9
_RESCANS_PER_BUDGET = 16
_SHARE_OF_FRAGMENTS = 8
_TRIM_WAIT_S = 0.25
_IMPATIENT_S = 5.0
"""For so long nobody waits again for a process that made no room in time: it may be stopped."""
_CHECK_ONE_IN = 16
_FULL_S = 2.0
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_MAP_BYTES_MIN = 64 << 10
"""Smaller fragments are copied."""
_FLOCK = struct.Struct("@hhqqi0q")


def file_name(fragment: FragmentId) -> str:
    """Name of a fragment's file: half of its id; the footer has all of it."""
    return fragment.hex()[:32]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What one process has seen of the cache, and what the directory holds.

    Attributes:
        directory: Where it is.
        in_memory: True in shared memory.
        bytes_max: The budget.
        bytes_held: Bytes of the files there are now.
        hits: Fragments this process found.
        misses: Fragments it did not find.
        puts: Fragments it published.
        refused: Fragments it could not publish: no room.
        evictions: Files it removed to make room.
        damaged: Files whose bytes had changed; they were removed, not served.
    """

    directory: str
    in_memory: bool
    bytes_max: int
    bytes_held: int
    hits: int
    misses: int
    puts: int
    refused: int
    evictions: int
    damaged: int


class FragmentFile:
    """One fragment of the cache, open: readable whatever is evicted.

    Attributes:
        nbytes: Bytes of the fragment.
    """

    __slots__ = ("_descriptor", "_view", "nbytes")

    def __init__(self, descriptor: int, raw_size: int) -> None:
        self._descriptor = descriptor
        self._view: memoryview | None = None
        self.nbytes = raw_size

    def __del__(self) -> None:
        os.close(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, for as long as this object lives."""
        return self._descriptor

    def read(self, start: int, stop: int) -> bytes:
        """Some of the bytes, in memory of their own.

        Raises:
            StorageError: The disk failed.
        """
        data = bytearray(stop - start)
        self.read_into(data, start)
        return bytes(data)

    def read_into(self, buffer: bytearray | memoryview, start: int) -> None:
        """Fill a buffer with the bytes from `start` on.

        For who wants each byte once it is cheaper than a mapping; memory that was used a moment ago
        is cheaper than fresh memory.

        Raises:
            StorageError: The disk failed.
        """
        try:
            size = os.preadv(self._descriptor, [buffer], start)
        except OSError as error:
            raise StorageError(
                f"cannot read the fragment cache: {error.strerror}", errno=error.errno
            ) from error
        if size != len(buffer):
            raise StorageError("a file of the fragment cache has become shorter")

    def view(self) -> memoryview:
        """All the bytes, mapped read-only."""
        if self._view is None:
            if self.nbytes < _MAP_BYTES_MIN:
                self._view = memoryview(self.read(0, self.nbytes))
            else:
                # Populated: one walk over the page tables instead of a fault for every 64 KiB.
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                mapped = mmap.mmap(self._descriptor, self.nbytes, flags=flags, prot=mmap.PROT_READ)
                self._view = memoryview(mapped)
        return self._view


class SharedFragmentCache:
    """The files of one place. Safe in any thread; any number of processes share the place.

    Args:
        place: Where and how large.
        check_all: Check the bytes of every fragment when it is mapped. By default on disk; in
            memory all are checked that were there before this process came, one in sixteen of the
            others, and all as soon as anybody found one damaged.

    Attributes:
        place: Where and how large.
        since_ns: When this process came, in nanoseconds since 1970: files that were changed before
            are checked.
    """

    def __init__(self, place: CachePlace, *, check_all: bool | None = None) -> None:
        self.place = place
        self._path = os.fspath(place.directory)
        self._check_all = not place.in_memory if check_all is None else check_all
        # Who filled the place before is not known: a killed daemon, or somebody who meant harm. The
        # time of change of a file is the one that its owner cannot set.
        self.since_ns = time.time_ns()
        self._lock = threading.Lock()
        self._bytes_max = place.bytes_max
        self._bytes_held = 0
        self._stuck_bytes = 0
        self._put_since_scan = 0
        self._full_until = 0.0
        self._impatient_until = 0.0
        self._hits = 0
        self._misses = 0
        self._puts = 0
        self._refused = 0
        self.evictions = 0
        self._damaged = 0
        self._user = begin_use(place.directory)
        self._claims = os.open(
            os.path.join(self._path, _CLAIMS_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        # Where there is no room later, damage must still be told of.
        with contextlib.suppress(OSError):
            os.pwrite(self._claims, b"\0", len(_DAMAGED))
        self.trim()

    def close(self) -> None:
        """Stop using the cache; the last one to do so gives shared memory back.

        What is mapped stays mapped.
        """
        os.close(self._claims)
        end_use(self._user, self.place.directory, remove=self.place.in_memory)

    # --- reading

    def _path_of(self, fragment: FragmentId) -> str:
        return f"{self._path}/{file_name(fragment)}"

    def get(
        self, fragment: FragmentId, raw_size: int, *, check: bool = False, count: bool = True
    ) -> FragmentFile | None:
        """A fragment, or None.

        Args:
            fragment: Its id.
            raw_size: Its length: a file of another length is not it.
            check: Check its bytes, whatever the cache was told.
            count: Count it among what was found, or not: a reader wants it.
        """
        path = self._path_of(fragment)
        try:
            file = FragmentFile(os.open(path, _READ), raw_size)
        except OSError:
            self._misses += count
            return None
        try:
            is_right = self._is_right(file, fragment, check=check)
        except (FragmentError, OSError, ValueError):
            is_right = False
        if not is_right:
            self.drop_damaged(path)
            return None
        self._hits += count
        return file

    def recheck(self, file: FragmentFile, fragment: FragmentId) -> bool:
        """Whether a file that was opened before has the right bytes now; if not, it is removed."""
        try:
            is_right = self._is_right(file, fragment, check=True)
        except (FragmentError, OSError, ValueError):
            is_right = False
        if not is_right:
            self.drop_damaged(self._path_of(fragment))
        return is_right

    def holds(self, fragment: FragmentId) -> bool:
        """Whether a fragment is there; it may leave at any moment."""
        return os.path.exists(self._path_of(fragment))

    def touch(self, fragment: FragmentId, credit_s: float) -> None:
        """Move a fragment in the order of leaving.

        Args:
            fragment: Its id.
            credit_s: It leaves as if it was last used that much later than now.
        """
        at_ns = time.time_ns() + int(credit_s * 1e9)
        with contextlib.suppress(OSError):
            os.utime(self._path_of(fragment), ns=(at_ns, at_ns))

    @property
    def checks_all(self) -> bool:
        """Whether every fragment is checked each time: on disk, and once damage was found."""
        return self._check_all

    def fileno(self) -> int:
        """Descriptor of the claims, whose first byte says D once anybody found damage."""
        return self._claims

    def is_to_check(self, fragment: FragmentId) -> bool:
        """Whether a fragment is to be checked in any case, and not only one in sixteen."""
        if self._check_all:
            return True
        try:
            return os.stat(self._path_of(fragment)).st_ctime_ns < self.since_ns
        except OSError:
            return False  # it has left: who brings it back does so from now on

    def _is_right(self, file: FragmentFile, fragment: FragmentId, *, check: bool) -> bool:
        size = file.nbytes
        status = os.fstat(file.fileno())
        if status.st_size != size + FOOTER.size:
            return False
        footer = FOOTER.unpack(file.read(size, size + FOOTER.size))
        magic, named_size, checksum, identity = footer
        if magic != MAGIC or named_size != size or identity != bytes(fragment):
            return False
        # The hash of a fragment in memory costs a tenth of storing it into the page cache: too
        # much for every one of them, and what memory forgets, the page cache would forget as well.
        is_ours = status.st_ctime_ns >= self.since_ns
        if not check and is_ours and self._hits % _CHECK_ONE_IN and not self.is_suspect():
            return True
        return bool(xxhash.xxh3_64_intdigest(file.view()) == checksum)

    def is_suspect(self) -> bool:
        """Whether every file is to be checked, for this process or because another says so."""
        if not self._check_all:
            with contextlib.suppress(OSError):
                self._check_all = os.pread(self._claims, 1, 0) == _DAMAGED
        return self._check_all

    def drop_damaged(self, path: str) -> None:
        """Remove a file that is not what its name says, and have all others checked from now on."""
        self._damaged += 1
        self._misses += 1
        self._check_all = True
        # Told to all who share the place, of which each sees few files; to ask costs a microsecond.
        with contextlib.suppress(OSError):
            os.pwrite(self._claims, _DAMAGED, 0)
        log.warning("a file of the fragment cache is damaged and was removed: %s", path)
        with contextlib.suppress(OSError):
            os.unlink(path)

    # --- filling

    def put(
        self,
        fragment: FragmentId,
        raw: memoryview,
        credit_s: float = 0.0,
        checksum: int | None = None,
    ) -> bool:
        """Publish the bytes of a fragment, which the caller has checked.

        Args:
            fragment: Its id.
            raw: All its bytes.
            credit_s: See `touch`.
            checksum: XXH3-64 of the bytes, if the caller knows.

        Returns:
            False if there is no room for it.
        """
        size = raw.nbytes + FOOTER.size
        if size > self.files_bytes_max or time.monotonic() < self._full_until:
            self._refused += 1
            return False
        if checksum is None:
            checksum = xxhash.xxh3_64_intdigest(raw)
        footer = FOOTER.pack(MAGIC, raw.nbytes, checksum, bytes(fragment))
        name = file_name(fragment)
        temporary = self.temporary(name)
        try:
            self._write(temporary, raw, footer, credit_s)
            os.rename(temporary, os.path.join(self._path, name))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self._refused += 1
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                # Somebody else fills the place: make room, and leave it alone for a moment.
                self._full_until = time.monotonic() + _FULL_S
                self.trim()
            return False
        with self._lock:
            self._puts += 1
        self.count(size)
        return True

    def temporary(self, name: str) -> str:
        """Where this thread writes what is to be published under a name."""
        return os.path.join(self._path, f"{_TEMPORARY}{name}-{os.getpid()}-{threading.get_ident()}")

    def count(self, size: int) -> None:
        """Note that a file was published, and make room if that is too much."""
        with self._lock:
            self._bytes_held += size
            self._put_since_scan += size
            is_over = self._bytes_held > max(self.files_bytes_max, self._stuck_bytes)
            is_due = self._put_since_scan * _RESCANS_PER_BUDGET > self._bytes_max
        if is_over:
            # Who makes room may have to wait for a processor: nobody fills it further meanwhile.
            is_patient = time.monotonic() >= self._impatient_until
            if not self.trim(wait_s=_TRIM_WAIT_S if is_patient else 0.0) and is_patient:
                self._impatient_until = time.monotonic() + _IMPATIENT_S
        elif is_due:
            self.trim()

    def room(self) -> int:
        """Bytes that can be published before something has to leave; counts what there is."""
        self.trim(wait_s=_TRIM_WAIT_S)
        return self.files_bytes_max - self._bytes_held

    def remove(self, fragment: FragmentId) -> None:
        """Have a fragment leave now."""
        path = self._path_of(fragment)
        with contextlib.suppress(OSError):
            size = os.stat(path).st_size
            os.unlink(path)
            with self._lock:
                self._bytes_held -= size

    def _write(self, path: str, raw: memoryview, footer: bytes, credit_s: float) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            written = os.writev(descriptor, [raw, footer])
            while written < raw.nbytes:
                written += os.write(descriptor, raw[written:])
            while written < raw.nbytes + len(footer):
                written += os.write(descriptor, footer[written - raw.nbytes :])
            at_ns = time.time_ns() + int(credit_s * 1e9)
            os.utime(descriptor, ns=(at_ns, at_ns))
        finally:
            os.close(descriptor)

    @property
    def files_bytes_max(self) -> int:
        """Of the budget, what files in the directory may have."""
        return self._bytes_max - held_open(self._bytes_max)

    def trim(
        self, bytes_max: int | None = None, *, keep_whole: bool = False, wait_s: float = 0.0
    ) -> bool:
        """Count what the place holds, and remove what is over the budget and what is left over.

        Does nothing if another process is at it.

        Args:
            bytes_max: Trim to this instead.
            keep_whole: Have no whole file leave.
            wait_s: How long to wait for another process that is at it.

        Returns:
            False if another process was at it all the time.
        """
        try:
            lock = os.open(
                os.path.join(self._path, _LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError:
            return True  # the directory was deleted: there is nothing to remove
        try:
            is_ours = lock_alone(lock, wait_s)
            if is_ours:
                self._trim(bytes_max, keep_whole=keep_whole)
        finally:
            os.close(lock)
        return is_ours

    def _files(self) -> tuple[list[tuple[int, int, str]], int]:
        """(place in the order of leaving, bytes, path) of what is published; bytes of what is not.

        Temporary files whose writer was killed are removed on the way.
        """
        files: list[tuple[int, int, str]] = []
        unpublished = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if not entry.name.startswith(_TEMPORARY):
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif entry.name not in (_LOCK_NAME, _CLAIMS_NAME, USERS_NAME):
                        unpublished += status.st_size
                        if time.time() - status.st_ctime > _TEMPORARY_S_MAX:
                            os.unlink(entry.path)
                            unpublished -= status.st_size
        return files, unpublished

    def _trim(self, bytes_max: int | None, *, keep_whole: bool) -> None:
        files, unpublished = self._files()
        held = unpublished + sum(size for _, size, _ in files)
        with contextlib.suppress(OSError):
            self._bytes_max = measure_budget(
                self.place.directory,
                in_memory=self.place.in_memory,
                asked=self.place.asked,
                held=held,
            )
        limit = self.files_bytes_max if bytes_max is None else bytes_max
        if held > limit:
            staying = {
                path
                for _, _, path in files
                if os.path.basename(path).startswith(WHOLE_PREFIX)
                and (keep_whole or is_in_use(path))
            }
            kept: float = limit
            if bytes_max is None:
                # Where what cannot leave is too much by itself, fragments keep some room: they
                # would be decoded for nothing.
                stuck = unpublished + sum(size for _, size, path in files if path in staying)
                kept = max(limit * _KEEP_AFTER_TRIM, stuck + limit // _SHARE_OF_FRAGMENTS)
            for _, size, path in sorted(files):
                if held <= kept:
                    break
                if path in staying:
                    continue
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    self.evictions += 1
                held -= size
        with self._lock:
            self._bytes_held = held
            self._put_since_scan = 0
            # What cannot leave is not tried again with every fragment.
            is_stuck = held > self.files_bytes_max
            self._stuck_bytes = held + self._bytes_max // _RESCANS_PER_BUDGET if is_stuck else 0

    # --- one decode per fragment

    def claim(self, fragment: FragmentId) -> bool:
        """Whether this cache's user may decode a fragment: nobody else who shares the place is.

        The kernel takes the claim back when the claimant dies. Two users of one
        `SharedFragmentCache` do not exclude each other.
        """
        try:
            fcntl.fcntl(self._claims, fcntl.F_OFD_SETLK, _lock_of(fcntl.F_WRLCK, fragment))
        except OSError:
            return False
        return True

    def release(self, fragment: FragmentId) -> None:
        """Give a claim back."""
        fcntl.fcntl(self._claims, fcntl.F_OFD_SETLK, _lock_of(fcntl.F_UNLCK, fragment))

    # --- what there is

    def statistics(self) -> CacheStatistics:
        """The counters now, and what the directory holds."""
        held = sum(size for _, size, _ in self._files()[0])
        return CacheStatistics(
            directory=self._path,
            in_memory=self.place.in_memory,
            bytes_max=self._bytes_max,
            bytes_held=held,
            hits=self._hits,
            misses=self._misses,
            puts=self._puts,
            refused=self._refused,
            evictions=self.evictions,
            damaged=self._damaged,
        )


def _lock_of(kind: int, fragment: FragmentId) -> bytes:
    """`struct flock` for one byte of the claims file, chosen by the fragment's id."""
    return _FLOCK.pack(kind, os.SEEK_SET, int.from_bytes(bytes(fragment)[:7], "little"), 1, 0)
