"""When to decode ahead: for those who read a file front to back. Pure, no I/O.

A stream belongs to a content and a region, not to a handle: loaders share handles between threads
and processes, and the kernel's own read-ahead reorders neighbouring requests.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["SequentialReads"]

_SLACK_BYTES = 256 << 10
"""Two requests of 128 KiB: how far the kernel sends neighbouring requests out of order."""

_RUN_BYTES_MIN = 512 << 10
"""A run this long is somebody reading on. Headers of ordinary files are shorter, so opening a file
to look at its header decodes nothing of its tensors."""

_STREAMS_MAX = 16
_CONTENTS_MAX = 256


@dataclass(slots=True)
class _Stream:
    end: int
    run: int


class SequentialReads:
    """Remembers where files are being read. Belongs to one thread."""

    def __init__(self) -> None:
        self._streams: OrderedDict[int, list[_Stream]] = OrderedDict()

    def observe(self, content: int, offset: int, end: int) -> bool:
        """Take note of a read of `[offset, end)`; True if it continues a run worth decoding for."""
        streams = self._streams.get(content)
        if streams is None:
            streams = self._streams[content] = []
            if len(self._streams) > _CONTENTS_MAX:
                self._streams.popitem(last=False)
        else:
            self._streams.move_to_end(content)
        for stream in streams:
            if abs(offset - stream.end) <= _SLACK_BYTES:
                stream.run += max(0, end - max(offset, stream.end))
                stream.end = max(stream.end, end)
                return stream.run >= _RUN_BYTES_MIN
        streams.append(_Stream(end, end - offset))
        del streams[:-_STREAMS_MAX]
        return False
