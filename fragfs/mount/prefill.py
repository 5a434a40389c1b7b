"""Prefill: decoded fragments go into the kernel's page cache ahead of the reader.

`reader.ahead` says what a reader will want next; fragments are decoded for it by the fetcher and
stored by the pusher process (`pusher`). A store is only begun when its fragments are published, and
no request waits for one.

A reader whom the kernel's own read-ahead serves better is left alone: each file is read a while
without stores, then with them, and they go on if they pay. Decoding ahead goes on in any case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from fragfs.cache.place import available_memory
from fragfs.errors import FragmentError
from fragfs.library.extents import OpenContent
from fragfs.mount.pusher import PARTS_MAX, PUSHED, PusherOptions, StorePart, pack_store
from fragfs.reader.ahead import PAGE_BYTES, TRIPWIRE_BYTES, ReadAhead, Window
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.plan import plan_read
from fragfs.types import FragmentMetadata

__all__ = ["Prefill", "PrefillStatistics", "Pusher"]

log = logging.getLogger(__name__)

_CHUNK_BYTES = 960 << 10
_STORES_IN_FLIGHT = 2
_LEAP_BYTES = 1 << 20
"""How far ahead of a reader who has overtaken the stores go on: what it faults on at once, and what
the kernel then reads ahead, would make them wait."""

_DECODES_AHEAD = 8
_CONTENTS_MAX = 256
_MEMORY_BYTES_MIN = 256 << 20
_MEMORY_KEPT_S = 0.25
_END_S_MAX = 0.5
_DEVICE = "/dev/fuse"


@dataclass(frozen=True, slots=True)
class PrefillStatistics:
    """Counters since the mount began.

    Attributes:
        windows: Stretches of files that were made ready.
        pushed_bytes: Bytes stored into the page cache.
        failed_stores: Stores the kernel refused: of inodes it has forgotten, mostly.
        push_ns: What the stores took.
    """

    windows: int
    pushed_bytes: int
    failed_stores: int
    push_ns: int


class Pusher:
    """The pusher process of one mount. All methods belong to the event loop's thread.

    Args:
        options: What it is told.

    Raises:
        OSError: The system refused to start it.
    """

    def __init__(self, options: PusherOptions) -> None:
        self._waiting: deque[trio.Event] = deque()
        self.bytes = 0
        self.failed = 0
        self.push_ns = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device = _find_device()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "fragfs.mount.pusher",
                    str(theirs.fileno()),
                    str(device),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), device),
                cwd="/",
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(options.to_json().encode())
        ours.setblocking(False)
        self._channel = ours
        self._slots = trio.CapacityLimiter(_STORES_IN_FLIGHT)
        self.is_alive = True

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def store(self, inode: int, offset: int, parts: list[StorePart]) -> None:
        """Have bytes stored into the page cache; returns when the pusher has taken them on."""
        done = trio.Event()
        await self._slots.acquire_on_behalf_of(done)
        if not self.is_alive:
            self._slots.release_on_behalf_of(done)
            return
        self._waiting.append(done)
        try:
            self._channel.send(pack_store(inode, offset, parts))
        except OSError as error:
            log.warning("the pusher process does not take stores any more: %s", error)
            self._fail()

    async def receive(self) -> None:
        """Take the pusher's replies until it ends."""
        while self.is_alive:
            await trio.lowlevel.wait_readable(self._channel)
            try:
                data = self._channel.recv(PUSHED.size)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                log.warning("the pusher process has ended: no prefill until the next mount")
                self._fail()
                return
            stored, error, elapsed_ns = PUSHED.unpack(data)
            self.bytes += stored
            self.push_ns += elapsed_ns
            self.failed += bool(error)
            self._slots.release_on_behalf_of(self._waiting.popleft())

    def _fail(self) -> None:
        self.is_alive = False
        while self._waiting:
            self._slots.release_on_behalf_of(self._waiting.popleft())

    def close(self) -> None:
        """Tell the process to end; if it hangs in a store, closing the socket ends it."""
        self.is_alive = False
        with contextlib.suppress(OSError):
            self._channel.send(b"end")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S_MAX)
        self._channel.close()
        try:
            self._process.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            # It was stopped: while it holds the device, readers would wait for a daemon that ends.
            self._process.kill()


@dataclass(slots=True)
class _Followed:
    """A file whose reads are followed."""

    content: OpenContent
    ahead: ReadAhead
    windows: deque[Window] = field(default_factory=deque)
    driver_count: int = 0
    is_storing: bool = True


