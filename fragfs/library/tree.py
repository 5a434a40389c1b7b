"""The library as a directory tree: what a mount shows and `ls` lists.

Paths are bytes with components joined by "/"; b"" is the root. Folders above models exist because a
model's name has several components.
"""

from __future__ import annotations

from dataclasses import dataclass

from fragfs.library.catalog import Catalog
from fragfs.library.names import parents, split

__all__ = ["Directory", "File", "TreeNode", "list_directory", "lookup"]


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
        "SELECT files.content, files.mtime_ns, contents.size, contents.mtime_ns FROM files"
        " LEFT JOIN contents ON contents.number = files.content"
        " WHERE model = ? AND directory = ? AND name = ?",
        (number, *split(path[len(name) + 1 :])),
    )
    return _node(row, name) if row else None


def list_directory(catalog: Catalog, path: bytes) -> list[tuple[bytes, TreeNode]] | None:
    """The entries of a directory by name, or None if `path` is no directory."""
    node = lookup(catalog, path)
    if not isinstance(node, Directory):
        return None
    if node.model is not None:
        rows = catalog.rows(
            "SELECT files.content, files.mtime_ns, contents.size, contents.mtime_ns, files.name"
            " FROM files LEFT JOIN contents ON contents.number = files.content"
            " WHERE model = (SELECT number FROM models WHERE name = ?) AND directory = ?"
            " ORDER BY files.name",
            (node.model, path[len(node.model) + 1 :]),
        )
        return [(row[4], _node(row, node.model)) for row in rows]
    entries: list[tuple[bytes, TreeNode]] = [
        (split(name)[1], Directory(mtime_ns, name))
        for name, mtime_ns in catalog.rows(
            "SELECT name, mtime_ns FROM models WHERE parent = ?", (path,)
        )
    ]
    entries += [
        (split(folder)[1], Directory(mtime_ns, None))
        for folder, mtime_ns in catalog.rows(
            "SELECT path, mtime_ns FROM folders WHERE parent = ? AND path != x''", (path,)
        )
    ]
    return sorted(entries, key=lambda entry: entry[0])


def _node(row: tuple[int | None, ...], model: bytes) -> TreeNode:
    content, name_mtime_ns, size, content_mtime_ns = row[:4]
    if content is None or size is None or content_mtime_ns is None:
        return Directory(name_mtime_ns or 0, model)
    return File(content, size, content_mtime_ns, model)
