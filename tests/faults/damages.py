"""What may happen to the bytes of a library, as a table: every file, record, field, page and cell.

`DamageTable` is made from one healthy library and lists damages by name; each is a function that
spoils a copy of that library. Nothing here judges: `test_damage.py` does.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fragfs.library.files import OsFiles
from fragfs.library.packs import ScannedRecord, scan_records
from fragfs.library.records import (
    BATCH_TRAILER,
    FRAGMENT_HEADER,
    PACK_FOOTER,
    PACK_HEADER,
    RECORD_HEADER,
    Layout,
    RecordKind,
)

PAGE = 4096
CATALOG = "catalog.sqlite"
WAL = "catalog.sqlite-wal"
HARMLESS_FILES = (
    "catalog.snapshot",
    "lock",
    "lock.next",
    "leases/shared",
    "staging/batch.intent",
)
"""Files without which a library reads as before; the next writer makes them anew."""


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        name: What is damaged, where and how.
        area: What is expected. "pack": who needs the bytes gets an error, nobody else does.
            "catalog" and "cell": right, or an error. "harmless": all is right, and the next writer
            makes the file anew. "history": as "pack"; it tells a rebuild a whole, false story.
        apply: Does it to the library in a directory.
    """

    name: str
    area: str
    apply: Callable[[Path], None]


def flip(data: bytearray, at: int, bit: int = 4) -> None:
    data[at] ^= 1 << bit


