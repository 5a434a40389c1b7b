"""Who may write: the lock, the open pack, what a crash left, the snapshot.

The order of every step is FORMAT.md's "Write order". A `Batch` exists only while the writer lock is
held; whatever a crash leaves is behind the pack's committed size and is never read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fragfs.errors import FormatError, IntegrityError, StorageError
from fragfs.library.appender import PackAppender, PackState
from fragfs.library.batch import Batch
from fragfs.library.catalog import SNAPSHOT_NAME, Catalog
from fragfs.library.files import Files
from fragfs.library.filesystem import unwritable_error
from fragfs.library.lock import writer_lock
from fragfs.library.packs import PACKS_NAME, pack_name, pack_number, scan_records
from fragfs.library.records import (
    PACK_HEADER,
    PackHeader,
    RecordKind,
    pack_pack_header,
    parse_batch_trailer,
    parse_pack_header,
)
from fragfs.types import LibraryConfig

__all__ = [
    "INTENT_NAME",
    "STAGING_NAME",
    "LibraryWriter",
    "read_intents",
]

log = logging.getLogger(__name__)

STAGING_NAME = "staging"
INTENT_NAME = "batch.intent"


class LibraryWriter:
    """Starts batches, one at a time, under the library's lock.

    Args:
        files: Where to write.
        directory: The library's directory.
        catalog: Its catalog.
        uuid: Its UUID, for new packs.
        config: Its settings.
        lock_timeout_s: How long to wait for another writer.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        uuid: bytes,
        config: LibraryConfig,
        lock_timeout_s: float,
    ) -> None:
        self._files = files
        self._directory = directory
        self._packs = directory / PACKS_NAME
        self.catalog = catalog
        self._uuid = uuid
        self.config = config
        self._lock_timeout_s = lock_timeout_s

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Hold the lock and collect records; the caller commits, or the batch is forgotten."""
        if self.catalog.read_only:
            raise unwritable_error(self._directory)
        with self.locked():
            batch = Batch(self)
            try:
                yield batch
            finally:
                batch.close()

    def locked(self) -> AbstractContextManager[None]:
        """Keep everybody from changing the library, for as long as the context lasts.

        Raises:
            StorageError: Another process kept the lock all the time, or this user may not write.
        """
        return writer_lock(self._directory, self._lock_timeout_s, self.catalog.generation)

    def open_pack(self, retired: Collection[int] = ()) -> PackAppender:
        """The open pack, if nothing follows its committed bytes and it stays; else a new one.

        A pack is never truncated: another process may be reading it, and a crash's leftovers are
        evidence.
        """
        row = self.catalog.row(
            "SELECT number, committed_size FROM packs WHERE state = ? ORDER BY number DESC",
            (PackState.OPEN,),
        )
        if row is not None and row[0] not in retired:
            number, size = int(row[0]), int(row[1])
            path = self._packs / pack_name(number)
            if path.name in self._files.names(self._packs) and self._is_writable(
                path, number, size
            ):
                return PackAppender(self._files, path, number, size, new=False)
        known = self.catalog.row("SELECT max(number) FROM packs")
        highest = int(known[0] or 0) if known else 0
        highest = max([highest, *self._pack_numbers()])
        number = highest + 1
        pack = PackAppender(self._files, self._packs / pack_name(number), number, 0, new=True)
        pack.append(pack_pack_header(PackHeader(self._uuid, number, self.config)))
        return pack

    def _is_writable(self, path: Path, number: int, size: int) -> bool:
        """Whether a pack ends where it should, and has a header that readers will accept."""
        if self._files.size(path) != size:
            return False
        descriptor = self._files.open_read(path)
        try:
            data = self._files.read_at(descriptor, PACK_HEADER.size, 0)
            header = parse_pack_header(data, str(path))
        except (FormatError, IntegrityError):
            return False
        finally:
            self._files.close(descriptor)
        return (header.library_uuid, header.pack_number) == (self._uuid, number)

    def _pack_numbers(self) -> list[int]:
        names = self._files.names(self._packs)
        return [number for name in names if (number := pack_number(name)) is not None]

    def examine_leftovers(self) -> list[tuple[int, int, int, int]]:
        """Packs, or ends of packs, that no commit vouches for: rows that mark them abandoned.

        They are what a crash left, unless they hold a whole batch that no interrupted commit
        explains: then the catalog is older than its packs, and writing would bury what they hold.

        Raises:
            FormatError: The catalog is older than its packs.
        """
        intended = self.interrupted_batches()
        rows = {
            row[0]: row
            for row in self.catalog.rows(
                "SELECT number, committed_size, file_size, state FROM packs"
            )
        }
        abandoned = []
        for number in sorted(self._pack_numbers()):
            known = rows.get(number)
            if known is not None and known[3] != PackState.OPEN:
                continue
            start = int(known[1]) if known else PACK_HEADER.size
            size = self._files.size(self._packs / pack_name(number))
            if known is not None and size == start:
                continue
            self._check_explained(number, start, size, intended)
            abandoned.append((number, start, size, PackState.ABANDONED))
        return abandoned

    def _check_explained(self, number: int, start: int, size: int, intended: list[bytes]) -> None:
        path = self._packs / pack_name(number)
        descriptor = self._files.open_read(path)
        try:
            trailers = [
                parse_batch_trailer(record.data)
                for record in scan_records(self._files, descriptor, start, size)
                if record.header.kind is RecordKind.BATCH_TRAILER
            ]
        finally:
            self._files.close(descriptor)
        for trailer in trailers:
            if trailer.batch not in intended:
                raise FormatError(
                    f"the catalog is older than its packs: {path} holds a batch (generation"
                    f" {trailer.generation}) that the catalog has never seen",
                    path=str(path),
                    remedy="put back the catalog.sqlite of the same backup as the packs, or make a"
                    " new one from them with: fragfs check --rebuild",
                )

    # --- the note that explains an interrupted commit

    def write_intent(self, batch: bytes) -> None:
        """Leave a durable note of the batch whose trailer is about to be written.

        Earlier notes stay until a commit succeeds: that commit marks all leftovers abandoned.
        """
        staging = self._directory / STAGING_NAME
        temporary = staging / f"{INTENT_NAME}.{os.getpid()}"
        self._files.unlink(temporary)
        descriptor = self._files.create(temporary)
        try:
            self._files.append(descriptor, [b"".join([*self.interrupted_batches(), batch])])
            self._files.sync(descriptor)
        finally:
            self._files.close(descriptor)
        self._files.rename(temporary, staging / INTENT_NAME)
        self._files.sync_directory(staging)

    def remove_intent(self) -> None:
        """Remove the note, if possible; a stale one is harmless, so nothing is synced either."""
        with suppress(StorageError):  # the batch is committed: it must not be told to have failed
            self._files.unlink(self._directory / STAGING_NAME / INTENT_NAME)

    def interrupted_batches(self) -> list[bytes]:
        """Ids of batches whose commit was begun and not finished, as far as a note tells."""
        return read_intents(self._files, self._directory / STAGING_NAME)

    def sync_packs(self) -> None:
        """Make the names of new packs durable."""
        self._files.sync_directory(self._packs)

    def clean_staging(self) -> None:
        """Remove what killed writers left unfinished. Called under the lock.

        Raises:
            StorageError: The directory is a link: what lies behind it is not ours to remove.
        """
        staging = self._directory / STAGING_NAME
        if staging.is_symlink():
            raise StorageError(
                f"{staging} is a link",
                path=str(staging),
                remedy="put a directory in its place: its files are removed by every writer",
            )
        for name in self._files.names(staging):
            if name != INTENT_NAME:
                self._files.unlink(staging / name)

    def shrink_catalog(self) -> None:
        """Give unused space of the catalog back, if it is much.

        Raises:
            StorageError: There is no room for it, or another writer kept the lock.
        """
        with self.locked():
            self.catalog.shrink()

    def publish_snapshot(self) -> None:
        """Replace the catalog's copy, for readers that may not open the catalog itself.

        Under the lock, so that an older copy never replaces a newer one.
        """
        with self.locked():
            temporary = self._directory / STAGING_NAME / f"{SNAPSHOT_NAME}.{os.getpid()}"
            self._files.unlink(temporary)
            try:
                self.catalog.copy_to(temporary)
                descriptor = self._files.open_append(temporary)
                try:
                    self._files.sync(descriptor)
                finally:
                    self._files.close(descriptor)
                self._files.rename(temporary, self._directory / SNAPSHOT_NAME)
                self._files.sync_directory(self._directory)
            except StorageError:
                self._files.unlink(temporary)
                raise

    def renew_snapshot(self) -> None:
        """`publish_snapshot` after a change that stands whether or not it can be published."""
        try:
            self.publish_snapshot()
        except StorageError as error:
            log.warning("other users see the library as it was before: %s", error)

    # --- packs that a commit has retired

    def retired_packs(self) -> list[int]:
        """Numbers of retired packs whose files are there.

        Found before a snapshot is published that names them no more: others may retire more packs
        in between, which that snapshot may name.
        """
        there = set(self._pack_numbers())
        rows = self.catalog.rows(
            "SELECT number FROM packs WHERE state = ? ORDER BY number", (PackState.RETIRED,)
        )
        return [number for (number,) in rows if number in there]

    def remove_packs(self, numbers: Sequence[int]) -> None:
        """Remove the files of retired packs; descriptors that readers hold stay good."""
        for number in numbers:
            self._files.unlink(self._packs / pack_name(number))
        self.sync_packs()


def read_intents(files: Files, staging: Path) -> list[bytes]:
    """The ids in `batch.intent`, the note about interrupted commits.

    Args:
        files: How to read.
        staging: The library's directory for unfinished work.
    """
    path = staging / INTENT_NAME
    if not staging.is_dir() or INTENT_NAME not in files.names(staging):
        return []
    descriptor = files.open_read(path)
    try:
        ids = files.read_at(descriptor, files.size(path), 0)
    finally:
        files.close(descriptor)
    return [ids[start : start + 16] for start in range(0, len(ids), 16)]
