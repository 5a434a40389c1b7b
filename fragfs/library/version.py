"""Which format a library has, looked at without opening it: opening may bring it up to date."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

from fragfs.library.catalog import CATALOG_NAME

__all__ = ["read_format_version"]

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
