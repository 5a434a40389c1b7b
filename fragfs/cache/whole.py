"""Whole files: all bytes of one content in one file of the cache, put together of its fragments.

The kernel can be given such a file to read instead of asking (`mount.passthrough`). Named after the
content's number and SHA-256; written, published, evicted and trimmed as fragments are (`shared`),
and only in shared memory.

A fragment is checked when it is copied. A file that another process put together is checked against
the content's SHA-256 before it is used. What was checked is remembered with its XXH3, to be checked
again.

Where there is no room for a content twice, as many of its fragments as that takes leave as they are
copied, except those that others are predicted from. In the order of leaving a whole file is behind
fragments that were served and before those. All whole files together have a share of the budget;
what was used within an hour does not leave for another one, since the page cache serves what does
not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from fragfs.cache.layered import BASE_CREDIT_S, SERVED_CREDIT_S
from fragfs.cache.pages import LARGE_PAGE_BYTES, collapse_pages, is_in_use
from fragfs.cache.shared import WHOLE_PREFIX, SharedFragmentCache
from fragfs.types import FragmentId, FragmentIdentity

__all__ = ["WHOLE_BYTES_MIN", "Part", "Whole", "WholeFiles"]

log = logging.getLogger(__name__)

WHOLE_BYTES_MIN = 1 << 20
"""Smaller contents are read in a request or two."""

_SHARE_OF_BUDGET = 0.75
_IDLE_S_MIN = 3600.0
_MISSING_SHARE = 16
"""Of a content, one part in so many may be fetched anew: small fragments have often left."""

_LEAVING_BYTES_MIN = 64 << 10
"""Smaller ones are of many contents: headers, padding."""

_STEP_BYTES = 1 << 20
_CREDIT_S = -1800.0
_CLAIM_POLL_S = 0.1
_CLAIM_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Whole:
    """A content of the cache's library.

    Attributes:
        number: Its number: what a damaged catalog says of another content is not about this one.
        sha256: Of all its bytes.
        size: Its bytes.
    """

    number: int
    sha256: bytes
    size: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{WHOLE_PREFIX}{self.number:x}-{self.sha256.hex()[:32]}"


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a content: the bytes from `start` on, `size` of them, of a fragment."""

    fragment: FragmentIdentity
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A file that was checked: its inode, and the XXH3-64 of its bytes."""

    inode: int
    checksum: int


class WholeFiles:
    """The whole files of one cache. `open` belongs to one thread, what makes and checks to another.

    Args:
        shared: The cache.
        fetch: Gets a fragment that has left the cache; asked only for a small share of a content.
        is_wanted: Asked between two parts of what is made or checked; False ends it.
    """

    def __init__(
        self,
        shared: SharedFragmentCache,
        fetch: Callable[[FragmentIdentity], memoryview],
        is_wanted: Callable[[], bool],
    ) -> None:
        self._shared = shared
        self._fetch = fetch
        self._is_wanted = is_wanted
        self._known: dict[Whole, _Known] = {}

    def takes(self, size: int) -> bool:
        """Whether a content of so many bytes may be put together."""
        return WHOLE_BYTES_MIN <= size <= self._shared.files_bytes_max * _SHARE_OF_BUDGET

    def open(self, whole: Whole) -> int | None:
        """The descriptor of a content's file, or None if there is none that was checked."""
        known = self._known.get(whole)
        if known is None or self._shared.is_suspect():
            return None
        found = self._open(whole)
        if found is None or os.fstat(found).st_ino != known.inode:
            if found is not None:
                os.close(found)
            if self._known.get(whole) is known:  # else it has just been put together again
                self._known.pop(whole, None)
            return None
        _touch(found)
        return found

    def make(self, whole: Whole, parts: Sequence[Part]) -> bool:
        """Put a content together; True if its file is there then, and was checked.

        Args:
            whole: The content.
            parts: All of it, in order.

        Raises:
            FragmentError: A fragment could not be fetched.
        """
        if not self.takes(whole.size) or sum(part.size for part in parts) != whole.size:
            return False
        claim = FragmentId(whole.sha256)
        patient_until = time.monotonic() + _CLAIM_S_MAX
        while not self._shared.claim(claim):  # another process is at it, or was stopped
            if time.monotonic() > patient_until or not self._is_wanted():
                return False
            time.sleep(_CLAIM_POLL_S)
        try:
            found = self._open(whole)
            if found is None:
                return self._put_together(whole, parts)
            try:
                return self._adopt(whole, found)
            finally:
                os.close(found)
        finally:
            self._shared.release(claim)

    def _put_together(self, whole: Whole, parts: Sequence[Part]) -> bool:
        # Where every byte is to be checked when it is read, the kernel may not read by itself.
        if self._shared.is_suspect():
            return False
        missing = [one for one in _distinct(parts) if not self._shared.holds(one.id)]
        if sum(one.raw_size for one in missing) * _MISSING_SHARE > whole.size:
            return False
        temporary = self._shared.temporary(whole.name)
        known = None
        try:
            known = self._write(temporary, whole.size, parts)
            if known is not None:
                os.rename(temporary, self._path(whole))
        except OSError as error:
            log.debug("no whole file: %s", error)
            known = None
        finally:
            if known is None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        if known is None:
            return False
        self._known[whole] = known
        self._shared.count(whole.size)
        return True

    def check(self, whole: Whole) -> bool | None:
        """Check a file again that was checked before; one that has changed is removed.

        Returns:
            Whether it is right; None if it has left, or was not read to the end.
        """
        known = self._known.get(whole)
        found = self._open(whole) if known is not None else None
        if known is None or found is None:
            return None
        try:
            checksum = xxhash.xxh3_64()
            is_read = self._read_through(found, whole.size, checksum.update)
            if not is_read or os.fstat(found).st_ino != known.inode:
                return None
        finally:
            os.close(found)
        if checksum.intdigest() == known.checksum:
            return True
        self._drop_damaged(whole)
        return False

    def holds(self) -> int:
        """How many files there are that were checked."""
        return sum(os.path.exists(self._path(whole)) for whole in list(self._known))

    # --- helpers

    def _path(self, whole: Whole) -> str:
        return os.path.join(self._shared.place.directory, whole.name)

    def _open(self, whole: Whole) -> int | None:
        try:
            # Without waiting for who looks whether it is in use.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            found = os.open(self._path(whole), flags)
        except OSError:
            return None
        if os.fstat(found).st_size == whole.size:
            return found
        os.close(found)
        self._drop_damaged(whole)
        return None

    def _drop_damaged(self, whole: Whole) -> None:
        self._known.pop(whole, None)
        self._shared.drop_damaged(self._path(whole))

    def _adopt(self, whole: Whole, found: int) -> bool:
        """Check a file that another process may have written."""
        inode = os.fstat(found).st_ino
        known = self._known.get(whole)
        if known is not None and known.inode == inode:
            return True
        proof, checksum = hashlib.sha256(), xxhash.xxh3_64()

        def take(data: memoryview) -> None:
            proof.update(data)
            checksum.update(data)

        if not self._read_through(found, whole.size, take):
            return False
        if proof.digest() != whole.sha256:
            self._drop_damaged(whole)
            return False
        self._known[whole] = _Known(inode, checksum.intdigest())
        return True

    def _write(self, path: str, size: int, parts: Sequence[Part]) -> _Known | None:
        leaving = self._make_room(size, parts)
        if leaving is None:
            return None
        checksum = xxhash.xxh3_64()
        written = collapsed = fetched = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            has_small_pages = os.fstat(descriptor).st_blksize < LARGE_PAGE_BYTES
            for part in parts:
                if not self._is_wanted():
                    return None
                fragment = part.fragment
                file = self._shared.get(fragment.id, fragment.raw_size, check=True, count=False)
                if file is None:
                    fetched += fragment.raw_size
                    if fetched * _MISSING_SHARE > size:
                        return None
                raw = self._fetch(fragment) if file is None else file.view()
                view = raw[part.start : part.start + part.size]
                if len(view) != part.size:
                    return None
                checksum.update(view)
                while view:
                    count = os.pwrite(descriptor, view, written)
                    written += count
                    view = view[count:]
                if fragment.number in leaving:
                    self._shared.remove(fragment.id)
                elif not fragment.is_base:
                    self._shared.touch(fragment.id, SERVED_CREDIT_S)
                ready = written // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
                if has_small_pages and ready > collapsed:
                    collapse_pages(descriptor, collapsed, ready - collapsed)
                    collapsed = ready
            _touch(descriptor)
            return _Known(os.fstat(descriptor).st_ino, checksum.intdigest())
        finally:
            os.close(descriptor)

    def _make_room(self, size: int, parts: Sequence[Part]) -> set[int] | None:
        """Have room for a file; gives the fragments that leave as soon as they are copied.

        None if there cannot be room for it and for what stays.
        """
        shared = self._shared
        others = self._have_idle_leave(shared.files_bytes_max * _SHARE_OF_BUDGET - size)
        if others is None:
            return None
        room = shared.room()
        short = size - room
        if short <= 0:
            return set()
        times = Counter(part.fragment.number for part in parts)
        fragments = _distinct(parts)
        leaving: set[int] = set()
        freed = 0
        for one in fragments:
            is_spare = times[one.number] == 1 and not one.is_base
            if freed < short and is_spare and one.raw_size >= _LEAVING_BYTES_MIN:
                leaving.add(one.number)
                freed += one.raw_size
        staying = sum(one.raw_size for one in fragments) - freed
        if others + size + staying > shared.files_bytes_max:
            return None
        for one in fragments:
            # Used now: what others left here goes first.
            shared.touch(one.id, BASE_CREDIT_S)
        if short > freed:
            shared.trim(shared.files_bytes_max - room - (short - freed), keep_whole=True)
        return leaving

    def _have_idle_leave(self, bytes_max: float) -> int | None:
        """Have long unused whole files leave until the others fit.

        Returns:
            Bytes of the others; None, and nothing leaves, if they do not fit.
        """
        found = []
        with os.scandir(self._shared.place.directory) as entries:
            for entry in entries:
                if entry.name.startswith(WHOLE_PREFIX):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime - _CREDIT_S, status.st_size, entry.path))
        held = sum(size for _, size, _ in found)
        leaving = []
        for used, size, path in sorted(found):
            if held <= bytes_max or time.time() - used < _IDLE_S_MIN:
                break
            if not is_in_use(path):
                leaving.append(path)
                held -= size
        if held > bytes_max:
            return None
        for path in leaving:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return held

    def _read_through(self, descriptor: int, size: int, take: Callable[[memoryview], None]) -> bool:
        """Hand all bytes of a file on, in steps; False if it was not wanted to the end."""
        with (
            mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for start in range(0, size, _STEP_BYTES):
                if not self._is_wanted():
                    return False
                with view[start : start + _STEP_BYTES] as step:
                    take(step)
        return True


def _touch(descriptor: int) -> None:
    """Move a whole file in the order of leaving: it was used now."""
    at_ns = time.time_ns() + int(_CREDIT_S * 1e9)
    with contextlib.suppress(OSError):
        os.utime(descriptor, ns=(at_ns, at_ns))


def _distinct(parts: Sequence[Part]) -> list[FragmentIdentity]:
    return list({part.fragment.number: part.fragment for part in parts}.values())
