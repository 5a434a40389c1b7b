"""What is fuzzed: one function of bytes for each parser and reader, and samples to start from.

A target takes any bytes and returns. It raises only where fragfs has a defect: another exception
than `FragmentError`, a rule of layouts broken, bytes served that nobody added. `test_targets.py`
runs each on a bounded number of mutated samples; `python -m tools.fuzz` runs them under atheris.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from fragfs.codec.encoding import decode
from fragfs.errors import FragmentError
from fragfs.formats.detect import parse_layout
from fragfs.library.add import AddOptions
from fragfs.library.extents import ExtentMap, check_seal
from fragfs.library.library import FragmentLibrary
from fragfs.library.manifests import parse_manifest
from fragfs.library.packs import scan_records
from fragfs.library.records import (
    PACK_HEADER,
    RECORD_HEADER,
    parse_batch_trailer,
    parse_fragment_record,
    parse_index,
    parse_pack_header,
    parse_record_header,
    parse_retirement,
)
from fragfs.reader.plan import plan_read
from fragfs.types import Dtype, LibraryConfig
from tests.formats.format_samples import (
    GGUF_ARRAY,
    GGUF_STRING,
    GGUF_UINT32,
    Source,
    check_layout,
    entry,
    gguf_bytes,
    gguf_pair,
    gguf_string,
    gguf_tensor,
    safetensors_bytes,
    zip_bytes,
)

__all__ = ["TARGETS", "Target"]

_WORKPLACE = Path(tempfile.gettempdir())
_GOLDEN = Path(__file__).parents[1] / "codec"


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        name: As `--target` takes it.
        run: Takes any bytes; raises only for a defect.
        samples: Gives valid inputs to mutate.
        examples: How many mutated ones the suite tries.
    """

    name: str
    run: Callable[[bytes], None]
    samples: Callable[[], Sequence[bytes]]
    examples: int


# --- model files


def _layout(name: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        # A few bytes may claim a large file: the rest reads as zeros.
        size = len(data) + (data[-1] << 20 if data and data[-1] < 4 else 0)
        source = Source(data, size)
        layout = parse_layout(name, size, source.read_at)
        check_layout(layout, size)
        assert source.read_bytes <= 4 * size + (1 << 20), "the file was read over and over"

    return run


def _safetensors_samples() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [4], 24, 32),
        "c": entry("F4", [3], 32, 34),
    }
    large = {f"layer.{n}": entry("F16", [64, 64], n * 8192, (n + 1) * 8192) for n in range(10)}
    return [
        safetensors_bytes({}),
        safetensors_bytes(header, bytes(34)),
        safetensors_bytes(large, bytes(81920)),
        safetensors_bytes({"x": entry("F32", [1 << 40], 0, 4)}, bytes(4)),
        safetensors_bytes(b'{"a":[["F32",[1],[0,4]]]}', bytes(4)),
    ]


def _gguf_samples() -> list[bytes]:
    pairs = [
        gguf_pair("general.alignment", GGUF_UINT32, struct.pack("<I", 64)),
        gguf_pair("name", GGUF_STRING, gguf_string("a model")),
        gguf_pair("words", GGUF_ARRAY, struct.pack("<IQ", 8, 2) + gguf_string("a") * 2),
    ]
    tensors = [gguf_tensor("t.0", (64, 2), 0, 0), gguf_tensor("t.1", (256,), 12, 512)]
    return [
        gguf_bytes([], []),
        gguf_bytes(pairs, tensors, bytes(700), alignment=64),
        gguf_bytes([], [gguf_tensor("odd", (3, 5, 7), 99, 64)], bytes(80_000), version=2),
    ]


def _zip_samples() -> list[bytes]:
    return [
        zip_bytes({}),
        zip_bytes({"a/data.pkl": b"x" * 100, "a/data/0": bytes(range(256)) * 300}),
        zip_bytes({f"a/data/{n}": bytes([n]) * 5000 for n in range(4)}),
    ]


# --- packs