class Prefill:
    """Decodes and stores ahead of the readers of a mount.

    All methods belong to the event loop's thread.

    Args:
        fetcher: Where decoded fragments come from.
        identify: Where a fragment is stored, by number.
        pusher: What stores; None only decodes ahead.
        nursery: Where windows are worked on.
    """

    def __init__(
        self,
        fetcher: FragmentFetcher,
        identify: Callable[[int], FragmentMetadata],
        pusher: Pusher | None,
        nursery: trio.Nursery,
    ) -> None:
        self._fetcher = fetcher
        self._identify = identify
        self.pusher = pusher
        self._nursery = nursery
        self._followed: OrderedDict[int, _Followed] = OrderedDict()
        self._windows = 0
        self._memory = (0.0, 0)

    def on_read(self, content: OpenContent, offset: int, size: int) -> None:
        """Note a read that was asked for; never waits."""
        followed = self._followed.get(content.number)
        if followed is None:
            followed = _Followed(content, ReadAhead(content.extents))
            self._followed[content.number] = followed
            while len(self._followed) > _CONTENTS_MAX:
                self._followed.popitem(last=False)
        window = followed.ahead.on_read(offset, size)
        if window is not None:
            self._windows += 1
            self._nursery.start_soon(self._work, followed, window)

    def statistics(self) -> PrefillStatistics:
        """The counters now."""
        pusher = self.pusher
        return PrefillStatistics(
            windows=self._windows,
            pushed_bytes=pusher.bytes if pusher else 0,
            failed_stores=pusher.failed if pusher else 0,
            push_ns=pusher.push_ns if pusher else 0,
        )

    async def _work(self, followed: _Followed, window: Window) -> None:
        try:
            position = window.start
            while position < window.stop:
                stream = window.stream
                if stream is not None and stream.front > position:
                    # The reader has overtaken: what it asks for itself is not stored again.
                    position = -(-(stream.front + _LEAP_BYTES) // PAGE_BYTES) * PAGE_BYTES
                    if position >= window.stop:
                        return
                if self._is_memory_short():
                    return
                position = await self._chunk(followed, window, position)
        except FragmentError:
            return  # whoever reads these bytes will be told
        except Exception:
            # Nobody waits for this, so nothing that goes wrong here may end the mount.
            log.exception("decoding ahead failed")

    async def _chunk(self, followed: _Followed, window: Window, start: int) -> int:
        """Make one chunk ready; returns where it ends."""
        stop = min(start + _CHUNK_BYTES, window.stop)
        extents = followed.content.extents
        ahead = plan_read(extents, start, min(window.stop, start + 4 * _CHUNK_BYTES) - start)
        for piece in ahead[:_DECODES_AHEAD]:
            self._fetcher.begin_nowait(piece.fragment, urgent=False)
        pieces = plan_read(extents, start, stop - start)
        for piece in pieces:
            await self._fetcher.ready(piece.fragment)
        pusher = self.pusher
        if pusher is None or not pusher.is_alive or not followed.is_storing:
            return stop
        for part_start, part_stop in _without_tripwire(start, stop, window.trip):
            await self._store(pusher, followed.content, part_start, part_stop)
        return stop

    async def _store(self, pusher: Pusher, content: OpenContent, start: int, stop: int) -> None:
        pieces = plan_read(content.extents, start, stop - start)
        if len(pieces) > PARTS_MAX:
            return  # thousands of tiny tensors: not worth it
        parts = []
        for piece in pieces:
            fragment = self._identify(piece.fragment)
            parts.append(
                StorePart(fragment.id, fragment.raw_size, piece.fragment_offset, piece.size)
            )
        await pusher.store(content.number, start, parts)

    def _is_memory_short(self) -> bool:
        now = time.monotonic()
        if now - self._memory[0] > _MEMORY_KEPT_S:
            self._memory = (now, available_memory())
        return self._memory[1] < _MEMORY_BYTES_MIN


def _without_tripwire(start: int, stop: int, trip: int | None) -> list[tuple[int, int]]:
    """What of a chunk is stored: all but the tripwire."""
    if trip is None or trip >= stop or trip + TRIPWIRE_BYTES <= start:
        return [(start, stop)]
    parts = [(start, trip), (trip + TRIPWIRE_BYTES, stop)]
    return [(a, b) for a, b in parts if a < b]


def _find_device() -> int:
    """The descriptor of this process's one FUSE session."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == _DEVICE:
                return int(name)
    raise FragmentError("this process has no FUSE session")
