"""A disk that remembers: what a command did to a library, and what a power cut may leave of it.

`RecordedDisk` is the real file system behind the `Files` interface, and writes down every
operation. `crash_states` plays them back up to each one and gives the directories that could be
found afterwards: bytes that were not synced may be there, missing, torn or out of order, and so may
names in directories that were not synced. The catalog is written by SQLite, past the interface: its
log is cut after each frame that a commit appends, and within each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fragfs.library.catalog import CATALOG_NAME
from fragfs.library.files import OsFiles

__all__ = ["CrashState", "RecordedDisk", "crash_states", "directory_files"]

_WAL_NAME = f"{CATALOG_NAME}-wal"
_WAL_HEADER_SIZE = 32
_FRAME_HEADER_SIZE = 24
_NOT_ON_DISK = {_WAL_NAME, f"{CATALOG_NAME}-shm", "lock", "lock.next"}
"""The log is kept with the catalog; the others are gone, or mean nothing, after a power cut."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation. `kind` is the name of a method of `Files`, or one of

    "written": SQLite filled the file, "closed": and synced it; "catalog": it committed, and left
    `data` and `log`.
    """

    kind: str
    path: Path
    data: bytes = b""
    new: Path | None = None
    log: bytes = b""


@dataclass(frozen=True, slots=True)
class CrashState:
    """A directory as it may be found after a power cut.

    Attributes:
        label: The operation before which the power went, and what became of unsynced data.
        files: Bytes of every file, by path relative to the recorded directory; None: a directory.
    """

    label: str
    files: dict[Path, bytes | None]

    def write(self, directory: Path) -> None:
        """Make it real below a directory that does not exist yet."""
        directory.mkdir()
        for path in sorted(self.files):
            data = self.files[path]
            if data is None:
                (directory / path).mkdir(parents=True, exist_ok=True)
            else:
                (directory / path).write_bytes(data)

    def key(self) -> frozenset[tuple[Path, int | None]]:
        """Equal for equal states, of this process. Python keeps the hash of each bytes object."""
        return frozenset(
            (path, None if data is None else hash(data)) for path, data in self.files.items()
        )


class RecordedDisk(OsFiles):
    """Real files below `root`, and a list of everything that was done to them.

    Attributes:
        steps: What was done, in order.
    """

    def __init__(self, root: Path, library: Path) -> None:
        self.root = root
        self.steps: list[_Step] = []
        self._library = library
        self._catalog: tuple[bytes, bytes] | None = None
        self._paths: dict[int, Path] = {}
        self._sizes: dict[Path, int] = {}
        self._held: list[int] = []
        self.first = directory_files(root)
        self._look_at_catalog()

    def finish(self) -> None:
        """Record the last commit. The library must still be open: closing it moves the log."""
        self._look_at_catalog()

    def release(self) -> None:
        """Close what was read of the database. Before the library is closed SQLite would lose its
        locks by that: POSIX frees all of a process's on the first close of the file."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held = []

    def _add(self, kind: str, path: Path, data: bytes = b"", new: Path | None = None) -> None:
        self._look_at_catalog()
        self.steps.append(_Step(kind, path, data, new))

    def _look_at_catalog(self) -> None:
        found = self._read(self._library / CATALOG_NAME), self._read(self._library / _WAL_NAME)
        if found != (self._catalog or (b"", b"")):
            self._catalog = found
            self.steps.append(
                _Step("catalog", self._library / CATALOG_NAME, found[0], None, found[1])
            )

    def _read(self, path: Path) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        self._held.append(descriptor)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def _record_foreign(self, path: Path, kind: str) -> None:
        """SQLite filled a file of ours, which is now synced or renamed."""
        data = path.read_bytes()
        if self._sizes.get(path) != len(data):
            self._sizes[path] = len(data)
            self._add(kind, path, data)

    def make_directory(self, path):
        self._add("make_directory", path)
        super().make_directory(path)

    def create(self, path):
        self._add("create", path)
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self._sizes[path] = 0
        return descriptor

    def open_append(self, path):
        if path.parent.name == "staging":
            self._record_foreign(path, "written")
        descriptor = super().open_append(path)
        self._paths[descriptor] = path
        return descriptor

    def append(self, descriptor, buffers):
        path, data = self._paths[descriptor], b"".join(buffers)
        self._add("append", path, data)
        super().append(descriptor, buffers)
        self._sizes[path] = self._sizes.get(path, 0) + len(data)

    def sync(self, descriptor):
        self._add("sync", self._paths[descriptor])
        super().sync(descriptor)

    def sync_directory(self, path):
        self._add("sync_directory", path)
        super().sync_directory(path)

    def rename(self, old, new):
        if old not in self._sizes:
            # Nobody else syncs it, so SQLite has, when it was closed.
            self._record_foreign(old, "closed")
        self._add("rename", old, new=new)
        super().rename(old, new)
        self._sizes.pop(old, None)

    def unlink(self, path):
        self._add("unlink", path)
        super().unlink(path)
        self._sizes.pop(path, None)


