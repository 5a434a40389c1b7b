"""`fragfs add`: from paths to published models.

Order: find and check everything that can be checked without reading whole files, store the
fragments, publish each model in one step, and only then touch the sources (`remove_source`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fragfs.errors import FormatError, NotFoundError, StorageError, UsageError
from fragfs.formats.detect import parse_layout
from fragfs.library.batch import Batch
from fragfs.library.catalog import Catalog
from fragfs.library.files import storage_error
from fragfs.library.ingest import Ingester, IngestTotals, PlannedFile
from fragfs.library.names import as_name, join, parents, printable, split
from fragfs.library.progress import Progress
from fragfs.library.publish import (
    DraftDirectory,
    DraftFile,
    ModelDraft,
    NewContent,
    check_new_name,
    load_draft,
    publish_model,
)
from fragfs.library.source import (
    SourceFile,
    SourceTree,
    check_outside,
    read_source,
    scan_source,
)

__all__ = ["AddOptions", "AddReport", "Adder"]

_SPARE_BYTES = 64 << 20

_WORKERS_MAX = 32
"""One thread reads and appends: more encoders than this only wait for it."""


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add.

    Attributes:
        name: Model name; by default the directory's own.
        into: "MODEL" or "MODEL/DIR" of an existing model that the paths are copied into.
        update: Bring an existing model up to date: read what changed, drop what is gone. A file
            counts as unchanged if its size and modification time are those recorded.
        checksum: With `update`, read every file, whatever its size and time say.
        remove_source: Remove the source files after reading everything back from disk.
        follow_links: Store what links outside the source lead to.
        force: Store truncated files and LFS pointers as they are.
        space_check: Refuse to start if the worst case does not fit on the disk.
        workers: Threads that encode; None for one per core.
    """

    name: bytes | None = None
    into: bytes | None = None
    update: bool = False
    checksum: bool = False
    remove_source: bool = False
    follow_links: bool = False
    force: bool = False
    space_check: bool = True
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class AddReport:
    """What an add did.

    Attributes:
        models: Names of the models published.
        file_count: Files of the sources now in the library.
        logical_bytes: Their bytes.
        new_bytes: Record bytes appended to packs.
        reused_bytes: Raw bytes that were stored already.
        unchanged_count: Files that `update` did not have to read.
        removed_count: Files that `update` dropped from the model.
        skipped: (path, reason) of what was left out.
        verdicts: (path, remark) of files some loaders refuse.
        healed: Damaged fragments that were replaced by good ones.
        saved_bytes: Bytes saved, by mechanism, as in `LibraryStats`.
        warnings: Remarks such as a missing shard.
        removed_source_count: Source files removed.
    """

    models: tuple[bytes, ...]
    file_count: int
    logical_bytes: int
    new_bytes: int
    reused_bytes: int
    unchanged_count: int
    removed_count: int
    skipped: tuple[tuple[bytes, str], ...]
    verdicts: tuple[tuple[bytes, str], ...]
    healed: tuple[str, ...]
    saved_bytes: dict[str, int]
    warnings: tuple[str, ...]
    removed_source_count: int