class _Bytes:
    """`Files` of one file in memory, as far as records are read from it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        assert size <= 1 << 16, "headers are small"
        return self._data[offset : offset + size]


def _records(data: bytes) -> None:
    """Every parser of pack bytes: as they are, and with checksums that fit."""
    for record in (data, _sealed(data)):
        for parse in (
            lambda d: parse_record_header(d, "here"),
            lambda d: parse_fragment_record(d, "here"),
            lambda d: parse_fragment_record(d, "here", check_stored=False),
            lambda d: parse_index(d, "here"),
            parse_batch_trailer,
            parse_retirement,
        ):
            _refuses_politely(parse, record)
    for pack in (data, _sealed(data[: PACK_HEADER.size])):
        _refuses_politely(lambda d: parse_pack_header(d, "here"), pack)
    try:
        offsets = [
            record.offset
            for record in scan_records(_Bytes(data), 0, 0, len(data))  # type: ignore[arg-type]
        ]
    except FragmentError:
        return
    assert offsets == sorted(set(offsets))


def _sealed(data: bytes) -> bytes:
    """A record or pack header whose checksums are right, so that what lies behind is reached."""
    made = bytearray(data)
    if len(made) == PACK_HEADER.size:
        made[-8:] = _digest(made[:-8])
        return bytes(made)
    if len(made) < RECORD_HEADER.size:
        return data
    size = int.from_bytes(made[6:8], "little")
    if not RECORD_HEADER.size + 8 <= size <= len(made):
        return data
    made[8:16] = (len(made) - size).to_bytes(8, "little")
    made[16:24] = _digest(made[size:])
    made[size - 8 : size] = _digest(made[: size - 8])
    return bytes(made)


def _digest(data: bytes | bytearray) -> bytes:
    return xxhash.xxh3_64_intdigest(bytes(data)).to_bytes(8, "little")


def _refuses_politely(parse: Callable[[bytes], object], data: bytes) -> None:
    with suppress(FragmentError):
        parse(data)


def _record_samples() -> list[bytes]:
    found = []
    for path in sorted((_tiny_library() / "packs").iterdir()):
        data = path.read_bytes()
        found.append(data[: PACK_HEADER.size])
        files = _Bytes(data)
        for record in scan_records(files, 0, PACK_HEADER.size, len(data)):  # type: ignore[arg-type]
            if record.header.record_size < 6000:
                found.append(data[record.offset : record.offset + record.header.record_size])
    return found


# --- extents and manifests


def _extents(data: bytes) -> None:
    """A blob of the catalog, and a frame that holds the bytes."""
    for blob in (data, zstandard.compress(data)):
        try:
            check_seal(blob, 1024, bytes(32))
            extents = ExtentMap.parse(blob)
        except FragmentError:
            continue
        size = 0
        for extent in extents:
            assert extent.offset == size
            assert extent.size > 0
            size += extent.size
        assert size == extents.size
        for offset in (0, size // 2, max(size - 1, 0)):
            planned = plan_read(extents, offset, 1 << 20)
            assert sum(piece.size for piece in planned) == min(1 << 20, size - offset)


def _extent_samples() -> list[bytes]:
    with FragmentLibrary.open(_tiny_library()) as library:
        files = [file for model in library.models() for file in library.files(model.name)]
        contents = [library.open_content(file.content) for file in files]
    blobs = [content.extents.pack(1024, bytes(32)) for content in contents]
    return blobs + [zstandard.decompress(blob) for blob in blobs]


def _manifest(data: bytes) -> None:
    """A payload, and a frame that holds the bytes."""
    for payload in (data, zstandard.compress(data)):
        try:
            manifest = parse_manifest(payload, "here")
        except FragmentError:
            continue
        for file in manifest.files:
            assert b".." not in file.path.split(b"/")
            assert not file.path.startswith(b"/")
        for content in manifest.contents:
            assert len(content.ids) == 32 * len(content.sizes) == 32 * len(content.kinds)


def _manifest_samples() -> list[bytes]:
    found = []
    for path in sorted((_tiny_library() / "packs").iterdir()):
        data = path.read_bytes()
        for record in scan_records(_Bytes(data), 0, PACK_HEADER.size, len(data)):  # type: ignore[arg-type]
            if record.header.kind == 2:
                start = record.offset + record.header.header_size
                payload = data[start : start + record.header.payload_size]
                found += [payload, zstandard.decompress(payload)]
    return found


# --- decoders

_CASE = struct.Struct("<BBHIB")
"""Predictor, dtype, size of the parameters, raw size, bases; then those, each base's size first."""


def _codec(data: bytes) -> None:
    if len(data) < _CASE.size:
        return
    predictor, code, params_size, raw_size, base_count = _CASE.unpack_from(data)
    dtype = Dtype.of_code(code % 25) or Dtype.BYTES
    position = _CASE.size + params_size
    params, bases = data[_CASE.size : position], []
    for _ in range(base_count % 5):
        size = int.from_bytes(data[position : position + 2], "little")
        bases.append(memoryview(data[position + 2 : position + 2 + size]))
        position += 2 + size
    raw_size %= (1 << 20) + 1
    try:
        raw = decode(predictor, dtype, params, memoryview(data[position:]), raw_size, bases)
    except FragmentError:
        return
    assert len(raw) == raw_size


def _codec_samples() -> list[bytes]:
    vectors = json.loads((_GOLDEN / "golden_predicted.json").read_text())
    found = []
    for vector in vectors:
        params = bytes.fromhex(vector["params"])
        bases = [bytes.fromhex(base) for base in vector["bases"]]
        head = _CASE.pack(
            vector["predictor"],
            Dtype[vector["dtype"]].code,
            len(params),
            len(vector["raw"]) // 2,
            len(bases),
        )
        body = b"".join(len(base).to_bytes(2, "little") + base for base in bases)
        found.append(head + params + body + bytes.fromhex(vector["payload"]))
    return found


# --- catalogs


@cache
def _tiny_library() -> Path:
    """A library of a few files, made once for this process and removed with it."""
    import atexit

    root = Path(tempfile.mkdtemp(prefix="fragfs-fuzz-", dir=_WORKPLACE))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    rng = np.random.default_rng(3)
    base = (rng.standard_normal(9000) * 0.02).astype("<f4")
    with FragmentLibrary.create(root / "lib", LibraryConfig(fragment_elements=4096)) as library:
        for name, values in {"org/base": base, "tuned": base + np.float32(1e-5)}.items():
            source = root / name
            (source / "sub").mkdir(parents=True)
            header = {"w": entry("F32", [9000], 0, 36_000)}
            (source / "m.safetensors").write_bytes(safetensors_bytes(header, values.tobytes()))
            (source / "sub" / "note").write_bytes(name.encode())
            library.add([source], AddOptions(name=name.encode()))
    return root / "lib"


@cache
def _expected() -> dict[tuple[bytes, bytes], bytes]:
    root = _tiny_library().parent
    return {
        (model.encode(), path.encode()): (root / model / path).read_bytes()
        for model in ("org/base", "tuned")
        for path in ("m.safetensors", "sub/note")
    }


@cache
def _cells() -> list[tuple[str, str, str, list[tuple[object, ...]]]]:
    """(table, column, condition on the row, keys of its rows) of the whole catalog."""
    found = []
    connection = sqlite3.connect(_tiny_library() / "catalog.sqlite")
    for (table,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'"
    ).fetchall():
        columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
        keys = [c[1] for c in sorted(columns, key=lambda c: c[5]) if c[5]] or ["rowid"]
        rows = connection.execute(f"SELECT {', '.join(keys)} FROM {table}").fetchall()
        where = " AND ".join(f"{key} IS ?" for key in keys)
        found += [(table, column[1], where, rows) for column in columns if rows]
    connection.close()
    return found


_NUMBERS = (0, 1, -1, 2, 5, 1023, 1024, 1 << 31, -(1 << 31), 1 << 48, (1 << 63) - 1, -(1 << 63))
_STATEMENTS = (
    "DROP TABLE fragments",
    "DROP TABLE contents",
    "DROP TABLE files",
    "DROP TABLE library",
    "DELETE FROM library",
    "DROP INDEX files_content",
    "CREATE VIEW v AS SELECT 1",
    "CREATE TRIGGER t AFTER INSERT ON packs BEGIN DELETE FROM files; END",
    "ALTER TABLE contents RENAME COLUMN extents TO x",
    "DELETE FROM contents",
    "UPDATE files SET name = '../../escape'",
    "UPDATE files SET name = x'2e2e2f2e2e2f657363617065'",
    "UPDATE files SET directory = x'2e2e'",
    "UPDATE models SET name = x'2f6162736f6c757465' WHERE number = 1",
    "UPDATE contents SET extents = zeroblob(3000000)",
    "UPDATE fragments SET record_size = 1 << 40",
    "UPDATE fragments SET offset = (1 << 62) + 5",
)


def _catalog(data: bytes) -> None:
    """Changes cells as the bytes say (five each), then uses the library in every way."""
    with tempfile.TemporaryDirectory(prefix="fragfs-fuzz-", dir=_WORKPLACE) as place:
        path = Path(place) / "inner" / "lib"
        shutil.copytree(_tiny_library(), path)
        connection = sqlite3.connect(path / "catalog.sqlite")
        trusted = True
        for start in range(0, min(len(data) - 4, 40), 5):
            trusted &= _change(connection, data[start : start + 5])
        connection.commit()
        connection.close()
        before = sorted(Path(place).iterdir())
        with suppress(FragmentError), FragmentLibrary.open(path) as library:
            _use(library, Path(place) / "inner" / "out", check_bytes=trusted)
        assert sorted(Path(place).iterdir()) == before, "something was written outside"


