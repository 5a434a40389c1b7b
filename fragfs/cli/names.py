"""`MODEL[/FILE]` arguments. Pure."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fragfs.errors import NotFoundError, UsageError

__all__ = ["Target", "files_below", "parse_target"]


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


def files_below(target: Target, paths: Iterable[bytes]) -> list[bytes]:
    """The files that a target stands for.

    Args:
        target: The target.
        paths: All files of its model.

    Returns:
        The file itself, or every file of the directory; all files for a whole model.

    Raises:
        NotFoundError: The model has no such file or directory.
    """
    inside = target.path + b"/" if target.path else b""
    found = [path for path in paths if path == target.path or path.startswith(inside)]
    if not found and target.path:
        model, path = os.fsdecode(target.model), os.fsdecode(target.path)
        raise NotFoundError(
            f"model {model!r} has no file {path!r}",
            remedy=f"see 'fragfs ls {model}' for its files",
            path=path,
        )
    return found