@dataclass(slots=True)
class _Plan:
    """One model to publish: what of it comes from the sources.

    Attributes:
        name: The model's name.
        number: Its number in the catalog, None if it is new.
        into: True if the sources are added to what the model has, False if they are all of it.
        trees: The sources.
        directories: Directories that the sources bring, by path in the model.
        files: Files that the sources bring, by path in the model.
        kept: Those of them that are in the catalog already and need not be read.
        removed_count: Files the model loses.
        planned: Files to read, with their layouts.
        read: What was read, by path in the model; its fragments are committed.
    """

    name: bytes
    number: int | None
    into: bool
    trees: list[SourceTree]
    directories: dict[bytes, DraftDirectory] = field(default_factory=dict)
    files: dict[bytes, SourceFile] = field(default_factory=dict)
    kept: dict[bytes, DraftFile] = field(default_factory=dict)
    removed_count: int = 0
    planned: list[PlannedFile] = field(default_factory=list)
    read: dict[bytes, NewContent] = field(default_factory=dict)

    def bring_directory(self, directory: DraftDirectory) -> None:
        """Plan a directory; two sources may share one.

        Raises:
            UsageError: Another source has a file there.
        """
        self._check_free(directory.path)
        self.directories[directory.path] = directory

    def bring_file(self, path: bytes, file: SourceFile) -> None:
        """Plan a file.

        Raises:
            UsageError: Another source has something else there.
        """
        self._check_free(path)
        if path in self.directories:
            raise self._clash(path)
        self.files[path] = file

    def _check_free(self, path: bytes) -> None:
        if any(place in self.files for place in (path, *parents(path))):
            raise self._clash(path)

    def _clash(self, path: bytes) -> UsageError:
        return UsageError(
            f"two of the sources would be {printable(path)} of {printable(self.name)}",
            remedy="add them one by one, each with its own --into",
        )