@dataclass(slots=True)
class _File:
    """A file as the disk has it: its durable bytes, and what was appended since.

    `catalog` is what SQLite left of it, if it is the catalog.
    """

    durable: bytes = b""
    pending: list[bytes] = field(default_factory=list)
    is_directory: bool = False
    catalog: _Step | None = None

    def kept(self) -> bytes:
        return b"".join([self.durable, *self.pending]) if self.pending else self.durable

    def torn(self) -> bytes:
        """Half of what was not synced."""
        if not self.pending:
            return self.durable
        return self.durable + (whole := b"".join(self.pending))[: len(whole) // 2]

    def reordered(self) -> bytes:
        """The later half of what was not synced, with nothing where the earlier half should be."""
        if not self.pending:
            return self.durable
        whole = b"".join(self.pending)
        gap = len(self.pending[0]) if len(self.pending) > 1 else len(whole) // 2
        return self.durable + bytes(gap) + whole[gap:]


@dataclass(frozen=True, slots=True)
class _NameChange:
    """A change of names that a sync of `directory` makes durable."""

    directory: Path
    added: Path | None
    removed: Path | None
    file: _File

    def apply(self, names: dict[Path, _File]) -> None:
        if self.removed is not None and names.get(self.removed) is self.file:
            del names[self.removed]
        if self.added is not None:
            names[self.added] = self.file


class _Disk:
    """Files and names as they are, and as far as they are durable."""

    def __init__(self, root: Path, files: dict[Path, bytes | None]) -> None:
        self._root = root
        self.names = {
            root / path: _File(data or b"", is_directory=data is None)
            for path, data in files.items()
        }
        self.durable_names = dict(self.names)
        self.changes: list[_NameChange] = []

    def apply(self, step: _Step) -> None:
        match step.kind:
            case "catalog":
                self.names[step.path].catalog = step
            case "make_directory" if step.path not in self.names:
                self._change(step.path.parent, step.path, None, _File(is_directory=True))
            case "create":
                self._change(step.path.parent, step.path, None, _File())
            case "append":
                self.names[step.path].pending.append(step.data)
            case "closed":
                self._change(step.path.parent, step.path, None, _File(step.data))
            case "written":
                self._change(step.path.parent, step.path, None, _File(pending=[step.data]))
            case "sync":
                file = self.names[step.path]
                file.durable, file.pending = file.kept(), []
            case "sync_directory":
                waiting = []
                for change in self.changes:
                    if change.directory == step.path:
                        change.apply(self.durable_names)
                    else:
                        waiting.append(change)
                self.changes = waiting
            case "rename":
                assert step.new is not None
                self._change(step.new.parent, step.new, step.path, self.names[step.path])
            case "unlink" if step.path in self.names:
                self._change(step.path.parent, None, step.path, self.names[step.path])

    def _change(
        self, directory: Path, added: Path | None, removed: Path | None, file: _File
    ) -> None:
        change = _NameChange(directory, added, removed, file)
        change.apply(self.names)
        self.changes.append(change)

    def outcomes(self, following: _Step | None) -> Iterator[tuple[str, dict[Path, bytes | None]]]:
        """What may be left now that `following` was not, or not wholly, done."""
        for label, names, take in self._losses():
            files = self._files(names, take)
            yield label, files
            if following is None:
                continue
            path = following.path.relative_to(self._root)
            if following.kind == "append" and label == "all kept":
                half = following.data[: len(following.data) // 2]
                yield "append torn", {**files, path: (files[path] or b"") + half}
            file = names.get(following.path)
            # A catalog that has just taken the name is not written to, but seen.
            if following.kind == "catalog" and file is not None and file.catalog is not None:
                for cut in _cuts(file.catalog.log, following.log):
                    found = {**files, path: following.data}
                    found[path.with_name(_WAL_NAME)] = following.log[:cut]
                    yield f"{label}, log cut at {cut} of {len(following.log)}", found

    def _losses(self) -> Iterator[tuple[str, dict[Path, _File], Callable[[_File], bytes]]]:
        """(name, the names that are left, what is left of each file) of each kind of loss."""
        yield "all kept", self.names, _File.kept
        if self.changes:
            yield "names lost", self.durable_names, _File.kept
            for place, change in enumerate(self.changes):
                some = dict(self.durable_names)
                for other in self.changes[:place] + self.changes[place + 1 :]:
                    other.apply(some)
                name = (change.added or change.removed or change.directory).name
                yield f"change of {name} lost", some, _File.kept
        if any(file.pending for file in self.names.values()):
            yield "bytes lost", self.names, lambda file: file.durable
            yield "all lost", self.durable_names, lambda file: file.durable
            yield "bytes torn", self.names, _File.torn
            yield "bytes reordered", self.names, _File.reordered

    def _files(
        self, names: dict[Path, _File], take: Callable[[_File], bytes]
    ) -> dict[Path, bytes | None]:
        found: dict[Path, bytes | None] = {}
        for path, file in names.items():
            # A directory whose name is lost takes what is in it along.
            if any(parent not in names for parent in path.parents if self._root in parent.parents):
                continue
            relative = path.relative_to(self._root)
            found[relative] = None if file.is_directory else take(file)
            if file.catalog is not None:
                found[relative] = file.catalog.data
                found[relative.with_name(_WAL_NAME)] = file.catalog.log
        return found


def crash_states(disk: RecordedDisk) -> Iterator[CrashState]:
    """Every different state that a power cut could have left, at every recorded operation."""
    model = _Disk(disk.root, disk.first)
    seen = set()
    for number, step in enumerate([*disk.steps, None]):
        what = f"{step.kind} {step.path.name}" if step is not None else "the end"
        for label, files in model.outcomes(step):
            state = CrashState(f"before step {number}, {what}: {label}", files)
            if (key := state.key()) not in seen:
                seen.add(key)
                yield state
        if step is not None:
            model.apply(step)


def _cuts(before: bytes, after: bytes) -> Sequence[int]:
    """Where a log may end after a crash in a commit: at each new frame's edge, and within it."""
    if len(after) < _WAL_HEADER_SIZE:
        return ()
    frame_size = _FRAME_HEADER_SIZE + int.from_bytes(after[8:12], "big")
    start = len(before) if before and after.startswith(before) else _WAL_HEADER_SIZE
    edges = range(start, len(after), frame_size)
    return [cut for edge in edges for cut in (edge, edge + frame_size // 2)]


def directory_files(root: Path) -> dict[Path, bytes | None]:
    """What is below a directory, as a crash state has it."""
    return {
        path.relative_to(root): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.name not in _NOT_ON_DISK
    }
