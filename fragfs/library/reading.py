"""All that can be asked of a library: its models, files and fragments; verifying and exporting.

`FragmentLibrary` is the door and adds what changes a library. Heavy rooms (numpy, codecs) are
imported by the methods that need them, so that `fragfs ls` starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from fragfs.errors import FormatError, FragmentError, NotFoundError
from fragfs.library import tree
from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap, OpenContent, check_seal
from fragfs.library.files import Files
from fragfs.library.lease import Lease, as_ranges, hold_lease, leased
from fragfs.library.names import as_name, join, printable
from fragfs.library.packs import PackReader
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.library.publish import DraftDirectory, load_draft
from fragfs.types import (
    FileEntry,
    FragmentId,
    FragmentIdentity,
    FragmentMetadata,
    LayerMapping,
    LibraryStats,
    ModelInfo,
    ModelManifest,
)

if TYPE_CHECKING:
    from fragfs.library.add import AddOptions
    from fragfs.library.decode import DecodedSource, FragmentDecoder
    from fragfs.library.estimate import EstimateReport
    from fragfs.library.explain import Explanation
    from fragfs.library.readback import ExportReport
    from fragfs.library.verify import VerifiedFile, VerifyState

__all__ = ["LibraryReader", "count_cores"]

_VERIFY_RECENT_BYTES_MAX = 192 << 20
"""Decoded fragments kept while files are verified: what several of them have in common."""


class LibraryReader:
    """What does not change a library; see `FragmentLibrary`.

    Args:
        path: The library's directory.
        files: How to read.

    Attributes:
        path: The library's directory.
        config: Its settings, fixed when it was created.
        uuid: Its identity: 16 bytes.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self._files = files
        self._catalog = Catalog(path)
        self.uuid, self.config = self._catalog.identity()
        self._packs = PackReader(files, path, self.uuid)

    def close(self) -> None:
        """Close the catalog and the packs; other threads must have stopped using them."""
        self._packs.drop_descriptors()
        self._catalog.close()

    def __enter__(self) -> Self:
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

    def generation(self) -> int:
        """The number of the change committed last."""
        return self._catalog.generation()[0]

    def close_removed_packs(self) -> None:
        """Let go of packs that were given back, so that their space is free; who lives long does.

        Takes a microsecond for each open pack, of which there are not many.
        """
        self._packs.drop_removed()

    @contextmanager
    def hold_lease(self, what: str = "reader") -> Iterator[Lease]:
        """Keep everything readable, whatever is removed, for as long as the context lasts.

        Args:
            what: What the holder is, for messages. It may say on the lease that it needs less.

        Raises:
            StorageError: The lease cannot be taken, or the catalog was moved away or replaced.
        """
        with hold_lease(self.path, what) as lease:
            # A rebuild lets nobody take a lease: one that waited for it has the old catalog open.
            self._catalog.check_in_place()
            yield lease

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

    def identities(self, numbers: Sequence[int]) -> list[FragmentIdentity]:
        """What some fragments are, in their order; a few hundred at most.

        Raises:
            NotFoundError: There is no such fragment.
        """
        return self._catalog.identities(numbers)

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
            workers or count_cores(),
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

        _, batch = self._catalog.generation()
        return VerifyState(path, self.uuid, batch, self._catalog.file_identity(), resume=resume)

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
                workers or count_cores(),
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


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