def edited(name: str, edit: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """A damage that edits one file's bytes."""

    def apply(library: Path) -> None:
        data = bytearray((library / name).read_bytes())
        edit(data)
        (library / name).write_bytes(data)

    return apply


def places(count: int) -> dict[str, int]:
    """First, middle and last of `count` things, the same one only once."""
    found: dict[str, int] = {}
    for word, at in (("first", 0), ("middle", count // 2), ("last", count - 1)):
        if at not in found.values():
            found[word] = at
    return found


# --- whole files


def file_damages(library: Path, older: Path) -> Iterator[Damage]:
    """What befalls each file of a library as a whole."""
    names = [CATALOG, WAL, f"{CATALOG}-shm", *HARMLESS_FILES]
    names += sorted(f"packs/{path.name}" for path in (library / "packs").iterdir())
    for name in names:
        area = "pack" if name.startswith("packs/") else "catalog"
        area = "harmless" if name in HARMLESS_FILES else area
        size = (library / name).stat().st_size
        for how, apply in _file_ways(name, size):
            yield Damage(f"{name}: {how}", area, apply)
        if (older / name).exists():
            yield Damage(f"{name}: an older copy", area, _older(name, older))


def _file_ways(name: str, size: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    yield "deleted", lambda library: (library / name).unlink()
    yield "emptied", edited(name, lambda data: data.clear())
    yield "garbage", edited(name, lambda data: data.__setitem__(slice(None), b"garbage\n" * 600))
    yield "garbage appended", edited(name, lambda data: data.extend(b"garbage\n" * 60))
    yield "a directory", _directory(name)
    yield "a link to nothing", _link(name)
    yield "a pipe", _pipe(name)
    if not size:
        return
    for word, at in places(size).items():
        yield f"{word} byte flipped", edited(name, lambda data, at=at: flip(data, at))
    for word, keep in {"in half": size // 2, "by a byte": size - 1, "to 40 bytes": 40}.items():
        if keep < size:
            yield (
                f"truncated {word}",
                edited(name, lambda data, keep=keep: data.__delitem__(slice(keep, None))),
            )
    blocks = size // PAGE
    for word, block in places(max(blocks, 1)).items():
        yield f"{word} block zeroed", edited(name, lambda data, block=block: _zero(data, block))
    if blocks > 1:
        yield (
            "first and last block swapped",
            edited(name, lambda data: _swap(data, 0, (blocks - 1) * PAGE, PAGE)),
        )


def _zero(data: bytearray, block: int) -> None:
    piece = data[block * PAGE : (block + 1) * PAGE]
    data[block * PAGE : (block + 1) * PAGE] = bytes(len(piece))


def _swap(data: bytearray, one: int, other: int, size: int) -> None:
    kept = data[one : one + size]
    data[one : one + size] = data[other : other + size]
    data[other : other + size] = kept


def _directory(name: str) -> Callable[[Path], None]:
    def apply(library: Path) -> None:
        (library / name).unlink()
        (library / name).mkdir()

    return apply


def _link(name: str) -> Callable[[Path], None]:
    def apply(library: Path) -> None:
        (library / name).unlink()
        (library / name).symlink_to(library / "nowhere")

    return apply


def _pipe(name: str) -> Callable[[Path], None]:
    def apply(library: Path) -> None:
        (library / name).unlink()
        os.mkfifo(library / name)

    return apply


def _older(name: str, older: Path) -> Callable[[Path], None]:
    def apply(library: Path) -> None:
        shutil.copyfile(older / name, library / name)

    return apply


# --- packs, record by record and field by field

_PLAIN = (RecordKind.MANIFEST, RecordKind.REMOVAL, RecordKind.RETIREMENT, RecordKind.PACK_INDEX)


def pack_damages(library: Path) -> Iterator[Damage]:
    """What befalls pack headers, records of every kind at every field, indexes and footers."""
    seen: dict[str, int] = {}
    for path in sorted((library / "packs").iterdir()):
        name, data = f"packs/{path.name}", path.read_bytes()
        for field, offset, size in _fields(PACK_HEADER, 0):
            yield from _field_damages(
                name, f"header {field}", offset, size, PACK_HEADER.size, forged="history"
            )
        records = scan(path)
        for word, index in places(len(records)).items():
            yield from _record_damages(name, data, records[index], word)
        for record in records:
            sort = _sort_of(data, record)
            seen[sort] = seen.get(sort, 0) + 1
            if seen[sort] in (1, 4):  # an early one and a later one of each sort
                yield from _record_damages(name, data, record, f"{sort} {seen[sort]}")
        yield from _swapped_records(name, data, records)
        if data.endswith(b"FRAGEND\n"):
            start = len(data) - PACK_FOOTER.size
            for field, offset, size in _fields(PACK_FOOTER, start):
                yield from _field_damages(name, f"footer {field}", offset, size, None)


def scan(path: Path) -> list[ScannedRecord]:
    files = OsFiles()
    descriptor = files.open_read(path)
    try:
        return list(scan_records(files, descriptor, PACK_HEADER.size, path.stat().st_size))
    finally:
        files.close(descriptor)


def _fields(layout: Layout, start: int) -> list[tuple[str, int, int]]:
    return [(name, start + offset, size) for offset, size, name in layout.table()]


def _sort_of(data: bytes, record: ScannedRecord) -> str:
    kind = record.header.kind
    if kind is RecordKind.FRAGMENT:
        return f"fragment of predictor {data[record.offset + RECORD_HEADER.size + 44]}"
    return kind.name.lower()


def _record_damages(name: str, data: bytes, record: ScannedRecord, word: str) -> Iterator[Damage]:
    start, header = record.offset, record.header
    fields = _fields(RECORD_HEADER, start)
    own = start + RECORD_HEADER.size
    if header.kind is RecordKind.FRAGMENT:
        fields += _fields(FRAGMENT_HEADER, own)
        bases = data[own + 46]
        for number in range(bases):
            fields.append((f"base {number}", own + FRAGMENT_HEADER.size + 32 * number, 32))
        params = own + FRAGMENT_HEADER.size + 32 * bases
        length = start + header.header_size - 8 - params
        if length:
            fields.append(("params", params, length))
    elif header.kind is RecordKind.BATCH_TRAILER:
        fields += _fields(BATCH_TRAILER, own)
    label = f"record {word}"
    forged = "history" if header.kind is RecordKind.BATCH_TRAILER else "pack"
    for field, offset, size in fields:
        yield from _field_damages(
            name, f"{label} {field}", offset, size, start + header.header_size, start, forged
        )
    checksum = start + header.header_size - 8
    yield from _field_damages(name, f"{label} header_checksum", checksum, 8, None)
    payload = start + header.header_size
    if header.payload_size:
        for spot, at in places(header.payload_size).items():
            yield _edit(
                name, f"{label} payload {spot} flipped", lambda d, a=payload + at: flip(d, a)
            )
        yield _edit(
            name,
            f"{label} payload zeroed",
            lambda d: d.__setitem__(
                slice(payload, payload + header.payload_size), bytes(header.payload_size)
            ),
        )
        yield _edit(name, f"{label} payload forged", lambda d: _forge_payload(d, record))
    end = start + header.record_size
    yield _edit(
        name, f"{label} zeroed", lambda d: d.__setitem__(slice(start, end), bytes(end - start))
    )
    yield _edit(name, f"{label} cut out", lambda d: d.__delitem__(slice(start, end)))
    yield _edit(name, f"{label} cut off", lambda d: d.__delitem__(slice((start + end) // 2, None)))


def _edit(name: str, what: str, edit: Callable[[bytearray], None]) -> Damage:
    return Damage(f"{name}: {what}", "pack", edited(name, edit))


def _field_damages(
    name: str,
    what: str,
    offset: int,
    size: int,
    header_end: int | None,
    header_start: int = 0,
    forged: str = "pack",
) -> Iterator[Damage]:
    """A field flipped, and flipped with the header's checksum made to fit if there is one."""
    yield _edit(name, f"{what} flipped", lambda data: flip(data, offset + size // 2))
    if header_end is None:
        return

    def forge(data: bytearray) -> None:
        flip(data, offset, 0)
        _seal(data, header_start, header_end)

    yield Damage(f"{name}: {what} forged", forged, edited(name, forge))


def _seal(data: bytearray, start: int, end: int) -> None:
    found = xxhash.xxh3_64_intdigest(bytes(data[start : end - 8]))
    data[end - 8 : end] = found.to_bytes(8, "little")


def _forge_payload(data: bytearray, record: ScannedRecord) -> None:
    """Flip a bit of the payload, and make both checksums that cover it fit."""
    start, payload = record.offset, record.offset + record.header.header_size
    end = start + record.header.record_size
    flip(data, (payload + end) // 2)
    found = xxhash.xxh3_64_intdigest(bytes(data[payload:end]))
    data[start + 16 : start + 24] = found.to_bytes(8, "little")
    _seal(data, start, payload)


def _swapped_records(name: str, data: bytes, records: Sequence[ScannedRecord]) -> Iterator[Damage]:
    """Two records of one size change places; then two neighbours of other sizes."""
    by_size: dict[int, int] = {}
    for record in records:
        size = record.header.record_size
        if record.header.kind is RecordKind.FRAGMENT and size in by_size:
            one = by_size[size]
            yield _edit(
                name,
                f"records of {size} bytes swapped",
                lambda d, a=one, b=record.offset, n=size: _swap(d, a, b, n),
            )
            break
        by_size[size] = record.offset
    if len(records) > 1:
        first, second = records[0], records[1]
        end = second.offset + second.header.record_size
        turned = data[second.offset : end] + data[first.offset : second.offset]
        yield _edit(
            name,
            "first two records swapped",
            lambda d: d.__setitem__(slice(first.offset, end), turned),
        )


# --- the catalog, page by page and cell by cell


def page_damages(library: Path) -> Iterator[Damage]:
    """What befalls each page of the database."""
    size = (library / CATALOG).stat().st_size
    for page in range(size // PAGE):
        start = page * PAGE
        for what, edit in {
            "zeroed": lambda d, p=page: _zero(d, p),
            "type flipped": lambda d, s=start: flip(d, s + (100 if s == 0 else 0), 1),
            "cell count flipped": lambda d, s=start: flip(d, s + (104 if s == 0 else 4), 0),
            "a cell pointer flipped": lambda d, s=start: flip(d, s + 9, 2),
            "last byte flipped": lambda d, s=start: flip(d, s + PAGE - 1),
            "last cell flipped": lambda d, s=start: flip(d, s + PAGE - 20, 0),
        }.items():
            yield Damage(f"{CATALOG} page {page + 1}: {what}", "catalog", edited(CATALOG, edit))
        if page:
            yield Damage(
                f"{CATALOG} pages {page} and {page + 1}: swapped",
                "catalog",
                edited(CATALOG, lambda d, s=start: _swap(d, s - PAGE, s, PAGE)),
            )
    for field, at in {
        "page size": 16,
        "write version": 18,
        "reserved space": 20,
        "page count": 31,
        "freelist": 35,
        "schema cookie": 43,
        "schema format": 47,
        "text encoding": 59,
        "user version": 63,
        "application id": 71,
    }.items():
        yield Damage(
            f"{CATALOG} header: {field} flipped",
            "catalog",
            edited(CATALOG, lambda d, a=at: flip(d, a, 1)),
        )


def cell_damages(library: Path) -> Iterator[Damage]:
    """What befalls each column at its first, middle and last row, in the table but no index."""
    connection = sqlite3.connect(library / CATALOG)
    tables = [
        row[0]
        for row in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
    ]
    for table in tables:
        columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
        keys = [column[1] for column in sorted(columns, key=lambda c: c[5]) if column[5]]
        order = ", ".join(keys)
        rows = connection.execute(f"SELECT {order} FROM {table} ORDER BY {order}").fetchall()
        for column in (column[1] for column in columns):
            for word, index in places(len(rows)).items() if rows else ():
                for how, change in _cell_ways(connection, table, column, keys, rows[index]):
                    yield Damage(
                        f"{table}.{column} {word}: {how}",
                        "cell",
                        _cell(table, column, keys, rows[index], change),
                    )
    connection.close()


def _cell_ways(
    connection: sqlite3.Connection, table: str, column: str, keys: list[str], key: tuple
) -> Iterator[tuple[str, object]]:
    where = " AND ".join(f"{name} IS ?" for name in keys)
    (value,) = connection.execute(f"SELECT {column} FROM {table} WHERE {where}", key).fetchone()
    if isinstance(value, int):
        yield "another number", value ^ 1
        if keys != [column]:  # a row's number can be nothing else
            yield "a string", "garbage"
    elif isinstance(value, bytes):
        spoilt = bytearray(value or b"\0")
        flip(spoilt, len(spoilt) // 2)
        yield "a flipped bit", bytes(spoilt)
        if value:
            yield "shorter", value[:-1]
    elif isinstance(value, str):
        yield "bytes", b"\xff\0"


def _cell(
    table: str, column: str, keys: list[str], key: tuple, value: object
) -> Callable[[Path], None]:
    where = " AND ".join(f"{name} IS ?" for name in keys)

    def apply(library: Path) -> None:
        with _without_indexes(library, table) as connection:
            connection.execute(
                f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {where}", (value, *key)
            )

    return apply


class _without_indexes:
    """The database with the indexes of a table hidden, so that a change reaches the table alone."""

    def __init__(self, library: Path, table: str) -> None:
        self._path = library / CATALOG
        self._table = table

    def __enter__(self) -> sqlite3.Connection:
        with sqlite3.connect(self._path) as connection:
            self._hidden = connection.execute(
                "SELECT rowid, * FROM sqlite_master WHERE type = 'index' AND tbl_name = ?",
                (self._table,),
            ).fetchall()
            self._schema = connection.execute(
                "SELECT sql FROM sqlite_master WHERE name = ?", (self._table,)
            ).fetchone()[0]
            # Without UNIQUE there need be no index; CHECK and NOT NULL would refuse the damage.
            bare = self._schema.replace(" UNIQUE", "").replace(" NOT NULL", "")
            self._rewrite(connection, bare.replace("CHECK (only = 1)", ""), hide=True)
        connection.close()
        self._connection = sqlite3.connect(self._path)
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.commit()
        self._connection.close()
        with sqlite3.connect(self._path) as connection:
            self._rewrite(connection, self._schema, hide=False)
        connection.close()

    def _rewrite(self, connection: sqlite3.Connection, schema: str, *, hide: bool) -> None:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?",
            (schema, self._table),
        )
        if hide:
            connection.execute(
                "DELETE FROM sqlite_master WHERE type = 'index' AND tbl_name = ?", (self._table,)
            )
        else:
            connection.executemany(
                "INSERT INTO sqlite_master (rowid, type, name, tbl_name, rootpage, sql)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                self._hidden,
            )
        connection.execute("PRAGMA writable_schema = OFF")