class Adder:
    """Plans and runs one add.

    Args:
        directory: The library's directory.
        catalog: Its catalog.
        start_batch: Takes the writer lock and begins a batch.
        open_ingester: Makes an `Ingester` for a number of workers.
        read_back: Yields a model file's bytes straight from disk, for `remove_source`.
        now_ns: The clock.
        progress: Told about progress.
    """

    def __init__(
        self,
        directory: Path,
        catalog: Catalog,
        start_batch: Callable[[], AbstractContextManager[Batch]],
        open_ingester: Callable[[int], Ingester],
        read_back: Callable[[bytes], None],
        now_ns: Callable[[], int],
        progress: Progress,
    ) -> None:
        self._directory = directory
        self._catalog = catalog
        self._start_batch = start_batch
        self._open_ingester = open_ingester
        self._read_back = read_back
        self._now_ns = now_ns
        self._progress = progress

    def run(self, paths: Sequence[Path], options: AddOptions) -> AddReport:
        """Add the paths; see `FragmentLibrary.add`."""
        plans = self._plan(paths, options)
        if options.remove_source:
            _refuse_links(plans)
        for plan in plans:
            plan.planned = [
                _parse(path, file, force=options.force)
                for path, file in plan.files.items()
                if path not in plan.kept
            ]
        total = sum(item.file.size for plan in plans for item in plan.planned)
        if options.space_check:
            self._check_space(total)
        self._progress.start("adding", total)
        removed_source_count = 0
        workers = options.workers or min(len(os.sched_getaffinity(0)), _WORKERS_MAX)
        with self._open_ingester(workers) as ingester:
            for plan in plans:
                self._store_and_publish(plan, ingester, update=options.update)
                if options.remove_source:
                    removed_source_count += self._remove_sources(plan)
            totals = ingester.totals
        return _report(plans, totals, removed_source_count)

    # --- planning

    def _plan(self, paths: Sequence[Path], options: AddOptions) -> list[_Plan]:
        if not paths:
            raise UsageError("nothing to add", remedy="name at least one directory or file")
        if options.name is not None and (len(paths) > 1 or options.into is not None):
            raise UsageError("--name goes with one path and without --into")
        for path in paths:
            check_outside(path, self._directory)
        _check_apart(paths)
        trees = [scan_source(path, follow_links=options.follow_links) for path in paths]
        for tree in trees:
            if not tree.files:
                raise UsageError(f"{tree.root} holds no files to add", path=str(tree.root))
        if options.into is not None:
            return [self._plan_into(trees, options)]
        plans = [self._plan_model(tree, options) for tree in trees]
        names = [plan.name for plan in plans]
        for name in names:
            if names.count(name) > 1 or any(parent in names for parent in parents(name)):
                raise UsageError(
                    f"two of the paths would be the model {printable(name)}",
                    remedy="add them one by one, each with its own --name",
                )
        return plans

    def _plan_model(self, tree: SourceTree, options: AddOptions) -> _Plan:
        if options.name is not None:
            name = as_name(options.name)
        elif tree.root.is_dir():
            name = as_name(_base_name(tree))
        else:
            raise UsageError(
                f"{tree.root} is a single file and needs a model to hold it",
                path=str(tree.root),
                remedy="pass --name MODEL for a new model, or --into MODEL for an existing one",
            )
        exists = self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)) is not None
        if not (options.update and exists):
            check_new_name(self._catalog, name)
        elif not tree.root.is_dir():
            raise UsageError(
                f"updating {printable(name)} from one file would drop all its others",
                path=str(tree.root),
                remedy=f"to replace the file in it: --into {printable(name)} --update",
            )
        old = load_draft(self._catalog, name) if exists else None
        plan = _Plan(name, old.number if old else None, into=False, trees=[tree])
        for entry in tree.directories:
            plan.bring_directory(DraftDirectory(entry.path, entry.mode, entry.mtime_ns))
        for file in tree.files:
            plan.bring_file(file.path, file)
            kept = self._unchanged(file, old)
            # What is to be removed afterwards is read, whatever its size and time say.
            if kept is not None and not (options.remove_source or options.checksum):
                plan.kept[file.path] = kept
        if old is not None:
            plan.removed_count = len(old.files.keys() - plan.files.keys())
        return plan

    def _unchanged(self, file: SourceFile, old: ModelDraft | None) -> DraftFile | None:
        """The stored file with this path, if size and time say that it is the same."""
        known = old.files.get(file.path) if old else None
        if known is None or known.mtime_ns != file.mtime_ns:
            return None
        row = self._catalog.row("SELECT size FROM contents WHERE number = ?", (known.content,))
        return known if row and row[0] == file.size else None

    def _plan_into(self, trees: list[SourceTree], options: AddOptions) -> _Plan:
        name, directory = self._split_target(as_name(options.into or b""))
        draft = load_draft(self._catalog, name)
        plan = _Plan(name, draft.number, into=True, trees=trees)
        for tree in trees:
            top = join(directory, _base_name(tree))
            if tree.root.is_dir():
                for entry in tree.directories:
                    path = as_name(join(top, entry.path))
                    plan.bring_directory(DraftDirectory(path, entry.mode, entry.mtime_ns))
                for file in tree.files:
                    plan.bring_file(as_name(join(top, file.path)), file)
            else:
                plan.bring_file(as_name(top), tree.files[0])
        # Tried now, so that a clash is told before anything is read; done when publishing.
        _merge(plan, draft, self._now_ns(), update=options.update)
        return plan

    def _split_target(self, target: bytes) -> tuple[bytes, bytes]:
        for name in (target, *parents(target)[:-1]):
            if self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)):
                return name, target[len(name) + 1 :]
        raise NotFoundError(
            f"no model to add into: {printable(target)}",
            remedy="see the models with: fragfs ls",
        )

    def _check_space(self, needed_bytes: int) -> None:
        status = os.statvfs(self._directory)
        free_bytes = status.f_bavail * status.f_frsize
        if needed_bytes + _SPARE_BYTES > free_bytes:
            raise StorageError(
                f"adding may need up to {needed_bytes:,} bytes and {self._directory} has"
                f" {free_bytes:,} free",
                path=str(self._directory),
                remedy="free some space, or pass --no-space-check if most of it is stored already"
                " (an add that fills the disk stops cleanly and can be resumed)",
            )

    # --- running

    def _store_and_publish(self, plan: _Plan, ingester: Ingester, *, update: bool) -> None:
        for planned, content in ingester.store(plan.planned):
            plan.read[planned.path] = content
        with self._start_batch() as batch:
            # Loaded under the lock: what others did to the model meanwhile is kept, or noticed.
            draft = self._draft(plan, update=update)
            for path, content in plan.read.items():
                file = plan.files[path]
                draft.files[path] = DraftFile(
                    path, file.mode, file.mtime_ns, self._same_content(draft, path, content)
                )
            publish_model(batch, self._catalog, draft, self._now_ns())

    def _draft(self, plan: _Plan, *, update: bool) -> ModelDraft:
        now_ns = self._now_ns()
        if plan.number is None:
            return ModelDraft(plan.name, None, now_ns, dict(plan.directories), {})
        exists = self._catalog.row(
            "SELECT 1 FROM models WHERE number = ? AND name = ?", (plan.number, plan.name)
        )
        if not exists:
            raise _changed(plan.name)
        draft = load_draft(self._catalog, plan.name)
        if plan.into:
            _merge(plan, draft, now_ns, update=update)
            return draft
        for path, kept in plan.kept.items():
            if draft.files.get(path) != kept:
                raise _changed(plan.name)
        files = {
            path: replace(kept, mode=plan.files[path].mode) for path, kept in plan.kept.items()
        }
        return ModelDraft(plan.name, plan.number, draft.added_ns, dict(plan.directories), files)

    def _same_content(
        self, draft: ModelDraft, path: bytes, content: NewContent
    ) -> int | NewContent:
        """Keep the inode of a file that was read again and has not changed."""
        if draft.number is None:
            return content
        row = self._catalog.row(
            "SELECT contents.number FROM files JOIN contents ON contents.number = files.content"
            " WHERE files.model = ? AND files.directory = ? AND files.name = ?"
            " AND contents.sha256 = ? AND contents.mtime_ns = ?",
            (draft.number, *split(path), content.sha256, content.mtime_ns),
        )
        return row[0] if row else content

    # --- removing sources

    def _remove_sources(self, plan: _Plan) -> int:
        """Remove what is proven to be in the library: read back from disk, source unchanged."""
        self._read_back(plan.name)
        for path, file in plan.files.items():
            self._check_stored(plan, path, file)
        for file in plan.files.values():
            try:
                file.source.unlink()
            except OSError as error:
                raise storage_error(error, f"cannot remove {file.source}") from error
        for tree in plan.trees:
            if tree.root.is_dir():
                _remove_empty_directories(tree)
        return len(plan.files)

    def _check_stored(self, plan: _Plan, path: bytes, file: SourceFile) -> None:
        row = self._catalog.row(
            "SELECT contents.sha256 FROM models JOIN files ON files.model = models.number"
            " JOIN contents ON contents.number = files.content"
            " WHERE models.name = ? AND files.directory = ? AND files.name = ?",
            (plan.name, *split(path)),
        )
        if row is None or row[0] != plan.read[path].sha256:
            raise _changed(plan.name)
        try:
            status = file.source.stat()
        except OSError as error:
            raise storage_error(error, f"cannot look at {file.source} again") from error
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise StorageError(
                f"{file.source} changed after it was added; no source file was removed",
                path=str(file.source),
                remedy="run the command again with --update",
            )


