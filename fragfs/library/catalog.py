"""The catalog: the SQLite database that says what a library holds, and its only commit point.

Readers call `connection()`: one connection per thread, opened on first use, read-only. Nothing here
keeps a transaction open after a method returns, and no connection crosses a process: a forked child
that uses the catalog gets an error instead of a corrupted database.

Writers use `transaction()`, under the library's lock (`writer.py`).
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fragfs.errors import FormatError, NotFoundError, StorageError, UsageError
from fragfs.library.cells import odd_cell
from fragfs.library.files import storage_error
from fragfs.library.filesystem import database_error
from fragfs.library.records import RECORD_HEADER_BYTES_MAX
from fragfs.library.schema import APPLICATION_ID, FIRST_CONTENT, MIGRATIONS, SCHEMA
from fragfs.types import (
    FRAGMENT_BYTES_MAX,
    LIBRARY_FORMAT_VERSION,
    FragmentId,
    FragmentIdentity,
    FragmentMetadata,
    Level,
    LibraryConfig,
)

__all__ = [
    "CATALOG_NAME",
    "CATALOG_REMEDY",
    "NO_PACK",
    "NUMBERS_MAX",
    "SNAPSHOT_NAME",
    "Catalog",
    "create_catalog",
]

NO_PACK = 0
"""Stands for the pack of a fragment that files need and no pack has any more."""

CATALOG_NAME = "catalog.sqlite"
SNAPSHOT_NAME = "catalog.snapshot"

CATALOG_REMEDY = (
    "restore it, with the packs, from one backup, or make a new one from the packs with: fragfs"
    " check --rebuild"
)
"""What to do about a damaged catalog."""

_OFFSET_MAX = 1 << 48
NUMBERS_MAX = 1 << 31
"""Fragment numbers stay below it in any catalog that is not damaged: tables have a row for each."""

_ASKED_STEP = 8
"""Numbers asked for in one query are filled up to a multiple of this."""

_FREE_PAGES_MIN = 64
_FREE_SHARE_MIN = 0.2
"""Unused pages are used again; fewer of them are not worth writing all others anew."""

# Whose library it is does not matter: nothing in it is run.
_FOREIGN_ENTRIES = (
    "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
    " OR (type = 'table' AND rootpage = 0)"
)

_FRAGMENT_COLUMNS = "number, id, pack, offset, record_size, raw_size, predictor"


def create_catalog(path: Path, uuid: bytes, config: LibraryConfig, now_ns: int) -> None:
    """Create an empty catalog at `path` (a name nobody uses yet)."""
    with _sqlite_errors(path):
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {LIBRARY_FORMAT_VERSION}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO library VALUES (1, ?, ?, ?, ?, ?, 0, ?, ?)",
                (
                    uuid,
                    config.fragment_elements,
                    config.closure_max,
                    config.zstd_level,
                    config.pack_bytes_max,
                    bytes(16),
                    config.level,
                ),
            )
            connection.execute("INSERT INTO folders VALUES (x'', x'', ?)", (now_ns,))
            connection.execute(
                "INSERT INTO sqlite_sequence VALUES ('contents', ?)", (FIRST_CONTENT - 1,)
            )
            connection.execute("COMMIT")
        finally:
            connection.close()


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Translate SQLite's errors at the edge; each names the database and what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise database_error(error, path) from error
    except sqlite3.IntegrityError:
        raise  # a constraint of ours: a defect of fragfs, not of the database file
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # The latter where SQLite's own message quotes a damaged schema.
        raise FormatError(
            f"catalog {path} is damaged: {error}",
            path=str(path),
            remedy=CATALOG_REMEDY,
        ) from error


def _filled_up(numbers: Sequence[int]) -> list[int]:
    """Numbers to ask for, filled up to a round count: SQLite knows the statement from before."""
    if len(numbers) == 1:
        return [*numbers]
    return [*numbers, *[*numbers][:1] * (-len(numbers) % _ASKED_STEP)]


class _ThreadConnection:
    """A thread's connection, closed when the thread ends or the catalog is closed."""

    def __init__(self, connection: sqlite3.Connection, identity: tuple[int, ...] | None) -> None:
        self.connection = connection
        self.identity = identity
        self._process = os.getpid()

    def close(self) -> None:
        """Close it, unless this is a forked child: the connection is the parent's."""
        if os.getpid() == self._process:
            self.connection.close()

    def __del__(self) -> None:
        self.close()


