"""What the kernel knows of the mount: inodes with their lookup counts, and names.

A file's inode number is its content's number in the catalog, never reused for other bytes, so pages
the kernel keeps are never stale. A directory gets a number from 2**48 up when it is first seen,
which its path keeps for the life of the mount; a root inode is always there.

Names are recorded only while the kernel may hold them: from the lookup that told it until it forgot
the inode. They are what has to be checked when the catalog changes.

Everything belongs to the event loop's thread; nothing blocks.

Source: libfuse `fuse_lowlevel.h`, "forget"; design of lookup counts in pyfuse3's `Operations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fragfs.library.tree import Directory, File, TreeNode
from fragfs.mount.view import join_path

__all__ = ["DIRECTORY_INODE_MIN", "ROOT_INODE", "Inode", "InodeTable", "KnownDirectory"]

ROOT_INODE = 1

DIRECTORY_INODE_MIN = 1 << 48
"""Content numbers stay below it."""


@dataclass(slots=True)
class Inode:
    """An inode the kernel may refer to.

    Attributes:
        number: Its number.
        path: The directory's path; for a file, the last path it was found under (for messages).
        node: What the kernel was last told about it. Outlives the name: an inode that is open or
            looked up answers `getattr` after its removal.
        lookup_count: How often the kernel was told of it and has not forgotten it.
        names: (parent inode, name) pairs under which the kernel was told of it.
    """

    number: int
    path: bytes
    node: TreeNode
    lookup_count: int = 0
    names: set[tuple[int, bytes]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class KnownDirectory:
    """What the kernel knows of one directory.

    Attributes:
        number: The directory's inode.
        path: Its path.
        mtime_ns: The modification time the kernel was last told.
        names: Inode by name, for the entries the kernel may hold.
    """

    number: int
    path: bytes
    mtime_ns: int
    names: dict[bytes, int]


class InodeTable:
    """Inodes by number, names by parent.

    Args:
        root: The root directory.
    """

    def __init__(self, root: Directory) -> None:
        self._inodes = {ROOT_INODE: Inode(ROOT_INODE, b"", root)}
        self._names: dict[int, dict[bytes, int]] = {}
        # Never shrinks: loop guards of directory walkers rely on (st_dev, st_ino) for the life of
        # the mount, and directories are few.
        self._directories = {b"": ROOT_INODE}

    def __len__(self) -> int:
        return len(self._inodes)

    def get(self, number: int) -> Inode | None:
        """The inode of that number, if the kernel may refer to it."""
        return self._inodes.get(number)

    def number_of(self, path: bytes, node: TreeNode) -> int:
        """The inode number of what is at a path; a directory seen for the first time gets one."""
        if isinstance(node, File):
            return node.content
        return self._directories.setdefault(path, DIRECTORY_INODE_MIN + len(self._directories))

    def remember(self, parent: Inode, name: bytes, node: TreeNode) -> Inode:
        """Record that the kernel is about to be told of an entry: one lookup more."""
        path = join_path(parent.path, name)
        number = self.number_of(path, node)
        inode = self._inodes.get(number)
        if inode is None:
            inode = self._inodes[number] = Inode(number, path, node)
        inode.path = path
        inode.node = node
        inode.lookup_count += 1
        siblings = self._names.setdefault(parent.number, {})
        previous = siblings.get(name)
        if previous != number:
            if previous is not None and previous in self._inodes:
                self._inodes[previous].names.discard((parent.number, name))
            siblings[name] = number
            inode.names.add((parent.number, name))
        return inode

    def forget(self, number: int, count: int) -> None:
        """Record that the kernel takes back lookups; with the last one the inode's names go."""
        inode = self._inodes.get(number)
        if inode is None or number == ROOT_INODE:
            return
        inode.lookup_count -= count
        if inode.lookup_count > 0:
            return
        del self._inodes[number]
        for parent, name in inode.names:
            self._drop(parent, name)

    def drop_name(self, parent: int, name: bytes, number: int) -> None:
        """Stop watching a name, unless it stands for another inode by now."""
        if self._names.get(parent, {}).get(name) != number:
            return
        self._drop(parent, name)
        inode = self._inodes.get(number)
        if inode is not None:
            inode.names.discard((parent, name))

    def known_directories(self) -> list[KnownDirectory]:
        """A copy of what the kernel knows of every directory, for a thread to look at."""
        known = []
        for number, path in [(number, path) for path, number in self._directories.items()]:
            inode = self._inodes.get(number)
            names = self._names.get(number)
            if inode is None and not names:
                continue
            mtime_ns = inode.node.mtime_ns if inode is not None else 0
            known.append(KnownDirectory(number, path, mtime_ns, dict(names or {})))
        return known

    def _drop(self, parent: int, name: bytes) -> None:
        siblings = self._names[parent]
        del siblings[name]
        if not siblings:
            del self._names[parent]
