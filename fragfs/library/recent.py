"""Decoded fragments kept for a moment, so that planning does not decode a base for each sibling.

Bounded in bytes. Only writers use it: readers have the fragment cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from fragfs.types import Fragment

__all__ = ["RecentFragments"]


class RecentFragments:
    """The raw bytes of the fragments used last; a `DecodedSource`. Safe in any thread.

    Args:
        bytes_max: Most bytes to hold.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_held = 0
        self._lock = threading.Lock()
        self._fragments: OrderedDict[int, memoryview] = OrderedDict()

    def get(self, number: int) -> memoryview | None:
        """The raw bytes of a fragment, if they are held."""
        with self._lock:
            raw = self._fragments.get(number)
            if raw is not None:
                self._fragments.move_to_end(number)
            return raw

    def put(self, number: int, raw: memoryview, record: Fragment | None = None) -> None:
        """Hold the raw bytes of a fragment, which must never change."""
        with self._lock:
            previous = self._fragments.pop(number, None)
            self._bytes_held += raw.nbytes - (previous.nbytes if previous is not None else 0)
            self._fragments[number] = raw
            while self._bytes_held > self._bytes_max and self._fragments:
                _, evicted = self._fragments.popitem(last=False)
                self._bytes_held -= evicted.nbytes
