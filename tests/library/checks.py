"""Ways to damage a library on disk, and to look at what a check says."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from pathlib import Path

from fragfs.library.files import OsFiles, storage_error
from fragfs.library.findings import CheckReport, ProblemKind
from fragfs.library.library import FragmentLibrary
from fragfs.library.progress import NO_PROGRESS
from fragfs.library.scan import PackScan, scan_pack


def pack_path(library: Path, number: int) -> Path:
    return library / "packs" / f"{number:010d}.pack"


def packs_of(library: Path) -> list[Path]:
    return sorted((library / "packs").iterdir())


def scan_of(pack: Path) -> PackScan:
    return scan_pack(OsFiles(), pack, int(pack.stem), None, NO_PROGRESS)


class BadPage(OsFiles):
    """A disk that does not give one page of a file."""

    def __init__(self, path: Path, offset: int, error: int = errno.EIO) -> None:
        self._path = str(path)
        self._page = offset // 4096
        self._error = error

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        """See `Files`."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self._path and offset // 4096 <= self._page <= (offset + size - 1) // 4096:
            raise storage_error(OSError(self._error, "bad page", path), f"cannot read {path}")
        return super().read_at(descriptor, size, offset)


def flip(path: Path, offset: int, bits: int = 0x10) -> None:
    """Damage one byte."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ bits]))


def flip_fragment(library: FragmentLibrary, number: int, at: int = -1) -> None:
    """Damage a byte of a fragment's record; by default the last one, which is payload."""
    meta = library.fragment(number)
    place = meta.offset + (at if at >= 0 else meta.record_size + at)
    flip(pack_path(library.path, meta.pack), place)


def write_catalog(library: Path, sql: str, *parameters: object) -> None:
    """Change the catalog behind the library's back."""
    connection = sqlite3.connect(library / "catalog.sqlite")
    with connection:
        connection.execute(sql, parameters)
    connection.close()


def rows(library: Path, sql: str) -> list[tuple]:
    connection = sqlite3.connect(library / "catalog.sqlite")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def back_up_catalog(library: Path, to: Path) -> None:
    """What a backup would have: all of the catalog, in one file."""
    source, target = sqlite3.connect(library / "catalog.sqlite"), sqlite3.connect(to)
    source.backup(target)
    source.close()
    target.close()


def put_back_catalog(backup: Path, library: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{library / 'catalog.sqlite'}{suffix}").unlink(missing_ok=True)
    shutil.copy(backup, library / "catalog.sqlite")


def kinds(report: CheckReport) -> list[str]:
    return [str(problem.kind) for problem in report.problems]


def lost_files(report: CheckReport) -> set[tuple[bytes, bytes]]:
    return {
        file
        for problem in report.problems
        if problem.kind is ProblemKind.LOST
        for file in problem.files
    }


def everything(library: FragmentLibrary) -> dict[bytes, list[tuple]]:
    """All that a user can see of a library, inode numbers included."""
    return {
        model.name: [
            (entry.path, entry.sha256, entry.content, entry.mtime_ns, entry.mode)
            for entry in library.files(model.name)
        ]
        for model in library.models()
    }


def failed(library: FragmentLibrary) -> set[tuple[bytes, bytes]]:
    return {(item.model, item.path) for item in library.verify() if item.error}
