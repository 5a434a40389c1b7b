"""The front of a mount: compiled code that takes the kernel's requests and answers most reads.

pyfuse3 opens the session, then gets a socket in the place of its device: what it reads there are
the requests that are no reads, opens or closes of files, and what it writes there goes to the
kernel. A read is answered at
once, without the interpreter, if its fragments are in the shared cache and the front was told that
it may open them, or was given them; else the event loop has them decoded, and then has the read
answered. What is decoded ahead is named ahead, so that most reads never come here but as a note of
where their reader is.

Where the module was not built there is no front, and pyfuse3 hands every read to
`mount.operations`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import socket
import struct
import threading
from types import ModuleType
from typing import Protocol

import trio
from pyfuse3 import FUSEError

from fragfs.cache.shared import FragmentFile, SharedFragmentCache
from fragfs.library.extents import OpenContent
from fragfs.mount.device import OUT_HEADER, find_device
from fragfs.reader.ahead import PAGE_BYTES
from fragfs.types import FragmentIdentity

__all__ = ["Front", "Reads", "find_front_module"]

log = logging.getLogger(__name__)

_VERSION = 5
"""Of the module and what it takes; raised with every change to it, here and in the source."""

_RECORD = struct.Struct("=QQQII")
"""Request, content, offset, size, kind; of `_ENDED` an errno in the place of the size, of `_OPENS`
the flags in the place of the offset."""

_SERVED, _MISSED, _ENDED, _OPENS, _CLOSES = range(5)
_OPEN_REPLY = struct.Struct("=QIi")
"""Handle, flags, what the kernel is to read."""

_KEEP_CACHE, _PASSTHROUGH = 1 << 1, 1 << 7
_COPIED_BYTES_MAX = 64 << 10
"""Fragments at hand as bytes are given up to this size: giving them makes a copy."""

_RECORDS_BYTES = 64 << 10
_SOCKET_BYTES = 1 << 20
_ENDS_S_MAX = 1.0


def find_front_module() -> ModuleType | None:
    """The compiled module, or None."""
    try:
        from fragfs.mount import _front  # type: ignore[attr-defined]  # compiled, no stub
    except ImportError:
        return None
    if os.sysconf("SC_PAGESIZE") != PAGE_BYTES:
        return None  # what it reserves for requests and counts in pipes is for small pages
    module: ModuleType = _front
    # A file built for older sources is as good as none.
    return module if getattr(module, "VERSION", None) == _VERSION else None


class Reads(Protocol):
    """Who knows of contents and fragments; `mount.operations` in a mount."""

    def open_content(self, number: int, flags: int) -> int:
        """Open a handle; gives what the kernel is to read instead of asking, or 0.

        Raises FUSEError.
        """

    def close_content(self, handle: int) -> None:
        """Close a handle; comes after all that was read by it."""

    def note_read(self, handle: int, offset: int, size: int) -> None:
        """Learn of a read; called for each, in the order in which they came."""

    async def prepare_read(self, handle: int, offset: int, size: int) -> bool:
        """Have what a read needs decoded, and the front told; False where that is no use."""

    async def read_content(self, handle: int, offset: int, size: int) -> memoryview | bytearray:
        """The bytes of a read; raises FUSEError."""


class Front:
    """Answers the reads of this process's one FUSE session. Belongs to the event loop's thread.

    Takes the session over: from now on its descriptor is a socket.

    Attributes:
        device: The mount's device.
        pieces_max: Most pieces of a read that it answers; it misses longer ones in any case.

    Args:
        module: From `find_front_module`.
        bytes_max: Most bytes of fragments it holds. They are open files of the cache, whose
            memory is not free again when they are evicted.

    Raises:
        OSError: The system refused a descriptor.
    """

    def __init__(self, module: ModuleType, bytes_max: int) -> None:
        self.pieces_max: int = module.PIECES_MAX
        session = find_device()
        self.device = fcntl.fcntl(session, fcntl.F_DUPFD_CLOEXEC, 3)
        os.set_blocking(self.device, False)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        records, self._records_in = os.pipe()
        self._records = io.FileIO(records)
        with theirs:
            for end in (self._requests, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            os.dup2(theirs.fileno(), session, inheritable=False)
        self._front = module.Front(
            self.device, self._requests.fileno(), self._records_in, bytes_max
        )
        # The one that takes requests waits without the interpreter's lock, and so does the other.
        self._threads = [
            threading.Thread(target=run, name=f"fragfs front {name}", daemon=True)
            for name, run in (("serve", self._front.serve), ("relay", self._front.relay))
        ]

    async def run(self, reads: Reads) -> int:
        """Serve until the mount has ended.

        Args:
            reads: Who is told of reads, and gets what is not held.

        Returns:
            The errno that ended it, or 0 after `close`.
        """
        for thread in self._threads:
            thread.start()
        with self._records:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(self._records)
                    for record in _RECORD.iter_unpack(self._records.read(_RECORDS_BYTES)):
                        request, content, offset, size, kind = record
                        if kind == _ENDED:
                            nursery.cancel_scope.cancel()
                            return int(size)
                        if kind == _OPENS:
                            self._open(reads, request, content, offset)
                            continue
                        if kind == _CLOSES:
                            self._close(reads, request, content)
                            continue
                        _note(reads, content, offset, size)
                        if kind == _MISSED:
                            nursery.start_soon(self._answer, reads, request, content, offset, size)

    def _open(self, reads: Reads, request: int, number: int, flags: int) -> None:
        try:
            backing = reads.open_content(number, flags)
        except FUSEError as error:
            self._refuse(request, error.errno)
            return
        except Exception:
            log.exception("an open failed")
            self._refuse(request, errno.EIO)
            return
        reply = _OPEN_REPLY.pack(number, _PASSTHROUGH if backing else _KEEP_CACHE, backing)
        header = OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, request)
        if not self._send(header, reply):
            reads.close_content(number)
            self._refuse(request, errno.EIO)  # should anybody wait for it all the same

    def _close(self, reads: Reads, request: int, handle: int) -> None:
        try:
            reads.close_content(handle)
        except Exception:
            log.exception("a close failed")
        self._send(OUT_HEADER.pack(OUT_HEADER.size, 0, request))

    def _refuse(self, request: int, number: int) -> None:
        self._send(OUT_HEADER.pack(OUT_HEADER.size, -number, request))

    def _send(self, *reply: bytes | memoryview | bytearray) -> bool:
        """Answer a request; False if nobody waits for it any more."""
        try:
            os.writev(self.device, reply)
        except OSError:
            return False
        return True

    async def _answer(
        self, reads: Reads, request: int, content: int, offset: int, size: int
    ) -> None:
        try:
            try:
                is_prepared = await reads.prepare_read(content, offset, size)
            except Exception as error:  # of descriptors, say; what matters fails again
                log.debug("a read was not prepared: %s", error)
                is_prepared = False
            if is_prepared and self._front.answer(request, content, offset, size):
                return
            data = await reads.read_content(content, offset, size)
            self._send(OUT_HEADER.pack(OUT_HEADER.size + len(data), 0, request), data)
        except FUSEError as error:
            self._refuse(request, error.errno)
        except Exception:
            # Nothing that goes wrong in one read may end the mount.
            log.exception("a read failed")
            self._refuse(request, errno.EIO)

    def close(self) -> None:
        """Stop, and give up the device; whoever still reads gets errors from now on."""
        self._front.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_ENDS_S_MAX)
        if any(thread.is_alive() for thread in self._threads):
            return  # it still uses what is closed here, and ends with this process
        self._requests.close()
        os.close(self._records_in)
        os.close(self.device)

    def counters(self) -> tuple[int, int, int]:
        """Reads it answered, the bytes of them, and how many fragments it opened."""
        reads, bytes_returned, opened = self._front.counters()
        return reads, bytes_returned, opened

    def has_passthrough(self) -> bool:
        """Whether the kernel offered passthrough, and was asked for it."""
        return bool(self._front.has_passthrough())

    def want_passthrough(self) -> None:
        """Ask the kernel for passthrough when it greets; before `run`."""
        self._front.want_passthrough()

    def use_cache(self, shared: SharedFragmentCache) -> None:
        """Tell it where the files are that it may open.

        Raises:
            OSError: The system refused a descriptor.
        """
        directory = os.fsencode(shared.place.directory)
        self._front.use_cache(directory, shared.fileno(), shared.since_ns)

    def open_file(self, content: OpenContent) -> None:
        """Tell it of a file that is open."""
        sizes, offsets, _ = content.extents.columns()
        ends, fragments = content.extents.ends, content.extents.fragments
        self._front.add_file(content.number, ends, fragments, sizes, offsets)

    def close_file(self, number: int) -> None:
        """Tell it that nobody has a file open any more."""
        self._front.remove_file(number)

    def holds(self, fragment: int) -> bool:
        """Whether it can answer reads of a fragment, and will be able to for some time."""
        return bool(self._front.holds(fragment))

    def name(self, fragment: FragmentIdentity, credit_s: float) -> None:
        """Let it open a fragment's file in the cache, unchecked, when somebody reads it.

        Args:
            fragment: The fragment; the file may not be there yet.
            credit_s: See `SharedFragmentCache.touch`.
        """
        credit_ns = int(credit_s * 1e9)
        self._front.name(fragment.number, fragment.id, fragment.raw_size, credit_ns)

    def is_due(self, fragment: int) -> bool:
        """Whether it leaves a fragment's file, of those that it may open, to be checked now."""
        return bool(self._front.is_due(fragment))

    def give(self, fragment: int, raw: memoryview | FragmentFile) -> None:
        """Have it answer reads of a fragment."""
        if isinstance(raw, FragmentFile):
            self._front.give_file(fragment, raw.fileno(), raw.nbytes)
        elif raw.nbytes <= _COPIED_BYTES_MAX:
            self._front.give_bytes(fragment, raw)


def _note(reads: Reads, content: int, offset: int, size: int) -> None:
    """Nobody waits for this, so nothing that goes wrong here may end the mount."""
    try:
        reads.note_read(content, offset, size)
    except Exception:
        log.exception("a reader was not followed")
