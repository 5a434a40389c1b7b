"""What a library's databases say of themselves, looked at without opening the library.

Opening may bring it up to date.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

from fragfs.library.catalog import CATALOG_NAME, SNAPSHOT_NAME

__all__ = ["read_format_version", "read_snapshot_generation"]

_BUSY_S = 0.5


def read_format_version(library: Path) -> int | None:
    """The format of a library's catalog; None if there is none that can be read.

    Source: FORMAT.md, "Catalog": `PRAGMA user_version`.
    """
    path = library / CATALOG_NAME
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(bytes(path))}?mode=ro", uri=True, timeout=_BUSY_S)
        ) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        return None
    return int(version) or None


def read_snapshot_generation(library: Path) -> int | None:
    """The generation of the catalog's copy for other users; None if it cannot be read.

    It is never newer than the catalog, unless that was put back from a backup.
    """
    path = library / SNAPSHOT_NAME
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(bytes(path))}?mode=ro&immutable=1", uri=True)
        ) as connection:
            (generation,) = connection.execute("SELECT generation FROM library").fetchone()
    except (sqlite3.Error, TypeError):
        return None
    return generation if isinstance(generation, int) else None
