"""Turning source files into committed fragments: read once, hash, dedup, encode, verify, append.

One thread reads and appends; workers hash and encode; one more thread keeps each file's SHA-256.
Bytes in flight are bounded, so memory does not depend on the size of files or models. Batches are
committed as they fill up, and the writer lock is free in between.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from blake3 import blake3

from fragfs.errors import IntegrityError, LimitError, NotFoundError, StorageError
from fragfs.formats.cut import plan_cuts
from fragfs.formats.layout import Cut, Layout
from fragfs.library.batch import Batch, Replacement
from fragfs.library.catalog import Catalog
from fragfs.library.decode import FragmentDecoder, where
from fragfs.library.extents import ExtentMapBuilder
from fragfs.library.files import storage_error
from fragfs.library.hints import TensorHints
from fragfs.library.names import printable
from fragfs.library.planning import BasePlanner, Hints, Planned
from fragfs.library.progress import Progress
from fragfs.library.publish import NewContent
from fragfs.library.source import SourceFile, check_unchanged, read_source
from fragfs.library.unpublished import note_unpublished
from fragfs.types import Dtype, FragmentId, FragmentMetadata, LibraryConfig

__all__ = ["IngestTotals", "Ingester", "PlannedFile"]

_BATCH_S = 10.0
"""A batch is committed after this long: what a crash may cost."""

_IN_FLIGHT_BYTES_PER_WORKER = 16 << 20
"""Eight fragments of f32 read ahead for each worker: a commit's fsync leaves none of them idle."""
_IN_FLIGHT_BYTES_MAX = 256 << 20
"""However many cores: an add shall stay below 1 GB with everything it holds."""
_IN_FLIGHT_CUTS_MAX = 1024


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A source file, its path in the model, and how it will be cut."""

    path: bytes
    file: SourceFile
    layout: Layout


@dataclass(slots=True)
class IngestTotals:
    """What came of the bytes so far.

    Attributes:
        new_bytes: Record bytes appended.
        reused_bytes: Raw bytes that were stored already.
        saved_bytes: Raw minus record bytes of new fragments, by predictor name.
        healed: Fragments whose damaged record was replaced by a good one, described.
    """

    new_bytes: int = 0
    reused_bytes: int = 0
    saved_bytes: dict[str, int] = field(default_factory=dict)
    healed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _FileState:
    planned: PlannedFile
    extents: ExtentMapBuilder = field(default_factory=ExtentMapBuilder)
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)


@dataclass(frozen=True, slots=True)
class _Staged:
    """What a worker found out about one cut.

    `planned` is set if its record must be written; `known` if the library has the fragment; both
    if the library's record is damaged and `planned` shall replace it.
    """

    planned: Planned | None
    known: FragmentMetadata | None
    damage: str = ""


@dataclass(slots=True)
class _Piece:
    """One cut on its way, or the end of a file (no cut)."""

    state: _FileState
    cut: Cut | None = None
    raw: bytes = b""
    hints: Hints = field(default_factory=Hints)
    staged: Future[_Staged] | None = None
    hashed: Future[None] | None = None


class Ingester:
    """Stores the bytes of source files. Used by one thread; a context manager.

    Args:
        config: The library's settings.
        catalog: Where to look for fragments that are stored already.
        decoder: Checks the records that dedup hits rely on.
        start_batch: Takes the writer lock and begins a batch.
        workers: Threads that hash and encode.
        progress: Told about bytes read.
        now_ns: The clock.
    """

    def __init__(
        self,
        config: LibraryConfig,
        catalog: Catalog,
        decoder: FragmentDecoder,
        start_batch: Callable[[], AbstractContextManager[Batch]],
        workers: int,
        progress: Progress,
        now_ns: Callable[[], int],
    ) -> None:
        self._config = config
        self._now_ns = now_ns
        self._catalog = catalog
        self._decoder = decoder
        self._planner = BasePlanner(catalog, decoder, config, config.level)
        self._checked: set[int] = set()
        self._start_batch = start_batch
        self._progress = progress
        self._batch: Batch | None = None
        self._batch_scope = ExitStack()
        self._workers = ThreadPoolExecutor(workers, "fragfs-encode")
        self._hasher = ThreadPoolExecutor(1, "fragfs-sha256")
        self._pieces: deque[_Piece] = deque()
        self._in_flight_bytes = 0
        self._in_flight_bytes_max = min(workers * _IN_FLIGHT_BYTES_PER_WORKER, _IN_FLIGHT_BYTES_MAX)
        self._replaced: dict[int, FragmentMetadata] = {}
        self._finished: list[tuple[PlannedFile, NewContent]] = []
        self.totals = IngestTotals()

    def __enter__(self) -> Ingester:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        self._batch_scope.close()

    def store(self, files: Sequence[PlannedFile]) -> list[tuple[PlannedFile, NewContent]]:
        """Store the files' fragments and commit them; the files are not visible yet.

        Raises:
            StorageError: A file cannot be read or changed while it was read, or the disk is full.
        """
        self._finished = []
        for planned in files:
            self._read(planned)
        while self._pieces:
            self._collect()
        self.commit()
        return self._finished

    def commit(self) -> None:
        """Commit what was appended and let other writers have their turn."""
        if self._batch is not None:
            # No model names them yet: what tells them from what is left of removed models.
            self._batch.commit(note_unpublished(self._batch.new_numbers, self._now_ns()))
            self._batch = None
            self._batch_scope.close()
            self._planner.forget_pending()

    # --- reading, in the calling thread

    def _read(self, planned: PlannedFile) -> None:
        file = planned.file
        state = _FileState(planned)
        self._progress.note(printable(planned.path))
        descriptor, before = read_source(file)
        try:
            if (before.st_size, before.st_mtime_ns) != (file.size, file.mtime_ns):
                raise StorageError(
                    f"{file.source} changed since it was first looked at",
                    path=str(file.source),
                    retryable=True,
                    remedy="wait until nothing writes to it and add it again",
                )
            hints = TensorHints(planned.layout)
            for cut, raw in self._cuts(planned, descriptor):
                self._make_room(len(raw))
                self._in_flight_bytes += len(raw)
                hint = hints.of_cut(cut)
                self._pieces.append(
                    _Piece(
                        state,
                        cut,
                        raw,
                        hint,
                        self._workers.submit(self._stage, raw, cut.dtype, hint),
                        self._hasher.submit(state.sha256.update, raw),
                    )
                )
            check_unchanged(file, before, descriptor)
        finally:
            os.close(descriptor)
        self._pieces.append(_Piece(state))

    def _cuts(self, planned: PlannedFile, descriptor: int) -> Iterator[tuple[Cut, bytes]]:
        path = planned.file.source
        for cut in plan_cuts(planned.layout, self._config.fragment_elements):
            try:
                raw = os.pread(descriptor, cut.size, cut.offset)
            except OSError as error:
                raise storage_error(error, f"cannot read {path}") from error
            if len(raw) != cut.size:
                raise StorageError(
                    f"{path} became shorter while it was read",
                    path=str(path),
                    offset=cut.offset + len(raw),
                    retryable=True,
                    remedy="wait until nothing writes to it and add it again",
                )
            yield cut, raw

    def _make_room(self, size: int) -> None:
        while self._pieces and (
            self._in_flight_bytes + size > self._in_flight_bytes_max
            or len(self._pieces) >= _IN_FLIGHT_CUTS_MAX
        ):
            self._collect()

    # --- hashing and encoding, in the workers

    def _stage(self, raw: bytes, dtype: Dtype, hints: Hints) -> _Staged:
        fragment_id = FragmentId(blake3(raw).digest())
        batch = self._batch
        if batch is not None and (pending := batch.find(fragment_id)) is not None:
            return _Staged(None, pending)
        known = self._catalog.find_fragment(fragment_id)
        if known is None:
            return _Staged(self._planner.plan(raw, dtype, fragment_id, hints), None)
        try:
            self._decoder.check_closure(known, self._checked)
        except (IntegrityError, StorageError, NotFoundError) as error:
            if isinstance(error, StorageError) and error.retryable:
                raise
            # Never rest the only copy of a file on a rotten record: ours is good and replaces it.
            # From nothing: its closure can only shrink, whatever is predicted from it.
            solo = self._planner.plan_solo(raw, dtype, fragment_id, hints)
            return _Staged(solo, known, error.message)
        return _Staged(None, known)

    # --- appending, in the calling thread, in file order

    def _collect(self) -> None:
        piece = self._pieces.popleft()
        if piece.cut is None or piece.staged is None or piece.hashed is None:
            self._finish(piece.state)
            return
        staged = piece.staged.result()
        piece.hashed.result()
        cut = piece.cut
        self._in_flight_bytes -= cut.size
        metadata = self._place(staged, piece, cut)
        piece.state.extents.append(cut.size, metadata.number, 0, cut.kind, first=cut.first)
        self._progress.advance(cut.size)
        batch = self._batch
        if batch is not None and (batch.is_full or time.monotonic() - batch.started_s >= _BATCH_S):
            self.commit()

    def _place(self, staged: _Staged, piece: _Piece, cut: Cut) -> FragmentMetadata:
        totals = self.totals
        planned, known = staged.planned, staged.known
        if planned is None:
            assert known is not None, "a worker returned neither a fragment nor a hit"
            totals.reused_bytes += known.raw_size
            return known
        if self._batch is None:
            self._batch = self._batch_scope.enter_context(self._start_batch())
        if known is not None and known.number in self._replaced:
            totals.reused_bytes += known.raw_size
            return self._replaced[known.number]
        if known is not None:
            (metadata,) = self._batch.replace_fragments(
                [Replacement(known.number, planned.fragment, planned.signature)]
            )
            self._replaced[metadata.number] = metadata
            totals.healed.append(f"{staged.damage}; a good copy is now in {where(metadata)}")
            totals.new_bytes += metadata.record_size
            return metadata
        count = self._batch.fragment_count
        try:
            metadata = self._batch.append_fragment(planned.fragment, planned.signature)
        except LimitError:
            # Another command has changed what its bases are predicted from, since they were chosen.
            planned = self._planner.plan_solo(
                piece.raw, cut.dtype, planned.fragment.id, piece.hints
            )
            metadata = self._batch.append_fragment(planned.fragment, planned.signature)
        if self._batch.fragment_count == count:
            totals.reused_bytes += metadata.raw_size
            return metadata
        self._planner.add_pending(metadata.number, planned, piece.raw)
        totals.new_bytes += metadata.record_size
        name = planned.fragment.predictor.name.lower()
        saved = metadata.raw_size - metadata.record_size
        totals.saved_bytes[name] = totals.saved_bytes.get(name, 0) + saved
        return metadata

    def _finish(self, state: _FileState) -> None:
        file = state.planned.file
        self._finished.append(
            (
                state.planned,
                NewContent(
                    sha256=state.sha256.digest(),
                    size=file.size,
                    mtime_ns=file.mtime_ns,
                    verdict=state.planned.layout.verdict,
                    extents=state.extents.build(),
                ),
            )
        )
