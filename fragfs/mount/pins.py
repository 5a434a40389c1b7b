"""The mount's lease: what it still needs of models that were removed.

Belongs to the watching thread. The order of the steps is what makes it safe: the generation is
read, *then* the event loop is asked what is open, *then* the catalog which of that is gone. What is
opened after the question is opened from a catalog at least as new.

Source: library/FORMAT.md, "Leases".
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fragfs.library.extents import OpenContent
from fragfs.library.lease import Lease, as_ranges

__all__ = ["MountLease"]


class MountLease:
    """Keeps a lease up to date.

    Args:
        lease: The lease.
        generation: Asks the catalog for its generation.
        copy_open: Copies the contents that are open, in the event loop.
        has_content: Asks the catalog whether it has a content.
    """

    def __init__(
        self,
        lease: Lease,
        generation: Callable[[], int],
        copy_open: Callable[[], Collection[OpenContent]],
        has_content: Callable[[int], bool],
    ) -> None:
        self._lease = lease
        self._generation = generation
        self._copy_open = copy_open
        self._has_content = has_content
        self._seen: int | None = None
        self._gone: dict[int, OpenContent] = {}

    def move(self) -> None:
        """Say what is needed now that the catalog has changed."""
        seen = self._generation()
        opened = self._copy_open()
        self._gone = {one.number: one for one in opened if not self._has_content(one.number)}
        self._seen = seen
        self._say()

    def let_go(self) -> None:
        """Say less where something that is gone was closed; it cannot be opened again."""
        if not self._gone:
            return
        opened = {one.number for one in self._copy_open()}
        if self._gone.keys() <= opened:
            return
        self._gone = {number: one for number, one in self._gone.items() if number in opened}
        self._say()

    def _say(self) -> None:
        pins = (f for one in self._gone.values() for f in one.extents.fragments)
        self._lease.say(self._seen, as_ranges(pins))
