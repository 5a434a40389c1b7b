"""Are the packs what the catalog says: headers, records, batches, indexes, sizes, leavings.

Every stored byte is read once and compared with its checksum; nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fragfs.errors import FragmentError, IntegrityError, StorageError
from fragfs.library.appender import PackState
from fragfs.library.catalog import Catalog
from fragfs.library.files import Files
from fragfs.library.findings import REBUILD, Damage, Findings, Problem, ProblemKind
from fragfs.library.history import History, replay_models
from fragfs.library.manifests import ManifestContent
from fragfs.library.names import printable
from fragfs.library.packs import PACKS_NAME, pack_name, pack_number
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.library.publish import current_manifest
from fragfs.library.records import (
    FRAGMENT_HEADER,
    INDEX_ENTRY,
    PACK_HEADER,
    RECORD_HEADER,
    RecordKind,
    pack_index,
)
from fragfs.library.scan import FoundRecord, Gap, PackScan, scan_pack
from fragfs.types import FragmentId, FragmentMetadata, LibraryConfig

__all__ = ["PackChecker", "bases_of_record"]

_TOLD_MAX = 8


def bases_of_record(data: bytes) -> tuple[FragmentId, ...]:
    """The ids of a fragment's bases, from the checked header of its record."""
    count = int(FRAGMENT_HEADER.unpack(data, RECORD_HEADER.size)[5])
    start = RECORD_HEADER.size + FRAGMENT_HEADER.size
    return tuple(FragmentId(data[at : at + 32]) for at in range(start, start + 32 * count, 32))


