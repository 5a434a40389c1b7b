"""`MODEL[/FILE]` arguments, and lists of models in messages."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fragfs.cli.tables import format_bytes
from fragfs.cli.terminal import show_name
from fragfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from fragfs.library.library import FragmentLibrary

__all__ = ["Target", "find_target", "is_below", "parse_target", "predicted_users"]

_LISTED_MAX = 5


@dataclass(frozen=True, slots=True)
class Target:
    """A model, or something in it.

    Attributes:
        model: The model's name.
        path: A file or directory of it; empty for the whole model.
    """

    model: bytes
    path: bytes


def parse_target(argument: str, models: Collection[bytes]) -> Target | None:
    """Find the model an argument names: the longest model name that is a prefix of it.

    Args:
        argument: As typed; slashes at its end are ignored.
        models: The names of all models.

    Returns:
        The target, or None if no model's name is a prefix.

    Raises:
        UsageError: The argument names nothing.
    """
    name = os.fsencode(argument).rstrip(b"/")
    if not name:
        raise UsageError(f"{argument!r} names no model", remedy="see 'fragfs ls' for the models")
    model = name
    while model:
        if model in models:
            return Target(model, name[len(model) + 1 :])
        model = model.rpartition(b"/")[0]
    return None


def find_target(library: FragmentLibrary, argument: str) -> Target:
    """Find what an argument names in a library.

    Raises:
        UsageError: The argument names nothing.
        NotFoundError: The library has no such model, or the model no such file or directory.
    """
    target = parse_target(argument, {info.name for info in library.models()})
    if target is None:
        # The library's own error suggests names that are near.
        return Target(library.model(os.fsencode(argument).rstrip(b"/")).name, b"")
    if target.path and library.lookup(target.model + b"/" + target.path) is None:
        model, path = os.fsdecode(target.model), os.fsdecode(target.path)
        raise NotFoundError(
            f"model {model} has no file {path}",
            remedy=f"see its files with: fragfs ls {model}",
            path=path,
        )
    return target


def is_below(path: bytes, directory: bytes) -> bool:
    """True if `path` is `directory` or lies in it; everything lies in b""."""
    return not directory or path == directory or path.startswith(directory + b"/")


def predicted_users(users: Sequence[tuple[bytes, int]]) -> str:
    """Whose predictions keep what is in no file any more, and how it goes.

    Args:
        users: Models, and the record bytes that each of them needs.
    """
    names = [f"{show_name(name)} ({format_bytes(size)})" for name, size in users]
    if len(names) > _LISTED_MAX:
        names[_LISTED_MAX:] = [f"{len(names) - _LISTED_MAX:,} more"]
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"{listed}; it goes when they do, or when fragfs optimize finds other bases"
