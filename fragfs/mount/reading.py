"""What answers the reads of a mount: caches, decoder processes, prefill; and their counters."""

from __future__ import annotations

import logging
import os

import trio

from fragfs.cache.layered import LayeredFragmentCache
from fragfs.cache.memory import CACHE_BYTES_MAX_DEFAULT, MemoryFragmentCache
from fragfs.cache.place import CachePlace, choose_place
from fragfs.cache.shared import SharedFragmentCache
from fragfs.errors import StorageError
from fragfs.library.extents import OpenContent
from fragfs.library.library import FragmentLibrary
from fragfs.mount.abort import can_abort
from fragfs.mount.front import Front
from fragfs.mount.options import MountOptions
from fragfs.mount.passthrough import Passthrough
from fragfs.mount.prefill import Prefill, Pusher
from fragfs.mount.pusher import PusherOptions
from fragfs.mount.table import MountEntry
from fragfs.reader.decoder import DecoderOptions
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.file import FileReader
from fragfs.reader.plan import plan_read
from fragfs.reader.pool import DecoderPool

__all__ = ["MountReading"]

log = logging.getLogger(__name__)

_WORKERS_MAX = 16
"""Decodes at once unless the user says otherwise: each holds some 10 MiB."""


_HELD_BYTES_MIN = 4 << 20


