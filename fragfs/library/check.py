"""`fragfs check`: is a library what FORMAT.md says, and what is wrong where it is not?

The catalog in itself, then the packs against it, by stored checksums; with `data` every fragment is
decoded as well, and every content hashed. Nothing is changed here; `repair.py` mends what it can.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from blake3 import blake3

from fragfs.errors import FormatError, FragmentError, IntegrityError, NotFoundError, StorageError
from fragfs.library.catalog import SNAPSHOT_NAME, Catalog
from fragfs.library.check_catalog import check_catalog, check_database
from fragfs.library.check_packs import PackChecker
from fragfs.library.closure import closure_of
from fragfs.library.decode import FragmentDecoder, where
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.library.files import Files
from fragfs.library.findings import Damage, Findings, ProblemKind
from fragfs.library.names import join, printable
from fragfs.library.progress import Progress
from fragfs.library.readback import read_content
from fragfs.library.recent import RecentFragments
from fragfs.library.writer import STAGING_NAME, LibraryWriter
from fragfs.types import LIBRARY_FORMAT_VERSION, LibraryConfig

__all__ = ["Checker"]

_RECENT_BYTES_MAX = 256 << 20
"""Decoded fragments kept: what a model's files and what is predicted from them have in common."""


class Checker:
    """Looks at all of one library.

    Args:
        files: Where the bytes are.
        directory: The library's directory.
        catalog: Its catalog.
        decoder: Makes what decodes its fragments: asked for only where something is decoded.
        writer: Reads the note about interrupted commits.
        uuid: The library's UUID.
        config: Its settings.
        workers: Threads that decode.
        progress: Told about bytes read and decoded.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        decoder: Callable[[], FragmentDecoder],
        writer: LibraryWriter,
        uuid: bytes,
        config: LibraryConfig,
        workers: int,
        progress: Progress,
    ) -> None:
        self._files = files
        self._directory = directory
        self._catalog = catalog
        self._decoder = decoder
        self._writer = writer
        self._uuid = uuid
        self._config = config
        self._workers = workers
        self._progress = progress

    def run(self, *, data: bool) -> Findings:
        """Check everything.

        Args:
            data: Whether to decode.

        Raises:
            StorageError: Something cannot be looked at (retryable: try again).
        """
        findings = Findings()
        if not check_database(self._catalog, findings):
            return findings
        try:
            self._check_structure(findings)
        except FormatError as error:
            # A row that no fragfs writes: what else the catalog says is not worth much.
            findings.distrust(error.message)
        if _distrusted(findings):
            return _only_distrust(findings)
        if data:
            self._data_check(findings).run()
        return findings

    def _check_structure(self, findings: Findings) -> None:
        check_catalog(self._catalog, self._config, findings)
        if _distrusted(findings):
            return
        findings.quarantined = dict(
            self._catalog.rows(
                "SELECT fragment, reason FROM quarantine"
                " WHERE fragment IN (SELECT number FROM fragments)"
            )
        )
        PackChecker(
            self._files,
            self._directory,
            self._catalog,
            self._uuid,
            self._config,
            self._writer.interrupted_batches,
            findings,
            self._progress,
        ).run()
        self._check_snapshot(findings)
        self._check_staging(findings)

    def decode_some(self, numbers: Collection[int], findings: Findings) -> None:
        """Decode some fragments and add what is found, as `run` with `data` does for all.

        Args:
            numbers: The fragments; those that are not in the catalog are passed over.
            findings: Of a run without `data`.
        """
        self._data_check(findings).run_some(numbers)

    def _data_check(self, findings: Findings) -> _DataCheck:
        return _DataCheck(self._catalog, self._decoder(), findings, self._workers, self._progress)

    def _check_snapshot(self, findings: Findings) -> None:
        path = self._directory / SNAPSHOT_NAME
        generation = self._catalog.generation()[0]
        if SNAPSHOT_NAME not in self._files.names(self._directory):
            if generation:
                findings.stale_snapshot = "there is none"
                findings.notes.append(
                    f"{path} is missing: other users cannot read the library until the next change"
                )
            return
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                (text,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                uuid, snapshot_generation = connection.execute(
                    "SELECT uuid, generation FROM library"
                ).fetchone()
        except (sqlite3.Error, TypeError) as error:
            findings.stale_snapshot = f"it is damaged: {error}"
        else:
            if text != "ok":
                findings.stale_snapshot = f"it is damaged: {text}"
            elif uuid != self._uuid:
                findings.stale_snapshot = "it is of another library"
            elif snapshot_generation > self._catalog.generation()[0]:
                findings.stale_snapshot = (
                    f"it is newer (generation {snapshot_generation}) than the catalog"
                    f" ({generation}): the catalog was restored from a backup, or is damaged"
                )
            elif snapshot_generation < generation:
                findings.notes.append(
                    f"{path} is of generation {snapshot_generation}, the catalog of {generation};"
                    " the next change brings it up to date"
                )
            elif version < LIBRARY_FORMAT_VERSION:
                findings.stale_snapshot = f"it has format {version}"
                findings.notes.append(
                    f"{path} has format {version}, as before the migration: other users"
                    " cannot read the library until the next change, or a repair"
                )
                return
        if findings.stale_snapshot:
            findings.mend(f"{path} is of no use to other users: {findings.stale_snapshot}")

    def _check_staging(self, findings: Findings) -> None:
        staging = self._directory / STAGING_NAME
        if not staging.is_dir():
            findings.mend(f"the directory {staging} is missing")
            return
        names = sorted(self._files.names(staging))
        findings.stale_staging = names
        if names:
            findings.notes.append(
                f"unfinished work in {self._directory / STAGING_NAME}: {', '.join(names)}; the next"
                " change removes what nobody uses"
            )


def _distrusted(findings: Findings) -> bool:
    return any(problem.kind is ProblemKind.CATALOG for problem in findings.problems)


def _only_distrust(findings: Findings) -> Findings:
    """What is wrong with a catalog that cannot be believed: whatever else it led to is not sure."""
    return Findings(
        problems=[p for p in findings.problems if p.kind is ProblemKind.CATALOG],
        pack_count=findings.pack_count,
        pack_bytes=findings.pack_bytes,
    )


class _DataCheck:
    """Decodes every fragment once, or little more, and hashes every content."""

    def __init__(
        self,
        catalog: Catalog,
        decoder: FragmentDecoder,
        findings: Findings,
        workers: int,
        progress: Progress,
    ) -> None:
        self._catalog = catalog
        self._decoder = decoder
        self._findings = findings
        self._workers = workers
        self._progress = progress
        self._recent = RecentFragments(_RECENT_BYTES_MAX)
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._bad: dict[int, str] = {}

    def run(self) -> None:
        contents = self._catalog.rows(
            "SELECT number, size, mtime_ns, sha256, stored_bytes, extents FROM contents"
            " ORDER BY number"
        )
        total = sum(row[1] for row in contents)
        self._progress.start("decoding", total)
        with ThreadPoolExecutor(self._workers, "fragfs-check") as pool:
            for number, size, mtime_ns, sha256, stored_bytes, blob in contents:
                content = OpenContent(
                    number, size, mtime_ns, sha256, stored_bytes, ExtentMap.parse(blob)
                )
                self._note(number)
                self._check_content(content, pool)
            rest = [
                number
                for (number,) in self._catalog.rows("SELECT number FROM fragments ORDER BY number")
                if number not in self._seen
            ]
            list(pool.map(self._try, rest))
        self._tell()

    def run_some(self, numbers: Collection[int]) -> None:
        for number in sorted(numbers):
            self._try(number)
        self._tell()

    def _tell(self) -> None:
        """Report what cannot be decoded, and what is in quarantine and can."""
        known = self._findings.damaged()
        for number, reason in sorted(self._bad.items()):
            if number not in known and number not in self._findings.quarantined:
                metadata = self._catalog.fragment(number)
                self._findings.damages.append(Damage(reason, (number,), offset=metadata.offset))
        quarantined = self._findings.quarantined.keys() & self._seen
        self._findings.sound_again = quarantined - self._bad.keys() - known.keys()
        self._findings.decoded_count = len(self._seen)

    def _note(self, content: int) -> None:
        row = self._catalog.row(
            "SELECT models.name, directory, files.name FROM files"
            " JOIN models ON models.number = model WHERE content = ? LIMIT 1",
            (content,),
        )
        if row is not None:
            self._progress.note(printable(join(row[0], join(row[1], row[2]))))

    def _check_content(self, content: OpenContent, pool: ThreadPoolExecutor) -> None:
        digest = hashlib.sha256()
        try:
            for piece in read_content(content, self._decode, pool):
                digest.update(piece)
                self._progress.advance(len(piece))
        except NotFoundError:
            raise StorageError(
                "the library changed while it was checked",
                retryable=True,
                remedy="run the command again",
            ) from None
        except FragmentError:
            return  # the fragment is known by now; those behind it are decoded at the end
        if digest.digest() != content.sha256:
            self._findings.contents[content.number] = (
                f"content {content.number}: its SHA-256 is {digest.hexdigest()}, recorded is"
                f" {content.sha256.hex()}, although every fragment is intact"
            )

    def _try(self, number: int) -> None:
        try:
            self._decode(number)
        except NotFoundError:
            return  # dropped meanwhile
        except FragmentError as error:
            if isinstance(error, StorageError) and error.retryable:
                raise

    def _decode(self, number: int) -> memoryview:
        """Decode and compare with the id; remembers what cannot be."""
        try:
            raw = self._decoder.decode(number, self._recent)
            with self._lock:
                is_new = number not in self._seen
                self._seen.add(number)
            if is_new:
                self._check_id(number, raw)
        except FragmentError as error:
            if not isinstance(error, NotFoundError) and not getattr(error, "retryable", False):
                with self._lock:
                    self._seen.add(number)
                self._blame(number, error)
            raise
        if number in self._bad:
            raise IntegrityError(self._bad[number])
        return raw

    def _check_id(self, number: int, raw: memoryview) -> None:
        metadata = self._catalog.fragment(number)
        found = blake3(raw).digest()
        if found != metadata.id:
            raise IntegrityError(
                f"fragment {metadata.id.short} in {where(metadata)}: what it decodes to has another"
                " id",
                fragment=metadata.id.hex(),
                expected=metadata.id.hex(),
                actual=found.hex(),
            )

    def _blame(self, number: int, error: FragmentError) -> None:
        """Remember a failure with the fragment that is damaged: it may be a base, below."""
        culprit = number
        if error.fragment:
            row = self._catalog.row(
                "SELECT number FROM fragments WHERE id = ?", (bytes.fromhex(error.fragment),)
            )
            culprit = int(row[0]) if row else number
        else:
            culprit = self._unreadable(number)
        with self._lock:
            self._bad.setdefault(culprit, error.message)

    def _unreadable(self, number: int) -> int:
        """The fragment of a closure whose record cannot be read."""
        for member in closure_of([number], self._catalog.bases):
            try:
                self._decoder.read_record(self._catalog.fragment(member))
            except FragmentError:
                return member
        return number
