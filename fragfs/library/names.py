"""Names of models and files: bytes, components joined by "/", never leaving their place."""

from __future__ import annotations

import os

from fragfs.errors import LimitError, UsageError

__all__ = [
    "MODEL_NAME_BYTES_MAX",
    "NAME_BYTES_MAX",
    "as_name",
    "join",
    "parents",
    "printable",
    "split",
]

NAME_BYTES_MAX = 255
"""Longest path component a Linux file system shows."""
MODEL_NAME_BYTES_MAX = 1024
"""Longest model name; leaves room for file paths below PATH_MAX."""


def as_name(name: str | bytes) -> bytes:
    """A model name or a path inside a model, checked.

    Raises:
        UsageError: Empty, absolute, with empty, "." or ".." components, or with a NUL.
        LimitError: Too long for a file system to show.
    """
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {name!r} cannot be a file name") from error
    shown = printable(raw)
    if not raw:
        raise UsageError("a name is empty")
    if b"\0" in raw:
        raise UsageError(f"the name {shown} contains a NUL byte")
    if raw.startswith(b"/") or raw.endswith(b"/"):
        raise UsageError(
            f"{shown} starts or ends with a slash: that is a path, not a name in the library",
            remedy='use a relative name such as "org/name"',
        )
    for component in raw.split(b"/"):
        if component in (b"", b".", b".."):
            raise UsageError(
                f"the name {shown} has the component {printable(component)!r}",
                remedy='use a relative path such as "org/name", without "." and ".."',
            )
        if len(component) > NAME_BYTES_MAX:
            raise LimitError(f"a component of {shown} is longer than {NAME_BYTES_MAX} bytes")
    if len(raw) > MODEL_NAME_BYTES_MAX:
        raise LimitError(f"the name {shown} is longer than {MODEL_NAME_BYTES_MAX} bytes")
    return raw


def printable(name: bytes) -> str:
    """A name for messages: control characters and undecodable bytes escaped, on one line."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def split(path: bytes) -> tuple[bytes, bytes]:
    """Directory and last component; the directory of a single component is b""."""
    directory, _, name = path.rpartition(b"/")
    return directory, name


def join(directory: bytes, name: bytes) -> bytes:
    """The path of `name` in `directory`; either may be b""."""
    return b"/".join(part for part in (directory, name) if part)


def parents(path: bytes) -> list[bytes]:
    """Every directory above `path`, nearest first, b"" last."""
    found = []
    while path:
        path, _ = split(path)
        found.append(path)
    return found
