"""Decoded fragments for many tasks at once: from the cache, else by one decode however many ask.

Decodes run in worker threads, at most as many at a time as there are workers, and are published in
the cache before anyone who waits is woken. Besides what the cache holds, the decoded bytes alive
are those of the running decodes and of the waiters just woken: a queue of waiting reads holds none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from fragfs.errors import StorageError
from fragfs.library.decode import DecodedSource

__all__ = ["FetchStatistics", "FragmentFetcher"]


@dataclass(frozen=True, slots=True)
class FetchStatistics:
    """Counters since the fetcher was made, and what is under way.

    Attributes:
        decodes: Decodes started.
        joins: Fetches that waited for a decode which another fetch had started.
        flights: Decodes running or queued now.
        workers: Most decodes that run at once.
    """

    decodes: int
    joins: int
    flights: int
    workers: int


class _Flight:
    """One decode under way and what came of it."""

    __slots__ = ("done", "error", "raw")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.raw: memoryview | None = None
        self.error: BaseException | None = None


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
        cache: Where decoded fragments are kept; safe to call from any thread.
        nursery: Where decodes run; must outlive every fetch.
        workers: Most decodes at once; at least 1.
    """

    def __init__(
        self,
        decode: Callable[[int, DecodedSource], memoryview],
        cache: DecodedSource,
        nursery: trio.Nursery,
        *,
        workers: int,
    ) -> None:
        self._decode = decode
        self._cache = cache
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(workers)
        self._flights: dict[int, _Flight] = {}
        self._decodes = 0
        self._joins = 0

    def begin_nowait(self, number: int) -> None:
        """Have a fragment decoded into the cache that a `fetch` will soon ask for."""
        if number not in self._flights and self._cache.get(number) is None:
            self._start(number)

    async def fetch(self, number: int) -> memoryview:
        """The decoded bytes of a fragment.

        Does not pass a checkpoint if the fragment is cached: the mount's request loop passes one
        per request anyway, and a second would cost as much as the rest of the read.

        Args:
            number: The fragment's number in the catalog.

        Returns:
            A read-only view of all its raw bytes. Hold it no longer than a reply takes: it may
            outlive its place in the cache.

        Raises:
            FragmentError: Whatever the decode raised.
            StorageError: The fetcher's nursery was cancelled before the decode began; retryable.
        """
        raw = self._cache.get(number)
        if raw is not None:
            return raw
        flight = self._flights.get(number)
        if flight is None:
            flight = self._start(number)
        else:
            self._joins += 1
        await flight.done.wait()
        if flight.error is not None:
            # Waiters share the exception; a traceback that grew with each would never end.
            raise flight.error.with_traceback(None)
        assert flight.raw is not None
        return flight.raw

    def statistics(self) -> FetchStatistics:
        """The counters now."""
        return FetchStatistics(
            decodes=self._decodes,
            joins=self._joins,
            flights=len(self._flights),
            workers=int(self._limiter.total_tokens),
        )

    def _start(self, number: int) -> _Flight:
        # No await between the look at _flights and this: that is what makes the flight single.
        flight = self._flights[number] = _Flight()
        self._decodes += 1
        self._nursery.start_soon(self._fly, number, flight)
        return flight

    async def _fly(self, number: int, flight: _Flight) -> None:
        try:
            flight.raw = await trio.to_thread.run_sync(
                self._decode,
                number,
                self._cache,
                limiter=self._limiter,
                abandon_on_cancel=False,
            )
        except Exception as error:
            flight.error = error
        except BaseException:
            flight.error = StorageError(
                f"fragment {number} was not decoded: the reader is closing", retryable=True
            )
            raise
        finally:
            del self._flights[number]
            flight.done.set()
