"""Decoded fragments that one process has at hand: least recently used leave first.

Used by the mount, so that neighbouring reads of one fragment look for it once: what it holds are
open files of the shared cache, or, without one, the bytes themselves. Bounded in bytes, not in
entries, because fragments differ in size by three orders of magnitude.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fragfs.errors import UsageError

__all__ = ["CACHE_BYTES_MAX_DEFAULT", "MemoryCacheStatistics", "MemoryFragmentCache"]

CACHE_BYTES_MAX_DEFAULT = 96 << 20
"""Leaves room for interpreter, numpy, SQLite and decode buffers in a daemon of 300 MB."""


@dataclass(frozen=True, slots=True)
class MemoryCacheStatistics:
    """Counters since the cache was made, and what it holds now.

    Attributes:
        bytes_held: Sum of the sizes of the fragments held.
        bytes_max: The budget.
        fragment_count: Fragments held.
        hits: Calls of `get` that found the fragment.
        misses: Calls of `get` that did not.
        evictions: Fragments that left to make room.
    """

    bytes_held: int
    bytes_max: int
    fragment_count: int
    hits: int
    misses: int
    evictions: int


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Held = TypeVar("Held", bound=_Sized)


class MemoryFragmentCache(Generic[Held]):
    """A byte-bounded LRU of decoded fragments.

    Safe to call from any thread; never blocks on anything but its own short lock. A fragment's
    bytes never change, so what was handed out stays right after the fragment was evicted.

    Args:
        bytes_max: Most bytes of fragments to hold; 0 holds nothing.

    Raises:
        UsageError: `bytes_max` is negative.
    """

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX_DEFAULT) -> None:
        if bytes_max < 0:
            raise UsageError(f"the fragment cache cannot hold {bytes_max} bytes")
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._fragments: OrderedDict[int, Held] = OrderedDict()
        self._bytes_held = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def get(self, number: int) -> Held | None:
        """The decoded bytes of a fragment, which thereby becomes the most recently used."""
        with self._lock:
            raw = self._fragments.get(number)
            if raw is None:
                self._misses += 1
                return None
            self._fragments.move_to_end(number)
            self._hits += 1
            return raw

    def holds(self, number: int) -> bool:
        """Whether a fragment is held; does not count as a use."""
        with self._lock:
            return number in self._fragments

    def put(self, number: int, raw: Held) -> None:
        """Keep the decoded bytes of a fragment, if they fit the budget at all.

        Args:
            number: The fragment's number in the catalog.
            raw: All its bytes; kept without a copy, so the caller must never change them.
        """
        if raw.nbytes > self._bytes_max:
            return
        with self._lock:
            previous = self._fragments.pop(number, None)
            if previous is not None:
                self._bytes_held -= previous.nbytes
            self._fragments[number] = raw
            self._bytes_held += raw.nbytes
            while self._bytes_held > self._bytes_max:
                _, evicted = self._fragments.popitem(last=False)
                self._bytes_held -= evicted.nbytes
                self._evictions += 1

    def drop(self, number: int) -> None:
        """Let go of a fragment, if it is held."""
        with self._lock:
            raw = self._fragments.pop(number, None)
            if raw is not None:
                self._bytes_held -= raw.nbytes

    def statistics(self) -> MemoryCacheStatistics:
        """The counters at one instant."""
        with self._lock:
            return MemoryCacheStatistics(
                bytes_held=self._bytes_held,
                bytes_max=self._bytes_max,
                fragment_count=len(self._fragments),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )
