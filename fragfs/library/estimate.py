"""`fragfs estimate`: what an add would store, without storing anything.

Everything is read and looked up, which finds what is stored already. Of what is new, a sample is
encoded the way an add would encode it, and `sampling` says what that means for the rest. Paths are
taken as added one after the other: a fragment may also be equal to, or predicted from, one of an
earlier path, which is read again from its file when it is needed. Memory grows with the number of
new fragments, not with their bytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from fragfs.errors import FormatError, StorageError, UsageError
from fragfs.formats.cut import plan_cuts
from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import Layout
from fragfs.library.add import AddOptions
from fragfs.library.catalog import Catalog
from fragfs.library.closure import Closures
from fragfs.library.decode import FragmentDecoder
from fragfs.library.files import storage_error
from fragfs.library.hints import TensorHints
from fragfs.library.names import printable
from fragfs.library.planning import BasePlanner, Hints
from fragfs.library.progress import Progress
from fragfs.library.records import pack_fragment_record
from fragfs.library.sampling import Outcome, StratumKey, form_strata, margin_of, pick
from fragfs.library.source import SourceFile, check_outside, read_source, scan_source
from fragfs.similarity.signature import FragmentSignature
from fragfs.types import Dtype, FragmentId, LibraryConfig, SpanKind

__all__ = ["EstimateReport", "Estimator"]

_IN_FLIGHT_MAX = 64
"""New fragments between the oldest sample being encoded and the newest that others may read."""
_MATCHES = 128
"""Nearest fragments looked at for an assumed base: later ones among them do not count."""


@dataclass(frozen=True, slots=True)
class EstimateReport:
    """What an add would store. All but the first three figures are estimates.

    Attributes:
        file_count: Files read.
        logical_bytes: Their bytes.
        exact_bytes: Bytes of pieces that are stored already, or come more than once.
        stored_bytes: Record bytes an add would append.
        margin_bytes: How far off that may be, from how much samples differed.
        sampled_bytes: Bytes of the pieces that were encoded.
        mechanisms: (raw bytes, record bytes) of new pieces by what they would be predicted by.
        skipped: (path, reason) of what an add would leave out.
        warnings: Remarks such as a missing shard.
    """

    file_count: int
    logical_bytes: int
    exact_bytes: int
    stored_bytes: int
    margin_bytes: int
    sampled_bytes: int
    mechanisms: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: tuple[tuple[bytes, str], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _New:
    """A piece that is not stored yet, and where to read it; `source` counts the paths."""

    source: int
    file: SourceFile
    offset: int
    size: int
    dtype: Dtype
    kind: SpanKind
    id: FragmentId
    hints: Hints
    signature: FragmentSignature | None


class _TrialPlanner(BasePlanner):
    """A planner that also knows fragments which nobody has stored.

    They are numbered from `first` on, and read from their files when they are candidates. What one
    of them would be predicted from, which decides how deep it lies, is assumed: the nearest
    fragment that may serve.
    """

    def __init__(
        self,
        catalog: Catalog,
        decoder: FragmentDecoder,
        config: LibraryConfig,
        pieces: Sequence[_New],
    ) -> None:
        super().__init__(catalog, decoder, config, config.level)
        self._pieces = pieces
        self._first = catalog.next_number("fragments")
        self._assumed: dict[int, tuple[int, ...]] = {}

    def offer(self, index: int) -> None:
        """From now on others may be predicted from a piece."""
        piece = self._pieces[index]
        if piece.signature is not None:
            self._pending_ids[self._first + index] = (piece.id, ())
            self._pending.add(self._first + index, piece.signature)

    def trial(self, index: int) -> Outcome:
        """Encode a piece as if all offered before it were stored."""
        piece = self._pieces[index]
        number = self._first + index
        later = range(number, number + _IN_FLIGHT_MAX + 1)
        planned = self.plan(_read(piece), piece.dtype, piece.id, piece.hints, exclude=later)
        header, payload = pack_fragment_record(planned.fragment)
        return Outcome(len(header) + len(payload), planned.fragment.predictor.name.lower())

    def _raw(self, number: int) -> memoryview | None:
        if number < self._first:
            return super()._raw(number)
        raw = self._recent.get(number)
        if raw is None:
            raw = memoryview(_read(self._pieces[number - self._first]))
            self._recent.put(number, raw)
        return raw

    def _bases_of(self, numbers: Collection[int]) -> dict[int, tuple[int, ...]]:
        found = super()._bases_of([number for number in numbers if number < self._first])
        for number in numbers:
            if number >= self._first:
                if number not in self._assumed:
                    self._assumed[number] = self._assume(number)
                found[number] = self._assumed[number]
        return found

    def _assume(self, number: int) -> tuple[int, ...]:
        signature = self._pieces[number - self._first].signature
        if signature is not None:
            closures = Closures(self._bases_of)
            for match in self._index.query(signature, count=_MATCHES):
                if match.fragment < number:
                    closure = closures.of((match.fragment,))
                    if len(closure) < self._config.closure_max:
                        return (match.fragment,)
        return ()


class Estimator:
    """Estimates one add.

    Args:
        directory: The library's directory.
        config: Its settings.
        catalog: Its catalog.
        decoder: Decodes candidates.
        progress: Told about bytes read, then about bytes encoded.
    """

    def __init__(
        self,
        directory: Path,
        config: LibraryConfig,
        catalog: Catalog,
        decoder: FragmentDecoder,
        progress: Progress,
    ) -> None:
        self._directory = directory
        self._config = config
        self._catalog = catalog
        self._decoder = decoder
        self._progress = progress
        self._pieces: list[_New] = []
        self._seen: set[FragmentId] = set()
        self._exact_bytes = 0

    def run(self, paths: Sequence[Path], options: AddOptions) -> EstimateReport:
        """Estimate; see `FragmentLibrary.estimate`."""
        if not paths:
            raise UsageError("nothing to look at", remedy="name at least one directory or file")
        for path in paths:
            check_outside(path, self._directory)
        trees = [scan_source(path, follow_links=options.follow_links) for path in paths]
        files = [file for tree in trees for file in tree.files]
        logical_bytes = sum(file.size for file in files)
        self._progress.start("reading", logical_bytes)
        planner = BasePlanner(self._catalog, self._decoder, self._config, self._config.level)
        for source, tree in enumerate(trees):
            for file in tree.files:
                self._scan(source, file, planner, force=options.force)
        strata = form_strata(
            [(StratumKey.of(p.source, p.dtype, p.kind, p.hints.name), p.size) for p in self._pieces]
        )
        workers = options.workers or len(os.sched_getaffinity(0))
        while picked := pick(strata):
            outcomes = self._encode([stratum.pieces[at] for stratum, at in picked], workers)
            for stratum, at in picked:
                stratum.outcomes[at] = outcomes[stratum.pieces[at]]
        parts: dict[str, tuple[int, float]] = {}
        for stratum in strata:
            for name, raw_bytes, stored in stratum.estimate():
                raw_before, stored_before = parts.get(name, (0, 0.0))
                parts[name] = (raw_before + raw_bytes, stored_before + stored)
        mechanisms = {name: (raw, round(stored)) for name, (raw, stored) in parts.items()}
        return EstimateReport(
            file_count=len(files),
            logical_bytes=logical_bytes,
            exact_bytes=self._exact_bytes,
            stored_bytes=sum(stored for _, stored in mechanisms.values()),
            margin_bytes=round(margin_of(strata)),
            sampled_bytes=sum(stratum.sizes[at] for stratum in strata for at in stratum.outcomes),
            mechanisms=mechanisms,
            skipped=tuple(entry for tree in trees for entry in tree.skipped),
            warnings=tuple(warning for tree in trees for warning in tree.warnings),
        )

    def _scan(self, source: int, file: SourceFile, planner: BasePlanner, *, force: bool) -> None:
        """Cut a file, and note what is new of it."""
        self._progress.note(printable(file.path))
        descriptor, status = read_source(file)
        try:
            if status.st_size != file.size:
                raise _changed(file)
            layout = _parse(file, descriptor)
            if layout.refusal is not None and not force:
                raise FormatError(
                    f"{file.source}: {layout.refusal}",
                    path=str(file.source),
                    remedy=layout.refusal_remedy,
                )
            hints = TensorHints(layout)
            for cut in plan_cuts(layout, self._config.fragment_elements):
                raw = _read_at(file, descriptor, cut.offset, cut.size)
                hint = hints.of_cut(cut)
                identity = FragmentId(blake3(raw).digest())
                if identity in self._seen or self._catalog.find_fragment(identity) is not None:
                    self._exact_bytes += cut.size
                else:
                    self._seen.add(identity)
                    signature = planner.sign(raw, cut.dtype, hint)
                    self._pieces.append(
                        _New(
                            source,
                            file,
                            cut.offset,
                            cut.size,
                            cut.dtype,
                            cut.kind,
                            identity,
                            hint,
                            signature,
                        )
                    )
                self._progress.advance(cut.size)
        finally:
            os.close(descriptor)

    def _encode(self, indices: Collection[int], workers: int) -> dict[int, Outcome]:
        """Encode some pieces, each as if all before it were stored."""
        chosen = set(indices)
        self._progress.start("encoding samples", sum(self._pieces[i].size for i in chosen))
        planner = _TrialPlanner(self._catalog, self._decoder, self._config, self._pieces)
        outcomes: dict[int, Outcome] = {}
        waiting: deque[tuple[int, Future[Outcome]]] = deque()

        def collect() -> None:
            index, future = waiting.popleft()
            outcomes[index] = future.result()
            self._progress.advance(self._pieces[index].size)

        pool = ThreadPoolExecutor(workers, "fragfs-estimate")
        try:
            for index in range(max(chosen, default=-1) + 1):
                # None may see so many later pieces that it would take them for earlier ones.
                while waiting and index - waiting[0][0] >= _IN_FLIGHT_MAX:
                    collect()
                if index in chosen:
                    waiting.append((index, pool.submit(planner.trial, index)))
                planner.offer(index)
            while waiting:
                collect()
        finally:
            pool.shutdown(cancel_futures=True)
        return outcomes


def _parse(file: SourceFile, descriptor: int) -> Layout:
    def read_at(offset: int, size: int) -> bytes:
        return _read_at(file, descriptor, offset, size)

    return parse_layout(os.fsdecode(file.source.name), file.size, read_at)


def _read(piece: _New) -> bytes:
    descriptor, _ = read_source(piece.file)
    try:
        return _read_at(piece.file, descriptor, piece.offset, piece.size)
    finally:
        os.close(descriptor)


def _read_at(file: SourceFile, descriptor: int, offset: int, size: int) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except OSError as error:
        raise storage_error(error, f"cannot read {file.source}") from error
    if len(data) != size:
        raise _changed(file)
    return data


def _changed(file: SourceFile) -> StorageError:
    return StorageError(
        f"{file.source} changed while it was read",
        path=str(file.source),
        retryable=True,
        remedy="wait until nothing writes to it and run the command again",
    )
