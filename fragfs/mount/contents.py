"""The file contents that are open, and those that were a moment ago.

All handles of a file share one record of its extents. Loaders that open a shard again for every
tensor would load its extents again each time (6 ms for 28,000 of them, in the event loop), so
contents that were closed are kept for a while. Any commit to the catalog ends that, also for those
that are open then and closed later: a content that nobody has open and that was removed must not be
opened again, since the lease pins what is gone only while it is open.

Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fragfs.library.extents import OpenContent

__all__ = ["OpenContents"]

_CLOSED_EXTENTS_MAX = 1 << 18
"""Extents of the closed contents that are kept: some 6 MB."""


@dataclass(slots=True)
class _Opened:
    content: OpenContent
    version: int
    handle_count: int


class OpenContents:
    """Contents by number, as long as a handle is open or they may soon be opened again.

    Args:
        load: Loads a content by number; raises NotFoundError if it is gone.
        data_version: A number that differs whenever anybody committed to the catalog.
    """

    def __init__(self, load: Callable[[int], OpenContent], data_version: Callable[[], int]) -> None:
        self._load = load
        self._data_version = data_version
        self._opened: dict[int, _Opened] = {}
        self._closed: OrderedDict[int, OpenContent] = OrderedDict()
        self._closed_extents = 0
        self._version: int | None = None

    def __getitem__(self, number: int) -> OpenContent:
        """A content that is open."""
        return self._opened[number].content

    def __contains__(self, number: object) -> bool:
        """Whether a content is open."""
        return number in self._opened

    def __iter__(self) -> Iterator[int]:
        """Numbers of the contents that are open."""
        return iter(self._opened)

    def find(self, number: int) -> OpenContent:
        """A content, whether it is open or not; loads it in the latter case.

        Raises:
            NotFoundError: It is neither open nor in the catalog.
        """
        opened = self._opened.get(number)
        return opened.content if opened is not None else self._load(number)

    def open(self, number: int) -> None:
        """Open one more handle.

        Raises:
            NotFoundError: It is neither open nor in the catalog.
        """
        opened = self._opened.get(number)
        if opened is None:
            # Asked before the content is loaded: a version that is too old only keeps it shorter.
            version = self._drop_outdated()
            content = self._take_closed(number) or self._load(number)
            opened = self._opened[number] = _Opened(content, version, 0)
        opened.handle_count += 1

    def close(self, number: int) -> None:
        """Close one handle."""
        opened = self._opened[number]
        opened.handle_count -= 1
        if not opened.handle_count:
            del self._opened[number]
            # What was loaded before the last commit may have been removed by it.
            if opened.version == self._version:
                self._keep_closed(opened.content)

    def _drop_outdated(self) -> int:
        version = self._data_version()
        if version != self._version:
            self._version = version
            self._closed.clear()
            self._closed_extents = 0
        return version

    def _take_closed(self, number: int) -> OpenContent | None:
        content = self._closed.pop(number, None)
        if content is not None:
            self._closed_extents -= len(content.extents)
        return content

    def _keep_closed(self, content: OpenContent) -> None:
        self._closed[content.number] = content
        self._closed_extents += len(content.extents)
        while self._closed_extents > _CLOSED_EXTENTS_MAX:
            _, dropped = self._closed.popitem(last=False)
            self._closed_extents -= len(dropped.extents)
