"""The part of a library that a mount shows: all models, or some with the folders above them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fragfs.library.tree import TreeNode

__all__ = ["Tree", "TreeView", "join_path"]


class Tree(Protocol):
    """A tree of directories and files under bytes paths; b"" is the root. `FragmentLibrary`."""

    def lookup(self, path: bytes) -> TreeNode | None:
        """The node at a path, or None."""

    def list_directory(self, path: bytes) -> list[tuple[bytes, TreeNode]] | None:
        """The entries of a directory by name; None if there is no such directory."""


def join_path(parent: bytes, name: bytes) -> bytes:
    """The path of an entry of a directory."""
    return parent + b"/" + name if parent else name


class TreeView:
    """A tree with everything hidden but some models. As safe in threads as the tree it shows.

    Args:
        tree: The whole tree.
        models: Names of the models to show; empty shows everything.
    """

    def __init__(self, tree: Tree, models: Sequence[bytes] = ()) -> None:
        self._tree = tree
        self._models = tuple(models)

    def lookup(self, path: bytes) -> TreeNode | None:
        """The node at a path, or None if there is none or it is hidden."""
        return self._tree.lookup(path) if self._is_visible(path) else None

    def list_directory(self, path: bytes) -> list[tuple[bytes, TreeNode]] | None:
        """The visible entries of a directory by name; None if there is no such directory."""
        if not self._is_visible(path):
            return None
        entries = self._tree.list_directory(path)
        if entries is None or not self._models:
            return entries
        return [entry for entry in entries if self._is_visible(join_path(path, entry[0]))]

    def _is_visible(self, path: bytes) -> bool:
        if not self._models or not path:
            return True
        return any(
            path == model or path.startswith(model + b"/") or model.startswith(path + b"/")
            for model in self._models
        )
