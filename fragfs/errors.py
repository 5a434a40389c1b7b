"""Every error fragfs raises on purpose, in one small family.

Users catch `FragmentError`; rooms raise the narrowest class. Each error carries fields, not only
text, so that the mount can map it to an errno and the command line can print the remedy.
"""

from __future__ import annotations

__all__ = [
    "FormatError",
    "FragmentError",
    "IntegrityError",
    "LimitError",
    "NotFoundError",
    "StorageError",
    "UsageError",
]


class FragmentError(Exception):
    """Root of all errors raised by fragfs.

    Args:
        message: What happened and where.
        remedy: What the user can do about it, as an imperative sentence without a full stop.
        path: The file concerned, if there is one.
        fragment: Full hex of the fragment concerned, if there is one.
        offset: Byte offset in `path` where the trouble is, if known.
        expected: What should have been there.
        actual: What was there.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        path: str | None = None,
        fragment: str | None = None,
        offset: int | None = None,
        expected: object = None,
        actual: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.path = path
        self.fragment = fragment
        self.offset = offset
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class UsageError(FragmentError):
    """The caller or the configuration asks for something that makes no sense."""


class NotFoundError(FragmentError):
    """A library, model, file or fragment that was named does not exist."""


class FormatError(FragmentError):
    """Bytes on disk break a rule of a file format (ours or a model file's)."""


class IntegrityError(FragmentError):
    """Stored bytes differ from the checksum or digest recorded for them."""


class LimitError(FragmentError):
    """A documented limit would be exceeded."""


class StorageError(FragmentError):
    """The operating system refused: full disk, lost permission, lock held, I/O error.

    Args:
        message: See `FragmentError`.
        retryable: True if the same call may succeed later without anybody changing anything.
        errno: The operating system's error number, if there is one.
        **fields: The other fields of `FragmentError`.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        errno: int | None = None,
        remedy: str | None = None,
        path: str | None = None,
        fragment: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, path=path, fragment=fragment, offset=offset)
        self.retryable = retryable
        self.errno = errno
