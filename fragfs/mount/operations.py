"""Answers the kernel's requests: the pyfuse3 adapter, and nothing but that.

Metadata handlers ask the catalog in the event loop: point lookups of some 20 microseconds, cheaper
than a trip to a thread. None of them awaits between asking the catalog and recording what the
kernel is told; the watcher relies on it (`watch.py`). Decoding happens in threads, below `reader`.

Every write is refused by the kernel before it gets here: the file system is mounted read-only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from fragfs.errors import FragmentError, IntegrityError, NotFoundError
from fragfs.library.extents import OpenContent
from fragfs.library.library import FragmentLibrary
from fragfs.library.tree import Directory, File, TreeNode
from fragfs.mount.contents import OpenContents
from fragfs.mount.errors import FaultLog, answering, answering_at_once
from fragfs.mount.inodes import ROOT_INODE, Inode, InodeTable
from fragfs.mount.reading import MountReading
from fragfs.mount.residency import XATTR_PASSTHROUGH
from fragfs.mount.view import Tree, join_path

__all__ = ["ENTRY_TIMEOUT_S", "XATTR_STATUS", "MountOperations", "Ownership"]

log = logging.getLogger(__name__)

ENTRY_TIMEOUT_S = 3600.0
"""How long the kernel may keep names and attributes. Contents never change and changed names are
invalidated, so this bounds only what a lost invalidation costs."""

_BLOCK_BYTES = 4096
_STATFS_KEPT_S = 5.0
_NAME_BYTES_MAX = 255

XATTR_STATUS = b"user.fragfs.status"
"""Of the root directory: counters of the mount, as JSON."""

_XATTR_SHA256 = b"user.fragfs.sha256"
_XATTR_STORED_BYTES = b"user.fragfs.stored_bytes"
_XATTR_MODELS = b"user.fragfs.models"
_XATTRS = (_XATTR_SHA256, _XATTR_STORED_BYTES, _XATTR_MODELS)


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who everything in the mount belongs to, and who may read it.

    Attributes:
        uid: Owner.
        gid: Group.
        umask: Permission bits taken off 0444 (files) and 0555 (directories).
    """

    uid: int
    gid: int
    umask: int


@dataclass(slots=True)
class _OpenDirectory:
    """One handle of a directory, with the entries as they were when its listing began."""

    inode: Inode
    entries: list[tuple[bytes, TreeNode]]


