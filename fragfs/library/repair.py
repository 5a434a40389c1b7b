"""`fragfs check --repair`: derive again what can be derived, quarantine what is damaged.

Damaged fragments are put in quarantine: they stay named, with the files that need them, and are no
base and no dedup hit until good bytes are added again (`ingest.py`). No pack is removed here but
those that were retired by a commit.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path

from fragfs.errors import NotFoundError, StorageError
from fragfs.library.batch import Batch
from fragfs.library.catalog import Catalog
from fragfs.library.check import Checker
from fragfs.library.extents import ExtentMap
from fragfs.library.files import Files
from fragfs.library.findings import CheckReport, Findings, ProblemKind
from fragfs.library.names import printable
from fragfs.library.packs import PACKS_NAME, PackReader, pack_name
from fragfs.library.progress import NO_PROGRESS
from fragfs.library.publish import pack_current_manifest
from fragfs.library.records import (
    FRAGMENT_HEADER,
    RECORD_HEADER,
    IndexEntry,
    PackHeader,
    RecordKind,
    pack_index,
    pack_pack_header,
)
from fragfs.library.scan import TRAILER_SIZE, FoundRecord, scan_pack
from fragfs.library.writer import STAGING_NAME, LibraryWriter

__all__ = ["Repairer"]

log = logging.getLogger(__name__)

_LOOKS = 3
_COPIED_BYTES = 4 << 20


class Repairer:
    """Checks a library, and mends it if asked to.

    Args:
        files: How to read and write.
        directory: The library's directory.
        catalog: Its catalog.
        packs: Reads its packs.
        writer: Takes the lock, and publishes the snapshot.
        checker: Looks at all of it.
        uuid: The library's UUID.
        now_ns: The clock.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        packs: PackReader,
        writer: LibraryWriter,
        checker: Checker,
        uuid: bytes,
        now_ns: Callable[[], int],
    ) -> None:
        self._files = files
        self._directory = directory
        self._packs_directory = directory / PACKS_NAME
        self._catalog = catalog
        self._packs = packs
        self._writer = writer
        self._checker = checker
        self._uuid = uuid
        self._now_ns = now_ns

    def check(self, *, data: bool) -> CheckReport:
        """Look, without changing anything; others may write meanwhile.

        Args:
            data: Whether to decode everything.
        """
        return self._look(data=data).report(self._catalog)

    def _look(self, *, data: bool) -> Findings:
        findings = None
        for _ in range(_LOOKS):
            before = self._catalog.generation()
            try:
                findings = self._checker.run(data=data)
            except NotFoundError:
                continue  # a model was removed while it was looked at
            if not (findings.problems or findings.damages or findings.contents):
                return findings
            # A change between two looks can make what is sound seem otherwise: look again.
            if self._catalog.generation() == before:
                break
        try:
            # So can a commit that was under way: nothing is called damaged that others work on.
            with self._writer.locked():
                return self._look_again(findings, data=data)
        except StorageError as error:
            if findings is None:
                raise
            findings.notes.append(f"others may have been writing meanwhile: {error.message}")
            return findings

    def _look_again(self, found: Findings | None, *, data: bool) -> Findings:
        """Look under the lock, and decode what was or is suspected: all, if nothing was found."""
        is_decoded = found is not None and found.decoded_count is not None
        findings = self._checker.run(data=data and not is_decoded)
        if found is None or (data and not is_decoded):
            return findings
        if any(problem.kind is ProblemKind.CATALOG for problem in findings.problems):
            return findings
        if is_decoded:
            suspects = {*found.damaged(), *findings.quarantined} - findings.damaged().keys()
            self._checker.decode_some(suspects, findings)
            findings.decoded_count = found.decoded_count
        findings.contents = {
            number: what
            for number, what in found.contents.items()
            if self._catalog.row("SELECT 1 FROM contents WHERE number = ?", (number,))
        }
        return findings

    def repair(self, *, data: bool) -> CheckReport:
        """Look, mend, and look again.

        Args:
            data: Whether to decode everything.

        Raises:
            FormatError: The catalog is older than its packs.
            StorageError: Something cannot be written.
        """
        found = self._look(data=data)
        if any(problem.kind is ProblemKind.CATALOG for problem in found.problems):
            return found.report(self._catalog)
        decoded = found.damaged().keys() if data else set()
        done: list[str] = []
        self._files.make_directory(self._directory / STAGING_NAME)
        with self._writer.batch() as batch:
            # Under the lock: what was found without it may have been changed since.
            findings = self._checker.run(data=False)
            for number in findings.headless_packs:
                self._write_header(number, done)
            suspects = {*decoded, *findings.quarantined} - findings.damaged().keys()
            self._checker.decode_some(suspects, findings)
            self._mend_catalog(batch, findings, done)
            for number in findings.unindexed_packs:
                self._write_index(number, done)
        # Before the snapshot, which will not name them: others may retire more meanwhile.
        retired = self._writer.retired_packs()
        if done or findings.stale_snapshot or retired:
            self._writer.publish_snapshot()
        if findings.stale_snapshot:
            done.append("the snapshot for other users is published anew")
        if retired:
            self._writer.remove_packs(retired)
            self._packs.drop_descriptors()
            done.append(f"{len(retired)} packs that were replaced are removed")
        left = self._look(data=False)
        left.contents = found.contents
        left.decoded_count = found.decoded_count
        return left.report(self._catalog, done)

    # --- the catalog

    def _mend_catalog(self, batch: Batch, findings: Findings, done: list[str]) -> None:
        damaged = {
            number: reason
            for number, reason in findings.damaged().items()
            if number not in findings.quarantined
        }
        before = len(done)
        for name in sorted(findings.untold_models):
            self._tell_model(batch, name, done)
        if damaged:
            done.append(f"{len(damaged)} damaged fragments are in quarantine now")
        if findings.sound_again:
            done.append(f"{len(findings.sound_again)} fragments left quarantine: they are good")
        if findings.bases:
            done.append(f"the bases of {len(findings.bases)} fragments are those of their records")
        if findings.stale_signatures:
            done.append(f"{len(findings.stale_signatures)} signatures are dropped")
        if findings.wrong_stored_bytes:
            done.append(
                f"the sizes of {len(findings.wrong_stored_bytes)} contents are counted anew"
            )
        if findings.leavings:
            done.append(f"what was left in {len(findings.leavings)} packs is accounted for")
        if findings.stale_staging:
            done.append("unfinished work is removed from staging")
        has_strays = self._catalog.row(
            "SELECT 1 FROM quarantine WHERE fragment NOT IN (SELECT number FROM fragments)"
        )
        if has_strays:
            done.append("what is in quarantine is in the catalog")
        if len(done) == before:
            return

        def apply(connection: sqlite3.Connection) -> None:
            now_ns = self._now_ns()
            connection.executemany(
                "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)",
                ((number, now_ns, reason) for number, reason in damaged.items()),
            )
            connection.executemany(
                "DELETE FROM quarantine WHERE fragment = ?",
                ((number,) for number in findings.sound_again),
            )
            connection.execute(
                "DELETE FROM quarantine WHERE fragment NOT IN (SELECT number FROM fragments)"
            )
            for table in ("signatures", "similar"):
                connection.executemany(
                    f"DELETE FROM {table} WHERE fragment = ?",
                    ((number,) for number in {*damaged, *findings.stale_signatures}),
                )
            _write_bases(connection, findings.bases)
            _count_stored_bytes(connection, findings.wrong_stored_bytes)

        batch.commit(apply)

    def _tell_model(self, batch: Batch, name: bytes, done: list[str]) -> None:
        """Let the packs say what a model is, or that there is none."""
        if self._catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)):
            batch.append_plain(RecordKind.MANIFEST, pack_current_manifest(self._catalog, name))
        else:
            batch.append_plain(RecordKind.REMOVAL, name)
        done.append(f"the packs say again what {printable(name)} is")

    # --- packs

    def _write_index(self, number: int, done: list[str]) -> None:
        """Give a sealed pack its index."""
        path = self._packs_directory / pack_name(number)
        scan = scan_pack(self._files, path, number, None, NO_PROGRESS)
        entries = [_entry(record) for record in scan.records()]
        entries += [_trailer_entry(batch.end) for batch in scan.batches]
        entries.sort(key=lambda entry: entry.offset)
        tail = pack_index(entries, scan.records_end)
        size = self._replace(path, b"", scan.records_end, tail)
        with self._catalog.transaction() as connection:
            connection.execute(
                "UPDATE packs SET committed_size = ?, file_size = ? WHERE number = ?",
                (size, size, number),
            )
        done.append(f"pack {number} has its index again")

    def _write_header(self, number: int, done: list[str]) -> None:
        """Give a pack its header: what it says is in the catalog as well."""
        path = self._packs_directory / pack_name(number)
        config = self._writer.config
        header = pack_pack_header(PackHeader(self._uuid, number, config))
        self._replace(path, header, self._files.size(path), b"")
        done.append(f"pack {number} has its header again")

    def _replace(self, path: Path, head: bytes, end: int, tail: bytes) -> int:
        """Put a whole new file in a pack's place; gives its size.

        Whoever has the old file open goes on reading the same bytes in it.

        Args:
            path: The pack.
            head: What its first bytes shall be; those behind are copied.
            end: Where the copied bytes end.
            tail: What follows them.
        """
        temporary = self._directory / STAGING_NAME / path.name
        self._files.unlink(temporary)
        source = self._files.open_read(path)
        try:
            target = self._files.create(temporary)
            try:
                self._files.append(target, [head])
                for offset in range(len(head), end, _COPIED_BYTES):
                    size = min(_COPIED_BYTES, end - offset)
                    self._files.append(target, [self._files.read_at(source, size, offset)])
                self._files.append(target, [tail])
                self._files.sync(target)
            finally:
                self._files.close(target)
        finally:
            self._files.close(source)
        self._files.rename(temporary, path)
        self._writer.sync_packs()
        self._packs.drop_descriptors()
        return end + len(tail)