class PackChecker:
    """Compares the packs of a library with its catalog.

    Args:
        files: Where the bytes are.
        directory: The library's directory.
        catalog: Its catalog, which passed its own check.
        uuid: The library's UUID.
        config: Its settings.
        interrupted: Reads the ids of batches whose commit was begun and not finished.
        findings: Told what is wrong.
        progress: Told about bytes read.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        uuid: bytes,
        config: LibraryConfig,
        interrupted: Callable[[], Sequence[bytes]],
        findings: Findings,
        progress: Progress,
    ) -> None:
        self._files = files
        self._packs = directory / PACKS_NAME
        self._catalog = catalog
        self._uuid = uuid
        self._config = config
        self._read_interrupted = interrupted
        self._interrupted = interrupted()
        self._findings = findings
        self._progress = progress
        self._history = History()
        self._history_is_whole = True

    def run(self) -> None:
        """Check every pack, and what they say together."""
        rows = {
            number: (committed, size, state)
            for number, committed, size, state in self._catalog.rows(
                "SELECT number, committed_size, file_size, state FROM packs"
            )
        }
        there = {}
        for name in self._files.names(self._packs) if self._packs.is_dir() else ():
            number = pack_number(name)
            if number is None:
                self._findings.notes.append(f"{self._packs / name} is no pack: fragfs leaves it")
            else:
                there[number] = self._packs / name
        sizes = {number: self._files.size(path) for number, path in there.items()}
        self._progress.start("checking packs", sum(sizes.values()))
        for number in sorted(rows.keys() | there.keys()):
            path = there.get(number, self._packs / pack_name(number))
            committed, _, state = rows.get(number, (0, 0, None))
            if number not in there:
                if state != PackState.RETIRED:
                    self._missing(number, path, committed)
            elif state == PackState.RETIRED:
                self._findings.retired_files.append(number)
                self._progress.advance(sizes[number])
            elif state == PackState.ABANDONED and committed <= PACK_HEADER.size:
                self._progress.advance(sizes[number])  # nothing in it ever counted
            else:
                self._progress.note(path.name)
                self._check(number, path, None if state is None else (committed, state))
        if self._findings.retired_files:
            count = len(self._findings.retired_files)
            self._findings.notes.append(
                f"{count} packs were replaced and are still there; the next `fragfs check --repair`"
                " removes them"
            )
        if self._findings.leavings:
            self._findings.notes.append(
                f"an interrupted command left bytes in {len(self._findings.leavings)} packs that"
                " nothing reads; the next change accounts for them"
            )
        self._check_history()

    def _fragments(self, number: int) -> list[FragmentMetadata]:
        return [
            FragmentMetadata(row[0], FragmentId(row[1]), *row[2:])
            for row in self._catalog.rows(
                "SELECT number, id, pack, offset, record_size, raw_size, predictor FROM fragments"
                " WHERE pack = ? ORDER BY offset",
                (number,),
            )
        ]

    def _damage(self, what: str, lost: Sequence[FragmentMetadata], path: Path) -> None:
        self._findings.damages.append(
            Damage(what, tuple(metadata.number for metadata in lost), path=str(path))
        )

    def _missing(self, number: int, path: Path, committed: int) -> None:
        self._history_is_whole = False
        lost = self._fragments(number)
        if lost or committed > PACK_HEADER.size:
            self._damage(f"pack {number} is missing: {path}", lost, path)

    def _check(self, number: int, path: Path, known: tuple[int, int] | None) -> None:
        self._findings.pack_count += 1
        committed = known[0] if known else None
        try:
            scan = scan_pack(self._files, path, number, committed, self._progress)
        except FragmentError as error:
            if isinstance(error, StorageError) and error.retryable:
                raise
            self._history_is_whole = False
            self._damage(f"pack {number}: {error.message}", self._fragments(number), path)
            return
        self._findings.pack_bytes += scan.size
        if known is None:
            self._check_unknown(scan, PACK_HEADER.size)
            return
        wrong = self._wrong_header(scan)
        if wrong and not self._is_behind_its_header(scan):
            self._damage(wrong, self._fragments(number), path)
            self._history_is_whole = False
            return
        if wrong:
            self._findings.headless_packs.append(number)
            numbers = tuple(metadata.number for metadata in self._fragments(number))
            self._findings.damages.append(
                Damage(wrong, numbers, path=str(path), kind=ProblemKind.REPAIRABLE)
            )
        committed, state = known
        self._history.add(scan)
        if scan.size < committed and not self._is_cut_in_index(scan, committed):
            self._history_is_whole = False
            lost = [m for m in self._fragments(number) if m.offset + m.record_size > scan.size]
            self._damage(
                f"pack {number} ends at byte {scan.size}, of {committed} that count: {path}",
                lost,
                path,
            )
        elif scan.size > committed and state == PackState.OPEN:
            tail = scan_pack(self._files, path, number, None, NO_PROGRESS)
            self._check_unknown(tail, committed)
        self._check_records(scan, committed)
        self._check_structure(scan, committed, state)

    def _wrong_header(self, scan: PackScan) -> str:
        """Why the pack header is not that of this pack; "" if it is."""
        error = scan.header_error
        if error is not None:
            return f"{error.message} (pack {scan.number})"
        if scan.header is None or scan.header.library_uuid != self._uuid:
            return f"{scan.path} is a pack of another library"
        if scan.header.pack_number != scan.number:
            return f"{scan.path} is pack {scan.header.pack_number} under another name"
        if scan.header.config != self._config:
            return f"{scan.path} states other settings of the library than the catalog"
        return ""

    def _is_behind_its_header(self, scan: PackScan) -> bool:
        """Whether what follows a damaged header is this pack: a fragment is where it should be."""
        # A header is put before a copy of what follows: the disk must give all of that.
        if not isinstance(scan.header_error, IntegrityError) or scan.disk_errors:
            return False
        records = {record.offset: record for record in scan.records()}
        return any(
            metadata.offset in records
            and not self._wrong_record(metadata, records[metadata.offset], ())
            for metadata in self._fragments(scan.number)
        )

    def _check_unknown(self, scan: PackScan, start: int) -> None:
        """A pack, or an end of one, that the catalog has never heard of."""
        # Also of what others are committing right now: that note is older than what was read.
        explained = {*self._interrupted, *self._read_interrupted()}
        unexplained = [
            batch.trailer.generation
            for batch in scan.batches
            if batch.end > start and batch.trailer.batch not in explained
        ]
        foreign = scan.header is not None and scan.header.library_uuid != self._uuid
        # A snapshot may be older than the packs: then they know more than it, as they may.
        if unexplained and not foreign and not self._catalog.read_only:
            self._findings.problems.append(
                Problem(
                    ProblemKind.CATALOG,
                    f"the catalog is older than its packs: {scan.path} holds a batch (generation"
                    f" {unexplained[-1]}) that the catalog has never seen",
                    REBUILD,
                    path=str(scan.path),
                    offset=start,
                )
            )
        else:
            self._findings.leavings.append(scan.number)

    def _check_records(self, scan: PackScan, committed: int) -> None:
        """Every fragment of the catalog, against the record at its place."""
        records = {record.offset: record for record in scan.records()}
        end = min(scan.size, committed)
        for metadata in self._fragments(scan.number):
            if metadata.offset + metadata.record_size > end:
                continue  # told already, or the catalog's own check does
            what = self._wrong_record(metadata, records.get(metadata.offset), scan.gaps)
            if what:
                place = f"pack {scan.number} at offset {metadata.offset}"
                self._findings.damages.append(
                    Damage(
                        f"fragment {metadata.id.short} in {place}: {what}",
                        (metadata.number,),
                        path=str(scan.path),
                        offset=metadata.offset,
                    )
                )

    def _wrong_record(
        self, metadata: FragmentMetadata, record: FoundRecord | None, gaps: Sequence[Gap]
    ) -> str:
        if record is None:
            return "no readable record"
        if record.header.kind is not RecordKind.FRAGMENT:
            return f"another record, a {record.header.kind.name}"
        values = FRAGMENT_HEADER.unpack(record.data, RECORD_HEADER.size)
        if bytes(values[0]) != metadata.id:
            return f"fragment {FragmentId(values[0]).short} instead"
        if record.header.record_size != metadata.record_size or values[2] != metadata.raw_size:
            return "a record of another size than the catalog's"
        if not record.intact:
            return "stored bytes differ from their checksum"
        if values[3] != metadata.predictor:
            self._findings.distrust(
                f"the catalog names another predictor for fragment {metadata.id.short} than its"
                " record"
            )
        self._check_bases(metadata, bases_of_record(record.data))
        return ""

    def _check_bases(self, metadata: FragmentMetadata, ids: Sequence[FragmentId]) -> None:
        numbers = []
        for base in ids:
            found = self._catalog.find_fragment(base)
            if found is None:
                self._findings.damages.append(
                    Damage(
                        f"fragment {metadata.id.short} is predicted from fragment {base.short},"
                        " which is not in the catalog",
                        (metadata.number,),
                    )
                )
                return
            numbers.append(found.number)
        if tuple(numbers) != self._catalog.bases(metadata.number):
            self._findings.bases[metadata.number] = tuple(numbers)
            if len(self._findings.bases) <= _TOLD_MAX:
                self._findings.mend(
                    f"the catalog names other bases for fragment {metadata.id.short} than its"
                    f" record in pack {metadata.pack} at offset {metadata.offset}"
                )

    def _check_structure(self, scan: PackScan, committed: int, state: int) -> None:
        """Batches, the index, and damage in bytes that hold no fragment of the catalog."""
        ends_early = scan.size < committed and not self._is_cut_in_index(scan, committed)
        for batch in scan.batches:
            if not batch.whole:
                self._findings.notes.append(
                    f"the batch that ends at byte {batch.end} of pack {scan.number} is not whole"
                )
        has_index = self._has_index(scan) and scan.size == committed
        is_listable = self._is_listable(scan)
        if state == PackState.SEALED and not ends_early and not has_index:
            # Only where all is readable: no index is better than half of one.
            if not is_listable:
                self._findings.notes.append(
                    f"pack {scan.number} has no index: a damaged record hides what an index lists"
                )
            else:
                self._findings.unindexed_packs.append(scan.number)
                self._findings.mend(f"the index of pack {scan.number} is missing or damaged")
        for gap in scan.gaps:
            is_index = gap.start >= scan.records_end and is_listable
            if is_index and state == PackState.SEALED:
                continue
            self._findings.notes.append(
                f"bytes {gap.start} to {gap.end} of pack {scan.number} hold no readable record"
            )
        for record in scan.records():
            if record.header.kind is not RecordKind.FRAGMENT and not record.intact:
                self._findings.notes.append(
                    f"a {record.header.kind.name} record in pack {scan.number} at offset"
                    f" {record.offset} is damaged"
                )
        if scan.rest and not ends_early and not scan.gaps:
            self._findings.distrust(
                f"records of pack {scan.number} from byte {scan.rest[0].offset} on are committed"
                " without a trailer"
            )

    def _is_listable(self, scan: PackScan) -> bool:
        """Whether all records are readable, so that what follows them can only be an index."""
        return (
            not scan.rest
            and all(gap.start >= scan.records_end for gap in scan.gaps)
            and all(offset >= scan.records_end for offset in scan.disk_errors)
            and all(
                metadata.offset + metadata.record_size <= scan.records_end
                for metadata in self._fragments(scan.number)
            )
        )

    def _is_cut_in_index(self, scan: PackScan, committed: int) -> bool:
        """Whether all that is missing of a pack is a part of its index."""
        count = sum(1 for _ in scan.records()) + len(scan.batches)
        index_size = len(pack_index([], 0)) + INDEX_ENTRY.size * count
        return scan.records_end <= scan.size and scan.records_end + index_size == committed

    def _has_index(self, scan: PackScan) -> bool:
        if scan.index is None:
            return False
        listed = [(entry.offset, entry.record_size, entry.kind) for entry in scan.index]
        found = [(r.offset, r.header.record_size, r.header.kind) for r in scan.records()]
        trailers = [entry for entry in listed if entry[2] is RecordKind.BATCH_TRAILER]
        return len(trailers) == len(scan.batches) and (
            [entry for entry in listed if entry[2] is not RecordKind.BATCH_TRAILER] == found
            or bool(scan.gaps)
        )

    def _check_history(self) -> None:
        """Would a rebuild find every model? Packs alone must tell what the catalog tells."""
        generation, batch = self._catalog.generation()
        committed = self._history.committed(self._interrupted)
        tip = committed.tip.trailer.batch if committed.tip else bytes(16)
        if generation and tip != batch and self._history_is_whole:
            self._findings.notes.append("the trailer of the batch committed last is not readable")
        told = replay_models(committed.batches).models
        names = {name for (name,) in self._catalog.rows("SELECT name FROM models")}
        differing = told.keys() ^ names
        for name in told.keys() & names:
            current = current_manifest(self._catalog, name)
            other = told[name]
            if (
                (current.added_ns, current.mtime_ns, current.mode)
                != (other.added_ns, other.mtime_ns, other.mode)
                or set(current.files) != set(other.files)
                or sorted(current.contents, key=_number) != sorted(other.contents, key=_number)
            ):
                differing.add(name)
        self._findings.untold_models |= differing
        for name in sorted(differing)[:_TOLD_MAX]:
            self._findings.mend(
                f"the packs do not say what the model {printable(name)} is now: without the"
                " catalog it would be lost"
                if name in names
                else f"the packs do not say that the model {printable(name)} was removed"
            )


def _number(content: ManifestContent) -> int:
    return content.number
