"""What is to be added: the files of a source directory, found without reading them.

Links are followed to regular files inside the source, and from a hub snapshot into the `blobs` of
the same repository, because that is where a hub cache keeps its files. Any other link is refused by
name: it would copy something the user did not point at. Tools' own state is left out and listed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from fragfs.errors import StorageError, UsageError
from fragfs.library.files import storage_error
from fragfs.library.names import as_name, join, printable

__all__ = [
    "SourceDirectory",
    "SourceFile",
    "SourceTree",
    "check_outside",
    "check_unchanged",
    "read_source",
    "scan_source",
]

_SKIPPED_NAMES = frozenset({b".git", b".cache", b".locks", b".no_exist"})
_SKIPPED_PATTERNS = ("*.lock", "*.incomplete", ".tmp*.safetensors", ".*.safetensors.tmp*")
_INDEX_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file to be added.

    Attributes:
        path: Where it goes inside the model.
        source: Where it is.
        size: Its size when it was found.
        mtime_ns: Its modification time.
        mode: Its permission bits.
        is_link: True if `source` is a symbolic link, or was found through one.
    """

    path: bytes
    source: Path
    size: int
    mtime_ns: int
    mode: int
    is_link: bool


@dataclass(frozen=True, slots=True)
class SourceDirectory:
    """A directory to be shown in the model.

    Attributes:
        path: Where it goes inside the model; b"" is the model's own directory.
        mode: Its permission bits.
        mtime_ns: Its modification time.
    """

    path: bytes
    mode: int
    mtime_ns: int


