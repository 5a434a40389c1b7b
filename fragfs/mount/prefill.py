"""Prefill: decoded fragments go into the kernel's page cache ahead of the reader.

`reader.ahead` says what a reader will want next; fragments are decoded for it by the fetcher and
stored by the pusher process (`pusher`). A store is only begun when its fragments are published, and
no request waits for one.

A reader whom the kernel's own read-ahead serves well, with requests of half a MiB and more, is only
decoded ahead for: a store of as many pages costs more than such a request, and waits for its pages.
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
from dataclasses import dataclass

import trio

from fragfs.cache.place import available_memory
from fragfs.errors import FragmentError
from fragfs.library.extents import ExtentMap, OpenContent
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
_WIDE_BYTES = 512 << 10
_NARROW_READS_MAX = 64
"""Narrow requests in a row after which a file is stored for again: what is left between pages that
are cached already is narrow as well."""

_WINDOW_BYTES_MAX = 64 << 20
_WINDOWS_PER_CACHE = 8

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
    is_storing: bool
    narrow_reads: int = 0


class _Coming:
    """The fragments of a window: each is begun once, some ahead of the one that is waited for."""

    def __init__(self, extents: ExtentMap, window: Window, fetcher: FragmentFetcher) -> None:
        self._extents = extents
        self._fetcher = fetcher
        self._next = extents.index_at(window.start)
        self._end = extents.index_at(window.stop - 1) + 1
        self._waiting: dict[int, int] = {}  # extent -> fragment that was not at hand

    async def ready(self, start: int, stop: int) -> None:
        """Wait until what covers a part of the window is decoded; parts come front to back."""
        first = self._extents.index_at(start)
        last = self._extents.index_at(stop - 1)
        self._next = max(self._next, first)
        while self._next < self._end and self._next <= last + _DECODES_AHEAD:
            fragment = self._extents.fragments[self._next]
            if not self._fetcher.begin_nowait(fragment, urgent=False):
                self._waiting[self._next] = fragment
            self._next += 1
        for index in range(first, last + 1):
            if index in self._waiting:
                await self._fetcher.ready(self._waiting.pop(index))


class Prefill:
    """Decodes and stores ahead of the readers of a mount.

    All methods belong to the event loop's thread.

    Args:
        fetcher: Where decoded fragments come from.
        identify: Where a fragment is stored, by number.
        pusher: What stores; None only decodes ahead.
        nursery: Where windows are worked on.
        cache_bytes_max: Budget of the fragment cache: windows stay far below it.
        read_ahead_kb: How far the kernel reads ahead on the mount; None if it does not say.
    """

    def __init__(
        self,
        fetcher: FragmentFetcher,
        identify: Callable[[int], FragmentMetadata],
        pusher: Pusher | None,
        nursery: trio.Nursery,
        cache_bytes_max: int,
        read_ahead_kb: Callable[[], int | None],
    ) -> None:
        self._read_ahead_kb = read_ahead_kb
        self._window_bytes_max = min(_WINDOW_BYTES_MAX, cache_bytes_max // _WINDOWS_PER_CACHE)
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
            ahead = ReadAhead(content.extents, window_bytes_max=self._window_bytes_max)
            # The kernel begins with narrow requests; what is stored then keeps them narrow.
            is_storing = (self._read_ahead_kb() or 0) << 10 < _WIDE_BYTES
            followed = _Followed(content, ahead, is_storing)
            self._followed[content.number] = followed
            while len(self._followed) > _CONTENTS_MAX:
                self._followed.popitem(last=False)
        if size >= _WIDE_BYTES:
            followed.is_storing, followed.narrow_reads = False, 0
        elif not followed.is_storing:
            followed.narrow_reads += 1
            followed.is_storing = followed.narrow_reads > _NARROW_READS_MAX
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
            coming = _Coming(followed.content.extents, window, self._fetcher)
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
                stop = min(position + _CHUNK_BYTES, window.stop)
                await coming.ready(position, stop)
                pusher = self.pusher
                if pusher is not None and pusher.is_alive and followed.is_storing:
                    for part in _without_tripwire(position, stop, window.trip):
                        await self._store(pusher, followed.content, *part)
                else:
                    # Nothing may have been waited for: requests have their turn first.
                    await trio.lowlevel.checkpoint()
                position = stop
        except FragmentError:
            return  # whoever reads these bytes will be told
        except Exception:
            # Nobody waits for this, so nothing that goes wrong here may end the mount.
            log.exception("decoding ahead failed")

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