def _base_name(tree: SourceTree) -> bytes:
    return os.fsencode(Path(os.path.abspath(tree.root)).name)


def _check_apart(paths: Sequence[Path]) -> None:
    """Refuse sources that contain one another: their files would be added, or removed, twice."""
    places = [Path(os.path.realpath(path)) for path in paths]
    for index, place in enumerate(places):
        for other in places[:index]:
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise UsageError(
                    f"{place} and {other} contain one another",
                    path=str(place),
                    remedy="name each source once",
                )


def _merge(plan: _Plan, draft: ModelDraft, now_ns: int, *, update: bool) -> None:
    """Make room in a model for what a plan brings into it.

    Raises:
        UsageError: Something else has one of the places.
    """
    for path, directory in plan.directories.items():
        if any(place in draft.files for place in (path, *parents(path))):
            raise UsageError(f"{printable(path)} would take the place of a file, or lie below one")
        known = draft.directories.get(path)
        if known is None:
            draft.add_parents(path, now_ns)
        # A directory that was there has other entries now.
        draft.directories[path] = replace(known, mtime_ns=now_ns) if known else directory
    for path in plan.files:
        if path in draft.directories or any(parent in draft.files for parent in parents(path)):
            raise UsageError(
                f"{printable(path)} would take the place of a directory, or lie below a file"
            )
        if path in draft.files and not update:
            raise UsageError(
                f"{printable(draft.name)} has a file {printable(path)} already",
                remedy="pass --update to replace it",
            )
        if split(path)[0] not in plan.directories:
            draft.add_parents(path, now_ns)


