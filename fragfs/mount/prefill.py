"""Prefill: decoded fragments go into the kernel's page cache ahead of the reader.

`reader.ahead` says what a reader will want next; fragments are decoded for it by the fetcher and
stored by the pusher process (`pusher`). A store is only begun when its fragments are published, and
no request waits for one.

Where the front answers reads (`front`), only what is touched at random is stored: an answer costs
half of a store. Without it, a reader whom the kernel's own read-ahead serves well, with requests of
half a MiB and more, is only decoded ahead for: a store of as many pages costs more than such a
request, and waits for its pages.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from fragfs.cache.place import available_memory
from fragfs.errors import FragmentError
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.mount.device import find_device
from fragfs.mount.pusher import PARTS_MAX, PUSHED, PusherOptions, StorePart, pack_store
from fragfs.reader.ahead import PAGE_BYTES, TRIPWIRE_BYTES, ReadAhead, Window
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.plan import plan_read
from fragfs.types import FragmentIdentity

__all__ = ["Prefill", "PrefillStatistics", "Pusher", "PusherProcess", "start_pusher"]

log = logging.getLogger(__name__)

_STORED_BYTES = 960 << 10
"""What is stored in one turn."""

_BEGUN_IN_ONE_TURN = 8

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

_WINDOW_BYTES_MAX = 16 << 20

_WINDOWS_PER_CACHE = 16
"""What is given to the front must stay there until it is read."""

_MEMORY_BYTES_MIN = 256 << 20
_MEMORY_KEPT_S = 0.25
_END_S_MAX = 0.5
_RESTART_S = 0.05
_RESTARTS_MAX = 8
"""Deaths in a row, without a store in between, after which no process is started any more."""


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


class PusherProcess:
    """A pusher that was started.

    Attributes:
        process: The process.
        channel: Where it takes stores and says what became of them.
        lifeline: Only this process could write into it: its end is how the guard knows of ours.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], channel: socket.socket, lifeline: io.FileIO
    ) -> None:
        self.process = process
        self.channel = channel
        self.lifeline = lifeline

    def has_ended(self, timeout_s: float) -> bool:
        """Whether it ends in time; blocks until then."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class Pusher:
    """The pusher process of one mount, started again if it dies.

    All methods belong to the event loop's thread.

    Args:
        options: What it is told.
        start: Starts one.

    Raises:
        OSError: The system refused to start it.
    """

    def __init__(
        self,
        options: PusherOptions,
        start: Callable[[PusherOptions], PusherProcess] | None = None,
    ) -> None:
        self._options = options
        self._start = start or start_pusher
        self._waiting: deque[trio.Event] = deque()
        self._restarts = 0
        self.bytes = 0
        self.failed = 0
        self.push_ns = 0
        self._slots = trio.CapacityLimiter(_STORES_IN_FLIGHT)
        self._now: PusherProcess | None = self._start(options)
        self._last_pid = self._now.process.pid
        self.is_alive = True
        """False once it has died too often, or the mount ends; true while one is started again."""

    @property
    def pid(self) -> int:
        """Its process id: of the last one, if none runs now."""
        return self._last_pid

    async def store(self, inode: int, offset: int, parts: list[StorePart]) -> None:
        """Have bytes stored into the page cache; returns when the pusher has taken them on."""
        done = trio.Event()
        await self._slots.acquire_on_behalf_of(done)
        now = self._now
        if now is None:
            self._slots.release_on_behalf_of(done)
            return
        self._waiting.append(done)
        # So few short messages never fill a socket's buffer. Who takes the replies notices a dead
        # process, and gives the slots back.
        with contextlib.suppress(OSError):
            now.channel.send(pack_store(inode, offset, parts))

    async def run(self) -> None:
        """Take the process's replies, and start another when it ends, until that is no use."""
        while (now := self._now) is not None:
            await self._receive(now.channel)
            self._now = None
            while self._waiting:
                self._slots.release_on_behalf_of(self._waiting.popleft())
            now.channel.close()
            now.process.kill()
            # Only now: a guard that sees the end of this process before that of its own would abort
            # a connection that works.
            # It may still wait for a page that this process is to answer.
            await trio.to_thread.run_sync(
                now.process.wait, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
            )
            now.lifeline.close()
            self._restarts += 1
            log.warning("the pusher process (%d) has ended", self._last_pid)
            if self._restarts <= _RESTARTS_MAX and self.is_alive:
                await trio.sleep(_RESTART_S * self._restarts)
                self._restart()
        self.is_alive = False
        log.error("the pusher process keeps ending: no prefill until the next mount")

    def _restart(self) -> None:
        if self.is_alive:
            try:
                self._now = self._start(self._options)
            except OSError as error:
                log.error("cannot start the process that stores: %s", error)
            else:
                self._last_pid = self._now.process.pid

    async def _receive(self, channel: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(channel)
            try:
                data = channel.recv(PUSHED.size)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            self._restarts = 0
            stored, error, elapsed_ns = PUSHED.unpack(data)
            self.bytes += stored
            self.push_ns += elapsed_ns
            self.failed += bool(error)
            self._slots.release_on_behalf_of(self._waiting.popleft())

    def close(self) -> None:
        """Tell the process to end; if it hangs in a store or was stopped, its guard ends it."""
        self.is_alive = False
        now, self._now = self._now, None
        if now is None:
            return
        with contextlib.suppress(OSError):
            now.channel.send(b"end")
        has_ended = now.has_ended(_END_S_MAX)
        # While it holds the device, readers would wait for a daemon that ends.
        now.lifeline.close()
        if not has_ended and not now.has_ended(_END_S_MAX):
            now.process.kill()
        now.channel.close()


def start_pusher(options: PusherOptions) -> PusherProcess:
    """Start a pusher: a new program, so that it inherits no lock, thread or SQLite connection.

    Raises:
        OSError: The system refused.
    """
    device = find_device()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline_out, lifeline_in = os.pipe()
    descriptors = (theirs.fileno(), device, lifeline_out)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fragfs.mount.pusher", *map(str, descriptors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            cwd="/",
        )
    except BaseException:
        os.close(lifeline_in)
        ours.close()
        raise
    finally:
        os.close(lifeline_out)
        theirs.close()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(options.to_json().encode())
    ours.setblocking(False)
    return PusherProcess(process, ours, io.FileIO(lifeline_in, "w"))


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
        identify_all: What fragments are, by number.
        pusher: What stores; None only decodes ahead.
        nursery: Where windows are worked on.
        cache_bytes_max: Budget of the fragment cache: windows stay far below it.
        read_ahead_kb: How far the kernel reads ahead on the mount; None if it does not say.
        offer: Told the number of each fragment that a reader will want soon, and whether it is
            decoded already.
        note_stored: Told the number of a content and how many bytes of it were stored.
    """

    def __init__(
        self,
        fetcher: FragmentFetcher,
        identify_all: Callable[[Sequence[int]], list[FragmentIdentity]],
        pusher: Pusher | None,
        nursery: trio.Nursery,
        cache_bytes_max: int,
        read_ahead_kb: Callable[[], int | None],
        offer: Callable[[int, bool], None] | None = None,
        note_stored: Callable[[int, int], None] | None = None,
    ) -> None:
        self._note_stored = note_stored
        self._read_ahead_kb = read_ahead_kb
        self._offer = offer
        self._window_bytes_max = min(_WINDOW_BYTES_MAX, cache_bytes_max // _WINDOWS_PER_CACHE)
        self._fetcher = fetcher
        self._identify_all = identify_all
        self.pusher = pusher
        self._nursery = nursery
        self._followed: OrderedDict[int, _Followed] = OrderedDict()
        self._touched: set[tuple[int, int]] = set()
        self._windows = 0
        self._memory = (0.0, 0)

    def on_read(self, content: OpenContent, offset: int, size: int) -> None:
        """Note a read that was asked for; never waits."""
        followed = self._followed.get(content.number)
        if followed is None:
            read_ahead_bytes = (self._read_ahead_kb() or 0) << 10
            ahead = ReadAhead(
                content.extents,
                window_bytes_max=self._window_bytes_max,
                touch_bytes_max=max(read_ahead_bytes, TRIPWIRE_BYTES),
            )
            # The kernel begins with narrow requests; what is stored then keeps them narrow.
            is_storing = read_ahead_bytes < _WIDE_BYTES
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
        if window is None:
            return
        if window.stream is None:
            # Touched again before it was stored: once is enough.
            touched = (content.number, window.start)
            if touched in self._touched:
                return
            self._touched.add(touched)
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
            if self.pusher is not None and self._is_to_store(followed, window):
                await self._store_window(self.pusher, followed.content, window)
            else:
                await self._decode_window(followed.content.extents, window)
        except FragmentError:
            return  # whoever reads these bytes will be told
        except Exception:
            # Nobody waits for this, so nothing that goes wrong here may end the mount.
            log.exception("decoding ahead failed")
        finally:
            if window.stream is None:
                self._touched.discard((followed.content.number, window.start))

    async def _decode_window(self, extents: ExtentMap, window: Window) -> None:
        """Have a window decoded, whenever the decoders come to it."""
        indexes = range(extents.index_at(window.start), extents.index_at(window.stop - 1) + 1)
        if window.is_backward:
            indexes = indexes[::-1]
        for begun in range(0, len(indexes), _BEGUN_IN_ONE_TURN):
            if self._is_memory_short():
                return
            turn = indexes[begun : begun + _BEGUN_IN_ONE_TURN]
            numbers = [extents.fragments[index] for index in turn]
            with contextlib.suppress(FragmentError):  # begin those that can be
                self._identify_all(numbers)  # whoever asks for one of them now knows it
            for number in numbers:
                is_there = self._fetcher.begin_nowait(number, urgent=False)
                if self._offer is not None:
                    self._offer(number, is_there)
            await trio.lowlevel.checkpoint()  # requests have their turn

    async def _store_window(self, pusher: Pusher, content: OpenContent, window: Window) -> None:
        """Have a window decoded and stored, front to back."""
        coming = _Coming(content.extents, window, self._fetcher)
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
            stop = min(position + _STORED_BYTES, window.stop)
            await coming.ready(position, stop)
            if pusher.is_alive:
                for part in _without_tripwire(position, stop, window.trip):
                    await self._store(pusher, content, *part)
            else:
                await trio.lowlevel.checkpoint()  # nothing may have been waited for
            position = stop

    def _is_to_store(self, followed: _Followed, window: Window) -> bool:
        """Whether the pages of a window are stored, rather than only made ready to be answered.

        The front answers a request for less than a store of as many pages takes; but a page that is
        touched at random is asked for alone, and its neighbours are there if they are stored.
        """
        if window.stream is None:
            return True
        return self._offer is None and followed.is_storing and not window.is_backward

    async def _store(self, pusher: Pusher, content: OpenContent, start: int, stop: int) -> None:
        pieces = plan_read(content.extents, start, stop - start)
        if len(pieces) > PARTS_MAX:
            return  # thousands of tiny tensors: not worth it
        fragments = self._identify_all([piece.fragment for piece in pieces])
        parts = [
            StorePart(fragment.id, fragment.raw_size, piece.fragment_offset, piece.size)
            for fragment, piece in zip(fragments, pieces, strict=True)
        ]
        await pusher.store(content.number, start, parts)
        if self._note_stored is not None:
            self._note_stored(content.number, stop - start)

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
