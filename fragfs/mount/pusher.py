"""The pusher process: `python -m fragfs.mount.pusher`, started by `mount.prefill`.

Stores decoded fragments into the kernel's page cache of a mounted file. A process of its own,
because a store needs a core: in a thread it would share the interpreter with those who answer.

A store waits while the kernel reads one of its pages, and what the kernel reads the daemon answers.
So the daemon never waits for a store, and the pusher never decodes. When the daemon dies, the page
may stay locked for ever, and the pusher with it, holding the device that keeps every reader
waiting: a process of its own therefore aborts the connection then (`guard`).

Source: Linux `include/uapi/linux/fuse.h`, `FUSE_NOTIFY_STORE`; `fs/fuse/dev.c`,
`fuse_notify_store`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fragfs.cache.place import CachePlace
from fragfs.cache.shared import FragmentFile, SharedFragmentCache
from fragfs.mount.device import OUT_HEADER
from fragfs.mount.guard import start_guard
from fragfs.mount.table import MountEntry
from fragfs.reader.ahead import PAGE_BYTES
from fragfs.types import FragmentId

__all__ = ["PARTS_MAX", "PUSHED", "PusherOptions", "StorePart", "main", "pack_store"]

_STORE = struct.Struct("<QQ")
"""Inode, offset in the file; parts follow."""

_PART = struct.Struct("<32sIII")
"""Fragment id, its size, offset in it, bytes of it."""

PUSHED = struct.Struct("<QiQ")
"""Bytes stored, errno or 0, nanoseconds: one for each store, in order."""

PARTS_MAX = 256

_NOTIFY_STORE = struct.Struct("=QQII")
_FUSE_NOTIFY_STORE = 4
_MESSAGE_BYTES_MAX = _STORE.size + PARTS_MAX * _PART.size
_PIPE_BYTES = 1 << 20
_FILES_MAX = 4

_Part = tuple[bytes, int, int, int]
"""Fragment id, its size, offset in it, bytes of it."""


@dataclass(frozen=True, slots=True)
class StorePart:
    """Bytes of one fragment that are to be stored.

    Attributes:
        fragment: Its id.
        raw_size: Its length.
        start: Where the bytes start in it.
        size: How many.
    """

    fragment: FragmentId
    raw_size: int
    start: int
    size: int


def pack_store(inode: int, offset: int, parts: list[StorePart]) -> bytes:
    """The message that asks for one store.

    Args:
        inode: The file.
        offset: Where in the file; on a page.
        parts: What is stored there, one after the other; at most `PARTS_MAX`.
    """
    message = _STORE.pack(inode, offset)
    for part in parts:
        message += _PART.pack(bytes(part.fragment), part.raw_size, part.start, part.size)
    return message


@dataclass(frozen=True, slots=True)
class PusherOptions:
    """What a pusher is told.

    Attributes:
        place: The shared fragment cache.
        entry: The mount, to abort its connection.
    """

    place: CachePlace
    entry: MountEntry

    def to_json(self) -> str:
        """For the pusher's standard input."""
        return json.dumps(
            {
                "directory": os.fspath(self.place.directory),
                "in_memory": self.place.in_memory,
                "bytes_max": self.place.bytes_max,
                "asked": self.place.asked,
                "mount_id": self.entry.mount_id,
                "device": self.entry.device,
                "mountpoint": os.fspath(self.entry.mountpoint),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> PusherOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        place = CachePlace(
            Path(values["directory"]), values["in_memory"], values["bytes_max"], values["asked"]
        )
        entry = MountEntry(
            values["mount_id"], values["device"], Path(values["mountpoint"]), (), "", ""
        )
        return cls(place, entry)


class _Pusher:
    """Stores through a pipe: its pages are those of the cache's files, nothing is mapped for it.

    Writing from a mapping costs a third more (Linux 6.18, EPYC): the mapping has to be made, walked
    and taken down again for each fragment.
    """

    def __init__(self, device: int, shared: SharedFragmentCache) -> None:
        self._device = device
        self._shared = shared
        self._open_pipe()
        # Fragments end within pages, so neighbouring stores have one in common.
        self._files: OrderedDict[bytes, FragmentFile] = OrderedDict()

    def _open_pipe(self) -> None:
        self._pipe_out, self._pipe_in = os.pipe()
        with contextlib.suppress(OSError):  # more than a user may have: smaller stores then
            fcntl.fcntl(self._pipe_in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        pipe_pages = fcntl.fcntl(self._pipe_in, fcntl.F_GETPIPE_SZ) // PAGE_BYTES
        self._pages_max = pipe_pages - 1  # the header takes one

    def store(self, message: bytes) -> bytes:
        start_ns = time.perf_counter_ns()
        inode, offset = _STORE.unpack_from(message)
        stored, error = 0, 0
        try:
            for batch in self._batches(memoryview(message)[_STORE.size :]):
                size = self._store(inode, offset + stored, batch)
                if not size:
                    break
                stored += size
        except OSError as failed:
            error = failed.errno or errno.EIO
            # What is left in the pipe would become part of the next store.
            os.close(self._pipe_out)
            os.close(self._pipe_in)
            self._open_pipe()
        return PUSHED.pack(stored, error, time.perf_counter_ns() - start_ns)

    def _batches(self, parts: memoryview) -> Iterator[list[_Part]]:
        """The parts in pieces that fit the pipe and end on a page of the file, but for the last."""
        batch: list[_Part] = []
        pages = size = 0
        for fragment, raw_size, start, rest in _PART.iter_unpack(parts):
            while rest:
                # A page of the pipe for each page of the cache's file that is touched.
                room = (self._pages_max - pages) * PAGE_BYTES - start % PAGE_BYTES
                taken = min(rest, room)
                if taken < rest:
                    taken -= (size + taken) % PAGE_BYTES
                if taken <= 0:
                    yield batch
                    batch, pages, size = [], 0, 0
                    continue
                batch.append((fragment, raw_size, start, taken))
                pages += (start + taken - 1) // PAGE_BYTES - start // PAGE_BYTES + 1
                size += taken
                start += taken
                rest -= taken
        yield batch

    def _store(self, inode: int, offset: int, batch: list[_Part]) -> int:
        """Store parts that lie one after the other; 0 if one has left the cache."""
        files = []
        for fragment, raw_size, _, _ in batch:
            file = self._file(fragment, raw_size)
            if file is None:
                return 0
            files.append(file)
        size = sum(part[3] for part in batch)
        length = OUT_HEADER.size + _NOTIFY_STORE.size + size
        header = OUT_HEADER.pack(length, _FUSE_NOTIFY_STORE, 0)
        os.write(self._pipe_in, header + _NOTIFY_STORE.pack(inode, offset, size, 0))
        for file, (_, _, start, count) in zip(files, batch, strict=True):
            while count:
                moved = os.splice(file.fileno(), self._pipe_in, count, offset_src=start)
                if not moved:
                    raise OSError(errno.EIO, "a file of the fragment cache has become shorter")
                start += moved
                count -= moved
        os.splice(self._pipe_out, self._device, length)
        return size

    def _file(self, fragment: bytes, raw_size: int) -> FragmentFile | None:
        """The file of a fragment; None if it has left the cache, which is no harm."""
        file = self._files.get(fragment)
        if file is None:
            file = self._shared.get(FragmentId(fragment), raw_size)
            if file is None:
                return None
            self._files[fragment] = file
            if len(self._files) > _FILES_MAX:
                self._files.popitem(last=False)
        return file


def main(arguments: list[str]) -> int:
    """Store what is asked for until an empty message comes; returns the exit status."""
    channel, device, lifeline = map(int, arguments)
    for descriptor in (channel, device, lifeline):
        os.set_inheritable(descriptor, False)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # The daemon ends first, and it needs this process until then.
        signal.signal(ignored, signal.SIG_IGN)
    options = PusherOptions.from_json(sys.stdin.read())
    guard = start_guard(options.entry, device, lifeline)
    if guard is None:
        return 0
    messages = socket.socket(fileno=channel)
    pusher = _Pusher(device, SharedFragmentCache(options.place))
    with contextlib.suppress(OSError):  # the daemon is gone
        while len(message := messages.recv(_MESSAGE_BYTES_MAX)) >= _STORE.size:
            messages.send(pusher.store(message))
    os.close(device)
    guard.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