def _changed(name: bytes) -> StorageError:
    return StorageError(
        f"the model {printable(name)} was changed by another command meanwhile",
        retryable=True,
        remedy="run the command again; what was stored is reused",
    )


def _report(plans: Sequence[_Plan], totals: IngestTotals, removed_source_count: int) -> AddReport:
    trees = [tree for plan in plans for tree in plan.trees]
    saved = dict(totals.saved_bytes)
    if totals.reused_bytes:
        saved["exact"] = totals.reused_bytes
    return AddReport(
        models=tuple(plan.name for plan in plans),
        file_count=sum(len(plan.files) for plan in plans),
        logical_bytes=sum(file.size for plan in plans for file in plan.files.values()),
        new_bytes=totals.new_bytes,
        reused_bytes=totals.reused_bytes,
        unchanged_count=sum(len(plan.kept) for plan in plans),
        removed_count=sum(plan.removed_count for plan in plans),
        skipped=tuple(entry for tree in trees for entry in tree.skipped),
        verdicts=tuple(
            (item.path, item.layout.verdict)
            for plan in plans
            for item in plan.planned
            if item.layout.verdict
        ),
        healed=tuple(totals.healed),
        saved_bytes=saved,
        warnings=tuple(warning for tree in trees for warning in tree.warnings),
        removed_source_count=removed_source_count,
    )


def _parse(path: bytes, file: SourceFile, *, force: bool) -> PlannedFile:
    descriptor, status = read_source(file)
    try:
        if status.st_size != file.size:
            raise StorageError(
                f"{file.source} changed since it was first looked at",
                path=str(file.source),
                retryable=True,
                remedy="wait until nothing writes to it and add it again",
            )

        def read_at(offset: int, size: int) -> bytes:
            try:
                data = os.pread(descriptor, size, offset)
            except OSError as error:
                raise storage_error(error, f"cannot read {file.source}") from error
            if len(data) != size:
                raise StorageError(
                    f"{file.source} became shorter while it was read",
                    path=str(file.source),
                    retryable=True,
                    remedy="wait until nothing writes to it and add it again",
                )
            return data

        layout = parse_layout(os.fsdecode(file.source.name), status.st_size, read_at)
    finally:
        os.close(descriptor)
    if layout.refusal is not None and not force:
        raise FormatError(
            f"{file.source}: {layout.refusal}",
            path=str(file.source),
            remedy=layout.refusal_remedy,
        )
    return PlannedFile(path, file, layout)


def _refuse_links(plans: Sequence[_Plan]) -> None:
    for plan in plans:
        for file in plan.files.values():
            if file.is_link:
                raise UsageError(
                    f"{file.source} is a link, or lies behind one: removing it would not free what"
                    " it leads to",
                    path=str(file.source),
                    remedy="add without --remove-source and remove the files yourself",
                )


def _remove_empty_directories(tree: SourceTree) -> None:
    """Remove the directories that were added, if they are empty now; others stay, silently."""
    for directory in sorted(tree.directories, key=lambda entry: entry.path, reverse=True):
        try:
            os.rmdir(tree.root / os.fsdecode(directory.path))
        except OSError:
            continue