def _change(connection: sqlite3.Connection, change: bytes) -> bool:
    """One change; returns whether it leaves the bytes of files what they were, or errors."""
    what, which, row, how, value = change
    try:
        if what < 24:
            connection.execute(_STATEMENTS[which % len(_STATEMENTS)])
            return False
        table, column, where, rows = _cells()[(what * 256 + which) % len(_cells())]
        cell: object = (
            _NUMBERS[value % len(_NUMBERS)],
            None,
            "text \x00\udc80".encode(errors="surrogateescape").decode("latin-1"),
            bytes([value]) * (value % 70),
            value * 0.5,
            b"../" * (value % 5) + b"x",
        )[how % 6]
        connection.execute(
            f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {where}",
            (cell, *rows[row % len(rows)]),
        )
    except sqlite3.Error:
        return True
    # Whoever writes rows and indexes that agree can name other bytes: that is not damage.
    return False


def _use(library: FragmentLibrary, destination: Path, *, check_bytes: bool) -> None:
    for act in (
        library.stats,
        library.models,
        lambda: list(library.verify(workers=1)),
        lambda: library.check(workers=1),
        lambda: library.check(data=True, workers=1),
        lambda: library.collect(dry_run=True),
    ):
        _politely(act)
    waiting = [b""]
    while waiting:
        directory = waiting.pop()
        for name, node in _politely(lambda d=directory: library.list_directory(d)) or ():
            assert b"/" not in name
            path = directory + b"/" + name if directory else name
            if not hasattr(node, "content") and path.count(b"/") < 9:
                waiting.append(path)
    for number, (key, data) in enumerate(_expected().items()):
        found = _politely(lambda k=key: library.open_file(*k).read())
        assert not check_bytes or found in (None, data)
        _politely(lambda k=key: library.files(k[0]))
        _politely(lambda k=key: library.manifest(k[0]))
        _politely(lambda k=key: library.explain(k[0], tensors=True))
        _politely(lambda k=key, n=number: library.export(k[0], destination / str(n), workers=1))
    _politely(lambda: library.remove(b"tuned"))
    _politely(lambda: library.check(repair=True, workers=1))
    _politely(lambda: library.collect(grace_s=0))


def _politely(act: Callable[[], object]) -> object:
    try:
        return act()
    except FragmentError:
        return None


def _catalog_samples() -> list[bytes]:
    cells = [
        bytes([24 + n // 256, n % 256, 0, how, value])
        for n in range(len(_cells()))
        for how, value in ((0, 2), (0, 11), (0, 10), (1, 0), (2, 0), (3, 31))
    ]
    return [b""] + [bytes([0, n, 0, 0, 0]) for n in range(len(_STATEMENTS))] + cells


def _pages(data: bytes) -> None:
    """Overwrites bytes of the database as the bytes say (three each), then reads everything."""
    with tempfile.TemporaryDirectory(prefix="fragfs-fuzz-", dir=_WORKPLACE) as place:
        path = Path(place) / "lib"
        shutil.copytree(_tiny_library(), path)
        pages = bytearray((path / "catalog.sqlite").read_bytes())
        for start in range(0, min(len(data) - 2, 60), 3):
            at = int.from_bytes(data[start : start + 2], "little") * len(pages) >> 16
            # Steps of 1.5 bytes reach every byte of a catalog of up to 64 KiB and many of others.
            pages[at] = data[start + 2]
        (path / "catalog.sqlite").write_bytes(pages)
        with suppress(FragmentError), FragmentLibrary.open(path) as library:
            _use(library, path.parent / "out", check_bytes=False)


def _page_samples() -> list[bytes]:
    return [bytes([n % 256, n // 7 % 256, 255 - n % 256]) * 5 for n in range(0, 4000, 61)]


TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", _layout("m.safetensors"), _safetensors_samples, 400),
        Target("gguf", _layout("m.gguf"), _gguf_samples, 400),
        Target("zip", _layout("m.pt"), _zip_samples, 300),
        Target("records", _records, _record_samples, 800),
        Target("extents", _extents, _extent_samples, 600),
        Target("manifest", _manifest, _manifest_samples, 600),
        Target("codec", _codec, _codec_samples, 800),
        Target("catalog", _catalog, _catalog_samples, 80),
        Target("pages", _pages, _page_samples, 80),
    )
}
