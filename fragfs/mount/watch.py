"""Notices changes of the catalog and takes back what the kernel was told that is no longer true.

The mount's lease is moved first: garbage collection waits for it, and what stops the rest must not
stop that.

Runs in a thread of its own, with its own connection to the catalog: telling the kernel to forget a
name waits for requests on that name, so it must never happen in a request handler nor under a lock
that a handler needs.

Why no change is missed: a handler asks the catalog and records the name in one step of the event
loop. The thread sees that the catalog changed, and only then has the event loop copy the names. A
name recorded before the copy is checked; one recorded after it was read from the changed catalog.

Source: libfuse `fuse_lowlevel.h`, `fuse_lowlevel_notify_inval_entry`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fragfs.errors import FragmentError
from fragfs.library.tree import Directory, File, TreeNode
from fragfs.mount.inodes import DIRECTORY_INODE_MIN, KnownDirectory
from fragfs.mount.view import Tree

__all__ = [
    "CatalogWatcher",
    "KernelCaches",
    "LeaseKeeper",
    "StaleName",
    "Staleness",
    "plan_invalidation",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StaleName:
    """A name that no longer stands for the inode the kernel was told.

    Attributes:
        parent: Inode of the directory.
        name: The entry.
        number: The inode it stood for.
    """

    parent: int
    name: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Staleness:
    """What the kernel must forget.

    Attributes:
        names: Entries that are gone or stand for something else.
        directories: Inodes of directories whose modification time changed.
    """

    names: tuple[StaleName, ...]
    directories: tuple[int, ...]


class KernelCaches(Protocol):
    """The kernel's side of invalidation; may block, never called in the event loop."""

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel look an entry up again; OSError if it refuses."""

    def forget_attributes(self, number: int) -> None:
        """Make the kernel ask for an inode's attributes again; OSError if it refuses."""


def plan_invalidation(known: Sequence[KnownDirectory], tree: Tree) -> Staleness:
    """Compare what the kernel knows with the catalog. Blocks on catalog queries only."""
    names: list[StaleName] = []
    directories: list[int] = []
    for directory in known:
        if directory.names:
            current = dict(tree.list_directory(directory.path) or ())
            names.extend(
                StaleName(directory.number, name, number)
                for name, number in directory.names.items()
                if not _stands_for(current.get(name), number)
            )
        node = tree.lookup(directory.path)
        if isinstance(node, Directory) and node.mtime_ns != directory.mtime_ns:
            directories.append(directory.number)
    return Staleness(tuple(names), tuple(directories))


class LeaseKeeper(Protocol):
    """What tells garbage collection what the mount still needs; called in the watching thread."""

    def move(self) -> None:
        """Say what is needed now that the catalog has changed."""

    def let_go(self) -> None:
        """Say less where something that is gone was closed."""


class CatalogWatcher:
    """The thread's work.

    Args:
        tree: What the mount shows; asked in the watching thread.
        data_version: A number that differs whenever anybody committed to the catalog; asked in the
            watching thread only.
        copy_known: Copies what the kernel knows, in the event loop.
        drop_names: Stops recording names, in the event loop.
        kernel: Where stale names are made forgotten.
        lease: Keeps what is open readable.
        interval_s: Seconds between looks at the catalog.
    """

    def __init__(
        self,
        tree: Tree,
        data_version: Callable[[], int],
        copy_known: Callable[[], list[KnownDirectory]],
        drop_names: Callable[[Sequence[StaleName]], None],
        kernel: KernelCaches,
        lease: LeaseKeeper,
        *,
        interval_s: float = 0.25,
    ) -> None:
        self._tree = tree
        self._data_version = data_version
        self._copy_known = copy_known
        self._drop_names = drop_names
        self._kernel = kernel
        self._lease = lease
        self._interval_s = interval_s
        # None: the first look always compares, so nothing committed before it is missed.
        self._version: int | None = None

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set; survives a catalog that cannot be read for a while."""
        failed = False
        while not stop.is_set():
            try:
                self.look()
                failed = False
            except Exception as error:  # a mount that shows an old state beats one that is gone
                if not failed:
                    bug = None if isinstance(error, FragmentError) else error
                    log.error("changes of the library stay unseen: %s", error, exc_info=bug)
                failed = True
            stop.wait(self._interval_s)

    def look(self) -> Staleness | None:
        """Look once; None if nothing was committed since the last look."""
        version = self._data_version()
        if version == self._version:
            self._lease.let_go()
            return None
        self._lease.move()
        stale = plan_invalidation(self._copy_known(), self._tree)
        # Dropped first: a name looked up again in between is recorded anew and stays recorded.
        if stale.names:
            self._drop_names(stale.names)
        for name in stale.names:
            with _unknown_ignored():
                self._kernel.forget_name(name.parent, name.name)
        for number in stale.directories:
            with _unknown_ignored():
                self._kernel.forget_attributes(number)
        self._version = version
        return stale


def _stands_for(node: TreeNode | None, number: int) -> bool:
    if isinstance(node, File):
        return node.content == number
    return node is not None and number >= DIRECTORY_INODE_MIN


@contextlib.contextmanager
def _unknown_ignored() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # ENOENT: the kernel had forgotten by itself. ENOTCONN, ENODEV: unmounted meanwhile.
        if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
            log.warning("the kernel did not take an invalidation: %s", error)
