"""Passthrough: contents that are whole in the shared cache are read by the kernel itself.

When most of a content was read and its last handle is closed, its fragments are put together into
one file (`cache.whole`), by a thread that goes on while nobody reads through the mount. When it is
opened next, the kernel is handed that file: reads and mappings are then the file's, and come here
no more.

The first of these opens drops what the page cache has of the content.

The kernel wants all handles of an inode to be of one kind: while one is open, others are opened
like it.

Source: Linux `Documentation/filesystems/fuse-passthrough.rst`, since 6.9; needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Sequence

from fragfs.cache.shared import SharedFragmentCache
from fragfs.cache.whole import Part, Whole, WholeFiles
from fragfs.errors import FragmentError
from fragfs.library.extents import OpenContent
from fragfs.types import FragmentIdentity

__all__ = ["Passthrough"]

log = logging.getLogger(__name__)

_BACKING_MAP = struct.Struct("=iIQ")
_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_READ_SHARE = 2
_CHECKED_S = 60.0
"""What is closed is checked again if that was not done for so long."""

_REFUSALS = frozenset({errno.EPERM, errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP, errno.ELOOP})
_QUIET_S = 0.1
_PATIENCE_S = 600.0
"""How long the thread waits for quiet before each part; then it gives the content up. It does not
go on by a lower priority: a thread that is seldom run would keep the interpreter's lock from the
event loop."""

_QUEUED_MAX = 256
_POLL_S = 0.02
_IDENTITIES_AT_ONCE = 256
_ENDS_S_MAX = 1.0


class Passthrough:
    """Which contents the kernel reads itself. Belongs to the event loop's thread.

    Args:
        device: The mount's device.
        is_offered: Whether the kernel agreed to passthrough; asked once a file was read.
        shared: Where whole files are.
        identify_all: What fragments are, by number; called in another thread.
        decode: Decodes a fragment; called in another thread.
    """

    def __init__(
        self,
        device: int,
        is_offered: Callable[[], bool],
        shared: SharedFragmentCache,
        identify_all: Callable[[Sequence[int]], list[FragmentIdentity]],
        decode: Callable[[int], memoryview],
    ) -> None:
        # Its own: the thread may use it when the mount has given up its device.
        self._device = os.dup(device)
        self._is_offered = is_offered
        self._shared = shared
        self._identify_all = identify_all
        self._whole = WholeFiles(shared, lambda one: decode(one.number), self._is_wanted)
        self._backings: dict[int, int] = {}  # by number of each content that is open; 0 is none
        self._read_bytes: dict[int, int] = {}
        self._checked_at: dict[int, float] = {}
        self._last_read = 0.0
        self._opened = 0
        self._refused: str | None = None
        self._is_tried = False
        self._queued: set[int] = set()
        self._queue: queue.SimpleQueue[tuple[OpenContent, bool] | None] = queue.SimpleQueue()
        self._is_ended = False
        self._thread = threading.Thread(target=self._work, name="fragfs whole", daemon=True)
        self._thread.start()

    def open_file(self, content: OpenContent) -> None:
        """A content was opened that was not open."""
        self._backings[content.number] = 0
        if self._is_ended:
            return
        file = self._whole.open(_whole_of(content))
        if file is None:
            return
        try:
            self._backings[content.number] = self._hand_over(file)
            self._opened += 1
        except OSError as error:  # of memory, say: the next one may be taken
            log.warning("a file was not handed to the kernel: %s", error)
        finally:
            os.close(file)

    def backing(self, number: int) -> int:
        """What the kernel calls the file that it reads for an open content; 0 if there is none."""
        return self._backings.get(number, 0)

    def note_read(self, number: int, size: int) -> None:
        """Note bytes of a content that were asked for."""
        self._last_read = time.monotonic()
        if number in self._backings:
            self._read_bytes[number] = self._read_bytes.get(number, 0) + size

    def close_file(self, content: OpenContent) -> None:
        """The last handle of a content was closed."""
        backing = self._backings.pop(content.number, 0)
        read_bytes = self._read_bytes.pop(content.number, 0)
        if backing:
            self._take_back(backing)
            if time.monotonic() - self._checked_at.get(content.number, 0.0) > _CHECKED_S:
                self._enqueue(content, is_to_check=True)
        elif read_bytes * _READ_SHARE >= content.size and self._whole.takes(content.size):
            self._enqueue(content, is_to_check=False)

    def close(self) -> bool:
        """End the thread, and hand over nothing more; False if it still uses the cache.

        What is handed over and open or mapped stays readable.
        """
        self._is_ended = True
        self._queue.put(None)
        for number, backing in self._backings.items():
            if backing:
                self._take_back(backing)
                self._backings[number] = 0
        self._thread.join(_ENDS_S_MAX)
        if self._thread.is_alive():
            return False
        os.close(self._device)
        return True

    def status(self) -> dict[str, object]:
        """How many files there are, how often they were opened, and why no more are."""
        why = self._refused
        if why is None and not self._is_offered():
            why = "the kernel does not offer it, which Linux does since 6.9"
        if why is None and self._shared.checks_all:
            why = "damage was found in the fragment cache: every byte is checked when it is read"
        return {"files": self._whole.holds(), "opened": self._opened, "off": why}

    # --- helpers

    def _hand_over(self, file: int) -> int:
        """Have the kernel keep a file, and say what it calls it."""
        # Into a mutable buffer: only then ioctl gives what the system call returned.
        wanted = bytearray(_BACKING_MAP.pack(file, 0, 0))
        return int(fcntl.ioctl(self._device, _BACKING_OPEN, wanted))

    def _take_back(self, backing: int) -> None:
        with contextlib.suppress(OSError):  # the connection has ended
            fcntl.ioctl(self._device, _BACKING_CLOSE, struct.pack("=I", backing))

    def _enqueue(self, content: OpenContent, *, is_to_check: bool) -> None:
        is_possible = self._refused is None and self._is_offered() and not self._is_ended
        if is_possible and content.number not in self._queued and len(self._queued) < _QUEUED_MAX:
            self._queued.add(content.number)
            self._queue.put((content, is_to_check))

    # --- in the thread

    def _work(self) -> None:
        while not self._is_ended and (work := self._queue.get()) is not None:
            content, is_to_check = work
            try:
                self._take(content, is_to_check)
            except FragmentError as error:  # it was removed, or whoever reads it will be told
                log.debug("content %d was not put together: %s", content.number, error)
            except Exception:  # nobody waits for this
                log.exception("content %d was not put together", content.number)
            finally:
                self._queued.discard(content.number)

    def _take(self, content: OpenContent, is_to_check: bool) -> None:
        if not self._is_wanted() or not self._is_possible():
            return
        whole = _whole_of(content)
        if is_to_check:
            is_done = self._whole.check(whole) is not None
        else:
            is_done = self._whole.make(whole, self._parts(content))
        if is_done:
            self._checked_at[content.number] = time.monotonic()

    def _is_wanted(self) -> bool:
        """Wait until nobody reads; False if that does not come, or the mount ends."""
        patient_until = time.monotonic() + _PATIENCE_S
        while not self._is_ended and time.monotonic() < patient_until:
            if time.monotonic() > self._last_read + _QUIET_S:
                return True
            time.sleep(_POLL_S)
        return False

    def _is_possible(self) -> bool:
        """Whether the kernel takes files of the cache; tried before any is put together."""
        if self._refused is None and not self._is_tried and self._is_offered():
            try:
                self._take_back(self._hand_over(self._shared.fileno()))
                self._is_tried = True
            except OSError as error:
                if error.errno in _REFUSALS:
                    self._refused = f"this process may not ({error.strerror})"
                    log.info("no passthrough: %s", self._refused)
        return self._is_tried

    def _parts(self, content: OpenContent) -> list[Part]:
        numbers = list(dict.fromkeys(content.extents.fragments))
        fragments: dict[int, FragmentIdentity] = {}
        for start in range(0, len(numbers), _IDENTITIES_AT_ONCE):
            if self._is_ended:
                return []
            found = self._identify_all(numbers[start : start + _IDENTITIES_AT_ONCE])
            fragments |= {fragment.number: fragment for fragment in found}
        return [
            Part(fragments[extent.fragment], extent.fragment_offset, extent.size)
            for extent in content.extents
        ]


def _whole_of(content: OpenContent) -> Whole:
    return Whole(content.number, content.sha256, content.size)
