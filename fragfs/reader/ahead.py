"""Where the readers of a file are, and what they will want next. Pure.

The kernel asks for pages that are not in its cache. Whoever puts pages there ahead of a reader
hears of it no more, so each window has a hole, the tripwire: the reader's miss there says how far
it has come, and the next window is planned. Windows grow with each one that was used.

- A read that follows another one belongs to its stream; several streams run at once.
- A read at the start of a tensor starts a stream at once: loaders read tensors whole, in any order.
- Any other read touches one fragment, which is all that it gets.
- Who reads blocks that each end where the one before began goes back to front.
- A stream stays within its tensor until its reader has gone on to the next one by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from fragfs.library.extents import ExtentMap
from fragfs.types import SpanKind

__all__ = ["PAGE_BYTES", "TRIPWIRE_BYTES", "ReadAhead", "Stream", "Window"]

PAGE_BYTES = 4096

TRIPWIRE_BYTES = 128 << 10
"""One request of a mount whose read-ahead nobody raised."""

_STREAMS_MAX = 8
_STREAM_BYTES_MIN = 256 << 10
_SLACK_BYTES = 2 << 20
_TENSOR_START_BYTES = 128 << 10
_TENSOR_BYTES_MIN = 512 << 10
_TRIPWIRE_AT = 4
_READS_BEYOND = 2
_TOUCHES_MAX = 64
_BLOCK_BYTES_MAX = 2 << 20
_BLOCK_SLACK_BYTES = 128 << 10
_BLOCKS_MIN = 2
"""Blocks on end, each below the last, after which a reader is taken to go on like that."""


@dataclass(slots=True)
class Window:
    """A stretch of a file to be made ready for its reader.

    Attributes:
        start: First byte, on a page.
        stop: Where it ends: on a page, or the end of the file.
        trip: Where the tripwire is: a hole of `TRIPWIRE_BYTES` on a page; None has none.
        stream: Whose it is; None for a touched fragment.
        is_backward: Whether its end is wanted first.
    """

    start: int
    stop: int
    trip: int | None = None
    stream: Stream | None = None
    is_backward: bool = False


class Stream:
    """One reader that goes front to back, or one block of a reader that goes back to front.

    Attributes:
        low: Where it began.
        tensor_stop: The end of the tensor it began in.
        beyond: Reads that started behind that: the kernel itself asks for a little more than
            anybody wants, so one says nothing.
        front: The end of the furthest read.
        next: The end of what was planned.
        ceiling: Where the block above began, if this may be one of a reader that goes back to
            front.
        blocks: How many blocks there were above it, each of which ended where the next began.
        floor: The start of what was planned below.
    """

    __slots__ = (
        "beyond",
        "blocks",
        "ceiling",
        "floor",
        "front",
        "low",
        "next",
        "tensor_stop",
        "trip",
        "window_bytes",
    )

    def __init__(self, offset: int, end: int, tensor_stop: int, window_bytes: int) -> None:
        self.low = offset
        self.tensor_stop = tensor_stop
        self.beyond = 0
        self.front = end
        self.next = end
        self.trip: int | None = None
        self.window_bytes = window_bytes
        self.ceiling: int | None = None
        self.blocks = 0
        self.floor = offset

    @property
    def is_block(self) -> bool:
        """Whether it has not gone beyond the block above, so that nothing is planned behind it."""
        if self.ceiling is None or not self.blocks:
            return False
        return self.front <= self.ceiling + _SLACK_BYTES


class ReadAhead:
    """Follows the reads of one file.

    Args:
        extents: How it is assembled.
        window_bytes_min: The first window of a stream.
        window_bytes_max: The largest one.
        gap_bytes: How far beyond a read a window starts: the kernel has asked for that already.
        touch_bytes_max: What the kernel reads around a page that is touched; who has read more has
            gone on.
    """

    def __init__(
        self,
        extents: ExtentMap,
        *,
        window_bytes_min: int = 4 << 20,
        window_bytes_max: int = 64 << 20,
        gap_bytes: int = 256 << 10,
        touch_bytes_max: int = 128 << 10,
    ) -> None:
        self._extents = extents
        self._size = extents.size
        self._starts = [extent.offset for extent in extents if extent.first]
        self._data_start = next(
            (extent.offset for extent in extents if extent.kind is not SpanKind.HEADER), 0
        )
        self._window_bytes_min = min(window_bytes_min, window_bytes_max)
        self._window_bytes_max = window_bytes_max
        self._gap_bytes = gap_bytes
        self._touch_bytes_max = touch_bytes_max
        self._streams: list[Stream] = []
        self._touches: dict[int, None] = {}

    def on_read(self, offset: int, size: int) -> Window | None:
        """Note a read that the kernel asked for.

        Args:
            offset: First byte.
            size: Bytes.

        Returns:
            What to make ready now, if anything; never what was planned for the stream before.
        """
        if offset >= self._size:
            return None
        end = min(offset + size, self._size)
        # What was read or stored before has left the page cache: somebody begins again there.
        self._streams = [
            stream
            for stream in self._streams
            if not stream.low <= offset < stream.front - _SLACK_BYTES
        ]
        stream = self._stream_at(offset)
        if stream is None:
            return self._begin(offset, end)
        if offset >= stream.tensor_stop:
            stream.beyond += 1
        stream.front = max(stream.front, end)
        if stream.trip is not None and end > stream.trip:
            stream.window_bytes = min(stream.window_bytes * 2, self._window_bytes_max)
            return self._plan(stream, stream.next)
        if end < stream.next or stream.front - stream.low < _STREAM_BYTES_MIN:
            return None
        if stream.front < self._data_start + _STREAM_BYTES_MIN:
            return None  # the header, and what the kernel read with it
        if stream.is_block:
            return None
        return self._plan(stream, stream.front + self._gap_bytes)

    def _stream_at(self, offset: int) -> Stream | None:
        for index, stream in enumerate(self._streams):
            if stream.low <= offset <= stream.next + _SLACK_BYTES:
                # Most recently used first: the last one is dropped for a new one.
                self._streams.insert(0, self._streams.pop(index))
                return stream
        return None

    def _begin(self, offset: int, end: int) -> Window | None:
        start, stop = self._tensor_at(end - 1)
        stream = Stream(offset, end, stop, self._window_bytes_min)
        self._look_above(stream)
        self._streams.insert(0, stream)
        del self._streams[_STREAMS_MAX:]
        if offset <= self._data_start:
            return None
        if stream.blocks >= _BLOCKS_MIN:
            return self._plan_below(stream)
        begins = offset <= start or offset < start + _TENSOR_START_BYTES
        if begins and stop - start >= _TENSOR_BYTES_MIN:
            return self._plan(stream, end)
        if end - offset > self._touch_bytes_max:
            return self._plan(stream, end + self._gap_bytes)
        return self._touched((offset + end) // 2)

    def _look_above(self, stream: Stream) -> None:
        """Whether a stream that begins goes on below another one."""
        above = [
            other
            for other in self._streams
            if stream.low < other.low <= stream.low + _BLOCK_BYTES_MAX
        ]
        if not above:
            return
        block = min(above, key=lambda other: other.low)
        stream.ceiling = block.low
        # What was stored between the two is not asked for: the last reader is believed anyway.
        is_whole = block.ceiling is None or block.front + _BLOCK_SLACK_BYTES >= block.ceiling
        if is_whole or block is self._streams[0]:
            stream.blocks = block.blocks + 1
        if stream.blocks >= _BLOCKS_MIN:
            stream.floor = min(block.floor, stream.low)
            stream.window_bytes = block.window_bytes
            self._streams.remove(block)

    def _plan_below(self, stream: Stream) -> Window | None:
        if stream.low - stream.floor > stream.window_bytes // 2:
            return None
        if stream.floor < stream.low:
            stream.window_bytes = min(stream.window_bytes * 2, self._window_bytes_max)
        stop = stream.floor // PAGE_BYTES * PAGE_BYTES
        start = max(0, stop - stream.window_bytes) // PAGE_BYTES * PAGE_BYTES
        stream.floor = start
        return Window(start, stop, stream=stream, is_backward=True) if start < stop else None

    def _touched(self, offset: int) -> Window | None:
        """The pages that lie in one fragment: it was decoded for the read anyway."""
        index = self._extents.index_at(offset)
        if index in self._touches:
            return None
        self._touches[index] = None
        if len(self._touches) > _TOUCHES_MAX:
            del self._touches[next(iter(self._touches))]
        extent = self._extents[index]
        start = -(-extent.offset // PAGE_BYTES) * PAGE_BYTES
        stop = (extent.offset + extent.size) // PAGE_BYTES * PAGE_BYTES
        return Window(start, stop) if start < stop else None

    def _plan(self, stream: Stream, start: int) -> Window | None:
        limit = self._size
        if stream.beyond < _READS_BEYOND:
            limit = self._tensor_at(min(start, self._size) - 1)[1]
            if stream.beyond == 0:
                limit = min(limit, stream.tensor_stop)
        # Threads that share a tensor are streams side by side: no page is wanted twice.
        for other in self._streams:
            if other is not stream and other.low <= start < other.next:
                start = other.next
        for other in self._streams:
            if other is not stream and start < other.low:
                limit = min(limit, other.low)
        start = -(-start // PAGE_BYTES) * PAGE_BYTES
        stop = min(start + stream.window_bytes, self._size)
        if limit < stop:
            stop = limit // PAGE_BYTES * PAGE_BYTES if limit < self._size else limit
        stream.trip = None
        if stop <= start:
            return None
        if stop < limit - PAGE_BYTES:
            stream.trip = start + (stop - start) // _TRIPWIRE_AT // TRIPWIRE_BYTES * TRIPWIRE_BYTES
        stream.next = stop
        return Window(start, stop, stream.trip, stream)

    def _tensor_at(self, offset: int) -> tuple[int, int]:
        index = bisect_right(self._starts, offset)
        start = self._starts[index - 1] if index else 0
        stop = self._starts[index] if index < len(self._starts) else self._size
        return start, stop
