"""Decoded fragments for many tasks at once: from the caches, else by one decode however many ask.

Where there is a shared cache, decoder processes fill it (`pool`), and a fragment is at hand as soon
as it is published there. Without one, or when processes keep dying, worker threads decode.

A fragment's bases are flights of their own, so two fragments that share a base wait for one decode
of it. What another daemon is decoding is polled for by the waiting task, never by a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import trio

from fragfs.cache.layered import LayeredFragmentCache
from fragfs.cache.shared import FragmentFile
from fragfs.errors import FragmentError, StorageError
from fragfs.library.decode import DecodedSource
from fragfs.reader.decoder import Reply, Status
from fragfs.reader.pool import Decode, DecoderPool
from fragfs.types import Fragment, FragmentIdentity

__all__ = ["FetchStatistics", "FragmentFetcher"]

_POLL_S = 0.002
_POLL_S_MAX = 0.05
_ROUNDS_MAX = 4
"""Rounds of "this base is missing" after which a decoder decodes bases itself: they leave a small
cache faster than they are asked for again."""

_BUSY_S_MAX = 5.0
"""A process that was stopped keeps its claims: after this time the fragment is decoded twice."""

_FULL_S = 2.0


@dataclass(frozen=True, slots=True)
class FetchStatistics:
    """Counters since the fetcher was made, and what is under way.

    Attributes:
        decodes: Fragments decoded, bases included, by threads and processes.
        decoded_bytes: Their bytes.
        joins: Fetches that waited for a decode which another fetch had started.
        flights: Decodes running or queued now.
        workers: Most decodes that run at once in threads.
    """

    decodes: int
    decoded_bytes: int
    joins: int
    flights: int
    workers: int


class _Flight:
    """One decode under way and what came of it."""

    __slots__ = ("decode", "done", "error", "is_urgent", "raw", "waits_for")

    def __init__(self, *, is_urgent: bool) -> None:
        self.done = trio.Event()
        self.raw: memoryview | FragmentFile | None = None
        self.error: BaseException | None = None
        self.is_urgent = is_urgent
        self.decode: Decode | None = None
        self.waits_for: tuple[int, ...] = ()


class _Counting:
    """The caches as the source of one decode in a thread; counts what was decoded."""

    def __init__(self, cache: DecodedSource) -> None:
        self._cache = cache
        self.decoded = 0
        self.decoded_bytes = 0

    def get(self, number: int) -> memoryview | None:
        return self._cache.get(number)

    def put(self, number: int, raw: memoryview, record: Fragment | None = None) -> None:
        self.decoded += 1
        self.decoded_bytes += raw.nbytes
        self._cache.put(number, raw, record)


class FragmentFetcher:
    """Gets decoded fragments; one decode in flight per fragment.

    A decode belongs to the fetcher's nursery and not to who asked first: a cancelled reader leaves,
    the decode goes on for the others and for the cache. A decode that runs is never abandoned
    (it takes milliseconds and holds a buffer); one that still waits for a worker is dropped when
    the nursery is cancelled.

    All methods belong to the event loop's thread.

    Args:
        decode: Decodes a fragment by number and offers it to the source it is given
            (`FragmentLibrary.decode_fragment`); called in worker threads, several at once. Errors
            it raises reach every waiter.
        cache: Where decoded fragments are kept.
        nursery: Where decodes run; must outlive every fetch.
        workers: Most decodes at once in threads; at least 1.
        pool: Decoder processes that fill the cache's shared part; None decodes in threads.
    """

    def __init__(
        self,
        decode: Callable[[int, DecodedSource], memoryview],
        cache: LayeredFragmentCache,
        nursery: trio.Nursery,
        *,
        workers: int,
        pool: DecoderPool | None = None,
    ) -> None:
        self._decode = decode
        self._cache = cache
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(workers)
        self._pool = pool
        self._full_until = 0.0
        self._flights: dict[int, _Flight] = {}
        self._decodes = 0
        self._decoded_bytes = 0
        self._joins = 0

    def begin_nowait(self, number: int, *, urgent: bool = True) -> bool:
        """Have a fragment decoded into the cache that somebody will soon ask for.

        Returns:
            True if it is there already.
        """
        if number in self._flights:
            return False
        if self._cache.holds(number):
            return True
        # Threads take one after the other: what may be wanted must not stand before what is.
        if urgent or self._pool is None or self._usable_pool() is not None:
            self._start(number, urgent=urgent)
        return False

    async def ready(self, number: int) -> None:
        """Wait until a fragment is in the cache, or until its decode has failed.

        Never raises what the decode raised: who reads the fragment will be told.
        """
        if number in self._flights or not self._cache.holds(number):
            await self._join(number, urgent=False).done.wait()

    async def all_ready(self, numbers: Iterable[int]) -> None:
        """Wait as `ready` does, for all that a reader waits for."""
        flights = [
            self._join(number, urgent=True)
            for number in numbers
            if number in self._flights or not self._cache.holds(number)
        ]
        for flight in flights:
            await flight.done.wait()

    async def fetch(self, number: int) -> memoryview | FragmentFile:
        """A decoded fragment.

        Does not pass a checkpoint if the fragment is cached: the mount's request loop passes one
        per request anyway, and a second would cost as much as the rest of the read.

        Args:
            number: The fragment's number in the catalog.

        Returns:
            A read-only view of all its raw bytes, or a file that has them. It outlives its place
            in the cache.

        Raises:
            FragmentError: Whatever the decode raised.
            StorageError: The fetcher's nursery was cancelled before the decode began; retryable.
        """
        found = self._cache.find(number)
        if found is not None:
            return found
        has_left = False
        while True:
            flight = self._flights.get(number)
            if flight is None:
                flight = self._start(number, urgent=True, in_thread=has_left)
            else:
                self._joins += 1
                self._hurry(flight)
            await flight.done.wait()
            if flight.error is not None:
                # Waiters share the exception; a traceback that grew with each would never end.
                raise flight.error.with_traceback(None)
            if flight.raw is None:
                # Decoded by a process, and only asked for by now.
                flight.raw = self._cache.find(number)
            if flight.raw is not None:
                return flight.raw
            # It left a small cache in between: all who waited share one decode whose bytes stay.
            has_left = True

    def statistics(self) -> FetchStatistics:
        """The counters now."""
        pool = self._pool
        return FetchStatistics(
            decodes=self._decodes + (pool.decodes if pool else 0),
            decoded_bytes=self._decoded_bytes + (pool.decoded_bytes if pool else 0),
            joins=self._joins,
            flights=len(self._flights),
            workers=int(self._limiter.total_tokens),
        )

    def _start(self, number: int, *, urgent: bool, in_thread: bool = False) -> _Flight:
        # No await between the look at _flights and this: that is what makes the flight single.
        pool = None if in_thread else self._usable_pool()
        fragment = self._identity(number) if pool is not None else None
        flight = self._flights[number] = _Flight(is_urgent=urgent)
        if pool is None or fragment is None:
            self._nursery.start_soon(self._fly, number, flight, None)
        else:
            flight.decode = pool.submit(
                fragment, partial(self._on_reply, number, flight), urgent=urgent
            )
        return flight

    def _identity(self, number: int) -> FragmentIdentity | None:
        """What a fragment is, for the processes; None if the catalog does not say."""
        try:
            return self._cache.identify(number)
        except FragmentError:
            return None  # the decode in a thread says what is wrong

    def _usable_pool(self) -> DecoderPool | None:
        pool = self._pool
        if pool is None or not pool.is_alive or trio.current_time() < self._full_until:
            return None
        return pool

    def _on_reply(self, number: int, flight: _Flight, reply: Reply) -> None:
        """Most flights end with their first reply: only the others become a task."""
        if reply.status is Status.DONE:
            self._land(number, flight)
        else:
            self._nursery.start_soon(self._fly, number, flight, reply)

    def _land(self, number: int, flight: _Flight) -> None:
        del self._flights[number]
        flight.done.set()

    def _join(self, number: int, *, urgent: bool) -> _Flight:
        """The flight that there is, or a new one."""
        flight = self._flights.get(number)
        if flight is None:
            return self._start(number, urgent=urgent)
        if urgent:
            self._hurry(flight)
        return flight

    def _hurry(self, flight: _Flight) -> None:
        if not flight.is_urgent:
            flight.is_urgent = True
            if self._pool is not None and flight.decode is not None:
                self._pool.hurry(flight.decode)

    async def _fly(self, number: int, flight: _Flight, reply: Reply | None) -> None:
        """Go on after a process's first reply, or without one."""
        try:
            if reply is None or not await self._in_process(number, flight, reply):
                flight.raw = await self._in_thread(number)
        except Exception as error:
            flight.error = error
        except BaseException:
            flight.error = StorageError(
                f"fragment {number} was not decoded: the reader is closing", retryable=True
            )
            raise
        finally:
            self._land(number, flight)

    async def _in_thread(self, number: int) -> memoryview:
        source = _Counting(self._cache)
        raw = await trio.to_thread.run_sync(
            self._decode,
            number,
            source,
            limiter=self._limiter,
            abandon_on_cancel=False,
        )
        self._decodes += source.decoded
        self._decoded_bytes += source.decoded_bytes
        return raw

    async def _in_process(self, number: int, flight: _Flight, reply: Reply) -> bool:
        """Have a decoder process publish a fragment; False if that is not to be had."""
        busy_s = 0.0
        poll_s = _POLL_S
        rounds = 0
        while reply.status is not Status.DONE:
            if reply.status is Status.NEEDS:
                rounds += 1
                if self._needs_itself(number, reply.bases):
                    return False  # a damaged catalog: the decode in a thread says so
                flight.waits_for = reply.bases
                if not await self._bases_ready(reply.bases, urgent=flight.is_urgent):
                    return False  # the decode in a thread says what is wrong with them
            elif reply.status is Status.BUSY and busy_s < _BUSY_S_MAX:
                await trio.sleep(poll_s)
                busy_s += poll_s
                poll_s = min(poll_s * 2, _POLL_S_MAX)
            else:
                if reply.status is Status.FULL:
                    self._full_until = trio.current_time() + _FULL_S
                return False
            pool, fragment = self._usable_pool(), self._identity(number)
            if pool is None or fragment is None:
                return False
            reply = await self._ask(pool, fragment, flight, with_bases=rounds >= _ROUNDS_MAX)
        return True

    async def _ask(
        self, pool: DecoderPool, fragment: FragmentIdentity, flight: _Flight, *, with_bases: bool
    ) -> Reply:
        replies: list[Reply] = []
        replied = trio.Event()

        def on_reply(reply: Reply) -> None:
            replies.append(reply)
            replied.set()

        flight.decode = pool.submit(
            fragment, on_reply, urgent=flight.is_urgent, with_bases=with_bases
        )
        await replied.wait()
        return replies[0]

    def _needs_itself(self, number: int, bases: tuple[int, ...]) -> bool:
        """Whether waiting for some bases would be waiting for oneself."""
        pending, seen = list(bases), set[int]()
        while pending:
            base = pending.pop()
            if base == number:
                return True
            if base not in seen:
                seen.add(base)
                flight = self._flights.get(base)
                pending += flight.waits_for if flight is not None else ()
        return False

    async def _bases_ready(self, bases: tuple[int, ...], *, urgent: bool) -> bool:
        """Wait for some fragments; False if one cannot be decoded."""
        flights = [self._join(base, urgent=urgent) for base in bases]
        for flight in flights:
            await flight.done.wait()
        return all(flight.error is None for flight in flights)