class MountReading:
    """Reads of one mount. Belongs to the event loop's thread.

    Attributes:
        held_bytes_max: Most bytes of fragments to hold open or in memory beside the shared cache; a
            front may hold as many.

    Args:
        options: What the mount is asked to be.
        library: Where the bytes are.
        nursery: Where decodes run; must outlive every read.
    """

    def __init__(
        self, options: MountOptions, library: FragmentLibrary, nursery: trio.Nursery
    ) -> None:
        self._options = options
        self._library = library
        self._nursery = nursery
        workers = options.workers or min(max(2, os.cpu_count() or 1), _WORKERS_MAX)
        self._place = _choose_place(options, library.uuid)
        shared = None
        if self._place is not None:
            try:
                shared = SharedFragmentCache(self._place)
            except OSError as error:
                log.warning("no shared fragment cache in %s: %s", self._place.directory, error)
                self._place = None
        self.held_bytes_max = _held_bytes_max(self._place)
        self._cache = LayeredFragmentCache(
            library.identities,
            MemoryFragmentCache(self.held_bytes_max),
            shared,
        )
        self._pool: DecoderPool | None = None
        if self._place is not None:
            decoder = DecoderOptions(options.library, self._place, workers)
            self._pool = DecoderPool(decoder, nursery, workers)
        self._fetcher = FragmentFetcher(
            library.decode_fragment, self._cache, nursery, workers=workers, pool=self._pool
        )
        self._reader = FileReader(self._fetcher)
        self._front: Front | None = None
        self._prefill: Prefill | None = None
        self._pusher: Pusher | None = None
        self._passthrough: Passthrough | None = None
        self._may_leave_cache = True  # by the thread that puts files together
        self._reads = 0
        self._bytes_returned = 0

    def start(self, entry: MountEntry, front: Front | None) -> None:
        """Start the processes that help, now that the mount is there.

        Args:
            entry: The mount.
            front: What answers its reads; None if that is only this.
        """
        self._front = front
        shared = self._cache.shared
        if front is not None and shared is not None:
            try:
                front.use_cache(shared)
            except (OSError, MemoryError) as error:
                log.warning("fragments will be given to the front one by one: %s", error)
            if self._options.passthrough and shared.place.in_memory and os.geteuid() == 0:
                front.want_passthrough()
                self._passthrough = Passthrough(
                    front.device,
                    front.has_passthrough,
                    shared,
                    self._library.identities,
                    lambda number: self._library.decode_fragment(number, self._cache),
                )
        if self._pool is not None:
            self._pool.start()
        if not self._options.prefill or self._place is None:
            return
        if can_abort(entry):
            try:
                self._pusher = Pusher(PusherOptions(self._place, entry))
            except OSError as error:
                log.warning("no prefill: cannot start the process that stores: %s", error)
            else:
                self._nursery.start_soon(self._pusher.run)
        else:
            log.warning(
                "no prefill: this user may not abort the connection of %s, so a crash of this"
                " process could leave its readers waiting",
                entry.mountpoint,
            )
        self._prefill = Prefill(
            self._fetcher,
            self._cache.identify_all,
            self._pusher,
            self._nursery,
            self._place.bytes_max,
            lambda: entry.read_ahead_kb,
            self._offer if front is not None else None,
            self._passthrough.note_read if self._passthrough is not None else None,
        )

    def close(self) -> None:
        """End what holds the mount's device; the others end with the nursery."""
        if self._passthrough is not None:
            self._may_leave_cache = self._passthrough.close()
        if self._pusher is not None:
            self._pusher.close()

    def leave_cache(self) -> None:
        """Stop using the shared cache: when nothing reads, decodes or stores any more."""
        if self._cache.shared is not None and self._may_leave_cache:
            self._cache.shared.close()

    def on_change(self) -> None:
        """Note that the catalog has changed."""
        self._cache.drop_identities()

    def open_file(self, content: OpenContent) -> None:
        """A file was opened."""
        if self._front is not None:
            self._front.open_file(content)
        if self._passthrough is not None:
            self._passthrough.open_file(content)

    def backing(self, number: int) -> int:
        """What the kernel calls the file that it reads for an open content; 0 if it asks here."""
        return self._passthrough.backing(number) if self._passthrough is not None else 0

    def close_file(self, content: OpenContent) -> None:
        """Nobody has a file open any more."""
        if self._front is not None:
            self._front.close_file(content.number)
        if self._passthrough is not None:
            self._passthrough.close_file(content)

    def on_read(self, content: OpenContent, offset: int, size: int) -> None:
        """Note a read that was asked for."""
        if self._prefill is not None:
            self._prefill.on_read(content, offset, size)
        if self._passthrough is not None:
            self._passthrough.note_read(content.number, size)

    async def prepare(self, content: OpenContent, offset: int, size: int) -> bool:
        """Have the front able to answer a read; False if it could not even then.

        What cannot be decoded fails again in `read`, which says why.

        Raises:
            FragmentError: The catalog is damaged.
        """
        # Without a shared cache fragments are bytes in memory: giving them would copy them.
        if self._front is None or self._cache.shared is None:
            return False
        pieces = plan_read(content.extents, offset, size)
        if len(pieces) > self._front.pieces_max:
            return False
        numbers = {piece.fragment for piece in pieces}
        missing = [number for number in numbers if not self._front.holds(number)]
        await self._fetcher.all_ready(missing)
        for number in missing:
            self._offer(number, is_there=True)
        return True

    def _offer(self, number: int, is_there: bool) -> None:
        """Let the front open a fragment that will be read, or give it what is to be checked."""
        assert self._front is not None
        assert self._cache.shared is not None
        if self._front.holds(number):
            return
        shared = self._cache.shared
        fragment = self._cache.identify(number)
        if is_there and (self._front.is_due(number) or shared.is_to_check(fragment.id)):
            raw = self._cache.find(number, check=True)
            if raw is not None:
                self._front.give(number, raw)
        if not shared.checks_all:
            self._front.name(fragment, self._cache.served_credit_s(number))

    async def read(self, content: OpenContent, offset: int, size: int) -> memoryview | bytearray:
        """Read bytes of a content; see `FileReader.read`."""
        data: memoryview | bytearray | None = self._reader.read_nowait(content, offset, size)
        if data is None:
            data = await self._reader.read(content, offset, size)
        self._reads += 1
        self._bytes_returned += len(data)
        return data

    def status(self) -> dict[str, object]:
        """The counters of this mount, for the extended attribute `user.fragfs.status`."""
        fetched = self._fetcher.statistics()
        reads, bytes_returned, opened = self._front.counters() if self._front else (0, 0, 0)
        status: dict[str, object] = {
            "pid": os.getpid(),
            "helpers": self._pool.pids if self._pool is not None else [],
            "library": os.fspath(self._options.library),
            "reads": self._reads + reads,
            "bytes_returned": self._bytes_returned + bytes_returned,
            "decodes": fetched.decodes,
            "bytes_decoded": fetched.decoded_bytes,
            "waiting": fetched.flights,
            "front": self._front is not None,
            "options": self._asked(),
            "cache": None,
            "prefill": None,
            "passthrough": self._passthrough.status() if self._passthrough else None,
        }
        shared = self._cache.shared
        if shared is not None:
            counted = shared.statistics()
            status["cache"] = {
                "directory": counted.directory,
                "in_memory": counted.in_memory,
                "bytes_max": counted.bytes_max,
                "bytes_held": counted.bytes_held,
                "hits": counted.hits + opened,
                "misses": counted.misses,
                "evictions": counted.evictions + (self._pool.evictions if self._pool else 0),
                "damaged": counted.damaged,
            }
        if self._prefill is not None:
            prefilled = self._prefill.statistics()
            status["prefill"] = {
                "pid": self._pusher.pid if self._pusher is not None else None,
                "alive": self._pusher is not None and self._pusher.is_alive,
                "windows": prefilled.windows,
                "pushed_bytes": prefilled.pushed_bytes,
                "failed_stores": prefilled.failed_stores,
                "push_s": prefilled.push_ns / 1e9,
            }
        return status

    def _asked(self) -> dict[str, object]:
        """What the user asked for that explains what there is."""
        directory = self._options.cache_directory
        return {
            "cache_bytes_max": self._options.cache_bytes_max,
            "cache_directory": None if directory is None else os.fspath(directory),
            "passthrough": self._options.passthrough,
            "prefill": self._options.prefill,
            "read_ahead_kb": self._options.read_ahead_kb,
        }


def _held_bytes_max(place: CachePlace | None) -> int:
    """Fragments at hand: without a shared cache all that is cached, else open files beside it."""
    if place is None:
        return CACHE_BYTES_MAX_DEFAULT
    # The front holds as much, and the decoders the other half.
    return max(_HELD_BYTES_MIN, place.held_open_bytes_max // 4)


def _choose_place(options: MountOptions, uuid: bytes) -> CachePlace | None:
    """Where the cache is; a place that cannot be trusted is not used, and said."""
    try:
        place = choose_place(
            uuid,
            asked=options.cache_bytes_max,
            directory=options.cache_directory,
            disk=options.cache_on_disk,
        )
    except StorageError as error:
        log.warning("no shared fragment cache: %s", error)
        return None
    if place is None and options.cache_bytes_max != 0:
        log.warning("no shared fragment cache: too little shared memory and disk space")
    return place