def _write_bases(connection: sqlite3.Connection, bases: dict[int, tuple[int, ...]]) -> None:
    connection.executemany("DELETE FROM bases WHERE fragment = ?", ((number,) for number in bases))
    connection.executemany(
        "INSERT INTO bases VALUES (?, ?, ?)",
        (
            (number, position, base)
            for number, found in bases.items()
            for position, base in enumerate(found)
        ),
    )


def _count_stored_bytes(connection: sqlite3.Connection, contents: Collection[int]) -> None:
    sizes = dict(connection.execute("SELECT number, record_size FROM fragments"))
    for content in contents:
        row = connection.execute(
            "SELECT extents FROM contents WHERE number = ?", (content,)
        ).fetchone()
        total = sum(sizes[fragment] for fragment in set(ExtentMap.parse(row[0]).fragments))
        connection.execute(
            "UPDATE contents SET stored_bytes = ? WHERE number = ?", (total, content)
        )


def _entry(record: FoundRecord) -> IndexEntry:
    fragment, raw_size = bytes(32), 0
    if record.header.kind is RecordKind.FRAGMENT:
        values = FRAGMENT_HEADER.unpack(record.data, RECORD_HEADER.size)
        fragment, raw_size = bytes(values[0]), int(values[2])
    return IndexEntry(
        fragment, record.offset, record.header.record_size, raw_size, record.header.kind
    )


def _trailer_entry(end: int) -> IndexEntry:
    return IndexEntry(bytes(32), end - TRAILER_SIZE, TRAILER_SIZE, 0, RecordKind.BATCH_TRAILER)
