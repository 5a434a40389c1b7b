"""Giving back the space of records that no longer count, by copying the others out of a pack.

Records are copied as they are, checked but not decoded. The catalog points to the copies in the
same commit that retires the pack; only then, and after readers without write access got their new
snapshot, is the file removed. A crash leaves the pack, or its file, to be removed by the next run.
Numbers of packs are never used again, so a reader that still has an old place finds no other bytes
there: it looks the place up again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fragfs.errors import FragmentError, IntegrityError, StorageError
from fragfs.library.appender import PackState
from fragfs.library.batch import Batch
from fragfs.library.catalog import Catalog
from fragfs.library.files import Files
from fragfs.library.manifests import parse_manifest
from fragfs.library.packs import PACKS_NAME, PackReader, pack_name, scan_records
from fragfs.library.progress import NO_PROGRESS, Progress
from fragfs.library.publish import pack_current_manifest
from fragfs.library.records import (
    PACK_FOOTER,
    PACK_HEADER,
    RecordKind,
    RetiredBatch,
    checksum,
    pack_retirement,
    parse_batch_trailer,
    parse_fragment_record,
    parse_retirement,
)
from fragfs.library.writer import LibraryWriter
from fragfs.types import FragmentId, FragmentMetadata

__all__ = ["Compactor"]

log = logging.getLogger(__name__)

_GARBAGE_SHARE_MIN = 0.02
"""Packs with less to give back are left alone: giving it back means copying all the rest."""

_OVERHEAD = (RecordKind.BATCH_TRAILER, RecordKind.RETIREMENT, RecordKind.PACK_INDEX)


def _pays(waste: int, size: int) -> bool:
    return waste >= _GARBAGE_SHARE_MIN * size


@dataclass(slots=True)
class _Contents:
    """What a pack holds besides fragments.

    Attributes:
        manifests: Names of models, and the size of the newest manifest of each.
        removals: Names of models that were removed or renamed.
        batches: The batches in it, and those it vouches for since their packs are gone.
        overhead: Bytes of what every pack has besides.
    """

    manifests: dict[bytes, int]
    removals: set[bytes]
    batches: list[RetiredBatch]
    overhead: int


class Compactor:
    """Copies what counts out of packs with much that does not, and removes them.

    Args:
        files: How to read.
        directory: The library's directory.
        catalog: Its catalog.
        packs: Reads its packs.
        writer: Begins batches, publishes the snapshot, and removes packs.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        packs: PackReader,
        writer: LibraryWriter,
    ) -> None:
        self._files = files
        self._directory = directory / PACKS_NAME
        self._catalog = catalog
        self._packs = packs
        self._writer = writer

    def run(self, progress: Progress = NO_PROGRESS) -> tuple[tuple[int, str], ...]:
        """Compact every pack that pays, one commit each.

        Args:
            progress: Told about bytes copied, or found not to be worth it.

        Returns:
            Packs that were left alone because a record in them is damaged, with the reason.
        """
        kept = []
        live = self._live_bytes()
        candidates = list(self._wasted(live))
        if candidates:
            progress.start("compacting", sum(live.get(number, 0) for number in candidates))
        for number in candidates:
            progress.advance(live.get(number, 0))
            # Under the lock from the first look on: what others write into the pack must be seen.
            with self._writer.batch() as batch:
                try:
                    contents = self._contents(number)
                    if not self._is_wasteful(number, contents):
                        continue
                    self._check_records(number)
                except FragmentError as error:
                    if isinstance(error, StorageError) and error.retryable:
                        raise
                    # The pack may be all that is left of what is damaged in it.
                    kept.append((number, error.message))
                    continue
                self._copy(batch, number, contents)
                batch.commit()
        # Only what the snapshot will not name: others may retire more before it is looked at again.
        retired = self._writer.retired_packs()
        try:
            self._writer.publish_snapshot()
        except StorageError as error:
            # Readers of the old copy would miss the packs: the next run removes them.
            log.warning("replaced packs stay until the next gc: %s", error)
        else:
            self._writer.remove_packs(retired)
            self._packs.drop_descriptors()
        return tuple(kept)

    def pack_bytes(self) -> int:
        """Bytes of all pack files."""
        return sum(
            self._files.size(self._directory / name) for name in self._files.names(self._directory)
        )

    def estimate(self, live: Mapping[int, int]) -> int:
        """About how much a run would free.

        Args:
            live: Bytes of records that would count then, by pack.
        """
        return sum(self._wasted(live).values())

    def _wasted(self, live: Mapping[int, int]) -> dict[int, int]:
        """Bytes that are no fragment that counts, of packs with enough of them."""
        there = set(self._files.names(self._directory))
        found = {}
        for number, state in self._catalog.rows("SELECT number, state FROM packs"):
            name = pack_name(number)
            if state != PackState.RETIRED and name in there:
                size = self._files.size(self._directory / name)
                waste = size - live.get(number, 0)
                if _pays(waste, size):
                    found[number] = waste
        return found

    def _live_bytes(self) -> dict[int, int]:
        """Bytes of records that count, by pack."""
        return dict(
            self._catalog.rows("SELECT pack, sum(record_size) FROM fragments GROUP BY pack")
        )

    def _is_wasteful(self, number: int, contents: _Contents) -> bool:
        """Whether giving a pack back frees enough: some of it would be written again elsewhere."""
        size = self._files.size(self._directory / pack_name(number))
        manifests = sum(size for name, size in contents.manifests.items() if self._is_model(name))
        again = self._live_bytes().get(number, 0) + manifests + contents.overhead
        return _pays(size - again, size)

    def _check_records(self, number: int) -> None:
        """Check all records that would be copied, before anything is.

        Raises:
            FragmentError: One is damaged.
        """
        for metadata in self._fragments(number):
            self._read(metadata)

    def _fragments(self, number: int) -> list[FragmentMetadata]:
        return [
            FragmentMetadata(row[0], FragmentId(row[1]), *row[2:])
            for row in self._catalog.rows(
                "SELECT number, id, pack, offset, record_size, raw_size, predictor FROM fragments"
                " WHERE pack = ? ORDER BY offset",
                (number,),
            )
        ]

    def _read(self, metadata: FragmentMetadata) -> bytes:
        record = self._packs.read(metadata.pack, metadata.offset, metadata.record_size)
        parse_fragment_record(record, f"pack {metadata.pack} at offset {metadata.offset}")
        return record

    def _contents(self, number: int) -> _Contents:
        """Everything in the committed part of a pack that is no fragment."""
        row = self._catalog.row("SELECT committed_size FROM packs WHERE number = ?", (number,))
        end = int(row[0]) if row else 0
        found = _Contents({}, set(), [], PACK_HEADER.size)
        descriptor = self._files.open_read(self._directory / pack_name(number))
        reached = PACK_HEADER.size
        try:
            for record in scan_records(self._files, descriptor, PACK_HEADER.size, end):
                reached = record.offset + record.header.record_size
                found.overhead += (
                    record.header.record_size if record.header.kind in _OVERHEAD else 0
                )
                kind = record.header.kind
                if kind is RecordKind.BATCH_TRAILER:
                    trailer = parse_batch_trailer(record.data)
                    found.batches.append(
                        RetiredBatch(trailer.generation, trailer.batch, trailer.parent)
                    )
                if kind not in (
                    RecordKind.MANIFEST,
                    RecordKind.REMOVAL,
                    RecordKind.RETIREMENT,
                ):
                    continue
                start = record.offset + record.header.header_size
                payload = self._files.read_at(descriptor, record.header.payload_size, start)
                if checksum(payload) != record.header.payload_checksum:
                    raise IntegrityError(
                        f"stored bytes differ from their checksum in pack {number} at offset"
                        f" {record.offset}",
                        offset=record.offset,
                        remedy="restore the pack from a backup",
                    )
                if kind is RecordKind.MANIFEST:
                    found.manifests[parse_manifest(payload, f"pack {number}").name] = (
                        record.header.record_size
                    )
                elif kind is RecordKind.REMOVAL:
                    found.removals.add(payload)
                else:
                    found.batches += parse_retirement(payload)
        finally:
            self._files.close(descriptor)
        if end - reached not in (0, PACK_FOOTER.size):
            raise IntegrityError(
                f"no readable record in pack {number} at offset {reached}: what lies behind it is"
                " not known",
                offset=reached,
                remedy="restore the pack from a backup",
            )
        return found

    def _is_model(self, name: bytes) -> bool:
        return self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)) is not None

    def _copy(self, batch: Batch, number: int, contents: _Contents) -> None:
        """Append copies of all that counts in a pack, and retire it."""
        batch.retire_pack(number)
        for metadata in self._fragments(number):
            batch.move_fragment(metadata, self._read(metadata))
        for name in sorted(contents.manifests.keys() | contents.removals):
            if self._is_model(name):
                manifest = pack_current_manifest(self._catalog, name)
                batch.append_plain(RecordKind.MANIFEST, manifest)
            else:
                batch.append_plain(RecordKind.REMOVAL, name)
        batch.append_plain(RecordKind.RETIREMENT, pack_retirement(contents.batches))
