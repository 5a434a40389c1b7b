"""`fragfs check --rebuild`: a new catalog from the packs alone (FORMAT.md, "Recovery by scan").

Committed batches are replayed, the newest sound record of every fragment is found, and a complete
catalog is written in `staging/` that takes the old one's name in one rename. The old one is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from fragfs.codec.encoding import decode
from fragfs.errors import FragmentError, IntegrityError, NotFoundError, StorageError
from fragfs.library.catalog import CATALOG_NAME
from fragfs.library.check_packs import bases_of_record
from fragfs.library.decode import check_this_machine
from fragfs.library.files import Files
from fragfs.library.former import FormerCatalog, keep_former, read_formers, remove_journal
from fragfs.library.history import CommittedBatches, History, replay_models
from fragfs.library.lease import no_leases
from fragfs.library.lock import writer_lock
from fragfs.library.packs import PACKS_NAME, pack_name, pack_number
from fragfs.library.progress import Progress
from fragfs.library.rebuilt import PackRow, RebuiltCatalog
from fragfs.library.records import (
    FRAGMENT_HEADER,
    PACK_HEADER,
    RECORD_HEADER,
    PackHeader,
    RecordKind,
    checksum,
    parse_fragment_record,
    parse_pack_header,
)
from fragfs.library.resolve import Candidate, Resolved, resolve_fragments
from fragfs.library.scan import FoundRecord, PackScan, scan_pack
from fragfs.library.writer import INTENT_NAME, STAGING_NAME, read_intents
from fragfs.types import FragmentId

__all__ = ["RebuildReport", "Rebuilder"]


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a rebuild made.

    Attributes:
        model_count: Models in the new catalog.
        file_count: Their files.
        fragment_count: Fragments in it.
        kept: The old catalog under its new name, and its journal if it had one.
        notes: What could not be taken over, and why.
    """

    model_count: int
    file_count: int
    fragment_count: int
    kept: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What the packs hold.

    Attributes:
        header: What their headers agree on.
        packs: Every pack of the library.
        committed: The committed batches, fragments left out.
        candidates: Records of committed batches by fragment, the newest first; then those that
            damage has cut off from their trailer.
        record_count: All fragment records, also of batches that do not count.
    """

    header: PackHeader
    packs: tuple[PackRow, ...]
    committed: CommittedBatches
    candidates: dict[FragmentId, list[Candidate]]
    record_count: int


class Rebuilder:
    """Makes a new catalog for a library whose own is lost, damaged or older than the packs.

    Args:
        files: How to read and write.
        directory: The library's directory.
        lock_timeout_s: How long to wait for a writer.
        now_ns: The clock.
        progress: Told about bytes read.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        lock_timeout_s: float,
        now_ns: Callable[[], int],
        progress: Progress,
    ) -> None:
        self._files = files
        self._directory = directory
        self._packs = directory / PACKS_NAME
        self._staging = directory / STAGING_NAME
        self._lock_timeout_s = lock_timeout_s
        self._now_ns = now_ns
        self._progress = progress
        self._notes: list[str] = []

    def run(self) -> RebuildReport:
        """Make the catalog and put it in place.

        Raises:
            NotFoundError: There are no packs.
            StorageError: The library is in use, or something cannot be read or written.
        """
        if not self._packs.is_dir():
            raise NotFoundError(
                f"there are no packs of a fragfs library in {self._directory}",
                path=str(self._directory),
                remedy="check the path",
            )
        with no_leases(self._directory) as alone:
            if not alone:
                raise StorageError(
                    f"the library in {self._directory} is mounted, or something is being added",
                    path=str(self._directory),
                    retryable=True,
                    remedy="unmount it, wait for adds to end, and run the command again",
                )
            with writer_lock(self._directory, self._lock_timeout_s):
                return self._run()

    def _run(self) -> RebuildReport:
        self._files.make_directory(self._staging)
        formers = read_formers(self._files, self._directory)
        found = self._scan(formers)
        resolved = resolve_fragments(found.candidates, found.header.config.closure_max)
        self._prove(resolved)
        path = self._staging / CATALOG_NAME
        for leaving in (path, Path(f"{path}-wal"), Path(f"{path}-shm"), Path(f"{path}-journal")):
            self._files.unlink(leaving)
        tip = found.committed.tip
        catalog = RebuiltCatalog(
            header=found.header,
            generation=tip.trailer.generation if tip else 0,
            batch=tip.trailer.batch if tip else bytes(16),
            packs=found.packs,
            told=replay_models(found.committed.batches),
            resolved=resolved,
            record_count=found.record_count,
            formers=[f for f in formers if f.uuid == found.header.library_uuid],
            notes=self._notes,
        )
        newest = max((former.generation for former in catalog.formers), default=0)
        if newest > catalog.generation:
            self._tell_missing(catalog.generation + 1, newest)
        for pack, offset in catalog.told.damaged:
            self._notes.append(
                f"what a model was, or that it was removed, is damaged in pack {pack} at offset"
                f" {offset}"
            )
        counts = catalog.write(path, self._now_ns())
        descriptor = self._files.open_append(path)
        try:
            self._files.sync(descriptor)
        finally:
            self._files.close(descriptor)
        kept = keep_former(self._files, self._directory)
        # SQLite would replay the old catalog's journal onto the new one.
        remove_journal(self._files, self._directory)
        self._files.rename(path, self._directory / CATALOG_NAME)
        self._files.sync_directory(self._directory)
        self._files.unlink(self._staging / INTENT_NAME)
        return RebuildReport(*counts, kept, tuple(self._notes))

    # --- reading

    def _scan(self, formers: list[FormerCatalog]) -> _Found:
        numbers = {
            number: self._packs / name
            for name in self._files.names(self._packs)
            if (number := pack_number(name))
        }
        self._progress.start("reading packs", sum(map(self._files.size, numbers.values())))
        header = self._agreed_header(numbers, formers)
        history = History()
        fragments: dict[tuple[int, int], list[tuple[FragmentId, Candidate]]] = {}
        scans = []
        for number, path in sorted(numbers.items()):
            self._progress.note(path.name)
            scan = scan_pack(self._files, path, number, None, self._progress)
            if not self._is_ours(scan, header):
                continue
            history.add(scan)
            for batch in scan.batches:
                fragments[number, batch.end] = _candidates(scan, batch.records)
            scans.append(scan)
        committed = history.committed(read_intents(self._files, self._staging))
        for first, last in committed.missing:
            self._tell_missing(first, last)
        for scan in scans:
            self._tell_unexplained(scan)
        candidates: dict[FragmentId, list[Candidate]] = {}
        ends: dict[int, int] = {}
        for batch in committed.batches:
            ends[batch.pack] = max(batch.end, ends.get(batch.pack, 0))
            for fragment, candidate in fragments[batch.pack, batch.end]:
                candidates.setdefault(fragment, []).append(candidate)
        for records in candidates.values():
            records.reverse()
        packs = [_pack_row(scan, ends.get(scan.number, PACK_HEADER.size)) for scan in scans]
        for scan, pack in zip(scans, packs, strict=True):
            # A fragment proves itself by its id: it need not be lost with its batch's trailer.
            if scan.rest and pack.committed_size == pack.file_size:
                fragments[scan.number, scan.size] = _candidates(scan, scan.rest)
                for fragment, candidate in fragments[scan.number, scan.size]:
                    doubted = replace(candidate, found_by_search=True)
                    candidates.setdefault(fragment, []).append(doubted)
        return _Found(
            header,
            tuple(packs),
            committed,
            candidates,
            sum(map(len, fragments.values())),
        )

    def _tell_missing(self, first: int, last: int) -> None:
        self._notes.append(
            f"the batches of generation {first} to {last} are in no pack: what they added or"
            " removed is not known"
        )

    def _tell_unexplained(self, scan: PackScan) -> None:
        """Say what may have been a committed batch: its trailer, or its beginning, is damaged."""
        missing = "what they added or removed may be missing"
        if scan.rest:
            self._notes.append(
                f"{len(scan.rest)} records of pack {scan.number} from byte {scan.rest[0].offset} on"
                f" are followed by no readable trailer: {missing}"
            )
        if scan.strays:
            self._notes.append(
                f"{len(scan.strays)} trailers of pack {scan.number} from byte {scan.strays[0]} on"
                " are part of stored files, or end batches whose beginning is damaged:"
                f" {missing}"
            )

    def _agreed_header(self, numbers: dict[int, Path], formers: list[FormerCatalog]) -> PackHeader:
        """Identity and settings of the library, as most packs have them."""
        headers = []
        for number, path in numbers.items():
            scan = _read_header(self._files, path)
            if scan is not None and scan.pack_number == number:
                headers.append(scan)
        if not headers:
            raise NotFoundError(
                f"no pack in {self._packs} has a readable header: nothing can be rebuilt",
                path=str(self._packs),
                remedy="restore the library from a backup",
            )
        known = {former.uuid for former in formers}
        counts = Counter(header.library_uuid for header in headers)
        uuid = max(counts, key=lambda u: (u in known, counts[u]))
        return next(header for header in headers if header.library_uuid == uuid)

    def _is_ours(self, scan: PackScan, header: PackHeader) -> bool:
        if scan.header is None:
            self._notes.append(
                f"pack {scan.number} has a damaged header: what is only there cannot be read"
                " until it is restored, or written again by: fragfs check --repair"
            )
            return True
        ours = scan.header.library_uuid == header.library_uuid
        if not ours or scan.header.pack_number != scan.number:
            self._notes.append(f"{scan.path} is left out: it is not pack {scan.number} of this one")
            return False
        return True

    def _prove(self, resolved: Resolved) -> None:
        """Decode what was found behind damage: it may be part of a stored file, made to deceive."""
        for fragment in [f for f, record in resolved.records.items() if record.found_by_search]:
            try:
                proven = blake3(self._decode(resolved, fragment)).digest() == fragment
            except FragmentError as error:
                if isinstance(error, StorageError) and error.retryable:
                    raise
                proven = False
            if not proven:
                del resolved.records[fragment]
                resolved.lost[fragment] = "its record is behind damage and cannot be proven"

    def _decode(self, resolved: Resolved, fragment: FragmentId) -> memoryview:
        """The raw bytes of a fragment, by the records that were chosen, whatever the pack's header.

        Raises:
            FragmentError: It cannot be decoded.
        """
        check_this_machine()
        record = resolved.records.get(fragment)
        if record is None:
            raise IntegrityError(f"fragment {fragment.short} is lost", fragment=fragment.hex())
        where = f"pack {record.pack} at offset {record.offset}"
        descriptor = self._files.open_read(self._packs / pack_name(record.pack))
        try:
            data = self._files.read_at(descriptor, record.record_size, record.offset)
        finally:
            self._files.close(descriptor)
        stored = parse_fragment_record(data, where)
        raw = decode(
            stored.predictor,
            stored.dtype,
            stored.params,
            memoryview(stored.payload),
            stored.raw_size,
            [self._decode(resolved, base) for base in stored.bases],
        )
        if checksum(raw) != stored.raw_checksum:
            raise IntegrityError(f"decoded bytes differ from their checksum in {where}")
        return raw


