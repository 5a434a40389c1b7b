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
from fragfs.library.catalog import Catalog
from fragfs.library.files import storage_error
from fragfs.library.ingest import Ingester, PlannedFile
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
from fragfs.library.writer import Batch

__all__ = ["AddOptions", "AddReport", "Adder"]

_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add.

    Attributes:
        name: Model name; by default the directory's own.
        into: "MODEL" or "MODEL/DIR" of an existing model that the paths are copied into.
        update: Bring an existing model up to date: read what changed, drop what is gone.
        remove_source: Remove the source files after reading everything back from disk.
        follow_links: Store what links outside the source lead to.
        force: Store truncated files and LFS pointers as they are.
        space_check: Refuse to start if the worst case does not fit on the disk.
        workers: Threads that encode; None for one per core.
    """

    name: bytes | None = None
    into: bytes | None = None
    update: bool = False
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
    """One model to publish, and the source files that must be read for it."""

    draft: ModelDraft
    trees: list[SourceTree]
    to_read: list[SourceFile] = field(default_factory=list)
    planned: list[PlannedFile] = field(default_factory=list)
    unchanged_count: int = 0
    removed_count: int = 0


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
            plan.planned = [_parse(file, force=options.force) for file in plan.to_read]
        total = sum(file.size for plan in plans for file in plan.to_read)
        if options.space_check:
            self._check_space(total)
        self._progress.start("adding", total)
        removed = 0
        with self._open_ingester(options.workers or len(os.sched_getaffinity(0))) as ingester:
            for plan in plans:
                self._store_and_publish(plan, ingester)
                if options.remove_source:
                    removed += self._remove_sources(plan)
            totals = ingester.totals
        trees = [tree for plan in plans for tree in plan.trees]
        files = [file for tree in trees for file in tree.files]
        saved = dict(totals.saved_bytes)
        if totals.reused_bytes:
            saved["exact"] = totals.reused_bytes
        return AddReport(
            models=tuple(plan.draft.name for plan in plans),
            file_count=len(files),
            logical_bytes=sum(file.size for file in files),
            new_bytes=totals.new_bytes,
            reused_bytes=totals.reused_bytes,
            unchanged_count=sum(plan.unchanged_count for plan in plans),
            removed_count=sum(plan.removed_count for plan in plans),
            skipped=tuple(entry for tree in trees for entry in tree.skipped),
            verdicts=tuple(
                (item.file.path, item.layout.verdict)
                for plan in plans
                for item in plan.planned
                if item.layout.verdict
            ),
            healed=tuple(totals.healed),
            saved_bytes=saved,
            warnings=tuple(warning for tree in trees for warning in tree.warnings),
            removed_source_count=removed,
        )

    # --- planning

    def _plan(self, paths: Sequence[Path], options: AddOptions) -> list[_Plan]:
        if not paths:
            raise UsageError("nothing to add", remedy="name at least one directory or file")
        if options.name is not None and (len(paths) > 1 or options.into is not None):
            raise UsageError("--name goes with one path and without --into")
        for path in paths:
            check_outside(path, self._directory)
        trees = [scan_source(path, follow_links=options.follow_links) for path in paths]
        for tree in trees:
            if not tree.files:
                raise UsageError(f"{tree.root} holds no files to add", path=str(tree.root))
        if options.into is not None:
            return [self._plan_into(trees, options)]
        plans = [self._plan_model(tree, options) for tree in trees]
        names = [plan.draft.name for plan in plans]
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
            name = as_name(os.fsencode(Path(os.path.abspath(tree.root)).name))
        else:
            raise UsageError(
                f"{tree.root} is a single file: which model shall hold it?",
                path=str(tree.root),
                remedy="pass --name MODEL for a new model, or --into MODEL for an existing one",
            )
        exists = self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)) is not None
        if not (options.update and exists):
            check_new_name(self._catalog, name)
        old = load_draft(self._catalog, name) if exists else None
        draft = ModelDraft(
            name=name,
            number=old.number if old else None,
            added_ns=old.added_ns if old else self._now_ns(),
            directories={
                d.path: DraftDirectory(d.path, d.mode, d.mtime_ns) for d in tree.directories
            },
            files={},
        )
        plan = _Plan(draft, [tree])
        for file in tree.files:
            kept = self._unchanged(file, old)
            if kept is None:
                plan.to_read.append(file)
            else:
                draft.files[file.path] = kept
                plan.unchanged_count += 1
        if old is not None:
            present = {file.path for file in tree.files}
            plan.removed_count = sum(path not in present for path in old.files)
        return plan

    def _unchanged(self, file: SourceFile, old: ModelDraft | None) -> DraftFile | None:
        """The stored file with this path, if size and time say that it is the same."""
        known = old.files.get(file.path) if old else None
        if known is None or known.mtime_ns != file.mtime_ns:
            return None
        row = self._catalog.row("SELECT size FROM contents WHERE number = ?", (known.content,))
        return replace(known, mode=file.mode) if row and row[0] == file.size else None

    def _plan_into(self, trees: list[SourceTree], options: AddOptions) -> _Plan:
        name, directory = self._split_target(as_name(options.into or b""))
        draft = load_draft(self._catalog, name)
        plan = _Plan(draft, trees)
        now_ns = self._now_ns()
        for tree in trees:
            top = join(directory, os.fsencode(Path(os.path.abspath(tree.root)).name))
            is_directory = tree.root.is_dir()
            if is_directory:
                for entry in tree.directories:
                    path = join(top, entry.path)
                    draft.directories[path] = DraftDirectory(path, entry.mode, entry.mtime_ns)
                draft.add_parents(top, now_ns)
            moved = []
            for file in tree.files:
                path = as_name(join(top, file.path) if is_directory else top)
                self._check_place(draft, path, update=options.update)
                draft.add_parents(path, now_ns)
                moved.append(replace(file, path=path))
            tree.files = moved
            plan.to_read.extend(moved)
        return plan

    def _split_target(self, target: bytes) -> tuple[bytes, bytes]:
        for name in (target, *parents(target)[:-1]):
            if self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)):
                return name, target[len(name) + 1 :]
        raise NotFoundError(
            f"no model to add into: {printable(target)}",
            remedy="see the models with: fragfs ls",
        )

    @staticmethod
    def _check_place(draft: ModelDraft, path: bytes, *, update: bool) -> None:
        shown = printable(path)
        if path in draft.directories or any(parent in draft.files for parent in parents(path)):
            raise UsageError(f"{shown} would take the place of a directory, or lie below a file")
        if path in draft.files and not update:
            raise UsageError(
                f"{printable(draft.name)} has a file {shown} already",
                remedy="pass --update to replace it",
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

    def _store_and_publish(self, plan: _Plan, ingester: Ingester) -> None:
        for planned, content in ingester.store(plan.planned):
            file = planned.file
            plan.draft.files[file.path] = DraftFile(
                file.path, file.mode, file.mtime_ns, self._same_content(plan.draft, file, content)
            )
        with self._start_batch() as batch:
            publish_model(batch, self._catalog, plan.draft, self._now_ns())

    def _same_content(
        self, draft: ModelDraft, file: SourceFile, content: NewContent
    ) -> int | NewContent:
        """Keep the inode of a file that was touched or re-added with the bytes it had."""
        if draft.number is None:
            return content
        row = self._catalog.row(
            "SELECT contents.number FROM files JOIN contents ON contents.number = files.content"
            " WHERE files.model = ? AND files.directory = ? AND files.name = ?"
            " AND contents.sha256 = ? AND contents.mtime_ns = ?",
            (draft.number, *split(file.path), content.sha256, content.mtime_ns),
        )
        return row[0] if row else content

    def _remove_sources(self, plan: _Plan) -> int:
        self._read_back(plan.draft.name)
        files = [file for tree in plan.trees for file in tree.files]
        for file in files:
            status = file.source.stat()
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise StorageError(
                    f"{file.source} changed after it was added; no source file was removed",
                    path=str(file.source),
                    remedy="run the command again with --update",
                )
        for file in files:
            try:
                file.source.unlink()
            except OSError as error:
                raise storage_error(error, f"cannot remove {file.source}") from error
        for tree in plan.trees:
            if tree.root.is_dir():
                _remove_empty_directories(tree.root)
        return len(files)


def _parse(file: SourceFile, *, force: bool) -> PlannedFile:
    descriptor, status = read_source(file)
    try:

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
    return PlannedFile(file, layout)


def _refuse_links(plans: Sequence[_Plan]) -> None:
    for plan in plans:
        for tree in plan.trees:
            for file in tree.files:
                if file.is_link:
                    raise UsageError(
                        f"{file.source} is a link: removing it would not free what it leads to",
                        path=str(file.source),
                        remedy="add without --remove-source and remove the files yourself",
                    )


def _remove_empty_directories(root: Path) -> None:
    """Remove what became empty; directories that still hold something stay, silently."""
    for directory, _, _ in os.walk(root, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            continue
