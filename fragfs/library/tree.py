"""The library as a directory tree: what a mount shows and `ls` lists.

Paths are bytes with components joined by "/"; b"" is the root. Folders above models exist because a
model's name has several components.
"""

from __future__ import annotations

from dataclasses import dataclass

from fragfs.errors import FormatError, FragmentError
from fragfs.library.catalog import CATALOG_REMEDY, Catalog
from fragfs.library.names import as_name, join, parents, printable, split
from fragfs.library.schema import FIRST_CONTENT

__all__ = ["IS_INDEXED", "Directory", "File", "TreeNode", "check_file", "list_directory", "lookup"]

_CONTENT_MAX = 1 << 48
_SIZE_MAX = 1 << 50
"""64 TiB, the most that extents can cover."""

IS_INDEXED = (
    "(SELECT count(*) FROM files AS other INDEXED BY files_content"
    " WHERE other.content = files.content AND other.model = files.model"
    " AND other.directory = files.directory AND other.name = files.name)"
)
"""Whether the index of contents agrees about a row of `files`: a damaged row would show the bytes
of another file, and nothing else in the catalog would tell."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of the tree.

    Attributes:
        mtime_ns: When its set of entries last changed.
        model: The model it is or lies in; None for folders above models.
    """

    mtime_ns: int
    model: bytes | None


@dataclass(frozen=True, slots=True)
class File:
    """A file of the tree.

    Attributes:
        content: The content it shows: its inode number.
        size: Bytes of the file.
        mtime_ns: What the inode shows; the same for every name of the content, forever.
        model: The model it lies in.
    """

    content: int
    size: int
    mtime_ns: int
    model: bytes


TreeNode = Directory | File


def _model_of(catalog: Catalog, path: bytes) -> tuple[int, bytes, int] | None:
    """(number, name, mtime) of the model that `path` is or lies in."""
    names = [path, *parents(path)[:-1]]
    marks = ",".join("?" * len(names))
    row = catalog.row(f"SELECT number, name, mtime_ns FROM models WHERE name IN ({marks})", names)
    return row if row is None else (row[0], row[1], row[2])


def lookup(catalog: Catalog, path: bytes) -> TreeNode | None:
    """What is at `path`, or None."""
    model = _model_of(catalog, path) if path else None
    if model is None:
        row = catalog.row("SELECT mtime_ns FROM folders WHERE path = ?", (path,))
        return Directory(row[0], None) if row else None
    number, name, mtime_ns = model
    if path == name:
        return Directory(mtime_ns, name)
    row = catalog.row(
        f"SELECT files.content, files.mtime_ns, contents.size, contents.mtime_ns, {IS_INDEXED}"
        " FROM files LEFT JOIN contents ON contents.number = files.content"
        " WHERE model = ? AND directory = ? AND name = ?",
        (number, *split(path[len(name) + 1 :])),
    )
    return _node(row, name, path) if row else None


def list_directory(catalog: Catalog, path: bytes) -> list[tuple[bytes, TreeNode]] | None:
    """The entries of a directory by name, or None if `path` is no directory."""
    node = lookup(catalog, path)
    if not isinstance(node, Directory):
        return None
    if node.model is not None:
        rows = catalog.rows(
            "SELECT files.content, files.mtime_ns, contents.size, contents.mtime_ns,"
            f" {IS_INDEXED}, files.name"
            " FROM files LEFT JOIN contents ON contents.number = files.content"
            " WHERE model = (SELECT number FROM models WHERE name = ?) AND directory = ?"
            " ORDER BY files.name",
            (node.model, path[len(node.model) + 1 :]),
        )
        return [
            (_checked(path, row[5]), _node(row, node.model, join(path, row[5]))) for row in rows
        ]
    entries: list[tuple[bytes, TreeNode]] = [
        (_checked(path, split(name)[1]), Directory(mtime_ns, name))
        for name, mtime_ns in catalog.rows(
            "SELECT name, mtime_ns FROM models WHERE parent = ?", (path,)
        )
    ]
    entries += [
        (_checked(path, split(folder)[1]), Directory(mtime_ns, None))
        for folder, mtime_ns in catalog.rows(
            "SELECT path, mtime_ns FROM folders WHERE parent = ? AND path != x''", (path,)
        )
    ]
    return sorted(entries, key=lambda entry: entry[0])


def _checked(directory: bytes, name: bytes) -> bytes:
    """A name as the catalog has it, if a directory can have it."""
    try:
        as_name(name)
    except FragmentError as error:
        raise _damaged(directory, f"an entry whose name cannot be: {error.message}") from error
    if b"/" in name:
        raise _damaged(directory, f"an entry whose name has a slash: {printable(name)}")
    return name


def check_file(path: bytes, content: int, size: int, is_indexed: int) -> None:
    """Check what a row of `files` and its content say of a file.

    Args:
        path: The file, for messages.
        content: The number of its content.
        size: Its bytes.
        is_indexed: What `IS_INDEXED` gave.

    Raises:
        FormatError: It cannot be so.
    """
    if not is_indexed:
        raise _damaged(path, "the table of files and its index disagree")
    if not FIRST_CONTENT <= content < _CONTENT_MAX or not 0 <= size <= _SIZE_MAX:
        raise _damaged(path, f"content {content} of {size} bytes")


def _damaged(path: bytes, what: str) -> FormatError:
    return FormatError(
        f"the catalog is damaged at {printable(path) or 'its root'}: {what}",
        remedy=CATALOG_REMEDY,
    )


def _node(row: tuple[int | None, ...], model: bytes, path: bytes) -> TreeNode:
    content, name_mtime_ns, size, content_mtime_ns, is_indexed = row[:5]
    if content is None:
        return Directory(name_mtime_ns or 0, model)
    if size is None or content_mtime_ns is None:
        raise _damaged(path, f"content {content} is missing")
    check_file(path, content, size, is_indexed or 0)
    return File(content, size, content_mtime_ns, model)