class MountOperations(pyfuse3.Operations):
    """The requests of one mount.

    Args:
        library: Contents, totals and model names.
        tree: What of the library is shown.
        inodes: What the kernel knows; its root is the tree's.
        reading: Where bytes come from.
        ownership: Who everything belongs to.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        library: FragmentLibrary,
        tree: Tree,
        inodes: InodeTable,
        reading: MountReading,
        ownership: Ownership,
    ) -> None:
        super().__init__()
        self._library = library
        self._tree = tree
        self._inodes = inodes
        self._reading = reading
        self._ownership = ownership
        self.faults = FaultLog()
        # A file's handle is its inode: all handles of a content are the same to every request.
        self._contents = OpenContents(library.open_content, library.data_version)
        self._open_directories: dict[int, _OpenDirectory] = {}
        self._directory_handle_next = 1
        self._statfs: tuple[float, StatvfsData] | None = None

    def open_paths(self) -> list[bytes]:
        """Paths of the files that are open now and that the kernel does not read itself."""
        asked = (number for number in self._contents if not self._reading.backing(number))
        inodes = (self._inodes.get(number) for number in asked)
        return sorted(inode.path for inode in inodes if inode is not None)

    def open_contents(self) -> list[OpenContent]:
        """The contents that are open now."""
        return [self._contents[number] for number in self._contents]

    # --- names and attributes

    @answering
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; a missing one is never cached, so that it may appear at any time."""
        if len(name) > _NAME_BYTES_MAX:  # the kernel's own limit for FUSE is higher
            raise FUSEError(errno.ENAMETOOLONG)
        directory = self._directory(parent)
        node = self._tree.lookup(join_path(directory.path, name))
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(self._inodes.remember(directory, name, node))

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        """Take back lookups. Answers nobody, so not even `FUSEError` may be raised from here."""
        try:
            for number, count in inodes:
                self._inodes.forget(number, count)
        except Exception as error:
            self.faults.report(error, "forget")

    @answering
    async def getattr(self, number: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes; of what has been removed, those it had."""
        inode = self._inode(number)
        if isinstance(inode.node, Directory):
            current = self._tree.lookup(inode.path)
            if isinstance(current, Directory):
                inode.node = current
        return self._attributes(inode)

    @answering
    async def opendir(self, number: int, ctx: RequestContext) -> int:
        """Open a directory; its entries are read when a listing begins."""
        directory = self._directory(number)
        if not isinstance(self._tree.lookup(directory.path), Directory):
            raise FUSEError(errno.ESTALE)
        handle = self._directory_handle_next
        self._directory_handle_next += 1
        self._open_directories[handle] = _OpenDirectory(directory, [])
        return handle

    @answering
    async def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """List entries from one snapshot: none twice, none skipped, whatever changes meanwhile."""
        opened = self._open_directories[handle]
        if start == 0:
            opened.entries = self._tree.list_directory(opened.inode.path) or []
        for index in range(start, len(opened.entries)):
            name, node = opened.entries[index]
            # Recorded first, taken back if the reply is full: the kernel counts only what it got.
            inode = self._inodes.remember(opened.inode, name, node)
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), index + 1):
                self._inodes.forget(inode.number, 1)
                return

    @answering
    async def releasedir(self, handle: int) -> None:
        """Close a directory."""
        del self._open_directories[handle]

    # --- contents

    @answering
    async def open(self, number: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file for reading, where no front takes this request."""
        self._open_content(number, flags)
        return FileInfo(fh=number, keep_cache=True, direct_io=False)

    @answering_at_once
    def open_content(self, number: int, flags: int) -> int:
        """Open a file for reading; gives what the kernel is to read instead of asking, or 0."""
        self._open_content(number, flags)
        return self._reading.backing(number)

    def _open_content(self, number: int, flags: int) -> None:
        """Open one more handle.

        A content that is gone is answered with ESTALE: the kernel then looks the name up again,
        and the caller gets what is there now, or ENOENT.
        """
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise FUSEError(errno.EROFS)
        is_open = number in self._contents
        try:
            self._contents.open(number)
        except NotFoundError as error:
            raise FUSEError(errno.ESTALE) from error
        if not is_open:
            try:
                self._reading.open_file(self._contents[number])
            except BaseException:
                self._contents.close(number)
                raise

    @answering
    async def read(  # type: ignore[override]  # pyfuse3 sends any contiguous buffer
        self, handle: int, offset: int, size: int
    ) -> memoryview | bytearray:
        """Exactly the bytes asked for, up to the end: the kernel fills a short reply with zeros."""
        self.note_read(handle, offset, size)
        return await self.read_content(handle, offset, size)

    def note_read(self, handle: int, offset: int, size: int) -> None:
        """Learn where a reader is."""
        if handle in self._contents:
            self._reading.on_read(self._contents[handle], offset, size)

    async def prepare_read(self, handle: int, offset: int, size: int) -> bool:
        """Have the front given what a read needs; what fails will fail again in the read."""
        if handle not in self._contents:
            return False
        return await self._reading.prepare(self._contents[handle], offset, size)

    @answering
    async def read_content(self, handle: int, offset: int, size: int) -> memoryview | bytearray:
        """Exactly the bytes asked for, up to the end."""
        content = self._contents[handle]
        try:
            data = await self._reading.read(content, offset, size)
            wanted = min(size, max(0, content.size - offset))
            if len(data) != wanted:
                raise IntegrityError(
                    f"a read of {wanted} bytes at {offset} got {len(data)}",
                    expected=wanted,
                    actual=len(data),
                )
        except FragmentError as error:
            # Also where a fragment is not found: the file is there, its bytes are not.
            self._report(error, content)
            raise FUSEError(errno.EIO) from error
        return data

    @answering
    async def release(self, handle: int) -> None:
        """Close one handle of a file."""
        self.close_content(handle)

    def close_content(self, handle: int) -> None:
        """Close one handle of a file."""
        content = self._contents[handle]
        self._contents.close(handle)
        if handle not in self._contents:
            self._reading.close_file(content)

    # --- the rest

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Size and free space of the file system that holds the library; how many files."""
        now = time.monotonic()
        if self._statfs is None or now - self._statfs[0] > _STATFS_KEPT_S:
            self._statfs = (now, self._read_statfs())
        return self._statfs[1]

    @answering
    async def getxattr(self, number: int, name: bytes, ctx: RequestContext) -> bytes:
        """`user.fragfs.*` of files; every other name is one that is not there."""
        if number == ROOT_INODE and name == XATTR_STATUS:
            return json.dumps(self._status()).encode()
        node = self._inode(number).node
        # Not listed: it is no property of the file that a copy could have.
        if name == XATTR_PASSTHROUGH and isinstance(node, File):
            return b"%d" % bool(self._reading.backing(number))
        if name not in _XATTRS or not isinstance(node, File):
            raise FUSEError(pyfuse3.ENOATTR)
        if name == _XATTR_MODELS:
            return b"\n".join(self._library.models_of_content(node.content))
        content = self._contents.find(number)
        if name == _XATTR_SHA256:
            return content.sha256.hex().encode()
        return b"%d" % content.stored_bytes

    @answering
    async def listxattr(self, number: int, ctx: RequestContext) -> Sequence[bytes]:
        """The extended attributes of files."""
        return _XATTRS if isinstance(self._inode(number).node, File) else ()

    # --- helpers

    def _status(self) -> dict[str, object]:
        return self._reading.status() | {"last_errors": self.faults.recent()}

    def _inode(self, number: int) -> Inode:
        inode = self._inodes.get(number)
        if inode is None:
            raise FUSEError(errno.ESTALE)
        return inode

    def _directory(self, number: int) -> Inode:
        inode = self._inode(number)
        if not isinstance(inode.node, Directory):
            raise FUSEError(errno.ENOTDIR)
        return inode

    def _attributes(self, inode: Inode) -> EntryAttributes:
        node = inode.node
        attributes = EntryAttributes()
        attributes.st_ino = inode.number
        attributes.entry_timeout = ENTRY_TIMEOUT_S
        attributes.attr_timeout = ENTRY_TIMEOUT_S
        if isinstance(node, File):
            attributes.st_mode = stat.S_IFREG | (0o444 & ~self._ownership.umask)
            attributes.st_nlink = 1
            attributes.st_size = node.size
            # At least the size: cp takes a file with fewer blocks for one with holes.
            attributes.st_blocks = -(-node.size // 512)
        else:
            attributes.st_mode = stat.S_IFDIR | (0o555 & ~self._ownership.umask)
            attributes.st_nlink = 2
            attributes.st_size = _BLOCK_BYTES
            attributes.st_blocks = _BLOCK_BYTES // 512
        attributes.st_blksize = _BLOCK_BYTES
        attributes.st_uid = self._ownership.uid
        attributes.st_gid = self._ownership.gid
        attributes.st_atime_ns = node.mtime_ns
        attributes.st_mtime_ns = node.mtime_ns
        attributes.st_ctime_ns = node.mtime_ns
        return attributes

    def _read_statfs(self) -> StatvfsData:
        try:
            below = os.statvfs(self._library.path)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        data = StatvfsData()
        data.f_bsize = below.f_bsize
        data.f_frsize = below.f_frsize
        data.f_blocks = below.f_blocks
        data.f_bfree = below.f_bfree
        data.f_bavail = below.f_bavail
        data.f_files = sum(model.file_count for model in self._library.models())
        data.f_ffree = 0
        data.f_favail = 0
        data.f_namemax = _NAME_BYTES_MAX
        return data

    def _report(self, error: FragmentError, content: OpenContent) -> None:
        inode = self._inodes.get(content.number)
        path = inode.path if inode is not None else b"content %d" % content.number
        self.faults.report(
            error,
            path.decode(errors="backslashreplace"),
            lambda: self._library.models_of_content(content.number),
        )
