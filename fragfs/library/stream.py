"""A stored file as a Python file object: reading models without a mount."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fragfs.errors import IntegrityError
from fragfs.library.extents import OpenContent

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["ContentStream"]


class ContentStream(io.RawIOBase):
    """A read-only, seekable view of one file content; nothing is cached but the last fragment.

    Wrap it in `io.BufferedReader` for small reads. Not for several threads at once.

    Args:
        content: The file.
        decode: Decodes a fragment by number; its errors leave `read` as they are.
        let_go: Called once when it is closed.
    """

    def __init__(
        self,
        content: OpenContent,
        decode: Callable[[int], memoryview],
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._let_go = let_go
        self._content = content
        self._decode = decode
        self._position = 0
        self._last: tuple[int, memoryview] | None = None

    def close(self) -> None:
        """Let go of the file."""
        if not self.closed:
            self._let_go()
        super().close()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; positions behind the end read as end of file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._content.size}
        position = start[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer, short only at the end of the file.

        Raises:
            IntegrityError: A fragment is damaged.
            StorageError: A pack cannot be read.
        """
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), max(0, self._content.size - self._position))
        done = 0
        index = self._content.extents.index_at(self._position) if wanted else 0
        while done < wanted:
            extent = self._content.extents[index]
            skip = self._position - extent.offset
            size = min(extent.size - skip, wanted - done)
            start = extent.fragment_offset + skip
            raw = self._fragment(extent.fragment)
            if start + size > raw.nbytes:
                raise IntegrityError(
                    f"fragment {extent.fragment} has {raw.nbytes} bytes, an extent needs"
                    f" {start + size}",
                    remedy="restore the catalog from a backup, or add the model again",
                )
            target[done : done + size] = raw[start : start + size]
            self._position += size
            done += size
            index += 1
        return done

    def _fragment(self, number: int) -> memoryview:
        if self._last is None or self._last[0] != number:
            self._last = (number, self._decode(number))
        return self._last[1]
