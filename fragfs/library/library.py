"""`FragmentLibrary`: the door to a library, for the command line, the mount and Python programs.

Heavy rooms (numpy, codecs) are imported by the methods that need them, so that `fragfs ls` starts
fast.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from fragfs.errors import FormatError, FragmentError, NotFoundError, StorageError
from fragfs.library import tree
from fragfs.library.catalog import (
    Catalog,
)
from fragfs.library.extents import ExtentMap, OpenContent, check_seal
from fragfs.library.files import Files, OsFiles
from fragfs.library.lease import Lease, as_ranges, hold_lease, leased
from fragfs.library.names import as_name, join, printable
from fragfs.library.packs import PackReader
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.library.publish import (
    DraftDirectory,
    RemoveReport,
    load_draft,
    publish_move,
    publish_path_removal,
    publish_removal,
    refresh_stored_bytes,
)
from fragfs.library.version import read_snapshot_generation
from fragfs.library.writer import Batch, LibraryWriter
from fragfs.types import (
    FileEntry,
    FragmentId,
    FragmentMetadata,
    LayerMapping,
    Level,
    LibraryConfig,
    LibraryStats,
    ModelInfo,
    ModelManifest,
)

if TYPE_CHECKING:
    from fragfs.library.add import AddOptions, AddReport
    from fragfs.library.collect import Collector, GcReport
    from fragfs.library.decode import DecodedSource, FragmentDecoder
    from fragfs.library.estimate import EstimateReport
    from fragfs.library.explain import Explanation
    from fragfs.library.findings import CheckReport
    from fragfs.library.ingest import Ingester
    from fragfs.library.optimize import OptimizeReport
    from fragfs.library.readback import ExportReport
    from fragfs.library.rebuild import RebuildReport
    from fragfs.library.verify import VerifiedFile, VerifyState

__all__ = ["FragmentLibrary"]

log = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 60.0
_VERIFY_RECENT_BYTES_MAX = 192 << 20
"""Decoded fragments kept while files are verified: what several of them have in common."""


class FragmentLibrary:
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
        self.path = Path(path)
        self._files = files or OsFiles()
        self._now_ns = now_ns
        self._catalog = Catalog(self.path)
        self.uuid, self.config = self._catalog.identity()
        self._packs = PackReader(self._files, self.path, self.uuid)
        self._writer = LibraryWriter(
            self._files, self.path, self._catalog, self.uuid, self.config, lock_timeout_s
        )

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
            library._publish_snapshot()
        return report

    def close(self) -> None:
        """Close the catalog and the packs; other threads must have stopped using them."""
        self._packs.drop_descriptors()
        self._catalog.close()

    def __enter__(self) -> FragmentLibrary:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- models and files

    def models(self) -> list[ModelInfo]:
        """Every model, by name."""
        return [_model_info(row) for row in self._catalog.rows(f"{_MODELS} ORDER BY name")]

    def model(self, name: str | bytes) -> ModelInfo:
        """One model.

        Raises:
            NotFoundError: No such model; near names are suggested.
        """
        raw = as_name(name)
        row = self._catalog.row(f"{_MODELS} WHERE name = ?", (raw,))
        if row is None:
            raise self._no_model(raw)
        return _model_info(row)

    def _no_model(self, name: bytes) -> NotFoundError:
        names = [printable(row[0]) for row in self._catalog.rows("SELECT name FROM models")]
        near = get_close_matches(printable(name), names, n=3)
        remedy = f"did you mean {', '.join(near)}?" if near else "see the models with: fragfs ls"
        return NotFoundError(f"the library has no model named {printable(name)}", remedy=remedy)

    def files(self, name: str | bytes) -> list[FileEntry]:
        """Every file of a model, by path.

        Raises:
            NotFoundError: No such model.
            FormatError: The catalog is damaged there.
        """
        model = self.model(name)
        entries = []
        for is_indexed, directory, leaf, *rest in self._catalog.rows(
            f"SELECT {tree.IS_INDEXED}, directory, name, content, size, sha256, mode,"
            " files.mtime_ns, stored_bytes, verdict"
            " FROM files JOIN contents ON contents.number = content WHERE model = ?",
            (model.number,),
        ):
            entry = FileEntry(join(directory, leaf), *rest)
            tree.check_file(entry.path, entry.content, entry.size, is_indexed)
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry.path)

    def manifest(self, name: str | bytes) -> ModelManifest:
        """A model with its files and named tensors.

        The names come from the files' own headers, which are decoded for it.
        """
        from fragfs.library.layers import file_layers

        entries = self.files(name)
        layers: list[LayerMapping] = []
        fragment_id = cache(self._fragment_id)
        for entry in entries:
            content = self.open_content(entry.content)
            layers += file_layers(entry, content, self._decode_cold, fragment_id)
        return ModelManifest(self.model(name), tuple(entries), tuple(layers))

    def stats(self, name: str | bytes | None = None) -> LibraryStats:
        """Count the library, or one model of it; everything is recomputed from disk."""
        from fragfs.library.stats import library_stats

        number = self.model(name).number if name is not None else None
        return library_stats(self._catalog, self.path, number)

    def explain(
        self, name: str | bytes, path: str | bytes = b"", *, tensors: bool = False
    ) -> Explanation:
        """Say where the bytes of a model live, or those of a file or directory of it.

        Args:
            name: The model.
            path: A file or directory of it; everything by default.
            tensors: Whether to list tensors and the fragments that hold them.

        Raises:
            NotFoundError: No such model or file.
        """
        from fragfs.library.explain import Explainer

        explainer = Explainer(self._catalog, self.open_content, self._decode_cold)
        inside = as_name(path) if path else b""
        return explainer.explain(as_name(name), inside, self.files(name), tensors=tensors)

    def estimate(
        self, paths: Sequence[Path], options: AddOptions, progress: Progress = NO_PROGRESS
    ) -> EstimateReport:
        """Say what adding directories or files would store, without adding them.

        Reads everything, looks up what is stored already, and encodes a sample of the rest.

        Args:
            paths: Each is taken as a model of its own, added after those before it.
            options: How they would be added; the model's name does not matter.
            progress: Told about bytes read.

        Raises:
            UsageError: A link that leads elsewhere; nothing to add.
            FormatError: A truncated file or an LFS pointer (unless `options.force`).
            StorageError: Something cannot be read.
        """
        from fragfs.library.estimate import Estimator

        estimator = Estimator(self.path, self.config, self._catalog, self._decoder, progress)
        with hold_lease(self.path, "estimate"):
            return estimator.run(paths, options)

    def data_version(self) -> int:
        """A number that changes when any process has changed the library.

        Compare only values that the same thread got.
        """
        return self._catalog.data_version()

    def close_removed_packs(self) -> None:
        """Let go of packs that were given back, so that their space is free; who lives long does.

        Takes a microsecond for each open pack, of which there are not many.
        """
        self._packs.drop_removed()

    # --- the tree

    def lookup(self, path: bytes) -> tree.TreeNode | None:
        """What is at `path` of the tree that a mount shows; b"" is its root."""
        return tree.lookup(self._catalog, path)

    def list_directory(self, path: bytes) -> list[tuple[bytes, tree.TreeNode]] | None:
        """The entries of a directory of that tree, by name; None if it is no directory."""
        return tree.list_directory(self._catalog, path)

    # --- contents and fragments

    def open_content(self, content: int) -> OpenContent:
        """Everything needed to read a file content.

        Raises:
            NotFoundError: No file shows it any more.
            FormatError: The catalog is damaged.
        """
        row = self._catalog.row(
            "SELECT number, size, mtime_ns, sha256, stored_bytes, extents FROM contents"
            " WHERE number = ?",
            (content,),
        )
        if row is None:
            raise NotFoundError(f"content {content} is not in the library (any more)")
        number, size, mtime_ns, sha256, stored_bytes, blob = row
        check_seal(blob, number, sha256)
        extents = ExtentMap.parse(blob)
        if extents.size != size:
            raise FormatError(
                f"content {number} has {size} bytes, its extents have {extents.size}",
                path=str(self._catalog.path),
                remedy="restore the catalog from a backup",
                expected=size,
                actual=extents.size,
            )
        return OpenContent(number, size, mtime_ns, sha256, stored_bytes, extents)

    def has_content(self, content: int) -> bool:
        """Whether a file content is in the catalog (still)."""
        return self._catalog.row("SELECT 1 FROM contents WHERE number = ?", (content,)) is not None

    def open_file(self, name: str | bytes, path: str | bytes) -> BinaryIO:
        """A file of a model as a read-only, seekable Python file, decoded while it is read.

        It stays readable to the end, whatever is removed meanwhile; close it when you are done.

        Raises:
            NotFoundError: No such model or file.
        """
        import io

        from fragfs.library.stream import ContentStream

        model, inside = as_name(name), as_name(path)
        node = self.lookup(join(self.model(model).name, inside))
        if not isinstance(node, tree.File):
            raise NotFoundError(
                f"{printable(model)} has no file {printable(inside)}",
                remedy=f"see its files with: fragfs ls {printable(model)}",
            )
        with ExitStack() as scope:
            lease = scope.enter_context(hold_lease(self.path, "program reading a file"))
            content = self.open_content(node.content)
            lease.pin(as_ranges(content.extents.fragments))
            stream = ContentStream(content, self._decode_cold, scope.pop_all().close)
            return io.BufferedReader(stream, 1 << 20)

    def models_of_content(self, content: int) -> list[bytes]:
        """Names of the models that show a content."""
        return [
            row[0]
            for row in self._catalog.rows(
                "SELECT DISTINCT models.name FROM files JOIN models ON models.number = files.model"
                " WHERE content = ? ORDER BY models.name",
                (content,),
            )
        ]

    def fragment(self, number: int) -> FragmentMetadata:
        """Where a fragment is stored.

        Raises:
            NotFoundError: No such fragment.
        """
        return self._catalog.fragment(number)

    def bases(self, number: int) -> tuple[int, ...]:
        """Numbers of the fragments that a fragment's prediction reads."""
        return self._catalog.bases(number)

    def dependent_count(self, number: int) -> int:
        """How many fragments are predicted from a fragment."""
        return len(self._catalog.dependents(number))

    def decode_fragment(self, number: int, source: DecodedSource) -> memoryview:
        """The raw bytes of a fragment, read-only, from `source` or from its pack.

        Raises:
            NotFoundError: No such fragment.
            IntegrityError: Its stored bytes are damaged.
            StorageError: Its pack cannot be read.
        """
        return self._decoder.decode(number, source)

    def _decode_cold(self, number: int) -> memoryview:
        from fragfs.library.decode import NO_SOURCE

        return self._decoder.decode(number, NO_SOURCE)

    def _fragment_id(self, number: int) -> FragmentId:
        return self._catalog.fragment(number).id

    @cached_property
    def _decoder(self) -> FragmentDecoder:
        from fragfs.library.decode import FragmentDecoder

        return FragmentDecoder(self._catalog, self._packs)

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
                self._publish_snapshot()

    def _publish_snapshot(self) -> None:
        """Bring the read-only copy up to date; the change itself is committed already."""
        try:
            self._writer.publish_snapshot()
        except StorageError as error:
            log.warning("other users see an older state of the library for now: %s", error)

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

        Raises:
            NotFoundError: No such model or file.
        """
        from fragfs.library.stats import RemovedFragments

        raw = as_name(name)
        entries = self.files(raw)
        fragments = RemovedFragments(self._catalog, entries)
        with self._writer.batch() as batch:
            if paths:
                gone = publish_path_removal(batch, self._catalog, raw, paths, self._now_ns())
                removed = [entry for entry in entries if entry.path in gone]
            else:
                removed = entries
                publish_removal(batch, self._catalog, raw, self._now_ns())
        self._publish_snapshot()
        unreferenced_bytes, kept_bytes, kept_for = fragments.count(removed)
        return RemoveReport(
            model=raw,
            file_count=len(removed),
            removed_bytes=sum(entry.size for entry in removed),
            unreferenced_bytes=unreferenced_bytes,
            kept_bytes=kept_bytes,
            kept_for=tuple(kept_for),
        )

    def move(self, old: str | bytes, new: str | bytes) -> None:
        """Rename a model. Its inodes and bytes stay what they are.

        Raises:
            NotFoundError: No such model.
            UsageError: The new name is taken or nests.
        """
        model = self.model(old)
        with self._writer.batch() as batch:
            publish_move(batch, self._catalog, model.name, as_name(new), self._now_ns())
        self._publish_snapshot()

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
            workers or _cores(),
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
            self._writer.batch,
            self._writer.publish_snapshot,
        )
        return Collector(self.path, self._catalog, self._writer, compactor, self._now_ns)

    def _readable_layers(self) -> Iterator[LayerMapping]:
        """The named tensors of every model that can be read."""
        for model in self.models():
            try:
                yield from self.manifest(model.name).layers
            except FragmentError:
                continue  # damaged, or removed meanwhile: `verify` tells

    def hold_lease(self, what: str = "reader") -> AbstractContextManager[Lease]:
        """Keep everything readable, whatever is removed, for as long as the context lasts.

        Args:
            what: What the holder is, for messages. It may say on the lease that it needs less.
        """
        return hold_lease(self.path, what)

    def generation(self) -> int:
        """The number of the change committed last."""
        return self._catalog.generation()[0]

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
            StorageError: Something cannot be read for now, or, to repair, not be written.
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
            workers or _cores(),
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

    # --- whole models

    def verify(
        self,
        name: str | bytes | None = None,
        progress: Progress = NO_PROGRESS,
        workers: int | None = None,
        state: VerifyState | None = None,
    ) -> Generator[VerifiedFile, None, None]:
        """Decode every file of a model (or of all) and compare it with its recorded SHA-256.

        Args:
            name: The model; None for all.
            progress: Told about bytes decoded.
            workers: How many threads decode, and how many files are read at once; one per core by
                default.
            state: What an interrupted run has found good; see `verify_state`.

        Raises:
            NotFoundError: No such model.
        """
        from fragfs.library.recent import RecentFragments
        from fragfs.library.verify import verify_files

        recent = RecentFragments(_VERIFY_RECENT_BYTES_MAX)
        decoder = self._decoder
        models = [self.model(name)] if name is not None else self.models()
        files: list[tuple[bytes, FileEntry]] = []
        for model in models:
            with suppress(NotFoundError):
                files += [(model.name, entry) for entry in self.files(model.name)]
        verified = verify_files(
            files,
            self.open_content,
            lambda number: decoder.decode(number, recent),
            workers or _cores(),
            progress,
            state,
        )
        return leased(self.path, "verify", verified)

    def verify_state(self, path: Path, *, resume: bool) -> VerifyState:
        """Where a run of `verify` writes down how far it got, for the library as it is now.

        Args:
            path: The file.
            resume: Whether to go on where an interrupted run stopped.

        Raises:
            StorageError: The file cannot be made.
        """
        from fragfs.library.verify import VerifyState

        return VerifyState(path, self.uuid, self._catalog.generation()[1], resume=resume)

    def export(
        self,
        name: str | bytes,
        destination: Path,
        progress: Progress = NO_PROGRESS,
        workers: int | None = None,
    ) -> ExportReport:
        """Write a model's files to a new directory, bit-exact, with their modes and times.

        Raises:
            NotFoundError: No such model.
            UsageError: The destination holds something.
            StorageError: It cannot be written.
        """
        from fragfs.library.readback import export_files

        files = self.files(name)
        draft = load_draft(self._catalog, as_name(name))
        directories: list[DraftDirectory] = list(draft.directories.values())
        with hold_lease(self.path, "export") as lease:
            pinned: dict[int, OpenContent] = {}
            for number in {file.content for file in files}:
                with suppress(FragmentError):  # `export_files` asks for it again, and tells
                    pinned[number] = self.open_content(number)
            lease.pin(as_ranges(f for one in pinned.values() for f in one.extents.fragments))
            return export_files(
                files,
                [(d.path, d.mode, d.mtime_ns) for d in directories],
                destination,
                lambda number: pinned.get(number) or self.open_content(number),
                self._decode_cold,
                workers or _cores(),
                progress,
            )


_MODELS = """
SELECT number, name, added_ns, mtime_ns,
    (SELECT count(content) FROM files WHERE model = models.number),
    (SELECT coalesce(sum(size), 0) FROM files JOIN contents ON contents.number = content
        WHERE model = models.number),
    (SELECT coalesce(sum(stored_bytes), 0) FROM contents WHERE number IN
        (SELECT content FROM files WHERE model = models.number))
FROM models
"""


def _model_info(row: tuple[int, bytes, int, int, int, int, int]) -> ModelInfo:
    return ModelInfo(*row)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
