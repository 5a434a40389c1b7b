"""The decoder process: `python -m fragfs.reader.decoder`, started by `reader.pool`.

Options come on standard input. Requests and replies are messages on an inherited socket, one reply
for each request, in order. A decoder decodes one record, with its bases found in the fragment
cache, and publishes it there; it never waits for anybody: who has to be decoded first, or is being
decoded elsewhere, is the reply. It holds no descriptor of a mount and dies with the process that
started it.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fragfs.cache.layered import LayeredFragmentCache
from fragfs.cache.memory import MemoryFragmentCache
from fragfs.cache.place import CachePlace
from fragfs.cache.shared import SharedFragmentCache
from fragfs.errors import FragmentError, IntegrityError
from fragfs.library.decode import check_this_machine
from fragfs.library.library import FragmentLibrary
from fragfs.types import Fragment, FragmentId, FragmentIdentity

__all__ = [
    "REPLY",
    "REQUEST",
    "DecoderOptions",
    "Reply",
    "Request",
    "Status",
    "die_with_parent",
    "main",
]

REQUEST = struct.Struct("<q32sQ???")
"""What a fragment is (`FragmentIdentity`); whether to decode missing bases as well."""

REPLY = struct.Struct("<qBQQQQ")
"""Fragment number, status, fragments decoded, their bytes, nanoseconds, files evicted from the
cache; base numbers follow."""

_VIEWS_BYTES_MAX = 16 << 20
_VIEWS_BYTES_MIN = 2 << 20
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MEMORY_KEPT_BYTES = 16 << 20
_NICE = 5
_IDLE_MS = 2000


class Status(enum.IntEnum):
    """What became of a request.

    Attributes:
        DONE: The fragment is in the shared cache.
        BUSY: Another process is decoding it.
        NEEDS: The bases in the reply are not in the shared cache.
        FAILED: It could not be decoded; decode it elsewhere to learn why.
        FULL: It was decoded, but the shared cache has no room for it.
    """

    DONE = 0
    BUSY = 1
    NEEDS = 2
    FAILED = 3
    FULL = 4


_STATUSES = tuple(Status)


class Request(NamedTuple):
    """What a decoder is asked.

    Attributes:
        fragment: What to decode. To ask the catalog again would be a twentieth of the decode.
        with_bases: Whether to decode missing bases as well.
    """

    fragment: FragmentIdentity
    with_bases: bool

    def pack(self) -> bytes:
        """The message."""
        return REQUEST.pack(*self.fragment, self.with_bases)

    @classmethod
    def parse(cls, data: bytes) -> Request:
        """Read what `pack` wrote."""
        number, id_, raw_size, has_bases, is_base, with_bases = REQUEST.unpack(data)
        fragment = FragmentIdentity(number, FragmentId(id_), raw_size, has_bases, is_base)
        return cls(fragment, with_bases)


class Reply(NamedTuple):
    """A decoder's answer.

    Attributes:
        number: The fragment.
        status: What became of it.
        decoded: Fragments decoded for it.
        decoded_bytes: Their raw bytes.
        decode_ns: How long that took.
        evicted: Files of the shared cache that were removed to make room.
        bases: Fragments that have to be decoded first, for `NEEDS`.
    """

    number: int
    status: Status
    decoded: int = 0
    decoded_bytes: int = 0
    decode_ns: int = 0
    evicted: int = 0
    bases: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """The message."""
        head = REPLY.pack(
            self.number,
            self.status,
            self.decoded,
            self.decoded_bytes,
            self.decode_ns,
            self.evicted,
        )
        return head + struct.pack(f"<{len(self.bases)}q", *self.bases)

    @classmethod
    def parse(cls, data: bytes) -> Reply:
        """Read what `pack` wrote."""
        number, status, decoded, decoded_bytes, decode_ns, evicted = REPLY.unpack_from(data)
        count = (len(data) - REPLY.size) // 8
        bases = struct.unpack_from(f"<{count}q", data, REPLY.size) if count else ()
        return cls(number, _STATUSES[status], decoded, decoded_bytes, decode_ns, evicted, bases)


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """What a decoder is told.

    Attributes:
        library: The library's directory.
        place: The shared fragment cache.
        count: How many decoders there are: they share what may be held open.
    """

    library: Path
    place: CachePlace
    count: int = 1

    @property
    def views_bytes_max(self) -> int:
        """Most bytes of bases to hold, decoded or mapped."""
        share = self.place.held_open_bytes_max // 2 // self.count
        return max(_VIEWS_BYTES_MIN, min(_VIEWS_BYTES_MAX, share))

    def to_json(self) -> str:
        """For the decoder's standard input."""
        return json.dumps(
            {
                "library": os.fspath(self.library),
                "directory": os.fspath(self.place.directory),
                "in_memory": self.place.in_memory,
                "bytes_max": self.place.bytes_max,
                "asked": self.place.asked,
                "count": self.count,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> DecoderOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        place = CachePlace(
            Path(values["directory"]), values["in_memory"], values["bytes_max"], values["asked"]
        )
        return cls(Path(values["library"]), place, values["count"])


class _Timed:
    """The cache as the source of one decode: publishes what was decoded, with what it took."""

    def __init__(self, cache: LayeredFragmentCache, fragment: FragmentIdentity) -> None:
        self._cache = cache
        self._fragment = fragment
        self._since_ns = time.perf_counter_ns()
        self._start_ns = self._since_ns
        self.decoded = 0
        self.decoded_bytes = 0
        self.is_published = False

    def get(self, number: int) -> memoryview | None:
        raw = self._cache.get(number)
        self._since_ns = time.perf_counter_ns()
        return raw

    def put(self, number: int, raw: memoryview, record: Fragment | None = None) -> None:
        decode_ns = time.perf_counter_ns() - self._since_ns
        self.decoded += 1
        self.decoded_bytes += raw.nbytes
        fragment = self._fragment
        if number != fragment.number:
            fragment = self._cache.identify(number)._replace(is_base=True)
        if record is None or record.id != fragment.id:
            # Its catalog is not the one that this process has: one was put back from a backup.
            raise IntegrityError(
                f"fragment number {number} is another one than was asked for",
                expected=fragment.id.hex(),
                actual=None if record is None else record.id.hex(),
            )
        self.is_published = self._cache.publish(fragment, raw, record, decode_ns=decode_ns)
        self._cache.held.put(number, raw)
        self._since_ns = time.perf_counter_ns()

    def reply(self, number: int, status: Status, evicted: int) -> Reply:
        elapsed_ns = time.perf_counter_ns() - self._start_ns
        return Reply(number, status, self.decoded, self.decoded_bytes, elapsed_ns, evicted)


class _Decoder:
    def __init__(
        self, library: FragmentLibrary, shared: SharedFragmentCache, views_bytes_max: int
    ) -> None:
        self._library = library
        self._shared = shared
        self._cache = LayeredFragmentCache(
            library.identities,
            MemoryFragmentCache(views_bytes_max),
            shared,
        )

    def answer(self, request: Request) -> Reply:
        try:
            return self._answer(request.fragment, request.with_bases)
        except (FragmentError, OSError, MemoryError):
            return Reply(request.fragment.number, Status.FAILED)

    def _answer(self, identity: FragmentIdentity, with_bases: bool) -> Reply:
        number, fragment = identity.number, identity.id
        # Nobody tells a decoder of changes: who asks knows of what has become a base since.
        self._cache.note_identity(identity)
        if self._shared.holds(fragment):
            return Reply(number, Status.DONE)
        # If it has some since it was asked, they are decoded with it.
        if identity.has_bases and not with_bases:
            missing = self._missing_bases(number)
            if missing:
                return Reply(number, Status.NEEDS, bases=missing)
        if not self._shared.claim(fragment):
            return Reply(number, Status.BUSY)
        try:
            # It may have been published between the first look and the claim.
            if self._shared.holds(fragment):
                return Reply(number, Status.DONE)
            source = _Timed(self._cache, identity)
            evictions = self._shared.evictions
            # What has left the shared cache and is at hand here is decoded again: only its record
            # says for certain whose bytes they are.
            self._cache.held.drop(number)
            self._library.decode_fragment(number, source)
            # If it was not decoded, somebody without a claim has just published it.
            is_there = source.is_published or not source.decoded
            status = Status.DONE if is_there else Status.FULL
            return source.reply(number, status, self._shared.evictions - evictions)
        finally:
            self._shared.release(fragment)

    def _missing_bases(self, number: int) -> tuple[int, ...]:
        return tuple(
            base
            for base in self._library.bases(number)
            if self._cache.held.get(base) is None
            and not self._shared.holds(self._cache.identify(base).id)
        )


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends.

    Args:
        parent: Process id of who started it.

    Raises:
        SystemExit: It has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _keep_freed_memory() -> None:
    """Have the allocator use freed memory again instead of giving each MiB back to the system.

    Fresh memory has to be zeroed and mapped: some 7 % of a decoder's time (bf16, Xeon, 2026-11).
    Source: mallopt(3); other C libraries than glibc have none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MEMORY_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MEMORY_KEPT_BYTES)


def _receive(messages: socket.socket, library: FragmentLibrary) -> bytes:
    """The next request; empty if there will be none. Who waits long lets go of removed packs."""
    poll = select.poll()
    poll.register(messages, select.POLLIN)
    while not poll.poll(_IDLE_MS):
        library.close_removed_packs()
    return messages.recv(REQUEST.size)


def main(arguments: list[str]) -> int:
    """Answer requests until the other end of the socket is closed; returns the exit status."""
    channel, parent = int(arguments[0]), int(arguments[1])
    os.set_inheritable(channel, False)
    die_with_parent(parent)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # of the terminal: the parent ends us in time
        signal.signal(ignored, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    # Whoever faults on a page and whoever answers it must not queue behind decoding ahead.
    os.nice(_NICE)
    _keep_freed_memory()
    options = DecoderOptions.from_json(sys.stdin.read())
    with (
        socket.socket(fileno=channel) as messages,
        FragmentLibrary.open(options.library) as library,
    ):
        # Now, not in the first reader's time: it takes a third of a second, with what it imports.
        check_this_machine()
        shared = SharedFragmentCache(options.place)
        decoder = _Decoder(library, shared, options.views_bytes_max)
        while data := _receive(messages, library):
            messages.send(decoder.answer(Request.parse(data)).pack())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