class Catalog:
    """Connections to one library's catalog, and the queries that several rooms need.

    Args:
        directory: The library's directory.

    Attributes:
        path: The database file in use: the catalog, or its snapshot where this user cannot open
            the catalog itself (another user's library, read-only media).
        read_only: True if the snapshot is in use.
        was_migrated: True if it had an older format when it was opened.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory / CATALOG_NAME
        self.read_only = False
        self.was_migrated = False
        self._local = threading.local()
        self._opened: weakref.WeakSet[_ThreadConnection] = weakref.WeakSet()
        self._opened_lock = threading.Lock()
        self._process = os.getpid()
        self._identity = _identity(self.path)
        if self._identity is None:
            lost = (directory / "packs").is_dir()
            raise NotFoundError(
                f"the library in {directory} has lost its {CATALOG_NAME}"
                if lost
                else f"no fragfs library in {directory}",
                path=str(directory),
                remedy="put it back from a backup of the whole library, or make a new one from the"
                f" packs with: fragfs --library {directory} check --rebuild"
                if lost
                else f"create one with: fragfs init {directory}",
            )
        try:
            self.connection()
        except StorageError:
            if not (directory / SNAPSHOT_NAME).exists() or os.access(directory, os.W_OK):
                raise
            self.path = directory / SNAPSHOT_NAME
            self.read_only = True
            self._identity = _identity(self.path)
        self._check_version()

    def _check_version(self) -> None:
        with _sqlite_errors(self.path):
            connection = self.connection()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise FormatError(
                f"{self.path} is not the catalog of a fragfs library",
                path=str(self.path),
                remedy=f"check the path; if it is a library, {CATALOG_REMEDY}",
            )
        if version in MIGRATIONS and self.read_only:
            raise FormatError(
                f"library format {version} must be brought to {LIBRARY_FORMAT_VERSION} first",
                path=str(self.path),
                remedy="ask the library's owner to run any fragfs command on it once",
                expected=LIBRARY_FORMAT_VERSION,
                actual=version,
            )
        if version in MIGRATIONS:
            self._migrate()
            self.was_migrated = True
        elif version != LIBRARY_FORMAT_VERSION:
            raise FormatError(
                f"library format {version} is not the format this fragfs works with"
                f" ({LIBRARY_FORMAT_VERSION})",
                path=str(self.path),
                remedy="upgrade fragfs",
                expected=LIBRARY_FORMAT_VERSION,
                actual=version,
            )

    def _migrate(self) -> None:
        """Bring an older catalog up to date, in one transaction.

        Whoever has it open keeps working: tables are added, none is changed under a reader, and an
        older fragfs refuses the records it does not know one by one.
        """
        with self.transaction() as connection:
            while True:
                # Read under the write lock: another process may have been quicker.
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version not in MIGRATIONS:
                    break
                for statement in MIGRATIONS[version].split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, read-only and in autocommit mode."""
        held: _ThreadConnection | None = getattr(self._local, "held", None)
        if self.read_only and held is not None and _identity(self.path) != held.identity:
            held = None  # a newer snapshot has taken its place
        if held is None:
            identity = _identity(self.path)
            held = _ThreadConnection(self._connect(writable=False), identity)
            self._local.held = held
            with self._opened_lock:
                self._opened.add(held)
        elif os.getpid() != self._process:
            raise _forked()
        return held.connection

    def check_in_place(self) -> None:
        """Make sure that the catalog is still the file that was opened.

        Raises:
            StorageError: It was moved away or replaced.
        """
        if not self.read_only and _identity(self.path) != self._identity:
            # Numbers of another catalog, even an older one of the same library, mean other bytes.
            raise StorageError(
                f"the library in {self._directory} was moved away or replaced while it was in use",
                path=str(self._directory),
                remedy="put it back, or unmount and open it again",
            )

    def _connect(self, *, writable: bool) -> sqlite3.Connection:
        if os.getpid() != self._process:
            raise _forked()
        self.check_in_place()
        # A snapshot is never changed in place, only replaced by rename: immutable is true of it.
        mode = "mode=ro&immutable=1" if self.read_only else "mode=rw"
        uri = f"{self.path.absolute().as_uri()}?{mode}"
        with _sqlite_errors(self.path):
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=30, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA cell_size_check = ON")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(f"PRAGMA query_only = {0 if writable else 1}")
                (foreign,) = connection.execute(_FOREIGN_ENTRIES).fetchone()
                if foreign:
                    raise FormatError(
                        f"catalog {self.path} has views, triggers or virtual tables",
                        path=str(self.path),
                        remedy="do not use it: fragfs makes none, and they run when it is read",
                    )
            except BaseException:
                connection.close()
                raise
        return connection

    def close(self) -> None:
        """Close every thread's connection; other threads must have stopped using the catalog."""
        with self._opened_lock:
            opened = list(self._opened)
            self._opened.clear()
        for held in opened:
            held.close()
        self._local = threading.local()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction on a connection of its own; rolled back if the body raises."""
        connection = self._connect(writable=True)
        try:
            with _sqlite_errors(self.path):
                connection.execute("BEGIN IMMEDIATE")
            try:
                with _sqlite_errors(self.path):
                    yield connection
                    connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
        finally:
            connection.close()

    def shrink(self) -> bool:
        """Give the pages that nothing uses back to the disk, if they are many.

        Under the writer lock. Readers go on: they see the old pages until their query ends.

        Returns:
            Whether it was worth it.

        Raises:
            StorageError: There is no room for the copy that this makes; nothing has changed.
        """
        connection = self._connect(writable=True)
        try:
            with _sqlite_errors(self.path):
                (free_count,) = connection.execute("PRAGMA freelist_count").fetchone()
                (page_count,) = connection.execute("PRAGMA page_count").fetchone()
                if free_count < max(_FREE_PAGES_MIN, _FREE_SHARE_MIN * page_count):
                    return False
                connection.execute("VACUUM")
                # The file itself gets shorter only here; a reader in the way leaves it to the next.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                return True
        finally:
            connection.close()

    def file_identity(self) -> str:
        """Which file the database is, as text: another one after a rebuild."""
        return "-".join(map(str, self._identity or ()))

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy of the database, complete in one file.

        Raises:
            StorageError: It was replaced since it was opened, or there is no room.
        """
        self.check_in_place()
        with _sqlite_errors(path):
            target = sqlite3.connect(path)
            try:
                self.connection().backup(target)
                target.execute("PRAGMA journal_mode = DELETE")
            finally:
                target.close()

    # --- queries

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a read-only query.

        Raises:
            FormatError: The database is damaged, or a cell holds what its column never does.
            StorageError: It cannot be read.
        """
        with _sqlite_errors(self.path):
            cursor = self.connection().execute(sql, parameters)
            found = cursor.fetchall()
        self._check_types(cursor, found)
        return found

    def row(self, sql: str, parameters: Sequence[object] = ()) -> tuple[Any, ...] | None:
        """The first row of a read-only query, or None; raises as `rows` does."""
        with _sqlite_errors(self.path):
            cursor = self.connection().execute(sql, parameters)
            found: tuple[Any, ...] | None = cursor.fetchone()
        if found is not None:
            self._check_types(cursor, (found,))
        return found

    def _check_types(self, cursor: sqlite3.Cursor, rows: Sequence[tuple[Any, ...]]) -> None:
        odd = odd_cell(cursor.description, rows)
        if odd is not None:
            raise self.damaged(odd)

    def damaged(self, what: str) -> FormatError:
        """The error for what the catalog cannot say."""
        return FormatError(
            f"catalog {self.path} is damaged: {what}",
            path=str(self.path),
            remedy=CATALOG_REMEDY,
        )

    def data_version(self) -> int:
        """A number that changes when another connection has committed.

        Compare only values that the same thread got: SQLite counts per connection.
        """
        if self.read_only:
            return hash(_identity(self.path))
        found = self.row("PRAGMA data_version")
        return int(found[0]) if found else 0

    def identity(self) -> tuple[bytes, LibraryConfig]:
        """The library's UUID and its fixed settings."""
        found = self.row(
            "SELECT uuid, fragment_elements, closure_max, zstd_level, pack_bytes_max, level"
            " FROM library"
        )
        if found is None:
            raise FormatError(
                f"catalog {self.path} lacks the library's settings",
                path=str(self.path),
                remedy=CATALOG_REMEDY,
            )
        uuid, elements, closure, zstd_level, pack_bytes, level = found
        try:
            config = LibraryConfig(elements, closure, zstd_level, pack_bytes, Level(level))
        except (UsageError, ValueError) as error:
            raise self.damaged(f"settings that cannot be: {error}") from error
        if len(uuid) != 16:
            raise self.damaged(f"a library UUID of {len(uuid)} bytes")
        return uuid, config

    def generation(self) -> tuple[int, bytes]:
        """Number and id of the batch committed last.

        Raises:
            FormatError: The catalog is damaged.
        """
        found = self.row("SELECT generation, batch FROM library")
        if found is None:
            return 0, bytes(16)
        generation, batch = found
        if not 0 <= generation < 1 << 62 or len(batch) != 16:
            raise self.damaged(f"batch {generation} cannot be the last")
        return generation, batch

    def fragment(self, number: int) -> FragmentMetadata:
        """Where a fragment is stored.

        Raises:
            NotFoundError: No such fragment.
        """
        # The index of ids is asked as well: of two damaged rows one may have taken the other's
        # number, and then the bytes would be another fragment's.
        found = self.row(
            f"SELECT {_FRAGMENT_COLUMNS}, (SELECT other.number FROM fragments AS other"
            " WHERE other.id = fragments.id) AS number FROM fragments WHERE number = ?",
            (number,),
        )
        if found is None:
            raise NotFoundError(
                f"fragment number {number} is not in the catalog",
                remedy="add the model again, or restore the catalog from a backup",
            )
        *row, again = found
        if again != number:
            raise self.damaged(f"fragment {number} is not what the index of ids says")
        return self._metadata(row)

    def identities(self, numbers: Sequence[int]) -> list[FragmentIdentity]:
        """What some fragments are, in their order; a few hundred at most.

        Raises:
            NotFoundError: There is no such fragment.
        """
        asked = _filled_up(numbers)
        # Where the index of ids says something else, see `fragment`.
        rows = self.rows(
            "SELECT number, id, raw_size,"
            " EXISTS (SELECT 1 FROM bases WHERE bases.fragment = fragments.number),"
            " EXISTS (SELECT 1 FROM bases WHERE bases.base = fragments.number)"
            f" FROM fragments WHERE number IN ({', '.join('?' * len(asked))}) AND number ="
            " (SELECT other.number FROM fragments AS other WHERE other.id = fragments.id)",
            asked,
        )
        found = {
            number: FragmentIdentity(number, FragmentId(id_), size, bool(has_bases), bool(is_base))
            for number, id_, size, has_bases, is_base in rows
            if len(id_) == 32 and 0 <= size <= FRAGMENT_BYTES_MAX
        }
        for number in numbers:
            if number not in found:
                self.fragment(number)  # which says what is the matter
                return self.identities(numbers)  # it was added meanwhile
        return [found[number] for number in numbers]

    def _metadata(self, row: Sequence[Any]) -> FragmentMetadata:
        number, fragment, pack, offset, record_size, raw_size, predictor = row
        if (
            len(fragment) != 32
            or pack < NO_PACK
            or not 0 <= offset <= _OFFSET_MAX
            or not 0 < record_size <= FRAGMENT_BYTES_MAX + RECORD_HEADER_BYTES_MAX
            or not 0 <= raw_size <= FRAGMENT_BYTES_MAX
            or not 0 <= predictor <= 255
        ):
            raise self.damaged(f"the place of fragment {number} cannot be")
        return FragmentMetadata(
            number, FragmentId(fragment), pack, offset, record_size, raw_size, predictor
        )

    def find_fragment(self, fragment: FragmentId) -> FragmentMetadata | None:
        """Where the fragment with this id is stored, or None."""
        found = self.row(f"SELECT {_FRAGMENT_COLUMNS} FROM fragments WHERE id = ?", (fragment,))
        return self._metadata(found) if found else None

    def bases(self, number: int) -> tuple[int, ...]:
        """The fragments that the prediction of a fragment reads, in its order."""
        found = self.rows("SELECT base FROM bases WHERE fragment = ? ORDER BY position", (number,))
        return tuple(base for (base,) in found)

    def bases_of(self, numbers: Collection[int]) -> dict[int, tuple[int, ...]]:
        """`bases` of each of some fragments, a few hundred at most."""
        found: dict[int, tuple[int, ...]] = dict.fromkeys(numbers, ())
        asked = _filled_up([*found])
        marks = ", ".join("?" * len(asked))
        for fragment, base in self.rows(
            f"SELECT fragment, base FROM bases WHERE fragment IN ({marks})"
            " ORDER BY fragment, position",
            asked,
        ):
            found[fragment] += (base,)
        return found

    def dependents(self, number: int) -> list[int]:
        """The fragments whose predictions read a fragment."""
        return [
            fragment
            for (fragment,) in self.rows(
                "SELECT DISTINCT fragment FROM bases WHERE base = ?", (number,)
            )
        ]

    def quarantined(self) -> set[int]:
        """The fragments whose stored bytes were found damaged and not replaced since."""
        return {number for (number,) in self.rows("SELECT fragment FROM quarantine")}

    def next_number(self, table: str) -> int:
        """The first number of an AUTOINCREMENT table that was never used."""
        found = self.row("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        if found is None:
            return 1
        if type(found[0]) is not int or not 0 <= found[0] < 1 << 62:
            raise self.damaged(f"the last number of {table} cannot be")
        return found[0] + 1


def _identity(path: Path) -> tuple[int, ...] | None:
    """Tells a file from another that took its name; None if there is none.

    Raises:
        StorageError: This user may not look.
        FormatError: It is a directory, a pipe or the like.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, f"cannot look into the library in {path.parent}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(
            f"{path} is no regular file",
            path=str(path),
            remedy="check the path, or restore the catalog from a backup",
        )
    if path.name == SNAPSHOT_NAME:
        return status.st_dev, status.st_ino, status.st_mtime_ns
    return status.st_dev, status.st_ino


def _forked() -> StorageError:
    return StorageError(
        "a library that was opened before fork() is used after it",
        remedy="open the library again in the child process",
    )