def _read_header(files: Files, path: Path) -> PackHeader | None:
    """The header of a pack, if it can be read and believed."""
    descriptor = files.open_read(path)
    try:
        return parse_pack_header(files.read_at(descriptor, PACK_HEADER.size, 0), str(path))
    except FragmentError as error:
        if isinstance(error, StorageError) and error.retryable:
            raise
        return None
    finally:
        files.close(descriptor)


def _pack_row(scan: PackScan, committed_size: int) -> PackRow:
    """What the new catalog says of a pack whose last committed batch ends at `committed_size`."""
    is_damaged = any(gap.start >= committed_size for gap in scan.gaps)
    if (scan.rest and is_damaged) or scan.strays:
        # What is behind may count, and be readable one day: all of the pack is kept and checked.
        committed_size = scan.size
    return PackRow(
        scan.number,
        committed_size,
        scan.size,
        scan.index is not None,
        scan.header is not None,
        not scan.gaps,
    )


def _candidates(
    scan: PackScan, records: Sequence[FoundRecord]
) -> list[tuple[FragmentId, Candidate]]:
    """The fragment records of a batch, in the order they were written."""
    found = []
    for record in records:
        if record.header.kind is not RecordKind.FRAGMENT:
            continue
        values = FRAGMENT_HEADER.unpack(record.data, RECORD_HEADER.size)
        found.append(
            (
                FragmentId(values[0]),
                Candidate(
                    scan.number,
                    record.offset,
                    record.header.record_size,
                    int(values[2]),
                    int(values[3]),
                    bases_of_record(record.data),
                    record.intact and scan.header is not None,
                    record.found_by_search,
                ),
            )
        )
    return found