@dataclass(slots=True)
class SourceTree:
    """Everything found below one source path.

    Attributes:
        root: The source path.
        files: In path order.
        directories: The model's own directory first.
        skipped: (path, reason) of what was left out.
        warnings: Remarks such as a shard that an index names and that is not there.
    """

    root: Path
    files: list[SourceFile] = field(default_factory=list)
    directories: list[SourceDirectory] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_source(root: Path, *, follow_links: bool) -> SourceTree:
    """Find the files of a source path: a directory, or one regular file.

    Raises:
        UsageError: A link that leads elsewhere; nothing to add.
        StorageError: Something cannot be listed or looked at.
    """
    tree = SourceTree(root)
    status = _stat(root)
    if stat.S_ISREG(status.st_mode):
        name = as_name(os.fsencode(root.name))
        tree.directories.append(SourceDirectory(b"", 0o755, _mtime_ns(status, root)))
        tree.files.append(_file(name, root, status))
        return tree
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{root} is neither a directory nor a regular file", path=str(root))
    _Scanner(tree, root, follow_links=follow_links).scan(root, status)
    tree.files.sort(key=lambda file: file.path)
    tree.warnings.extend(_missing_shards(tree))
    return tree


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A directory to be listed: `above` are the identities of those around it."""

    directory: Path
    path: bytes
    status: os.stat_result
    above: frozenset[tuple[int, int]]
    through_link: bool


class _Scanner:
    def __init__(self, tree: SourceTree, root: Path, *, follow_links: bool) -> None:
        self._tree = tree
        self._follow_links = follow_links
        self._waiting: list[_Waiting] = []
        real = Path(os.path.realpath(root))
        self._allowed = [real]
        # A hub cache: REPO/snapshots/REVISION/file -> ../../blobs/DIGEST
        for parent in real.parents:
            if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
                self._allowed.append(parent.parent / "blobs")

    def scan(self, root: Path, status: os.stat_result) -> None:
        self._waiting.append(_Waiting(root, b"", status, frozenset(), through_link=False))
        while self._waiting:
            self._list(self._waiting.pop())

    def _list(self, waiting: _Waiting) -> None:
        directory, status = waiting.directory, waiting.status
        identity = (status.st_dev, status.st_ino)
        if identity in waiting.above:
            self._tree.skipped.append((waiting.path, "a link to a directory above it"))
            return
        mode, mtime_ns = stat.S_IMODE(status.st_mode), _mtime_ns(status, directory)
        self._tree.directories.append(SourceDirectory(waiting.path, mode, mtime_ns))
        try:
            names = sorted(os.listdir(os.fsencode(directory)))
        except OSError as error:
            raise storage_error(error, f"cannot list {directory}") from error
        for name in names:
            inside = join(waiting.path, name)
            if name in _SKIPPED_NAMES or any(
                fnmatchcase(os.fsdecode(name), pattern) for pattern in _SKIPPED_PATTERNS
            ):
                self._tree.skipped.append((inside, "a tool's own state"))
            else:
                self._entry(waiting, name, as_name(inside), waiting.above | {identity})

    def _entry(
        self, parent: _Waiting, name: bytes, path: bytes, above: frozenset[tuple[int, int]]
    ) -> None:
        source = parent.directory / os.fsdecode(name)
        try:
            is_link = source.is_symlink()
            status = source.stat()
        except FileNotFoundError as error:
            raise UsageError(
                f"{source} is a link to nothing (or was removed while it was looked at)",
                path=str(source),
                remedy="complete the download, or remove the link",
            ) from error
        except OSError as error:
            raise storage_error(error, f"cannot look at {source}") from error
        if is_link:
            self._check_link(source, is_directory=stat.S_ISDIR(status.st_mode))
        through_link = is_link or parent.through_link
        if stat.S_ISDIR(status.st_mode):
            self._waiting.append(_Waiting(source, path, status, above, through_link))
        elif stat.S_ISREG(status.st_mode):
            self._tree.files.append(_file(path, source, status, is_link=through_link))
        else:
            self._tree.skipped.append((path, "not a regular file"))

    def _check_link(self, source: Path, *, is_directory: bool) -> None:
        if self._follow_links:
            return
        target = Path(os.path.realpath(source))
        if is_directory or not any(target.is_relative_to(place) for place in self._allowed):
            raise UsageError(
                f"{source} is a link to {target}, which is outside the source"
                if not is_directory
                else f"{source} is a link to the directory {target}",
                path=str(source),
                remedy="add the target itself, or pass --follow-links to store what links lead to",
            )


def _file(
    path: bytes, source: Path, status: os.stat_result, *, is_link: bool = False
) -> SourceFile:
    return SourceFile(
        path,
        source,
        status.st_size,
        _mtime_ns(status, source),
        stat.S_IMODE(status.st_mode),
        is_link,
    )


def _mtime_ns(status: os.stat_result, path: Path) -> int:
    """The modification time, if 64 bits of nanoseconds can say it (1678 to 2262)."""
    if not -(1 << 63) <= status.st_mtime_ns < 1 << 63:
        raise UsageError(
            f"{path} has a modification time that cannot be kept",
            path=str(path),
            remedy="set another one with touch",
        )
    return status.st_mtime_ns


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} does not exist", path=str(path), remedy="check the spelling of the path"
        ) from error
    except OSError as error:
        raise storage_error(error, f"cannot look at {path}") from error


def _missing_shards(tree: SourceTree) -> Iterator[str]:
    """Name shards that an index file lists and that the source lacks: a download cut short."""
    present = {file.path for file in tree.files}
    for file in tree.files:
        if not file.path.endswith(b".index.json") or file.size > _INDEX_BYTES_MAX:
            continue
        try:
            shards = set(json.loads(file.source.read_bytes())["weight_map"].values())
            names = {os.fsencode(shard) for shard in shards if isinstance(shard, str)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        directory = file.path.rpartition(b"/")[0]
        missing = sorted(name for name in names if join(directory, name) not in present)
        if missing:
            yield (
                f"{printable(file.path)} names {len(missing)} file(s) that are not there,"
                f" e.g. {printable(missing[0])}"
            )


def check_outside(root: Path, library: Path) -> None:
    """Refuse a source that contains the library or lies in it.

    Raises:
        UsageError: It does.
    """
    source, store = Path(os.path.realpath(root)), Path(os.path.realpath(library))
    if store.is_relative_to(source) or source.is_relative_to(store):
        raise UsageError(
            f"the source {root} and the library {library} contain one another",
            path=str(root),
            remedy="add a directory outside the library",
        )


def read_source(file: SourceFile) -> tuple[int, os.stat_result]:
    """Open a source file for reading; returns its descriptor and its status.

    Raises:
        StorageError: It cannot be opened; the message names it.
    """
    try:
        # Without O_NONBLOCK a pipe that took the file's place would hold us forever.
        descriptor = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise storage_error(error, f"cannot read {file.source}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StorageError(
            f"{file.source} is no regular file any more",
            path=str(file.source),
            remedy="put the file back, or add the directory without it",
        )
    return descriptor, status


def check_unchanged(file: SourceFile, before: os.stat_result, descriptor: int) -> None:
    """Refuse a file that was changed while it was read.

    Raises:
        StorageError: Size or times differ from before.
    """
    after = os.fstat(descriptor)
    fields = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    if any(getattr(before, name) != getattr(after, name) for name in fields):
        raise StorageError(
            f"{file.source} changed while it was read",
            path=str(file.source),
            retryable=True,
            remedy="wait until nothing writes to it and add it again",
        )
