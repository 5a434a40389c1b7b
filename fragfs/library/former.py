"""The catalogs a library had before a rebuild: what they still tell, and keeping them.

A rebuild believes packs alone about models and bytes. From an older catalog it only takes which
numbers were used, so that none is used again for other bytes.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from fragfs.library.catalog import CATALOG_NAME, NUMBERS_MAX, SNAPSHOT_NAME
from fragfs.library.files import Files
from fragfs.library.writer import STAGING_NAME
from fragfs.types import FragmentId

__all__ = ["FormerCatalog", "keep_former", "read_formers", "remove_journal"]

_KEPT_NAME = "catalog.old-{}.sqlite"
_COPIED_BYTES = 4 << 20
_COUNT_MAX = 1 << 48
_PACKS_MAX = 1 << 24


@dataclass(frozen=True, slots=True)
class FormerCatalog:
    """What one older catalog tells.

    Attributes:
        uuid: Of its library.
        generation: Of the last batch it knows.
        used: The highest number ever used in each table with numbers of its own.
        pack_max: The highest number of a pack.
        numbers: Number of each fragment.
    """

    uuid: bytes
    generation: int
    used: dict[str, int]
    pack_max: int
    numbers: dict[FragmentId, int]


def read_formers(files: Files, directory: Path) -> list[FormerCatalog]:
    """Every catalog in a library's directory that can be read: the one in use, its copies.

    Args:
        files: Lists the directory.
        directory: The library's directory.
    """
    found = []
    for name in sorted(files.names(directory)):
        if name in (CATALOG_NAME, SNAPSHOT_NAME) or _kept_index(name):
            former = _read(directory / name)
            if former is not None:
                found.append(former)
    return found


def _read(path: Path) -> FormerCatalog | None:
    # The snapshot has no journal, and need not be writable.
    mode = "mode=ro" if path.name == CATALOG_NAME else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
            uuid, generation = connection.execute("SELECT uuid, generation FROM library").fetchone()
            used = dict(connection.execute("SELECT name, seq FROM sqlite_sequence"))
            (pack_max,) = connection.execute(
                "SELECT coalesce(max(number), 0) FROM packs"
            ).fetchone()
            numbers = {
                FragmentId(fragment): int(number)
                for number, fragment in connection.execute("SELECT number, id FROM fragments")
            }
            former = FormerCatalog(
                bytes(uuid),
                int(generation),
                {str(name): int(seq) for name, seq in used.items()},
                int(pack_max),
                numbers,
            )
    except (sqlite3.Error, TypeError, ValueError):
        return None  # damaged: it tells nothing
    return former if _is_plausible(former) else None


def _is_plausible(former: FormerCatalog) -> bool:
    """Whether its numbers may be carried over: those of a damaged catalog would damage the next."""
    used = former.used.get("fragments", 0)
    return (
        0 <= former.generation < _COUNT_MAX
        and 0 <= former.pack_max < _PACKS_MAX
        and 0 <= used < NUMBERS_MAX // 2
        and all(0 <= highest < _COUNT_MAX for highest in former.used.values())
        and all(0 < number <= used for number in former.numbers.values())
    )


def _kept_index(name: str) -> int:
    """The number in the name of a kept catalog; 0 for other names."""
    start, end = _KEPT_NAME.split("{}")
    digits = name.removeprefix(start).removesuffix(end)
    return int(digits) if name == _KEPT_NAME.format(digits) and digits.isdigit() else 0


def keep_former(files: Files, directory: Path) -> tuple[Path, ...]:
    """Copy the catalog and its journal to names of their own; gives those names.

    A copy, not a rename: there is a catalog under its name at every moment.

    Args:
        files: How to copy.
        directory: The library's directory.
    """
    names = set(files.names(directory))
    if CATALOG_NAME not in names:
        return ()
    index = 1 + max(map(_kept_index, names), default=0)
    kept = directory / _KEPT_NAME.format(index)
    copies = []
    # The journal first: what is moved from it into the catalog meanwhile is then in both copies.
    for suffix in ("-wal", ""):
        source = directory / f"{CATALOG_NAME}{suffix}"
        if source.name in names and (not suffix or files.size(source)):
            target = Path(f"{kept}{suffix}")
            _copy(files, source, directory / STAGING_NAME / target.name, target)
            copies.append(target)
    files.sync_directory(directory)
    return tuple(reversed(copies))


def _copy(files: Files, source: Path, temporary: Path, target: Path) -> None:
    files.unlink(temporary)
    reading = files.open_read(source)
    try:
        writing = files.create(temporary)
        try:
            for offset in range(0, files.size(source), _COPIED_BYTES):
                files.append(writing, [files.read_at(reading, _COPIED_BYTES, offset)])
            files.sync(writing)
        finally:
            files.close(writing)
    finally:
        files.close(reading)
    files.rename(temporary, target)


def remove_journal(files: Files, directory: Path) -> None:
    """Leave nothing that SQLite would replay onto another catalog of the same name.

    Args:
        files: How to unlink.
        directory: The library's directory.
    """
    path = directory / CATALOG_NAME
    if CATALOG_NAME in files.names(directory):
        # Should this be interrupted, the old catalog shall still be all there, if it can be read.
        with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=1)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for suffix in ("-wal", "-shm", "-journal"):
        files.unlink(Path(f"{path}{suffix}"))
