"""`FragmentLibrary`: the door to a library, for the command line, the mount and Python programs.

What does not change a library is in `reading.py`. Heavy rooms (numpy, codecs) are imported by the
methods that need them, so that `fragfs ls` starts fast.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fragfs.errors import FormatError, FragmentError
from fragfs.library.batch import Batch
from fragfs.library.files import Files, OsFiles
from fragfs.library.lease import hold_lease
from fragfs.library.names import as_name
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.library.publish import (
    RemoveReport,
    publish_move,
    publish_path_removal,
    publish_removal,
    refresh_stored_bytes,
)
from fragfs.library.reading import LibraryReader, count_cores
from fragfs.library.version import read_snapshot_generation
from fragfs.library.writer import LibraryWriter
from fragfs.types import (
    FileEntry,
    LayerMapping,
    Level,
    LibraryConfig,
)

if TYPE_CHECKING:
    from fragfs.library.add import AddOptions, AddReport
    from fragfs.library.collect import Collector, GcReport
    from fragfs.library.findings import CheckReport
    from fragfs.library.ingest import Ingester
    from fragfs.library.optimize import OptimizeReport
    from fragfs.library.rebuild import RebuildReport
    from fragfs.library.stats import RemovedFragments

__all__ = ["FragmentLibrary"]

log = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 60.0


class FragmentLibrary(LibraryReader):
    """A directory that holds models as deduplicated, compressed fragments.

    Use `create` or `open`. Methods are synchronous, may block on disk, and may be called from
    several threads at once; none may be called in a child process made by fork().

    Attributes:
        path: The library's directory.
        config: Its settings, fixed when it was created.
        uuid: Its identity: 16 bytes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        files: Files | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
    ) -> None:
        super().__init__(Path(path), files or OsFiles())
        self._now_ns = now_ns
        self._writer = LibraryWriter(
            self._files, self.path, self._catalog, self.uuid, self.config, lock_timeout_s
        )
        if self._catalog.was_migrated:
            self._writer.renew_snapshot()  # the old one is of no use to other users any more

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: LibraryConfig | None = None,
        *,
        files: Files | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> FragmentLibrary:
        """Create a library in a new or empty directory, and open it.

        Args:
            path: Where; missing parents are created.
            config: Settings that never change afterwards.
            files: How to write; the real file system by default.
            now_ns: The clock.

        Raises:
            UsageError: The directory holds something.
            StorageError: It cannot be written.
        """
        from fragfs.library.creation import create_library

        files = files or OsFiles()
        directory = Path(path)
        create_library(files, directory, config or LibraryConfig(), now_ns())
        return cls(directory, files=files, now_ns=now_ns)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        files: Files | None = None,
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
    ) -> FragmentLibrary:
        """Open an existing library.

        Args:
            path: The library's directory.
            files: How to read and write; the real file system by default.
            lock_timeout_s: How long changes wait for another writer.

        Raises:
            NotFoundError: There is no library.
            FormatError: It is damaged, or needs a newer fragfs.
            StorageError: It cannot be read.
        """
        library = cls(path, files=files, lock_timeout_s=lock_timeout_s)
        library._warn_if_older()
        return library

    def _warn_if_older(self) -> None:
        """Say where it can be known that the catalog was put back from a backup."""
        newest = read_snapshot_generation(self.path)  # first: it follows the catalog
        if newest is not None and newest > self.generation():
            log.warning(
                "the catalog in %s is older than its packs (generation %d of %d): it was put back"
                " from a backup; see what is missing, and bring it back, with: fragfs check",
                self.path,
                self.generation(),
                newest,
            )

    @classmethod
    def rebuild(
        cls,
        path: str | os.PathLike[str],
        *,
        files: Files | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
        progress: Progress = NO_PROGRESS,
    ) -> RebuildReport:
        """Make a new catalog from the packs alone; the old one is kept under another name.

        Args:
            path: The library's directory.
            files: How to read and write; the real file system by default.
            now_ns: The clock.
            lock_timeout_s: How long to wait for a writer.
            progress: Told about bytes read.

        Raises:
            NotFoundError: There are no packs.
            StorageError: The library is mounted or in use, or something cannot be written.
        """
        from fragfs.library.rebuild import Rebuilder

        files = files or OsFiles()
        report = Rebuilder(files, Path(path), lock_timeout_s, now_ns, progress).run()
        with cls(path, files=files, lock_timeout_s=lock_timeout_s) as library:
            library._writer.renew_snapshot()
        return report

    # --- changes

    def _start_batch(self) -> AbstractContextManager[Batch]:
        return self._writer.batch()

    def add(
        self, paths: Sequence[Path], options: AddOptions, progress: Progress = NO_PROGRESS
    ) -> AddReport:
        """Add directories or files; each model appears whole or not at all.

        Args:
            paths: Each directory becomes one model, or is copied into one (`options.into`).
            options: How.
            progress: Told about bytes read.

        Raises:
            UsageError: A name that is taken, escapes or nests; a link that leads elsewhere.
            FormatError: A truncated file or an LFS pointer (unless `options.force`).
            StorageError: Something cannot be read or written, or changed while it was read.
        """
        from fragfs.library.add import Adder

        adder = Adder(
            self.path,
            self._catalog,
            self._start_batch,
            lambda workers: self._open_ingester(workers, progress),
            self._read_back,
            self._now_ns,
            progress,
        )
        before = self._catalog.generation()
        try:
            # Fragments are stored before a model names them: nobody shall drop them meanwhile.
            with hold_lease(self.path, "add", required=True):
                report = adder.run(paths, options)
            if report.healed:
                with self._writer.batch() as batch:
                    refresh_stored_bytes(batch, self._catalog)
            return report
        finally:
            if self._catalog.generation() != before:
                self._writer.renew_snapshot()

    def _open_ingester(self, workers: int, progress: Progress) -> Ingester:
        from fragfs.library.ingest import Ingester

        return Ingester(
            self.config,
            self._catalog,
            self._decoder,
            self._start_batch,
            workers,
            progress,
            self._now_ns,
        )

    def _read_back(self, name: bytes) -> None:
        """Read a model from disk, not from the page cache, and compare every SHA-256."""
        self._packs.drop_page_cache()
        for checked in self.verify(name):
            if checked.error is not None:
                raise checked.error

    def remove(self, name: str | bytes, paths: Sequence[bytes] = ()) -> RemoveReport:
        """Remove a model, or files and directories of it.

        Where the catalog is damaged such that what became unreferenced cannot be counted, the
        report has zeros for it.

        Raises:
            NotFoundError: No such model or file.
        """
        raw = as_name(name)
        entries = self.files(raw)
        fragments = self._removed_fragments(entries)
        with self._writer.batch() as batch:
            if paths:
                gone = publish_path_removal(batch, self._catalog, raw, paths, self._now_ns())
                removed = [entry for entry in entries if entry.path in gone]
            else:
                removed = entries
                publish_removal(batch, self._catalog, raw, self._now_ns())
        self._writer.renew_snapshot()
        unreferenced_bytes, kept_bytes, kept_for = _count_removed(fragments, removed)
        return RemoveReport(
            model=raw,
            file_count=len(removed),
            removed_bytes=sum(entry.size for entry in removed),
            unreferenced_bytes=unreferenced_bytes,
            kept_bytes=kept_bytes,
            kept_for=tuple(kept_for),
        )

    def _removed_fragments(self, entries: Sequence[FileEntry]) -> RemovedFragments | None:
        """None if their extents are damaged: that must not keep the model from being removed."""
        from fragfs.library.stats import RemovedFragments

        try:
            return RemovedFragments(self._catalog, entries)
        except FormatError as error:
            _warn_not_counted(error)
            return None

    def move(self, old: str | bytes, new: str | bytes) -> None:
        """Rename a model. Its inodes and bytes stay what they are.

        Raises:
            NotFoundError: No such model.
            UsageError: The new name is taken or nests.
        """
        model = self.model(old)
        with self._writer.batch() as batch:
            publish_move(batch, self._catalog, model.name, as_name(new), self._now_ns())
        self._writer.renew_snapshot()

    def optimize(
        self,
        level: Level | None = None,
        progress: Progress = NO_PROGRESS,
        workers: int | None = None,
    ) -> OptimizeReport:
        """Plan the bases of all fragments again, and give back the space of old records.

        Args:
            level: What encodings to prefer; the library's own level by default. Another one
                encodes every fragment anew.
            progress: Told about bytes of fragments planned.
            workers: Threads that plan; one per core by default.

        Raises:
            StorageError: Something cannot be read or written.
        """
        from fragfs.library.reorganize import Reorganizer

        return Reorganizer(self._catalog, self._decoder, self._writer, self._collector()).optimize(
            level,
            self._readable_layers(),
            workers or count_cores(),
            progress,
        )

    def collect(
        self,
        progress: Progress = NO_PROGRESS,
        *,
        grace_s: float | None = None,
        wait_s: float | None = None,
        dry_run: bool = False,
    ) -> GcReport:
        """Drop the fragments that nothing needs, and give their space back.

        Mounts and readers may stay: what they have open stays readable to the last byte.

        Args:
            progress: Told about bytes copied out of packs that are given back.
            grace_s: What an add stored and no model names stays for so long after it was stored,
                so that a killed add can be resumed; a day by default.
            wait_s: How long mounts may take to say what they still need of what was removed; what
                is not said in time is kept. A few seconds by default.
            dry_run: Only say what would be dropped.

        Raises:
            StorageError: Something cannot be read or written.
        """
        from fragfs.library.collect import GRACE_S, WAIT_S

        return self._collector().run(
            progress,
            grace_s=GRACE_S if grace_s is None else grace_s,
            wait_s=WAIT_S if wait_s is None else wait_s,
            dry_run=dry_run,
        )

    def _collector(self) -> Collector:
        from fragfs.library.collect import Collector
        from fragfs.library.compact import Compactor

        compactor = Compactor(
            self._files,
            self.path,
            self._catalog,
            self._packs,
            self._writer,
        )
        return Collector(self.path, self._catalog, self._writer, compactor, self._now_ns)

    def _readable_layers(self) -> Iterator[LayerMapping]:
        """The named tensors of every model that can be read."""
        for model in self.models():
            try:
                yield from self.manifest(model.name).layers
            except FragmentError:
                continue  # damaged, or removed meanwhile: `verify` tells

    # --- the library as a whole

    def check(
        self,
        *,
        data: bool = False,
        repair: bool = False,
        progress: Progress = NO_PROGRESS,
        workers: int | None = None,
    ) -> CheckReport:
        """Compare catalog and packs with the format's rules and their checksums.

        Args:
            data: Also decode everything, and compare ids and SHA-256.
            repair: Mend what can be derived again, and put damaged fragments in quarantine.
            progress: Told about bytes read and decoded.
            workers: Threads that decode; one per core by default.

        Raises:
            StorageError: Something cannot be read, or, to repair, not be written.
        """
        from fragfs.library.check import Checker
        from fragfs.library.repair import Repairer

        checker = Checker(
            self._files,
            self.path,
            self._catalog,
            lambda: self._decoder,
            self._writer,
            self.uuid,
            self.config,
            workers or count_cores(),
            progress,
        )
        repairer = Repairer(
            self._files,
            self.path,
            self._catalog,
            self._packs,
            self._writer,
            checker,
            self.uuid,
            self._now_ns,
        )
        # What is dropped while it is looked at would be taken for lost.
        with hold_lease(self.path, "check"):
            return repairer.repair(data=data) if repair else repairer.check(data=data)


def _count_removed(
    fragments: RemovedFragments | None, removed: Sequence[FileEntry]
) -> tuple[int, int, list[tuple[bytes, int]]]:
    """As `RemovedFragments.count`; zeros where it is not known, as the removal stands."""
    if fragments is not None:
        try:
            return fragments.count(removed)
        except FormatError as error:
            _warn_not_counted(error)
    return 0, 0, []


def _warn_not_counted(error: FormatError) -> None:
    log.warning("what the removal leaves unreferenced is not known: %s", error)
